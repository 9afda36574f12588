"""Recipes: the ratio of each group for each size of a model family, with the provenance of the numbers."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from crdiff_export.errors import OptionError, RecipeError
from crdiff_export.formats.text import WARNING, did_you_mean
from crdiff_export.sizes import Size

Provenance = Literal["starting-point", "searched", "published"]
Scalar = str | int | float | bool

TARGETS: Final = ("attn", "ff", "attn2", "ff-shared")
# Where the search of the public code starts.
START_RATIO: Final = 0.3
START_SOURCE: Final = (
    "search start of the CR-Diff public code: 0.3 for each group, POA weight 1.5; not tuned for this model"
)
START_POA_WEIGHT: Final = 1.5  # src: the default of the public code, whose search does not vary it
FAR: Final = 1.5  # ours: beyond this factor in area or aspect, borrowed numbers need a warning
MAX_POA_WEIGHT: Final = 10.0  # ours: the public code uses 1.5; a weight above 10 is a typing error


@dataclass(frozen=True, slots=True)
class Evidence:
    """A measurement: mean scores of the pruned and the dense model, and an interval of their difference."""

    scorer: str
    pruned: float
    dense: float | None = None
    prompts: int | None = None
    interval: tuple[float, float] | None = None
    extra: Mapping[str, Scalar] = field(default_factory=dict)

    def values(self) -> dict[str, object]:
        """Return all values by their name in a recipe, without those that are missing."""
        fixed = {"scorer": self.scorer, "pruned": self.pruned, "dense": self.dense, "prompts": self.prompts}
        fixed["interval"] = list(self.interval) if self.interval else None
        return {**self.extra, **{key: value for key, value in fixed.items() if value is not None}}


@dataclass(frozen=True, slots=True)
class Variant:
    """The numbers for one size, for any prompt or for one prompt.

    Attributes:
        resolution: The size that a recipe has the numbers for.
        ratios: The ratio of each group.
        poa_weight: The POA weight to recommend.
        provenance: How the ratios came about.
        source: Where they come from, for people.
        targets: The kinds of layers to prune; None for the family's default.
        prompt: The prompt that they are for; None for any.
        evidence: What was measured of them at this size.
        borrowed_from: The size that they were found for, where they are taken for another one: see `borrow`.
    """

    resolution: Size
    ratios: Mapping[str, float]
    poa_weight: float
    provenance: Provenance
    source: str
    targets: tuple[str, ...] | None = None
    prompt: str | None = None
    evidence: Evidence | None = None
    borrowed_from: Size | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """All variants of one family; `name` is the name of the file without its folder.

    `native` is None only for the starting point of a UNet of no known family.
    """

    family: str
    title: str
    native: Size | None
    repo: str | None
    file: str | None
    variants: tuple[Variant, ...]
    name: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen variant for a target size and prompt; if it is not exactly for them, `note` says so in one line."""

    variant: Variant
    note: str | None = None


def choose(recipe: Recipe, target: Size, prompt: str | None = None) -> Choice:
    """Choose the variant nearest to a target size; variants for another prompt are left out.

    The distance is hypot(ln(area / target area), ln(aspect / target aspect)), so that half and double are equally far.
    Ties go to the variant for this prompt, then to the smaller width, then height, whatever the order in the file.

    Args:
        recipe: The recipe.
        target: The size in pixels to prune for.
        prompt: The prompt to prune for, if the numbers may be those of one prompt.

    Returns:
        The variant, with its own size.

    Raises:
        RecipeError: The recipe has no variant for any prompt.
    """
    fitting = [variant for variant in recipe.variants if variant.prompt in (None, prompt)]
    if not fitting:
        which = "variant for any prompt" if recipe.variants else "variant"
        hint = f"Add a [[variant]] for {target} to it, or give the ratios on the command line."
        if recipe.variants and prompt is None:
            hint = "Add a [[variant]] without a prompt, or take one of its prompts: crdiff export --prompt."
        raise RecipeError(f"{recipe.name} has no {which}", hint)

    def rank(variant: Variant) -> tuple[float, bool, int, int]:
        size = variant.resolution
        return _distance(size, target), variant.prompt != prompt, size.width, size.height

    best = min(fitting, key=rank)
    if (best.resolution, best.prompt) == (target, prompt):
        return Choice(best)
    wanted = f"{target}" if prompt is None else f"{target} and this prompt"
    if best.resolution == target:
        return Choice(best, f"no variant for {wanted}; using the one for any prompt")
    borrowed = f"no variant for {wanted}; its numbers are borrowed from {best.resolution}, a starting point"
    if far := _far(best.resolution, target):
        return Choice(best, f"{WARNING}{borrowed}: {far}")
    return Choice(best, borrowed)


def _far(size: Size, target: Size) -> str | None:
    """Say by how much the area or the aspect of a target size differs, if by more than FAR."""
    area = target.pixels / size.pixels
    aspect = (target.width / target.height) / (size.width / size.height)
    if max(area, 1 / area) > FAR:
        return f"{target} has {area:.3g} times the area"
    if max(aspect, 1 / aspect) > FAR:
        return f"{target} is {aspect:.3g} times as wide for its height"
    return None


