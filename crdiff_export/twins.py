"""The names of a layer: what the plan's layout, the original one and diffusers call the same weight."""

from crdiff_export.plan import Plan, Target


def diffusers_name(plan: Plan, target: Target) -> str:
    """What diffusers calls the weight of a target."""
    return by_key(plan)[key(plan, target)][1]


def original_place(plan: Plan, target: Target) -> tuple[str, int]:
    """What the original layout calls the weight of a target, and which part of that tensor it is."""
    return by_key(plan)[key(plan, target)][0]


def key(plan: Plan, target: Target) -> tuple[str, int]:
    """A target in the plan's own layout: its tensor and which part of that it is."""
    return target.source.name.removeprefix(plan.match.prefix), target.start // target.count


def by_key(plan: Plan) -> dict[tuple[str, int], tuple[tuple[str, int], str]]:
    """A layer's tensor and part in the plan's layout, to those in the original layout and the tensor in diffusers'.

    The layouts of a family list the same layers in the same order.
    """
    layouts = {layout.name: layout.layers for layout in plan.match.family.layouts}
    return {
        (own.tensor, own.part or 0): ((original.tensor, original.part or 0), single.tensor)
        for own, original, single in zip(
            plan.match.layout.layers, layouts["original"], layouts["diffusers"], strict=True
        )
    }
