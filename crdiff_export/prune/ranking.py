"""Start a criterion: by magnitudes, which are counted, or by scores."""

from collections.abc import Sequence

from crdiff_export.progress import Progress
from crdiff_export.prune.criteria import Ranked
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.kernels import Kernel
from crdiff_export.prune.plan import Plan


def rank(
    choice: CriterionChoice, plans: Sequence[Plan], kernel: Kernel, progress: Progress, device: str = "cpu"
) -> Ranked:
    """Read and rank the target weights of plans that share their checkpoint and cast.

    Args:
        choice: The criterion.
        plans: The plans.
        kernel: Counts magnitudes.
        progress: Told of the bytes read.
        device: The torch device on which scores are computed.

    Returns:
        The ranked weights, which decide for any ratios.

    Raises:
        CalibrationError: The calibration is of another base, or lacks a statistic.
        PlanError: Target weights are not finite, and the plans do not allow that.
    """
    if choice.criterion is None:
        from crdiff_export.prune.criteria.magnitude import RankedMagnitudes

        return RankedMagnitudes(plans, kernel, progress)
    from crdiff_export.prune.criteria.scored import Scored

    return Scored(plans, choice, progress, device)
