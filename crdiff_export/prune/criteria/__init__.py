"""Criteria: how weights are ranked. A criterion reads a base's weights once and then decides for any ratios.

`magnitude` and `uniform` rank by |w| and give thresholds (`magnitude.py`). Every other criterion gives each weight a
score, prunes the smallest scores, and gives masks (`scored.py`). Scores may need statistics that a calibration has
collected (`calibration.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, Protocol

from crdiff_export.errors import OptionError
from crdiff_export.progress import Progress
from crdiff_export.prune.criteria.calibration import Calibration
from crdiff_export.prune.criteria.decision import Decision, Mask
from crdiff_export.prune.criteria.spec import (
    GROUP,
    MAGNITUDES,
    SCORED,
    Spec,
    installed,
    names,
)
from crdiff_export.prune.kernels import Kernel
from crdiff_export.prune.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Calibration", "Criterion", "Decision", "Layer", "Loaded", "Mask", "Ranked", "Spec", "load", "names", "rank",
]  # fmt: skip


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
class Loaded:
    """A criterion with its options; `criterion` is None for those that rank by |w|."""

    spec: Spec
    criterion: Criterion | None = None

    @property
    def statistics(self) -> tuple[str, ...]:
        """The names of the statistics that it needs."""
        return self.criterion.statistics if self.criterion else ()

    @property
    def compare(self) -> str:
        """The weights that are compared with each other: `block` (the scope), `row`, or `layer` (OBS only)."""
        return self.spec.option("compare") or "block"

    @property
    def moves(self) -> bool:
        """Whether weights that are not pruned are changed."""
        return hasattr(self.criterion, "compensate")


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


def load(text: str) -> Loaded:
    """Load a criterion by its name and options.

    Raises:
        OptionError: The name or an option is unknown, or the package of the criterion is broken.
    """
    spec = Spec.parse(text)
    if spec.name in MAGNITUDES:
        return Loaded(spec)
    if spec.name in SCORED:
        factory: Callable[[Mapping[str, str]], Any] = EntryPoint(spec.name, SCORED[spec.name], GROUP).load()
        return Loaded(spec, factory(spec.values))
    return Loaded(spec, _from_entry_point(installed()[spec.name], spec))


def rank(
    plans: Sequence[Plan],
    loaded: Loaded,
    kernel: Kernel,
    progress: Progress,
    *,
    calibration: Calibration | None = None,
    device: str = "cpu",
) -> Ranked:
    """Read and rank the target weights of plans that share their checkpoint and cast.

    Args:
        plans: The plans.
        loaded: The criterion.
        kernel: Counts magnitudes.
        progress: Told of the bytes read.
        calibration: The statistics that the criterion needs.
        device: The torch device on which scores are computed.

    Returns:
        The ranked weights, which decide for any ratios.

    Raises:
        OptionError: The criterion needs a calibration and has none.
        CalibrationError: The calibration is of another base, or lacks a statistic.
        PlanError: Target weights are not finite, and the plans do not allow that.
    """
    if loaded.criterion is None:
        from crdiff_export.prune.criteria import magnitude

        return magnitude.RankedMagnitudes(plans, kernel, progress)
    if loaded.statistics and calibration is None:
        raise OptionError(
            f"{loaded.spec} needs a calibration",
            "Give --calibration FILE, made for this base and this size.",
        )
    from crdiff_export.prune.criteria.scored import Scored

    return Scored(plans, loaded, progress, calibration, device)


def _from_entry_point(entry: EntryPoint, spec: Spec) -> Criterion:
    """Call the entry point of another package; errors of its own code keep their traceback."""
    package = entry.dist.name if entry.dist else entry.value
    hint = f"It has to make a criterion, with statistics and score, of a mapping of options; ask {package}."
    try:
        factory = entry.load()
    except (ImportError, AttributeError) as error:
        raise OptionError(
            f"{entry.name}: {entry.value} cannot be loaded: {error}", f"Install {package} again, or whatever it needs."
        ) from error
    if not callable(factory):
        raise OptionError(f"{entry.name}: {entry.value} is not a function", hint)
    criterion: Criterion = factory(spec.values)
    statistics = getattr(criterion, "statistics", None)
    listed = isinstance(statistics, tuple) and all(isinstance(name, str) for name in statistics)
    if not listed or not callable(getattr(criterion, "score", None)):
        raise OptionError(
            f"{entry.name}: {entry.value} makes {type(criterion).__name__}, which is not a criterion", hint
        )
    return criterion
