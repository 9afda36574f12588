"""CLIPScore and PickScore: how near a picture and its prompt are in CLIP's embedding.

CLIPScore (Hessel et al., arXiv 2104.08718, section 3) is 2.5 * max(cos, 0) of ViT-B/32. Here it is the cosine itself,
of ViT-L/14: CR-Diff's table (arXiv 2604.05524) has values near 0.32, which is a bare cosine, and without the clamp a
search can tell bad pictures apart. The prompt is taken as it is, without the paper's "A photo depicts".
PickScore (Kirstain et al., arXiv 2305.01569) is exp(logit scale) * cosine of a CLIP-H tuned on choices of people. Its
model card takes tokenizer and preprocessing from the CLIP-H that it began as, with at most 77 tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from crdiff_export.evaluate.scorers import weights
from crdiff_export.evaluate.scorers.score import FunctionScorer, Scorer
from crdiff_export.evaluate.scorers.weights import Repo

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

CLIP_L: Final = Repo("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
CLIP_H: Final = Repo("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")
PICK_SCORE: Final = Repo("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800")
FILE: Final = "model.safetensors"
BATCH = 16  # our choice: pictures in one forward pass


class Clip:
    """A CLIP of transformers with its tokenizer and its preprocessing, which may be another repository's."""

    def __init__(self, repo: Repo, words: Repo, device: str, dtype: str) -> None:
        library = weights.transformers()
        self._device, self._dtype = weights.place(device, dtype)
        folder, file = weights.fetch(repo, None), weights.fetch(repo, FILE)
        small = folder if words == repo else weights.fetch(words, None)
        with weights.quiet():
            # Pillow's way also where torchvision is installed, whose numbers are a little different.
            processor = getattr(library, "CLIPImageProcessorPil", None) or library.CLIPImageProcessor
            self._processor = processor.from_pretrained(small, local_files_only=True)
            self._tokenizer = library.CLIPTokenizerFast.from_pretrained(small, local_files_only=True)
            model, loading = library.CLIPModel.from_pretrained(
                file.parent, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        # Files of transformers before 4.31 hold the numbers of the positions, which no later one needs.
        loading["unexpected_keys"] = [k for k in loading["unexpected_keys"] if not k.endswith("position_ids")]
        if problems := [f"{kind}: {sorted(map(str, keys))}" for kind, keys in loading.items() if keys]:
            raise weights.other_weights(f"{repo}", "; ".join(problems))
        self._model = model.to(self._device, self._dtype).eval()
        self.about = {"weights": f"{repo}", "sha256": weights.sha256(file)}
        self.about |= {"preprocessing": f"{words}, {type(self._processor).__name__}, RGB"}

    @property
    def scale(self) -> float:
        """The factor that turns a cosine into a logit."""
        return float(self._model.logit_scale.detach().float().exp())

    def embed(self, images: "Sequence[Image]", prompts: Sequence[str]) -> "tuple[Tensor, Tensor]":
        """Embed pictures and their prompts, all at once.

        Args:
            images: Pictures.
            prompts: As many prompts.

        Returns:
            Two tensors [picture, width] of rows of length 1, in float32 on the CPU.
        """
        import torch

        pictures = [image.convert("RGB") for image in images]
        # Without the last argument transformers 4 takes a picture with three rows for one with its colours first.
        pixels = self._processor(images=pictures, return_tensors="pt", input_data_format="channels_last")
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        with torch.inference_mode():
            output = self._model(
                input_ids=tokens["input_ids"].to(self._device),
                attention_mask=tokens["attention_mask"].to(self._device),
                pixel_values=pixels["pixel_values"].to(self._device, self._dtype),
            )
        return _normalized(output.image_embeds), _normalized(output.text_embeds)


def clip_score(device: str, dtype: str) -> Scorer:
    """Open the cosine that OpenAI's CLIP ViT-L/14 sees, -1 to 1; 1.7 GB of weights."""
    return _cosine_scorer("clip-score", CLIP_L, CLIP_L, device, dtype)


def pick_score(device: str, dtype: str) -> Scorer:
    """Open PickScore v1, about 15 to 25; 3.9 GB of weights."""
    return _cosine_scorer("pick-score", PICK_SCORE, CLIP_H, device, dtype)


def _cosine_scorer(name: str, repo: Repo, words: Repo, device: str, dtype: str) -> Scorer:
    """Make a scorer of a factor times the cosine of the two embeddings."""
    clip = Clip(repo, words, device, dtype)
    is_logit = repo == PICK_SCORE
    factor = clip.scale if is_logit else 1.0

    def compute(images: "Sequence[Image]", prompts: Sequence[str]) -> list[float]:
        image_vectors, text_vectors = clip.embed(images, prompts)
        cosines: list[float] = (image_vectors.double() * text_vectors.double()).sum(-1).tolist()
        return [factor * cosine for cosine in cosines]

    record = weights.fingerprint(name, device, dtype, **clip.about)
    formula = "exp(logit scale) * cosine" if is_logit else "cosine"
    return FunctionScorer({**record, "formula": formula}, compute, BATCH)


def _normalized(embeds: "Tensor") -> "Tensor":
    import torch

    return torch.nn.functional.normalize(embeds.float().cpu(), dim=-1)
