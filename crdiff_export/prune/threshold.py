"""The exact k-th smallest magnitude, from histograms.

Reference rule (public code, `prune_by_ratio`): k = int(n * ratio), t = the k-th smallest |w| (torch.kthvalue), keep
|w| > t. Counting is exact for every dtype: a format of at most 16 bits has a counter for each of its magnitudes; for
float32 a first count finds the upper 16 bits of t, a second one, of those weights alone, its lower 15. Weights with a
scale are compared as doubles, which hold their magnitudes exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crdiff_export.formats import dtypes
from crdiff_export.formats.dtypes import Encoding
from crdiff_export.prune.kernels import LOWER_BITS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Totals = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Threshold:
    """The exact threshold of one scope.

    Attributes:
        value: Weights of at most this magnitude are set to zero; None prunes nothing. It is a float32, unless weights
            of the scope have a scale.
        pruned: Weights of at most the threshold.
        total: Weights of the scope.
        nonfinite: Weights that are infinite or not a number, which are never pruned.
    """

    value: float | None
    pruned: int
    total: int
    nonfinite: int = 0


def totals(size: int) -> "Totals":
    """Return an empty histogram, int64 [size]."""
    import numpy as np

    return np.zeros(size, np.int64)


def rank(ratio: float, total: int) -> int:
    """Compute the reference's k, `int(n * ratio)` in double precision as Python computes it.

    Args:
        ratio: The share of weights to prune.
        total: n, the number of weights.

    Returns:
        k: the threshold is the k-th smallest magnitude.
    """
    return int(total * ratio)


def upper_bits(counts: Mapping[Encoding, "Totals"], k: int) -> int:
    """Find the upper 16 bits of the k-th smallest magnitude.

    Args:
        counts: One histogram per encoding.
        k: At least 1.

    Returns:
        The upper bits of the largest float32 that is not above the magnitude.
    """
    return int(_coarse(counts).cumsum().searchsorted(k))


def select(counts: Mapping[Encoding, "Totals"], k: int, refined: "Totals | None" = None) -> Threshold:
    """Select the threshold of a scope.

    Args:
        counts: One histogram per encoding.
        k: The threshold is the k-th smallest magnitude; 0 prunes nothing.
        refined: A histogram of the lower 15 bits of those F32 magnitudes whose upper bits are `upper_bits(counts, k)`;
            needed if F32 is among the encodings.

    Returns:
        The threshold.
    """
    coarse = _coarse(counts)
    total = int(coarse.sum())
    nonfinite = int(coarse[dtypes.INFINITY >> LOWER_BITS :].sum())
    if k < 1:
        return Threshold(None, 0, total, nonfinite)
    if k > total - nonfinite:
        # Infinities and NaN rank last, as in torch.kthvalue, and are never pruned: every finite weight is.
        return Threshold(_largest(counts), total - nonfinite, total, nonfinite)
    upper = upper_bits(counts, k)
    magnitudes, numbers = _fine(counts, upper, refined)
    below = int(coarse[:upper].sum())
    value = magnitudes[(below + numbers.cumsum()).searchsorted(k)]
    return Threshold(float(value), below + int(numbers[magnitudes <= value].sum()), total, nonfinite)


def _coarse(counts: Mapping[Encoding, "Totals"]) -> "Totals":
    """Sum the counts of all encodings, by the upper 16 bits of the magnitude's float32 pattern."""
    import numpy as np

    merged = np.zeros(1 << 16, np.int64)
    for encoding, counted in counts.items():
        if encoding.dtype == "F32":
            merged += counted
        else:
            np.add.at(merged, encoding.float32_patterns() >> np.uint32(LOWER_BITS), counted)
    return merged


def _fine(
    counts: Mapping[Encoding, "Totals"], upper: int, refined: "Totals | None"
) -> "tuple[NDArray[np.float64], Totals]":
    """Return the magnitudes whose float32 patterns have these upper bits, ascending, and how many weights have each."""
    import numpy as np

    magnitudes, numbers = [], []
    if refined is not None:
        bits = np.arange(upper << LOWER_BITS, (upper + 1) << LOWER_BITS, dtype=np.uint32)
        magnitudes.append(bits.view(np.float32).astype(np.float64))
        numbers.append(refined)
    for encoding, counted in counts.items():
        if encoding.dtype != "F32":
            values = encoding.values()
            inside = encoding.float32_patterns()[: len(values)] >> np.uint32(LOWER_BITS) == upper
            magnitudes.append(values[inside])
            numbers.append(counted[: len(values)][inside])
    order = np.concatenate(magnitudes).argsort(kind="stable")
    return np.concatenate(magnitudes)[order], np.concatenate(numbers)[order]


def _largest(counts: Mapping[Encoding, "Totals"]) -> float:
    """Return the largest finite float32, or the largest magnitude that an encoding with a scale has above it."""
    scaled = (float(encoding.values()[-1]) for encoding in counts if encoding.scale is not None)
    return max([dtypes.value(dtypes.LARGEST), *scaled])
