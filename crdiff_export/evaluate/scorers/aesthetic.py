"""LAION's aesthetic predictor, version 2: five linear layers on CLIP ViT-L/14's embedding of a picture, about 1 to 10.

src: christophschuhmann/improved-aesthetic-predictor, `simple_inference.py`; the weights are its
`sac+logos+ava1-l14-linearMSE.pth`, in a copy on the Hub by the authors of TRL. The prompt does not count.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from crdiff_export.evaluate.scorers import weights
from crdiff_export.evaluate.scorers.clip import CLIP_L, Clip
from crdiff_export.evaluate.scorers.score import Score, Scorer
from crdiff_export.evaluate.scorers.weights import Fetch, Repo

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

REPO: Final = Repo("trl-lib/ddpo-aesthetic-predictor", "e62d0b3d501a41272ad2c7d6454c99aefe8be459")
FILE: Final = "sac+logos+ava1-l14-linearMSE.pth"
# The layers' widths, and what is dropped after each while training; nothing bends between them.
WIDTHS: Final = (1024, 128, 64, 16, 1)
DROPPED: Final = (0.2, 0.2, 0.1, None, None)


class Aesthetic:
    """The head on the normalised embedding; the head computes in float32."""

    name = "aesthetic"

    def __init__(self, clip: Clip, head: "torch.nn.Module", record: dict[str, str]) -> None:
        self._clip = clip
        self._head = head
        self._record = record

    def score(self, images: "Sequence[Image]", prompts: Sequence[str]) -> list[Score]:
        import torch

        seen, _ = self._clip.embed(images, [""] * len(images))
        with torch.inference_mode():
            values: list[float] = self._head(seen).squeeze(-1).tolist()
        return [Score(value) for value in values]

    def fingerprint(self) -> dict[str, str]:
        return dict(self._record)

    def close(self) -> None:
        self._clip.close()


def head(width: int) -> "torch.nn.Sequential":
    """The layers for an embedding of `width`, in evaluation mode; ImageReward has the same, and the same names."""
    from torch import nn

    layers: list[nn.Module] = []
    for wide, dropped in zip(WIDTHS, DROPPED, strict=True):
        layers.append(nn.Linear(width, wide))
        if dropped:
            layers.append(nn.Dropout(dropped))
        width = wide
    return nn.Sequential(*layers).eval()


def aesthetic(device: str, dtype: str, fetch: Fetch = weights.fetch) -> Scorer:
    """The predictor and the CLIP that it needs; 1.7 GB of weights."""
    weights.transformers()
    path = fetch(REPO, FILE)
    found = weights.read_pickle(path)
    first = found.get("layers.0.weight")
    layers = head(int(first.shape[-1]) if first is not None and first.ndim else 768)
    weights.fill(layers, {name.removeprefix("layers."): tensor for name, tensor in found.items()}, f"{REPO}/{FILE}")
    clip = Clip(CLIP_L, CLIP_L, device, dtype, fetch)
    about = {"head": f"{REPO}", "head sha256": weights.sha256(path), **clip.about}
    return Aesthetic(clip, layers, weights.fingerprint("aesthetic", device, dtype, **about))
