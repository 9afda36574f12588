"""Repositories of scorers in a folder, pictures of many sizes, scores as numbers, and parts of their networks."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from crdiff_export import hub
from crdiff_export.evaluate.scorers import Scorer
from crdiff_export.hub.location import HubLocation

Fetched = list[tuple[str, str | None, str | None]]
Tensors = Mapping[str, Tensor]


def serve(shelf: Path, monkeypatch: pytest.MonkeyPatch, **others: Path) -> Fetched:
    """Put repositories that lie in a folder by their ids in the Hub's place.

    A file whose name begins with a word of `others` is that one. The list that is returned grows by repository, file
    and commit.
    """
    fetched: Fetched = []

    def fetch(location: HubLocation, *_: object) -> Path:
        fetched.append((location.repo, location.file, location.revision))
        name = location.file or ""
        return others.get(name.partition(".")[0], shelf / location.repo / name)

    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(hub, "fetch_parts", fetch)
    return fetched


def noise(sizes: Sequence[tuple[int, int]], seed: int) -> list[Image.Image]:
    """Pictures of these widths and heights."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in sizes]


def values(scorer: Scorer, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """The scores as numbers."""
    return [score.value for score in scorer.score(images, prompts)]


# Networks written out, in float64. `tensors` are a network's weights by their names, `name` is a layer's.

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
# The layers of the aesthetic head, and their widths.
HEAD = {"0": 1024, "2": 128, "4": 64, "6": 16, "7": 1}


def normalised(x: Tensor, tensors: Tensors, name: str, eps: float) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def linear(x: Tensor, tensors: Tensors, name: str) -> Tensor:
    return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", torch.zeros(()))


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor) -> Tensor:
    parts = []
    for head in range(heads):
        width = q.shape[-1] // heads
        part = slice(head * width, (head + 1) * width)
        parts.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(width) + mask, -1) @ v[:, part])
    return torch.cat(parts, -1)


def patches(pixels: Tensor, size: int) -> Tensor:
    """The squares of a picture [3, side, side], row by row: [square, 3 * size * size]."""
    rows = range(0, pixels.shape[-1], size)
    return torch.stack([pixels[:, y : y + size, x : x + size].reshape(-1) for y in rows for x in rows])


def cut(image: Image.Image, side: int, middle: Callable[[float], int]) -> Tensor:
    """The middle of a picture [3, side, side]; `middle` rounds the half of what is cut off."""
    width, height = image.size
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    left, top = (middle((length - side) / 2) for length in size)
    image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    values = np.asarray(image).astype(np.float64) / 255
    return torch.from_numpy((values - MEAN) / DEVIATION).permute(2, 0, 1)


def graded(x: Tensor, tensors: Tensors, prefix: str) -> float:
    """What the aesthetic head makes of an embedding."""
    for name in HEAD:
        x = linear(x, tensors, f"{prefix}{name}")
    return float(x)
