"""Find the exact k-th smallest of float32 scores, in memory or from two histograms.

The patterns of float32 numbers have their order once those of negative numbers are inverted (Herf, "Radix Tricks",
2001). So a histogram of the upper 16 bits finds the upper bits of the k-th smallest score, and one of the lower 16 bits
of the scores with those upper bits finds the rest. Counts are integers, so neither the order of layers nor the device
can change the result. -0.0 comes before 0.0, which makes no difference to a threshold.
"""

import struct

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crdiff_export.errors import CalibrationError

BITS = 16
SIZE = 1 << BITS
_HALF, _ALL_BUT_SIGN = SIZE // 2, 0x7FFF_FFFF
# The index of +infinity in a histogram of the upper bits.
_INFINITE = _HALF + (0x7F80_0000 >> BITS)


def kth(scores: Tensor, k: int) -> Tensor:
    """Return the k-th smallest score (k >= 1): of each row of a matrix, or of a flat tensor."""
    if scores.device.type == "cpu":  # NumPy takes half the time
        flat = scores.numpy()
        return torch.from_numpy(np.asarray(np.partition(flat, k - 1, axis=-1)[..., k - 1 : k]))
    return scores.kthvalue(k, dim=-1, keepdim=True).values


def finite(numbers: Tensor) -> bool:
    """Whether all numbers are finite; comparing minimum and maximum takes a fifth of the time of isfinite."""
    return not numbers.numel() or all(torch.isfinite(end) for end in torch.aminmax(numbers))


def count_upper(scores: Tensor) -> Tensor:
    """Count the upper bits of the scores' sort keys: int64 [SIZE], without scores of +infinity."""
    if scores.device.type == "cpu":
        from crdiff_export.prune.kernels import cpu

        histogram = np.zeros(SIZE, np.int64)
        cpu.count_keys(_bits(scores), histogram)
        counts = torch.from_numpy(histogram)
    else:
        counts = torch.bincount((_keys(scores) >> BITS) + _HALF, minlength=SIZE)
    counts[_INFINITE] = 0  # any other score with those bits would be NaN
    return counts


def count_lower(scores: Tensor, upper: int) -> Tensor:
    """Count the lower bits of the sort keys whose upper bits have the index `upper`: int64 [SIZE]."""
    if scores.device.type == "cpu":
        from crdiff_export.prune.kernels import cpu

        counts = np.zeros(SIZE, np.int64)
        cpu.refine_keys(_bits(scores), upper, counts)
        return torch.from_numpy(counts)
    keys = _keys(scores)
    inside = keys[(keys >> BITS) + _HALF == upper]
    return torch.bincount(inside & (SIZE - 1), minlength=SIZE)


def _bits(scores: Tensor) -> NDArray[np.int32]:
    return scores.contiguous().view(-1).view(torch.int32).numpy()


def _keys(scores: Tensor) -> Tensor:
    """Return int32 sort keys, which have the order of the float32 scores."""
    bits = scores.flatten().view(torch.int32)
    return bits ^ ((bits >> 31) & _ALL_BUT_SIGN)


def locate(counts: Tensor, k: int, criterion: object = "a criterion") -> tuple[int, int]:
    """Return the index of the k-th smallest (k >= 1) in a histogram, and the number of counts before it.

    A CalibrationError is raised if the histogram has fewer than k counts: then the criterion gave other scores for the
    same layers before.
    """
    at_most = counts.cumsum(0)
    if int(at_most[-1]) < k:
        raise CalibrationError(
            f"{criterion}: its scores differ from one call to the next",
            "The same layer has to get the same scores every time; ask whoever made the criterion.",
        )
    index = int(torch.searchsorted(at_most, k))
    return index, int(at_most[index] - counts[index])


def value(upper: int, lower: int) -> float:
    """Return the number whose sort key has these upper and lower bits."""
    key = (upper - SIZE // 2) << BITS | lower
    bits = key ^ ((key >> 31) & _ALL_BUT_SIGN)
    (number,) = struct.unpack("<f", struct.pack("<i", bits))
    return float(number)
