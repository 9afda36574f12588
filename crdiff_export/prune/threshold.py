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
    """A scope's answer: weights of magnitude at most `bits` (float32 magnitude bits) are zeroed; None zeroes none.

    `pruned` weights are at most the threshold, of `total`; `nonfinite` of them are kept whatever the ratio.
    """

    bits: int | None
    pruned: int
    total: int
    nonfinite: int = 0

    @property
    def value(self) -> float | None:
        """The threshold as a number, exactly."""
        return None if self.bits is None else dtypes.value(self.bits)


def totals(size: int) -> "Totals":
    """A histogram of a whole scope, all zero."""
    import numpy as np

    return np.zeros(size, np.int64)


def rank(ratio: float, total: int) -> int:
    """k of the reference: `int(n * ratio)` in double precision, as its Python computes it."""
    return int(total * ratio)


def upper_bits(counts: Mapping[str, "Totals"], k: int) -> int:
    """The upper 16 bits of the k-th smallest float32 magnitude (k >= 1), from one histogram per dtype."""
    return int(_coarse(counts).cumsum().searchsorted(k))


def select(counts: Mapping[str, "Totals"], k: int, refined: "Totals | None" = None) -> Threshold:
    """The threshold of a scope from one histogram per dtype, and, where F32 is among them, its refined one.

    `refined` counts the lower 15 bits of the F32 magnitudes whose upper bits are `upper_bits(counts, k)`.
    """
    coarse = _coarse(counts)
    total = int(coarse.sum())
    nonfinite = int(coarse[dtypes.INFINITY >> LOWER_BITS :].sum())
    if k < 1:
        return Threshold(None, 0, total, nonfinite)
    if k > total - nonfinite:
        # Infinities and NaN rank last, as in torch.kthvalue; they are kept, so all that is finite goes.
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
    """All dtypes' counts together, by the upper 16 bits of the float32 magnitude."""
    import numpy as np

    merged = np.zeros(1 << 16, np.int64)
    for dtype, counted in counts.items():
        if dtype == "F32":
            merged += counted
        else:
            np.add.at(merged, dtypes.scale(dtype) >> np.uint32(LOWER_BITS), counted)
    return merged


def _fine(counts: Mapping[str, "Totals"], upper: int) -> "Totals":
    """The counts of the dtypes other than F32 within one value of the upper bits, by the lower 15 bits."""
    import numpy as np

    merged = np.zeros(REFINED, np.int64)
    for dtype, counted in counts.items():
        if dtype != "F32":
            scale = dtypes.scale(dtype)
            inside = (scale >> np.uint32(LOWER_BITS)) == upper
            np.add.at(merged, scale[inside] & np.uint32(REFINED - 1), counted[inside])
    return merged
