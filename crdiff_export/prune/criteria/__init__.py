"""Criteria: how weights are ranked. A criterion reads a base's weights once and then decides for any ratios.

`magnitude` and `uniform` rank by |w| and give thresholds (`magnitude.py`). Every other criterion gives each weight a
score, prunes the smallest scores, and gives masks (`scored.py`). Scores may need statistics that a calibration has
collected (`calibration.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from crdiff_export.progress import Progress
from crdiff_export.prune.criteria.calibration import Calibration
from crdiff_export.prune.criteria.decision import Decision, Mask
from crdiff_export.prune.criteria.spec import Spec, names
from crdiff_export.prune.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Calibration", "Criterion", "Decision", "Formula", "Layer", "Mask", "Ranked", "Spec", "names"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight matrix as a criterion receives it, on the device that computes.

    Attributes:
        name: The diffusers name of the weight.
        weight: float32 [out, in], with the values that will be written, and 0 in place of values that are not finite.
        statistics: The statistics that the criterion needs.
        ratio: The ratio of its scope for `compensate` and `choose`; NaN for `score`, whose scores serve all ratios.
    """

    name: str
    weight: "Tensor"
    statistics: "Mapping[str, Tensor]"
    ratio: float


class Criterion(Protocol):
    """Gives every weight of a layer a score.

    An entry point of the group `crdiff.criteria` is a factory `(options: Mapping[str, str]) -> Criterion` that raises
    OptionError for unknown options. A criterion may have two more methods:

    - `compensate(layer, mask: Tensor[bool]) -> Tensor` returns the layer's weights, float32 [out, in], after
      those of the mask were pruned and the others were changed to compensate for them.
    - `notes(layers: Sequence[str]) -> Sequence[str]` returns what a user should know about the ranking of these layers.
      It is called once for every decision, and must return the same for the same layers.
    """

    @property
    def statistics(self) -> tuple[str, ...]:
        """The names of the statistics that it needs; empty if it needs no calibration."""
        ...

    def score(self, layer: Layer) -> "Tensor":
        """Score a layer: float32 [out, in], finite, deterministic; the smallest are pruned first."""
        ...


@dataclass(frozen=True, slots=True)
class Formula:
    """A criterion whose score is a formula of a layer's weights and statistics."""

    statistics: tuple[str, ...]
    score: "Callable[[Layer], Tensor]"


class Ranked(Protocol):
    """A criterion that has read a base's weights."""

    def decide(self, plan: Plan, progress: Progress | None = None) -> Decision:
        """Decide exactly which weights are pruned.

        Args:
            plan: A plan for the same checkpoint and cast, with any ratios.
            progress: Told of weights that are read again.

        Returns:
            The decision.
        """
        ...
