"""The formula of pruned output amplification and its schedule: functions of tensors and numbers alone."""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crdiff_export.errors import PoaError

if TYPE_CHECKING:
    from torch import Tensor

# One weight for all of sampling, or a function of the fraction that is done (0 at the first step, below 1 at the last).
Weight = float | Callable[[float], float]


def mix(dense: "Tensor", pruned: "Tensor", weight: float) -> "Tensor":
    """Compute (1 - w) * dense + w * pruned elementwise: POA of CR-Diff (arXiv 2604.05524).

    Args:
        dense: The prediction of the dense model, of any shape and float dtype.
        pruned: The prediction of the pruned model, of the same shape and dtype.
        weight: w. 0 gives the dense prediction, 1 the pruned one, more amplifies.

    Returns:
        The mix in the dtype of `dense`; float16 and bfloat16 are mixed in float32 and rounded once.

    """
    import torch

    if weight in (0, 1):
        return pruned if weight else dense
    wide = torch.promote_types(dense.dtype, torch.float32)
    return ((1 - weight) * dense.to(wide) + weight * pruned.to(wide)).to(dense.dtype)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The POA weight at each moment of sampling.

    Attributes:
        weight: A number, or a function of the fraction of sampling that is done.
        start: The fraction at which POA begins; before, the prediction is dense.
        stop: The fraction at which it ends.
    """

    weight: Weight
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        numeric = isinstance(self.start, numbers.Real) and isinstance(self.stop, numbers.Real)
        if not numeric or not 0 <= self.start < self.stop <= 1:
            raise PoaError(
                f"POA from {self.start!r} to {self.stop!r} is no part of sampling",
                "Give fractions with 0 <= start < stop <= 1.",
            )
        if not callable(self.weight):
            check(self.weight)

    @property
    def constant(self) -> float | None:
        """The weight if it is the same at all steps, else None."""
        if callable(self.weight) or (self.start, self.stop) != (0, 1):
            return None
        return float(self.weight)

    def at(self, fraction: float) -> float:
        """Return the weight when a fraction of sampling is done; PoaError if a function gives no finite number."""
        if not self.start <= fraction < self.stop:
            return 0.0
        return check(self.weight(fraction)) if callable(self.weight) else float(self.weight)


def check(weight: float) -> float:
    """Return the weight as a float; PoaError unless it is a finite number."""
    try:
        number = float(weight) if isinstance(weight, numbers.Real) and not isinstance(weight, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise PoaError(f"the POA weight is {weight!r}", "Give a finite number; 1.5 is the public code's.")
    return number
