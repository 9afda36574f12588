"""Pictures of a base, of what pruning makes of it, and of POA, side by side: the whole story, as in `export.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crdiff_export.errors import OptionError, PreviewError
from crdiff_export.evaluate.preview import files, wording
from crdiff_export.evaluate.preview.wording import Column, Taken
from crdiff_export.export import ExportRequest
from crdiff_export.models import recipe
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import criterion_choice
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan
from crdiff_export.sampling import drawing_setup, pipelines, poa, request_checks
from crdiff_export.sampling.drawing_setup import Easel
from crdiff_export.sampling.request_checks import DrawingRequest
from crdiff_export.sizes import Size, check_grid
from crdiff_export.verify.reopen import BakedCheckpoint, open_baked


@dataclass(frozen=True, slots=True)
class PreviewRequest(DrawingRequest):
    """What someone wants to see: which base, for which size, with which prompts, and everything not left to us.

    Ratios come from the recipe or from `ratio` and `ratios`, as in an export, or all is as in the file `baked`, whose
    size is then the default. `criterion` and `calibration` are an export's. No `weights` means the recommended one.
    """

    prompts: tuple[str, ...]
    size: Size | None = None
    seeds: tuple[int, ...] = (0,)
    weights: tuple[float, ...] = ()
    baked: Path | None = None
    recipe: Path | None = None
    ratio: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    criterion: str = criterion_choice.MAGNITUDE
    calibration: Path | None = None
    start: float = 0.0
    stop: float = 1.0
    offload: bool = False
    outputs: tuple[Path, ...] = ()
    force: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A request that nothing stands against. `plan` is that of the base, or of the baked file."""

    request: PreviewRequest
    easel: Easel
    plan: Plan
    baked: BakedCheckpoint | None
    size: Size
    columns: tuple[Column, ...]
    outputs: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def pictures(self) -> int:
        """How many there will be."""
        return len(self.request.prompts) * len(self.request.seeds) * len(self.columns)


@dataclass(frozen=True, slots=True)
class Preview:
    """Pictures and the files that show them. `facts` are what a sheet says above them."""

    job: Job
    facts: tuple[tuple[str, str], ...]
    taken: Taken
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def preview(request: PreviewRequest, progress: Progress | None = None) -> Preview:
    """Draw and write the pictures; raises a CrdiffError and writes nothing if it cannot."""
    job, watched = prepare(request), progress or Silent()
    return draw(job, measure(job, watched), watched)


def prepare(request: PreviewRequest) -> Job:
    """Find the base, read its headers and plan; any refusal comes from here, before a weight is read."""
    _check(request)
    pipelines.check_packages(offload=request.offload)
    criterion = None if request.baked else CriterionChoice.of(request.criterion, request.calibration)
    found = drawing_setup.find(request)
    family = found.match.family
    baked = open_baked(request.baked.expanduser()) if request.baked else None
    if baked and baked.plan.match.family != family:
        raise PreviewError(
            f"{request.baked}: is of {baked.plan.match.family.title}, {request.base} is {family.title}",
            "Give the base that the file was made from; `crdiff inspect` names it.",
        )
    planned = baked.plan if baked else drawing_setup.planned(found, _pruning(request), criterion)
    size = request.size or planned.size
    check_grid(size, family.grid, family.title)
    columns = wording.columns(request.weights or (planned.variant.poa_weight,))
    stem = found.base.stem or found.checkpoint.stem
    rows = len(request.prompts) * len(request.seeds)
    outputs = files.place(request.outputs, f"{stem}-preview-{size}", force=request.force)
    files.check_sheet(outputs, rows, len(columns), size)
    if not any(scope.rank for scope in planned.scopes):
        raise PreviewError("all ratios are 0, so there is no pruned model to look at", "Give --ratio, or a --recipe.")
    set_up = drawing_setup.set_up(request, found, planned, offload=request.offload)
    notes = (*(() if baked else planned.notes), *(wording.foreign(request.prompts) if family.id == "demo" else ()))
    return Job(request, set_up, planned, baked, size, columns, outputs, notes)


def measure(job: Job, progress: Progress) -> poa.Source:
    """The thresholds or masks of the pruned model: from the baked file, or found as an export finds them."""
    if job.request.baked:
        return poa.from_baked(job.request.baked)
    return poa.from_recipe(_pruning(job.request), progress)


def draw(job: Job, source: poa.Source, progress: Progress) -> Preview:
    """Open the base once, make every picture with it, and write the files; each appears when it is complete."""
    from crdiff_export.evaluate.preview import render

    taken = render.take(job, source, progress)
    facts = wording.facts(job, taken)
    contact = wording.contact(job, facts, taken)
    files.write(contact, job.outputs, replace=job.request.force)
    notes = (*source.notes, *wording.warnings(taken), *files.warnings(contact, job.outputs))
    return Preview(job, facts, taken, job.outputs, notes)


def _pruning(request: PreviewRequest) -> ExportRequest:
    assert request.size
    # Nothing is written, so nothing stands in the way.
    return ExportRequest(
        request.base, request.size, recipe=request.recipe, ratio=request.ratio, ratios=request.ratios,
        criterion=request.criterion, calibration=request.calibration, variant=request.variant, force=True,
    )  # fmt: skip


def _check(request: PreviewRequest) -> None:
    """Refuse what the request alone shows to be impossible."""
    if not request.prompts:
        raise OptionError("a prompt is empty", "Say what the pictures are to show: --prompt TEXT.")
    request_checks.check(request, request.prompts)
    if not request.seeds or not all(0 <= seed < request_checks.SEEDS for seed in request.seeds):
        raise OptionError(
            "a seed is missing or out of range", f"Give --seed a number from 0 to {request_checks.SEEDS - 1}."
        )
    if request.baked and (request.recipe or request.ratio is not None or request.ratios):
        raise OptionError(
            "--baked has its own ratios", "Leave out --recipe, --ratio, --down, --mid and --up, or leave out --baked."
        )
    if request.baked and (request.calibration or request.criterion != criterion_choice.MAGNITUDE):
        raise OptionError("--baked is pruned already", "Leave out --criterion and --calibration, or leave out --baked.")
    if not request.baked and request.size is None:
        raise OptionError("there is no size", "Give --res, or a baked file with --baked, which has one.")
    for weight in request.weights:
        recipe.check_poa_weight("the POA weight", weight)
    poa.Schedule(1.0, request.start, request.stop)


__all__ = ["Job", "Preview", "PreviewRequest", "draw", "measure", "prepare", "preview"]
