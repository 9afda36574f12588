"""Rank at random, as a control: a criterion that is not better than this one is useless."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from crdiff_export.prune.criteria import Criterion, Layer

# The bits of the smallest normal float32, and how many positive normal finite ones there are.
_FIRST = 0x0080_0000
_NUMBERS = 0x7F80_0000 - _FIRST
# Numbers drawn at once, which fit the processor's cache.
_ATONCE = 1 << 15


class Random:
    """Random scores: every order of a layer's weights is equally likely, decided by the seed and the layer's name.

    Philox 4x64-10 (Salmon et al. 2011, SC '11) is a counter-based generator, here with the first 128 bits of the
    SHA-256 of `SEED/NAME` as its key: neither the order of layers nor the device can change a score. Scores are
    chosen from all positive normal float32, so that ties are as rare as float32 allows.
    """

    statistics: tuple[str, ...] = ()

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def score(self, layer: Layer) -> Tensor:
        key = int.from_bytes(hashlib.sha256(f"{self._seed}/{layer.name}".encode()).digest()[:16], "little")
        drawn, bits = np.random.Philox(key=key), np.empty(layer.weight.numel(), np.uint32)
        for start in range(0, bits.size, _ATONCE):
            part = bits[start : start + _ATONCE]
            numbers = drawn.random_raw(part.size)
            numbers >>= np.uint64(32)
            numbers *= np.uint64(_NUMBERS)
            numbers >>= np.uint64(32)
            np.add(numbers, np.uint64(_FIRST), out=part, casting="same_kind")
        return torch.from_numpy(bits.view(np.float32)).reshape(layer.weight.shape).to(layer.weight.device)


def random(options: Mapping[str, str]) -> Criterion:
    """Make the criterion with its `seed`."""
    return Random(int(options["seed"]))
