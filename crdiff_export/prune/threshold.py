"""The exact k-th smallest magnitude, from histograms.

Reference rule (public code, `prune_by_ratio`): k = int(n * ratio), t = the k-th smallest |w| (torch.kthvalue), keep
|w| > t. Counting is exact for every dtype: a format of at most 16 bits has a counter for each of its magnitudes; for
float32 a first count finds the upper 16 bits of t, a second one, of those weights alone, its lower 15.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crdiff_export.formats import dtypes
from crdiff_export.prune.kernels import LOWER_BITS, REFINED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Totals = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Threshold:
    """The exact threshold of one scope.

    Attributes:
        bits: Weights of at most this magnitude (a float32 pattern) are set to zero; None prunes nothing.
        pruned: Weights of at most the threshold.
        total: Weights of the scope.
        nonfinite: Weights that are infinite or not a number, which are never pruned.
    """

    bits: int | None
    pruned: int
    total: int
    nonfinite: int = 0

    @property
    def value(self) -> float | None:
        """The threshold as an exact number, or None."""
        return None if self.bits is None else dtypes.value(self.bits)


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


def upper_bits(counts: Mapping[str, "Totals"], k: int) -> int:
    """Find the upper 16 bits of the k-th smallest magnitude.

    Args:
        counts: One histogram per dtype.
        k: At least 1.

    Returns:
        The upper bits of a float32 magnitude pattern.
    """
    return int(_coarse(counts).cumsum().searchsorted(k))


def select(counts: Mapping[str, "Totals"], k: int, refined: "Totals | None" = None) -> Threshold:
    """Select the threshold of a scope.

    Args:
        counts: One histogram per dtype.
        k: The threshold is the k-th smallest magnitude; 0 prunes nothing.
        refined: A histogram of the lower 15 bits of those F32 magnitudes whose upper bits are `upper_bits(counts, k)`;
            needed if F32 is among the dtypes.

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
        return Threshold(dtypes.LARGEST, total - nonfinite, total, nonfinite)
    upper = upper_bits(counts, k)
    fine = _fine(counts, upper)
    if refined is not None:
        fine += refined
    below = int(coarse[:upper].sum())
    at_most = fine.cumsum()
    lower = int(at_most.searchsorted(k - below))
    return Threshold(upper << LOWER_BITS | lower, below + int(at_most[lower]), total, nonfinite)


def _coarse(counts: Mapping[str, "Totals"]) -> "Totals":
    """Sum the counts of all dtypes, by the upper 16 bits of the float32 magnitude."""
    import numpy as np

    merged = np.zeros(1 << 16, np.int64)
    for dtype, counted in counts.items():
        if dtype == "F32":
            merged += counted
        else:
            np.add.at(merged, dtypes.scale(dtype) >> np.uint32(LOWER_BITS), counted)
    return merged


def _fine(counts: Mapping[str, "Totals"], upper: int) -> "Totals":
    """Sum the counts of the dtypes other than F32 whose upper bits are `upper`, by the lower 15 bits."""
    import numpy as np

    merged = np.zeros(REFINED, np.int64)
    for dtype, counted in counts.items():
        if dtype != "F32":
            scale = dtypes.scale(dtype)
            inside = (scale >> np.uint32(LOWER_BITS)) == upper
            np.add.at(merged, scale[inside] & np.uint32(REFINED - 1), counted[inside])
    return merged
