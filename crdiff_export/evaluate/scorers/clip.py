"""CLIPScore and PickScore: how near CLIP sees a picture and its prompt.

CLIPScore (Hessel et al., arXiv 2104.08718, section 3) is 2.5 * max(cos, 0) of ViT-B/32. Here it is the cosine itself,
of ViT-L/14: CR-Diff's table (arXiv 2604.05524) has values near 0.32, which is a bare cosine, and without the clamp a
search can tell bad pictures apart. The prompt is taken as it is, without the paper's "A photo depicts".
PickScore (Kirstain et al., arXiv 2305.01569) is exp(logit scale) * cosine of a CLIP-H tuned on choices of people;
model card takes tokenizer and preprocessing from the CLIP-H that it began as, with at most 77 tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from crdiff_export.evaluate.scorers import weights
from crdiff_export.evaluate.scorers.score import Score, Scorer
from crdiff_export.evaluate.scorers.weights import Fetch, Repo

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

CLIP_L: Final = Repo("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
CLIP_H: Final = Repo("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")
PICK_SCORE: Final = Repo("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800")
FILE: Final = "model.safetensors"
BATCH = 16  # ours: pictures in one forward pass


class Clip:
    """A CLIP of transformers with its tokenizer and its preprocessing, which may be another repository's."""

    def __init__(self, repo: Repo, words: Repo, device: str, dtype: str, fetch: Fetch) -> None:
        library = weights.transformers()
        self._device, self._dtype = weights.place(device, dtype)
        folder, file = fetch(repo, None), fetch(repo, FILE)
        small = folder if words == repo else fetch(words, None)
        with weights.quiet():
            # PIL's way also where torchvision is installed, whose numbers are a little different.
            pictures = getattr(library, "CLIPImageProcessorPil", None) or library.CLIPImageProcessor
            self._pictures = pictures.from_pretrained(small, local_files_only=True)
            self._words = library.CLIPTokenizerFast.from_pretrained(small, local_files_only=True)
            model, told = library.CLIPModel.from_pretrained(
                file.parent, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        lists = {kind: sorted(map(str, told.get(kind, ()))) for kind in ("missing_keys", "unexpected_keys")}
        odd = [str(key[0]) for key in told.get("mismatched_keys", ())]
        weights.refuse(f"{repo}", lists["missing_keys"], _of_use(lists["unexpected_keys"]), odd)
        self._model = model.to(self._device, self._dtype).eval()
        self.about = {"weights": f"{repo}", "sha256": weights.sha256(file)}
        self.about |= {"preprocessing": f"{words}, {type(self._pictures).__name__}, RGB"}

    @property
    def scale(self) -> float:
        """What the cosine is multiplied with to be a logit."""
        return float(self._model.logit_scale.detach().float().exp())

    def embed(self, images: "Sequence[Image]", prompts: Sequence[str]) -> "tuple[Tensor, Tensor]":
        """The embeddings of pictures and of prompts, one in a row, each of length 1, in float32 on the CPU."""
        import torch

        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for start in range(0, len(images), BATCH):
            pictures = [image.convert("RGB") for image in images[start : start + BATCH]]
            texts = list(prompts[start : start + BATCH])
            # Without the last, transformers 4 takes the rows of a picture with three of them for its colours.
            pixels = self._pictures(images=pictures, return_tensors="pt", input_data_format="channels_last")
            longest = self._model.config.text_config.max_position_embeddings
            tokens = self._words(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            with torch.inference_mode():
                seen = self._model(
                    input_ids=tokens["input_ids"].to(self._device),
                    attention_mask=tokens["attention_mask"].to(self._device),
                    pixel_values=pixels["pixel_values"].to(self._device, self._dtype),
                )
            for kept, embeds in zip(found, (seen.image_embeds, seen.text_embeds), strict=True):
                kept.append(torch.nn.functional.normalize(embeds.float().cpu(), dim=-1))
        return torch.cat(found[0]), torch.cat(found[1])

    def close(self) -> None:
        """Give the memory of the model back."""
        self._model = None


class Likeness:
    """A factor times the cosine of the two embeddings."""

    def __init__(self, name: str, formula: str, clip: Clip, record: dict[str, str], *, scaled: bool) -> None:
        self.name = name
        self._clip = clip
        self._factor = clip.scale if scaled else 1.0
        self._record = {**record, "formula": formula}

    def score(self, images: "Sequence[Image]", prompts: Sequence[str]) -> list[Score]:
        seen, read = self._clip.embed(images, prompts)
        cosines: list[float] = (seen.double() * read.double()).sum(-1).tolist()
        return [Score(self._factor * cosine) for cosine in cosines]

    def fingerprint(self) -> dict[str, str]:
        return dict(self._record)

    def close(self) -> None:
        self._clip.close()


def clip_score(device: str, dtype: str, fetch: Fetch = weights.fetch) -> Scorer:
    """The cosine that OpenAI's CLIP ViT-L/14 sees, -1 to 1; 1.7 GB of weights."""
    return _likeness("clip-score", CLIP_L, CLIP_L, device, dtype, fetch)


def pick_score(device: str, dtype: str, fetch: Fetch = weights.fetch) -> Scorer:
    """PickScore v1, about 15 to 25; 3.9 GB of weights."""
    return _likeness("pick-score", PICK_SCORE, CLIP_H, device, dtype, fetch)


def _likeness(name: str, repo: Repo, words: Repo, device: str, dtype: str, fetch: Fetch) -> Scorer:
    clip = Clip(repo, words, device, dtype, fetch)
    scaled = repo == PICK_SCORE
    record = weights.fingerprint(name, device, dtype, **clip.about)
    return Likeness(name, "exp(logit scale) * cosine" if scaled else "cosine", clip, record, scaled=scaled)


def _of_use(unexpected: Sequence[str]) -> list[str]:
    """Without the numbers of the positions, which files of transformers before 4.31 hold and no later one needs."""
    return [key for key in unexpected if not key.endswith("position_ids")]
