"""Recipes: the ratio of each group for each size of a model family, with the provenance of the numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from crdiff_export.errors import OptionError, RecipeError
from crdiff_export.formats.text import did_you_mean
from crdiff_export.sizes import Size

Provenance = Literal["starting-point", "searched", "published"]
Scalar = str | int | float | bool

TARGETS: Final = ("attn", "ff", "attn2")
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


@dataclass(frozen=True, slots=True)
class Variant:
    """The numbers for one size, for any prompt or for one prompt."""

    resolution: Size
    ratios: Mapping[str, float]
    poa_weight: float
    provenance: Provenance
    source: str
    targets: tuple[str, ...] | None = None
    prompt: str | None = None
    evidence: Evidence | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """All variants of one family; `name` is the name of the file without its folder."""

    family: str
    title: str
    native: Size
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
    standing = best.provenance.replace("-", " ")
    return Choice(best, f"no variant for {wanted}; using the one for {best.resolution} ({standing})")


def _distance(size: Size, target: Size) -> float:
    area = math.log(size.width * size.height) - math.log(target.width * target.height)
    aspect = math.log(size.width / size.height) - math.log(target.width / target.height)
    return round(math.hypot(area, aspect), 9)  # the last digits of a logarithm differ between platforms; ties must not


def override(
    variant: Variant,
    groups: tuple[str, ...],
    ratio: float | None = None,
    per_group: Mapping[str, float] | None = None,
    poa_weight: float | None = None,
    by: str = "on the command line",
) -> Variant:
    """Replace numbers of a variant by the user's own.

    One ratio of the user makes the variant a starting point without evidence, because the new set was never measured.

    Args:
        variant: The variant.
        groups: The family's groups.
        ratio: A ratio for all groups.
        per_group: Ratios of single groups, which win over `ratio`.
        poa_weight: The POA weight.
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
    weight = variant.poa_weight if poa_weight is None else check_poa_weight("the POA weight", poa_weight)
    if unknown := next((group for group in ratios if group not in groups), None):
        hint = f"{did_you_mean(unknown, groups, 'groups')} --ratio is for all of them."
        raise OptionError(f"this model has no group {unknown!r} to prune", hint)
    if ratios:
        variant = replace(
            variant,
            ratios=ratios if ratios.keys() == set(groups) else {**variant.ratios, **ratios},
            provenance="starting-point",
            source=f"given {by}",
            prompt=None,
            evidence=None,
        )
    if poa_weight is not None:
        source = variant.source if ratios else f"{variant.source}; POA weight given {by}"
        evidence = variant.evidence
        if evidence and weight != variant.poa_weight:  # what was measured of POA was so at another weight
            extra = {key: value for key, value in evidence.extra.items() if key not in ("poa", "poa_low", "poa_high")}
            evidence = replace(evidence, extra=extra)
        variant = replace(variant, poa_weight=weight, source=source, evidence=evidence)
    return variant


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