def borrow(variant: Variant, target: Size) -> Variant:
    """Take the numbers of a variant for a size that may be another one.

    Numbers that were found or measured at one size are a starting point at another, and no evidence of it.

    Args:
        variant: The variant.
        target: The size to prune for.

    Returns:
        The variant, which is the same if it is for the size.
    """
    if variant.resolution == target:
        return variant
    return replace(variant, provenance="starting-point", evidence=None, borrowed_from=variant.resolution)


def nearest_size(sizes: Iterable[Size], target: Size) -> Size | None:
    """Choose the size whose numbers may serve a target size without a warning, as `choose` does.

    Args:
        sizes: The sizes.
        target: The size in pixels.

    Returns:
        The nearest size; None if all are further than FAR in area or aspect.
    """
    near = [size for size in sizes if not _far(size, target)]
    return min(near, key=lambda size: (_distance(size, target), size.width, size.height), default=None)


def _distance(size: Size, target: Size) -> float:
    area = math.log(size.pixels) - math.log(target.pixels)
    aspect = math.log(size.width / size.height) - math.log(target.width / target.height)
    return round(math.hypot(area, aspect), 9)  # the last digits of a logarithm differ between platforms; ties must not


def override(
    variant: Variant,
    groups: tuple[str, ...],
    ratio: float | None = None,
    per_group: Mapping[str, float] | None = None,
    by: str = "on the command line",
) -> Variant:
    """Replace ratios of a variant by the user's own.

    One ratio of the user makes the variant a starting point without evidence, because the new set was never measured.
    The POA weight goes with the ratios that it was found with.

    Args:
        variant: The variant.
        groups: The family's groups.
        ratio: A ratio for all groups.
        per_group: Ratios of single groups, which win over `ratio`.
        by: Where the user gave the numbers, for the variant's source.

    Returns:
        The new variant.

    Raises:
        OptionError: A group does not exist.
        RecipeError: A number is out of its range, or a ratio is missing.
    """
    ratios = {} if ratio is None else dict.fromkeys(groups, ratio)
    ratios |= per_group or {}
    ratios = {group: check_ratio(f"the ratio of {group}", share) for group, share in ratios.items()}
    if unknown := next((group for group in ratios if group not in groups), None):
        hint = f"{did_you_mean(unknown, groups, 'groups')} --ratio is for all of them."
        raise OptionError(f"this model has no group {unknown!r} to prune", hint)
    if not ratios:
        return variant
    is_whole = ratios.keys() == set(groups)
    ratios = ratios if is_whole else {**variant.ratios, **ratios}
    return replace(
        variant,
        ratios=ratios,
        poa_weight=variant.poa_weight if ratios == variant.ratios else START_POA_WEIGHT,
        provenance="starting-point",
        source=f"given {by}",
        prompt=None,
        evidence=None,
        borrowed_from=None if is_whole else variant.borrowed_from,
    )


def override_poa_weight(variant: Variant, weight: float, by: str = "on the command line") -> Variant:
    """Replace the POA weight of a variant by the user's own; what was measured of POA was so at another weight.

    Args:
        variant: The variant.
        weight: The POA weight.
        by: Where the user gave it, for the variant's source.

    Returns:
        The new variant.

    Raises:
        RecipeError: The weight is out of its range.
    """
    weight = check_poa_weight("the POA weight", weight)
    source = variant.source if variant.source == f"given {by}" else f"{variant.source}; POA weight given {by}"
    evidence = variant.evidence
    if evidence and weight != variant.poa_weight:
        extra = {key: value for key, value in evidence.extra.items() if key not in ("poa", "poa_low", "poa_high")}
        evidence = replace(evidence, extra=extra)
    return replace(variant, poa_weight=weight, source=source, evidence=evidence)


def check_ratio(what: str, ratio: float) -> float:
    """Check a ratio.

    Args:
        what: The ratio's name, with which the message begins.
        ratio: The share of weights to set to zero.

    Returns:
        The ratio.

    Raises:
        RecipeError: It is not at least 0 and below 1.
    """
    if not 0 <= ratio < 1:
        raise RecipeError(f"{what} is {ratio}, must be 0 <= ratio < 1", "0.3 sets 30 % of the weights to zero, 0 none.")
    return ratio


def check_poa_weight(what: str, weight: float) -> float:
    """Check a POA weight.

    Args:
        what: The weight's name, with which the message begins.
        weight: The POA weight.

    Returns:
        The weight.

    Raises:
        RecipeError: It is not between 0 and MAX_POA_WEIGHT.
    """
    if not 0 <= weight <= MAX_POA_WEIGHT:
        hint = "1 is the pruned model, 0 the dense one; the public code uses 1.5."
        raise RecipeError(f"{what} is {weight}, must be 0 <= weight <= {MAX_POA_WEIGHT:g}", hint)
    return weight


def check_groups(variant: Variant, groups: tuple[str, ...], where: str) -> None:
    """Check that a variant has exactly one ratio for each group of the family.

    Args:
        variant: The variant.
        groups: The family's groups.
        where: The recipe and variant, with which the message begins.

    Raises:
        RecipeError: A ratio is missing, or is for another group.
    """
    for group in variant.ratios:
        if group not in groups:
            message = f"{where}: ratios.{group} is for a group that this model does not have"
            raise RecipeError(message, did_you_mean(group, groups, "groups"))
    for group in groups:
        if group not in variant.ratios:
            whole = ", ".join(f"{name} = {variant.ratios.get(name, 0.3)}" for name in groups)
            raise RecipeError(f"{where}: ratios.{group} is missing", f"Write ratios = {{ {whole} }}.")
