"""What a user wants to prune, and the plan that follows from it, the recipe and the headers."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

from crdiff_export.errors import PlanError, RecipeError
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.dtypes import DTYPES
from crdiff_export.models import recipe, recipe_files
from crdiff_export.models.families import Family, load_family
from crdiff_export.models.recipe import Variant
from crdiff_export.prune import plan
from crdiff_export.prune.architecture import native_note, stated_native, unknown_native
from crdiff_export.prune.criteria.calibration import NARROWER
from crdiff_export.prune.criterion_choice import MAGNITUDE, CriterionChoice
from crdiff_export.prune.plan import Plan, TooWideError
from crdiff_export.sizes import Size, check_grid


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What to prune. Whatever is left out comes from the recipe.

    Attributes:
        base: A path, a Hub id, an `hf://` address or an alias.
        size: The size to prune for, in pixels.
        recipe: A recipe file that replaces the family's built-in recipe.
        prompt: Take the recipe's numbers for this prompt.
        ratio: The ratio of all groups; overrides the recipe.
        ratios: The ratios of single groups, by name; override the recipe and `ratio`.
        poa_weight: The POA weight to recommend in the header; overrides the recipe.
        targets: The kinds of layers to prune; None for the recipe's or the family's default.
        criterion: How weights are ranked, such as `wanda:compare=row` (docs/criteria.md).
        calibration: The calibration file that the criterion ranks by.
        dtype: Cast all float tensors to `fp16`, `bf16` or `fp32`; None to keep each as it is.
        variant: The weights to take from a folder that has several, such as `fp16`.
        allow_nonfinite: Accept target weights that are infinite or not numbers.
        family: The table of the base's family; None for any family that is built in or installed.
        native: The size that the base was trained at; None for what its header, its configuration or its family says.
        given: Where the user wrote the ratios, for the header's provenance.
    """

    base: str
    size: Size
    _: KW_ONLY
    recipe: Path | None = None
    prompt: str | None = None
    ratio: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    poa_weight: float | None = None
    targets: tuple[str, ...] | None = None
    criterion: str = MAGNITUDE
    calibration: Path | None = None
    dtype: str | None = None
    variant: str | None = None
    allow_nonfinite: bool = False
    family: Path | None = None
    native: Size | None = None
    given: str = "on the command line"


def plan_variant(
    request: PlanRequest,
    checkpoint: Checkpoint,
    criterion: CriterionChoice | None = None,
    family: Family | None = None,
) -> Plan:
    """Plan what to prune, before a weight is read.

    Args:
        request: What to prune.
        checkpoint: The base's headers.
        criterion: The request's criterion, resolved; None to resolve it here.
        family: The base's family where the request has no table; None for any that is built in or installed.

    Returns:
        The plan, with notes for the user.

    Raises:
        PlanError: The base must not be pruned, or the calibration does not allow the cast that its dtype needs.
        CrdiffError: The recipe, the ratios, the size or the calibration do not fit the base.
    """
    criterion = criterion or CriterionChoice.of(request.criterion, request.calibration)
    match = plan.recognise(checkpoint, load_family(request.family) if request.family else family)
    variant, recipe_name, notes = _choose_ratios(request, match.family, criterion)
    try:
        planned = plan.make(
            checkpoint, match, request.size, variant, recipe_name,
            kinds=request.targets, cast=DTYPES[request.dtype] if request.dtype else None,
            allow_nonfinite=request.allow_nonfinite, notes=notes,
        )  # fmt: skip
    except TooWideError as error:
        if criterion.calibration:  # it describes the uncast weights, so a cast is no way out
            raise PlanError(error.message, NARROWER) from error
        raise
    if not (request.native or match.family.native or stated_native(checkpoint, match.family)):
        raise unknown_native(checkpoint)
    return _settle_poa_weight(criterion.plan(replace(planned, native=request.native)), request)


def _settle_poa_weight(planned: Plan, request: PlanRequest) -> Plan:
    """Recommend the user's POA weight, or 1 where nothing is pruned, and note what pruning cannot do here."""
    variant, notes = planned.variant, planned.notes
    if not any(scope.rank for scope in planned.scopes):
        variant = replace(variant, poa_weight=1.0)
        notes = (*notes, "these ratios prune nothing: every weight stays as it is in the base")
    elif note := native_note(planned):
        notes = (*notes, note)
    if request.poa_weight is not None:
        variant = recipe.override_poa_weight(variant, request.poa_weight, request.given)
    return replace(planned, variant=variant, notes=notes)


def _choose_ratios(
    request: PlanRequest, family: Family, criterion: CriterionChoice
) -> tuple[Variant, str, tuple[str, ...]]:
    """Choose the recipe's variant for this size, or the nearest one, and apply the user's numbers to it.

    Returns:
        The variant, the recipe's name, and notes for the user.
    """
    numbers = recipe_files.load(request.recipe) if request.recipe else recipe_files.of_family(family, request.size)
    if numbers.family != family.id:
        raise RecipeError(
            f"{request.recipe}: not a recipe for {family.title}, which {request.base} is",
            "Leave --recipe out, or give one for this family.",
        )
    choice = recipe.choose(numbers, request.size, request.prompt)
    usual = choice.variant.targets or family.default_kinds
    other_targets = request.targets if request.targets and set(request.targets) != set(usual) else None
    variant = recipe.borrow(criterion.drop_foreign_numbers(choice.variant, other_targets), request.size)
    variant = recipe.override(variant, family.groups, request.ratio, request.ratios, request.given)
    recipe.check_groups(variant, family.groups, numbers.name)
    check_grid(request.size, family.grid, family.title)
    # Skip the note about the nearest size when the user overrides every ratio.
    overridden = request.ratio is not None or request.ratios.keys() >= set(family.groups)
    return variant, numbers.name, (choice.note,) if choice.note and not overridden else ()
