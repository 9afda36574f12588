"""How weights are ranked. A criterion that has seen a base's weights decides which of them go, for any ratios.

`magnitude` and `uniform` rank by |w| and have a threshold (`magnitude.py`). Every other criterion gives each weight a
score, of which the smallest go, and so has masks (`scored.py`). Scores may need statistics that a calibration has
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
    """One weight matrix as a criterion sees it, all of it on the device that computes.

    `name` is diffusers' for the weight. `weight` is float32 [out, in] in the dtype that will be written, with 0 in the
    place of what is not finite. `statistics` are those that the criterion asked for. `ratio` is that of its scope for
    `compensate` and `choose`, and NaN for `score`, whose scores serve all ratios.
    """

    name: str
    weight: "Tensor"
    statistics: "Mapping[str, Tensor]"
    ratio: float


class Criterion(Protocol):
    """Gives every weight of a layer a score. What an entry point of `crdiff.criteria` makes of its options.

    An entry point is a factory `(options: Mapping[str, str]) -> Criterion`; it raises OptionError for options that it
    does not know. A criterion may have two more methods. `compensate(layer, mask: Tensor[bool]) -> Tensor`: the layer's
    weights, float32 [out, in], after those of the mask are gone and the others have moved to make up for it.
    `notes(layers: Sequence[str]) -> Sequence[str]`: what a user should know of how these layers, all of which it has
    seen, were ranked. It is asked once for every decision, and answers the same for the same layers.
    """

    @property
    def statistics(self) -> tuple[str, ...]:
        """The names of what it needs of a calibration; none if it needs no calibration."""
        ...

    def score(self, layer: Layer) -> "Tensor":
        """Float32 [out, in], finite; the smallest go first, and they may be negative. The same for the same layer."""
        ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """A criterion as it was asked for; `criterion` is None for those that rank by |w|."""

    spec: Spec
    criterion: Criterion | None = None

    @property
    def statistics(self) -> tuple[str, ...]:
        """What it needs of a calibration."""
        return self.criterion.statistics if self.criterion else ()

    @property
    def compare(self) -> str:
        """What weights are compared with: those of the scope (`block`), or the output row; `layer` is for OBS alone."""
        return self.spec.option("compare") or "block"

    @property
    def moves(self) -> bool:
        """Whether the weights that stay are moved."""
        return hasattr(self.criterion, "compensate")


class Ranked(Protocol):
    """A criterion that has seen a base's weights."""

    def decide(self, plan: Plan, progress: Progress | None = None) -> Decision:
        """Which weights go, exactly, for any ratios of a plan for the same checkpoint and cast."""
        ...


def load(text: str) -> Loaded:
    """Find a criterion; OptionError where there is no such one, or where its package is broken."""
    spec = Spec.parse(text)
    if spec.name in MAGNITUDES:
        return Loaded(spec)
    if spec.name in SCORED:
        factory: Callable[[Mapping[str, str]], Any] = EntryPoint(spec.name, SCORED[spec.name], GROUP).load()
        return Loaded(spec, factory(spec.values))
    return Loaded(spec, _made(installed()[spec.name], spec))


def rank(
    plans: Sequence[Plan],
    loaded: Loaded,
    kernel: Kernel,
    progress: Progress,
    *,
    calibration: Calibration | None = None,
    device: str = "cpu",
) -> Ranked:
    """Read the weights that the plans, which share their checkpoint and cast, prune, and rank them.

    `kernel` counts magnitudes; scores are computed on torch's `device`. OptionError where the criterion needs a
    calibration and there is none; CalibrationError for one of another base, or that lacks something; PlanError for
    weights that are not finite, unless the plans allow them.
    """
    if loaded.criterion is None:
        from crdiff_export.prune.criteria import magnitude

        return magnitude.Ranked(plans, kernel, progress)
    if loaded.statistics and calibration is None:
        raise OptionError(
            f"{loaded.spec} needs a calibration",
            "Give --calibration FILE, made for this base and this size.",
        )
    from crdiff_export.prune.criteria.scored import Scored

    return Scored(plans, loaded, progress, calibration, device)


def _made(entry: EntryPoint, spec: Spec) -> Criterion:
    """What another package's entry point makes of the options; its own errors keep their traceback."""
    package = entry.dist.name if entry.dist else entry.value
    hint = f"It has to make a criterion, with statistics and score, of a mapping of options; ask {package}."
    try:
        factory = entry.load()
    except (ImportError, AttributeError) as error:
        raise OptionError(
            f"{entry.name}: {entry.value} cannot be loaded: {error}", f"Install {package} again, or whatever it needs."
        ) from error
    if not callable(factory):
        raise OptionError(f"{entry.name}: {entry.value} is no function", hint)
    found: Criterion = factory(spec.values)
    statistics = getattr(found, "statistics", None)
    listed = isinstance(statistics, tuple) and all(isinstance(name, str) for name in statistics)
    if not listed or not callable(getattr(found, "score", None)):
        raise OptionError(f"{entry.name}: {entry.value} makes {type(found).__name__}, which is no criterion", hint)
    return found
