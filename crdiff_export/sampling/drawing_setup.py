"""A base that pictures are drawn with: found, then set up with everything that is decided before it is opened."""

from dataclasses import dataclass

from crdiff_export.errors import PlanError
from crdiff_export.export import ExportRequest, plan_variant
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.dtypes import FORMATS
from crdiff_export.hub import bases
from crdiff_export.models.families import Match
from crdiff_export.prune import architecture
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan, TooWideError, recognise
from crdiff_export.sampling import pipelines, request_checks
from crdiff_export.sampling.pipelines import Opening
from crdiff_export.sampling.request_checks import DrawingRequest
from crdiff_export.sizes import Size


@dataclass(frozen=True, slots=True)
class Found:
    """A base whose headers have been read."""

    base: bases.Base
    checkpoint: Checkpoint
    match: Match


@dataclass(frozen=True, slots=True)
class DrawingSetup:
    """A base, the size that it was trained for, how diffusers opens it, and on which device, in which dtype."""

    base: bases.Base
    native: Size
    opening: Opening
    device: str
    dtype: str


def find(request: DrawingRequest) -> Found:
    """Find a request's base, which may have to be fetched, and read its headers."""
    base = bases.locate(request.base, request.variant)
    checkpoint = base.open(request.variant)
    match = recognise(checkpoint)
    request_checks.check_negative(request.negative, match.family)
    return Found(base, checkpoint, match)


def planned(found: Found, request: ExportRequest, criterion: CriterionChoice | None = None) -> Plan:
    """The plan of an export of a base that is drawn with; PlanError where it could be pruned only after a cast."""
    try:
        return plan_variant(request, found.checkpoint, criterion)
    except TooWideError as error:
        hint = f"Save it as {', '.join(FORMATS)} first: --dtype is what the pipeline computes in, not the base's."
        raise PlanError(error.message, hint) from error


def set_up(request: DrawingRequest, found: Found, plan: Plan, *, offload: bool = False) -> DrawingSetup:
    """Decide how a base is drawn with; a CrdiffError where it cannot be. From here on torch is imported."""
    native = architecture.find(plan).native
    way = pipelines.choose(
        found.base, found.checkpoint, found.match, native, config=request.config, variant=request.variant
    )
    from crdiff_export.sampling import session

    device = session.device(request.device, offload=offload)
    return DrawingSetup(found.base, native, way, device, session.dtype(request.dtype, way.pipeline, device))
