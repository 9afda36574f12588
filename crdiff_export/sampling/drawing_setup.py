"""How a base will be drawn with, decided before its pipeline is opened."""

from dataclasses import dataclass

from crdiff_export.errors import PlanError, PreviewError
from crdiff_export.export import ExportRequest, plan_variant
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.dtypes import FORMATS
from crdiff_export.hub import bases
from crdiff_export.models.families import Match, load_family
from crdiff_export.prune import architecture
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan, TooWideError, quantisation, recognise
from crdiff_export.sampling import pipelines, request_checks
from crdiff_export.sampling.pipelines import Opening
from crdiff_export.sampling.request_checks import DrawingRequest
from crdiff_export.sizes import Size


@dataclass(frozen=True, slots=True)
class BaseHeaders:
    """A base whose headers have been read, and the family that they belong to."""

    base: bases.Base
    checkpoint: Checkpoint
    match: Match


@dataclass(frozen=True, slots=True)
class DrawingSetup:
    """A base, its native size, how diffusers opens it, and the device and dtype that it is drawn with.

    Attributes:
        base: The base.
        native: The size that it was trained for.
        opening: How diffusers opens it.
        device: torch's name of the device.
        dtype: The dtype to compute in, as in `--dtype`.
    """

    base: bases.Base
    native: Size
    opening: Opening
    device: str
    dtype: str


def read_base(request: DrawingRequest) -> BaseHeaders:
    """Find the base of a request, download it if necessary, and read its headers."""
    base = bases.locate(request.base, request.variant)
    checkpoint = base.open(request.variant)
    match = recognise(checkpoint, load_family(request.family) if request.family else None)
    request_checks.check_negative(request.negative, match.family)
    return BaseHeaders(base, checkpoint, match)


def plan_export(headers: BaseHeaders, request: ExportRequest, criterion: CriterionChoice | None = None) -> Plan:
    """Plan the export that the pictures are to judge.

    Args:
        headers: The base.
        request: The export.
        criterion: The criterion, if it has been resolved already.

    Returns:
        The plan.

    Raises:
        PlanError: The base can be pruned only after a cast, which a pipeline in memory does not make.

    """
    try:
        return plan_variant(request, headers.checkpoint, criterion)
    except TooWideError as error:
        hint = f"Save it as {', '.join(FORMATS)} first: --dtype is what the pipeline computes in, not the base's."
        raise PlanError(error.message, hint) from error


def set_up(request: DrawingRequest, headers: BaseHeaders, plan: Plan, *, offload: bool = False) -> DrawingSetup:
    """Decide how diffusers opens a base, on which device and in which dtype; this imports torch.

    Args:
        request: The options of the command.
        headers: The base.
        plan: A plan of its export.
        offload: Whether idle parts of the pipeline are to wait in main memory.

    Returns:
        The setup.

    Raises:
        PreviewError: diffusers cannot draw with the base.
        OptionError: The base is to be told a size, and has no such condition.
        CrdiffError: A file cannot be read, or the device cannot be used.

    """
    if quantised := quantisation(headers.checkpoint, headers.match.prefix):
        raise PreviewError(
            f"{headers.base.name}: quantised weights ({quantised.kind}), which diffusers does not open from this file",
            "Draw with the fp16 or bf16 checkpoint; `crdiff export` takes this one.",
        )
    model = architecture.find(plan)
    opening = pipelines.choose(
        headers.base, headers.checkpoint, headers.match, model, config=request.config, variant=request.variant
    )
    if request.told_size:
        opening = pipelines.tell(opening, model.native if request.told_size == "native" else request.told_size)
    from crdiff_export.sampling import session

    device = session.choose_device(request.device, offload=offload)
    return DrawingSetup(
        headers.base, model.native, opening, device, session.choose_dtype(request.dtype, opening.pipeline, device)
    )
