"""Rank at random: the control. Any criterion that is no better than this has told nothing of the weights."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from crdiff_export.criteria import Criterion, Layer

# The bits of the smallest normal float32, and how many positive normal finite ones there are.
_FIRST = 0x0080_0000
_NUMBERS = 0x7F80_0000 - _FIRST


class Random:
    """Every order of a layer's weights is as likely as any other; the seed and the layer's name decide.

    Philox 4x64-10 (Salmon et al. 2011, SC '11) is a counter-based generator, here with the first 128 bits of the
    SHA-256 of `SEED/NAME` as its key: neither the order of the layers nor the device can change a score. Its numbers
    pick from all positive normal float32, so that ties are as rare as float32 allows.
    """

    statistics: tuple[str, ...] = ()

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def score(self, layer: Layer) -> Tensor:
        key = int.from_bytes(hashlib.sha256(f"{self._seed}/{layer.name}".encode()).digest()[:16], "little")
        drawn = np.random.Philox(key=key).random_raw(layer.weight.numel())
        numbers = (drawn >> np.uint64(32)) * np.uint64(_NUMBERS) >> np.uint64(32)
        bits = (numbers + np.uint64(_FIRST)).astype(np.uint32)
        return torch.from_numpy(bits.view(np.float32)).reshape(layer.weight.shape).to(layer.weight.device)


def random(options: Mapping[str, str]) -> Criterion:
    """The criterion with `seed`."""
    return Random(int(options["seed"]))
