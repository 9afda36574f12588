"""The names of a layer: what the plan's layout, the original one and diffusers call the same weight."""

from collections.abc import Mapping
from functools import cache
from typing import Literal

from crdiff_export.models import families
from crdiff_export.prune.plan import Plan, Target

Names = Mapping[tuple[str, int], tuple[tuple[str, int], str]]


def diffusers_name(plan: Plan, target: Target) -> str:
    """What diffusers calls the weight of a target."""
    return by_key(plan)[key(plan, target)][1]


def original_place(plan: Plan, target: Target) -> tuple[str, int]:
    """What the original layout calls the weight of a target, and which part of that tensor it is."""
    return by_key(plan)[key(plan, target)][0]


def key(plan: Plan, target: Target) -> tuple[str, int]:
    """A target in the plan's own layout: its tensor and which part of that it is."""
    return target.source.name.removeprefix(plan.match.prefix), target.start // target.count


def by_key(plan: Plan) -> Names:
    """A layer's tensor and part in the plan's layout, to those in the original layout and the tensor in diffusers'.

    The layouts of a family list the same layers in the same order.
    """
    return _by_key(plan.match.family.id, plan.match.layout.name)


@cache  # a search asks for all layers at every candidate
def _by_key(family: str, layout: Literal["original", "diffusers"]) -> Names:
    layouts = {found.name: found.layers for found in families.by_id(family).layouts}
    return {
        (own.tensor, own.part or 0): ((original.tensor, original.part or 0), single.tensor)
        for own, original, single in zip(layouts[layout], layouts["original"], layouts["diffusers"], strict=True)
    }
