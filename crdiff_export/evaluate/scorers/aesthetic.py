"""LAION's aesthetic predictor, version 2: five linear layers on CLIP ViT-L/14's embedding of a picture, about 1 to 10.

src: christophschuhmann/improved-aesthetic-predictor, `simple_inference.py`; the weights are its
`sac+logos+ava1-l14-linearMSE.pth`, in a copy on the Hub by the authors of TRL. The prompt does not count.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from crdiff_export.evaluate.scorers import weights
from crdiff_export.evaluate.scorers.clip import BATCH, CLIP_L, Clip
from crdiff_export.evaluate.scorers.score import FunctionScorer, Scorer
from crdiff_export.evaluate.scorers.weights import Repo

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

REPO: Final = Repo("trl-lib/ddpo-aesthetic-predictor", "e62d0b3d501a41272ad2c7d6454c99aefe8be459")
FILE: Final = "sac+logos+ava1-l14-linearMSE.pth"
# The layers' widths, and the dropout after each while training; there is no activation between them.
WIDTHS: Final = (1024, 128, 64, 16, 1)
DROPOUTS: Final = (0.2, 0.2, 0.1, None, None)


def head(width: int) -> "torch.nn.Sequential":
    """Make the layers for an embedding of `width`, in evaluation mode; ImageReward has the same layers and names."""
    from torch import nn

    layers: list[nn.Module] = []
    for wide, dropout in zip(WIDTHS, DROPOUTS, strict=True):
        layers.append(nn.Linear(width, wide))
        if dropout:
            layers.append(nn.Dropout(dropout))
        width = wide
    return nn.Sequential(*layers).eval()


def aesthetic(device: str, dtype: str) -> Scorer:
    """Open the predictor and the CLIP that it needs; 1.7 GB of weights. The head computes in float32."""
    weights.transformers()
    path = weights.fetch(REPO, FILE)
    tensors = weights.read_pickle(path)
    first = tensors.get("layers.0.weight")
    layers = head(int(first.shape[-1]) if first is not None and first.ndim else 768)
    weights.fill(layers, {name.removeprefix("layers."): tensor for name, tensor in tensors.items()}, f"{REPO}/{FILE}")
    clip = Clip(CLIP_L, CLIP_L, device, dtype)
    about = {"head": f"{REPO}", "head sha256": weights.sha256(path), **clip.about}

    def compute(images: "Sequence[Image]", _prompts: Sequence[str]) -> list[float]:
        import torch

        vectors, _ = clip.embed(images, [""] * len(images))
        with torch.inference_mode():
            values: list[float] = layers(vectors).squeeze(-1).tolist()
        return values

    return FunctionScorer(weights.fingerprint("aesthetic", device, dtype, **about), compute, BATCH)
