"""Refuse target weights that are infinite or not a number."""

from collections.abc import Mapping, Sequence

from crdiff_export.errors import PlanError
from crdiff_export.formats.safetensors import show
from crdiff_export.prune.plan import Plan


def refuse(plans: Sequence[Plan], counts: Mapping[str, int]) -> None:
    """Refuse plans that prune targets with weights that are not finite.

    Args:
        plans: Plans for one checkpoint.
        counts: The number of such weights, by the name of the target.

    Raises:
        PlanError: A plan prunes such a target, and the plans do not allow that.
    """
    pruned = {target.name for plan in plans for target in plan.targets if plan.scopes[target.scope].rank}
    names = sorted(name for name in pruned if counts.get(name))
    if not names or plans[0].allow_nonfinite:
        return
    shown = ", ".join(show(name) for name in names[:3])
    more = len(names) - 3
    cast = plans[0].cast
    hint = "The checkpoint is damaged; --allow-nonfinite keeps such weights."
    if cast:
        hint = "Leave --dtype out, or give bf16, which has the range of fp32. --allow-nonfinite keeps such weights."
    raise PlanError(
        f"{plans[0].checkpoint.path}: {sum(counts[name] for name in names)} target weights are not finite"
        f"{f' once cast to {cast}' if cast else ''}, in {shown}{f' and {more} more' if more > 0 else ''}",
        hint,
    )
