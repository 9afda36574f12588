"""ImageReward (Xu et al., arXiv 2304.05977): BLIP reads the prompt while it looks at the picture, and a head grades it.

src: THUDM/ImageReward, `ImageReward/ImageReward.py`: the last state of the first token, which stays [CLS], goes through
five linear layers, and the reward is normalised with the mean and deviation of the training set.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from crdiff_export.errors import ScorerError
from crdiff_export.evaluate.scorers import blip, weights
from crdiff_export.evaluate.scorers.score import FunctionScorer, Scorer
from crdiff_export.evaluate.scorers.weights import Repo

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# The commit that added the last of the two files; the weights have not changed since.
REPO: Final = Repo("THUDM/ImageReward", "c63dec8373b5c3728b1d250865c402c9546be210")
FILE, CONFIG = "ImageReward.pt", "med_config.json"
BERT: Final = Repo("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594")
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
TOKENS = 35  # of a prompt; all prompts are padded to as many
# CLIP's, as torchvision takes them: of the values from 0 to 1
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
BATCH = 8  # our choice: pictures in one forward pass


def image_reward(device: str, dtype: str) -> Scorer:
    """Open ImageReward 1.0, about -2 to 2; 1.8 GB of weights. The head computes in float32."""
    place, precision = weights.place(device, dtype)
    config = _config(weights.fetch(REPO, CONFIG))
    tokenizer = _tokenizer(weights.fetch(BERT, None), config)
    path = weights.fetch(REPO, FILE)
    parts, side = blip.network(config, blip.VISION), blip.VISION["image_size"]
    weights.fill(parts, dict(blip.rename_tensors(weights.read_pickle(path))), f"{REPO}/{FILE}")
    parts.to(place)
    for name in ("vision", "text"):
        parts[name].to(precision)
    about = {"weights": f"{REPO}", "sha256": weights.sha256(path), "words": f"{BERT}"}
    about["preprocessing"] = f"RGB, bicubic to {side}, centre, CLIP's mean and deviation; {TOKENS} tokens"

    def compute(images: "Sequence[Image]", prompts: Sequence[str]) -> list[float]:
        import torch

        pixels = torch.stack([pixels_of(image, side) for image in images])
        tokens = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(place)
        with torch.inference_mode():
            raw = blip.reward(parts, pixels.to(place, precision), tokens["input_ids"], tokens["attention_mask"])
        values: list[float] = ((raw.double() - MEAN) / DEVIATION).tolist()
        return values

    return FunctionScorer(weights.fingerprint("image-reward", device, dtype, **about), compute, BATCH)


def pixels_of(image: "Image", side: int) -> "Tensor":
    """Return a picture as a tensor [3, side, side], as torchvision's Resize, CenterCrop, ToTensor and Normalize do.

    The longer side is rounded down and the crop's corner to the nearest even number, as in torchvision's
    `_compute_resized_output_size` and `center_crop`.

    Args:
        image: A picture of any mode, which becomes RGB first.
        side: The side of the square in pixels.

    Returns:
        The pixels in float32.
    """
    import numpy as np
    import torch
    from PIL.Image import Resampling

    image = image.convert("RGB")
    width, height = image.size
    short, long = min(width, height), int(side * max(width, height) / min(width, height))
    if short != side:
        size = (side, long) if width <= height else (long, side)
        image = image.resize(size, Resampling.BICUBIC)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    values = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
    values = (values - np.array(PIXEL_MEAN, np.float32)) / np.array(PIXEL_DEVIATION, np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
        return {name: config[name] for name in blip.TEXT_CONFIG}
    except (ValueError, KeyError, TypeError) as error:
        message = f"{REPO}/{CONFIG}: not the configuration of a text encoder: {type(error).__name__} {error}"
        raise ScorerError(message, "Delete the file from the cache, and run this again.") from error


def _tokenizer(folder: Path, config: dict[str, Any]) -> Any:
    """Open BERT's tokenizer, with the two words that BLIP adds at its end; the model's table has to end with them."""
    library = weights.transformers()
    with weights.quiet():
        tokenizer = library.BertTokenizerFast.from_pretrained(folder, local_files_only=True)
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    last = tokenizer.convert_tokens_to_ids("[ENC]")
    if last != config["vocab_size"] - 1:
        message = f"{BERT}: its last word is number {last}, that of {REPO} number {config['vocab_size'] - 1}"
        raise ScorerError(message, "Delete both from the cache, and run this again.")
    return tokenizer
