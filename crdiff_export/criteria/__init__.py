"""How weights are ranked. A criterion turns the plans for a checkpoint into one threshold per scope."""

from collections.abc import Sequence
from typing import Protocol

from crdiff_export.errors import PlanError
from crdiff_export.kernels import Kernel
from crdiff_export.plan import Plan
from crdiff_export.progress import Progress
from crdiff_export.threshold import Threshold

NAMES = ("magnitude",)


class Criterion(Protocol):
    """Ranks the weights of every scope of some plans, which share their checkpoint and cast, reading them once."""

    def __call__(
        self, plans: Sequence[Plan], kernel: Kernel, progress: Progress, /
    ) -> tuple[tuple[Threshold, ...], ...]:
        """For each plan one threshold per scope, in its order."""
        ...


def by_name(name: str) -> Criterion:
    """The criterion called `name`."""
    from crdiff_export.criteria import magnitude

    known: dict[str, Criterion] = {"magnitude": magnitude.thresholds}
    if name not in known:
        raise PlanError(f"unknown criterion {name!r}", f"Choose {', '.join(known)}.")
    return known[name]
