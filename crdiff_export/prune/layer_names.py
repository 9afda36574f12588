"""The names of one layer in the plan's layout, in the original layout and in diffusers."""

from collections.abc import Mapping
from functools import cache
from typing import Literal

from crdiff_export.models import families
from crdiff_export.prune.plan import Plan, Target

Names = Mapping[tuple[str, int], tuple[tuple[str, int], str]]


def diffusers_name(plan: Plan, target: Target) -> str:
    """Return the diffusers name of a target's weight.

    Args:
        plan: The plan.
        target: One of its targets.

    Returns:
        A name such as `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight`.
    """
    return by_key(plan)[key(plan, target)][1]


def original_place(plan: Plan, target: Target) -> tuple[str, int]:
    """Return the place of a target in the original layout.

    Args:
        plan: The plan.
        target: One of its targets.

    Returns:
        The name of the tensor and the number of the part of it, 0 for a whole tensor.
    """
    return by_key(plan)[key(plan, target)][0]


def key(plan: Plan, target: Target) -> tuple[str, int]:
    """Return the place of a target in the plan's own layout.

    Args:
        plan: The plan.
        target: One of its targets.

    Returns:
        The name of the tensor without prefix, and the number of the part of it.
    """
    return target.source.name.removeprefix(plan.match.prefix), target.start // target.count


def by_key(plan: Plan) -> Names:
    """Map each layer's place in the plan's layout to its place in the original layout and its name in diffusers.

    The layouts of a family list the same layers in the same order.
    """
    return _by_key(plan.match.family.id, plan.match.layout.name)


@cache  # a search needs all layers for every candidate
def _by_key(family: str, layout: Literal["original", "diffusers"]) -> Names:
    layouts = {entry.name: entry.layers for entry in families.by_id(family).layouts}
    return {
        (own.tensor, own.part or 0): ((original.tensor, original.part or 0), single.tensor)
        for own, original, single in zip(layouts[layout], layouts["original"], layouts["diffusers"], strict=True)
    }
