"""READ FIRST: the whole story, from a base to a pruned checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from crdiff_export.bake import destination, metadata, residual, write
from crdiff_export.bake.source_hashes import SourceHashes
from crdiff_export.bake.stream import Pruning
from crdiff_export.errors import CrdiffError, PlanError, RecipeError
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.crdiff_keys import CalibrationStamp, Stamp
from crdiff_export.formats.dtypes import DTYPES
from crdiff_export.hub import bases
from crdiff_export.models import recipe, recipe_files
from crdiff_export.models.families import Match
from crdiff_export.models.recipe import Variant
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import architecture, criterion_choice, kernels, plan
from crdiff_export.prune.criteria import Decision
from crdiff_export.prune.criteria.calibration import NARROWER
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Output, Plan, TooWideError
from crdiff_export.prune.threshold import Threshold
from crdiff_export.sizes import Size, check_grid


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What someone wants: which base, for which size, and everything they do not want to leave to us.

    `ratios` are per group and `ratio` is for all of them; either overrides the recipe. `dtype` is fp16, bf16 or fp32.
    `prompt` takes the recipe's numbers for that prompt. `criterion` is how weights are ranked, as in
    `wanda:compare=row` (docs/criteria.md), and `calibration` the file that it ranks by. `variant` names the weights to
    take from a folder that has several (`fp16`). `residual` is where to keep what is pruned away: none, embed or
    sidecar. `given` says where those numbers stand.
    """

    base: str
    size: Size
    output: Path | None = None
    recipe: Path | None = None
    prompt: str | None = None
    ratio: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    poa_weight: float | None = None
    targets: tuple[str, ...] | None = None
    criterion: str = criterion_choice.MAGNITUDE
    calibration: Path | None = None
    device: str = "auto"
    dtype: str | None = None
    variant: str | None = None
    residual: str = residual.NONE
    hashing: bool = True
    force: bool = False
    allow_nonfinite: bool = False
    threads: int | None = None
    given: str = "on the command line"


@dataclass(frozen=True, slots=True)
class ExportJob:
    """A request that has been checked and planned: what `--dry-run` shows."""

    request: ExportRequest
    base: bases.Base
    criterion: CriterionChoice
    plan: Plan
    target: Path
    space: destination.Space


@dataclass(frozen=True, slots=True)
class Baked:
    """A finished export. `notes` are what only the weights have shown; what was known before, the plan notes."""

    job: ExportJob
    thresholds: tuple[Threshold, ...]
    stamp: Stamp
    written: write.Written
    notes: tuple[str, ...] = ()


def prepare(request: ExportRequest) -> ExportJob:
    """Find the base, read its headers, and plan; any refusal comes from here, before a weight is read."""
    criterion = _criterion(request)
    residual.check_request(request.residual, criterion, hashing=request.hashing)
    base = bases.locate(request.base, request.variant)
    return plan_job(request, base, base.open(request.variant), criterion)


def plan_job(
    request: ExportRequest, base: bases.Base, checkpoint: Checkpoint, criterion: CriterionChoice | None = None
) -> ExportJob:
    """What `prepare` does for a base whose headers have been read."""
    criterion = criterion or _criterion(request)
    planned = plan_variant(request, checkpoint, criterion)
    target = destination.place(planned, request.output, base.stem, request.residual, force=request.force)
    return ExportJob(request, base, criterion, planned, target, destination.space(planned, target, request.residual))


def plan_variant(request: ExportRequest, checkpoint: Checkpoint, criterion: CriterionChoice | None = None) -> Plan:
    """What to prune, from headers and the recipe alone: the checkpoint's headers, and the calibration's.

    `criterion` is the request's, resolved; None resolves it here.
    """
    criterion = criterion or _criterion(request)
    match = plan.recognise(checkpoint)
    variant, recipe_name, notes = _choose(request, match)
    try:
        planned = plan.make(
            checkpoint, match, request.size, variant, recipe_name,
            kinds=request.targets, cast=DTYPES[request.dtype] if request.dtype else None,
            allow_nonfinite=request.allow_nonfinite, notes=notes,
        )  # fmt: skip
    except TooWideError as error:
        if criterion.calibration:  # which there is none of what it is after a cast
            raise PlanError(error.message, NARROWER) from error
        raise
    residual.check_plan(planned, request.residual)
    return criterion.plan(planned)


def _criterion(request: ExportRequest) -> CriterionChoice:
    return CriterionChoice.of(request.criterion, request.calibration)


def export(request: ExportRequest, progress: Progress | None = None) -> Baked:
    """Prune a base for a size and write it with its metadata; raises a CrdiffError and leaves no trace if it cannot.

    The file appears under its name only when it is complete and has been checked.
    """
    return run(prepare(request), progress or Silent())


def run(job: ExportJob, progress: Progress) -> Baked:
    """Do what was planned: rank the weights to find those that go, then write."""
    (outcome,) = run_all((job,), progress)
    if isinstance(outcome, CrdiffError):
        raise outcome
    return outcome


def run_all(jobs: Sequence[ExportJob], progress: Progress, *, together: bool = True) -> Iterator[Baked | CrdiffError]:
    """Run jobs for one checkpoint that differ in size, numbers and output alone: it is ranked and hashed once.

    Together they are written from one reading, too, unless a criterion moves weights, which would all have to be in
    memory. Else each is written when it is asked for, so that the disk has to hold no more than the caller keeps. What
    is wrong with the base is raised, with one output yielded in its place.
    """
    first = jobs[0]
    if together:
        destination.check_space(*(job.space for job in jobs))
    plans = [job.plan for job in jobs]
    with SourceHashes(plans, _known(jobs)) if first.request.hashing else nullcontext() as hashes:
        kernel = kernels.load(first.request.device, first.request.threads)
        criterion = first.criterion
        calibrated = criterion.calibrated(progress)
        ranked = criterion.rank(plans, kernel, progress, first.request.device)
        model = architecture.find(first.plan)
        for batch in [jobs] if together and not criterion.moves else [[job] for job in jobs]:
            decided = [(job, ranked.decide(job.plan, progress)) for job in batch]
            made = [_Making.of(job, decision, criterion.name, calibrated, model) for job, decision in decided]
            yield from _write(made, kernel, progress, hashes)


def _known(jobs: Sequence[ExportJob]) -> Mapping[str, str]:
    """The hashes of whole files that need not be computed. A pickle is never restored as a whole, only its tensors."""
    pickled = any(file.tensors_of for file in jobs[0].plan.checkpoint.files)
    kept = any(job.request.residual != residual.NONE for job in jobs)
    return {} if pickled and kept else jobs[0].base.hashes


def _write(
    batch: Sequence["_Making"], kernel: kernels.Kernel, progress: Progress, hashes: SourceHashes | None
) -> Iterator[Baked | CrdiffError]:
    try:
        destination.check_space(*(making.space for making in batch))
    except PlanError as error:
        yield from (error for _ in batch)
        return
    orders = [making.order for making in batch]
    for making, written in zip(batch, write.write(orders, kernel, progress, hashes=hashes), strict=True):
        yield written if isinstance(written, CrdiffError) else making.done(written)


@dataclass(frozen=True, slots=True)
class _Making:
    """A job of which is known what goes."""

    job: ExportJob
    stamp: Stamp
    order: write.Order

    @classmethod
    def of(
        cls,
        job: ExportJob,
        decision: Decision,
        criterion: str,
        calibrated: CalibrationStamp | None,
        model: architecture.Architecture,
    ) -> Self:
        planned = job.plan
        keep = job.request.residual
        stamp = metadata.stamp(
            planned, decision.thresholds, criterion, job.base.name, model, residual=residual.SAID[keep],
            masked=decision.masks is not None, moved=bool(decision.moved), calibrated=calibrated,
        )  # fmt: skip

        def compose(output: Output, hashes: metadata.Hashes | None) -> Mapping[str, str]:
            return metadata.header(planned, stamp, model, output.source.metadata, hashes)

        pruning = Pruning(planned, decision, keep=keep != residual.NONE)
        order = write.Order(pruning, job.target, compose, replace=job.request.force, residual=keep)
        return cls(job, stamp, order)

    @property
    def space(self) -> destination.Space:
        """What it needs, now that it is known how much goes."""
        counts = [threshold.pruned for threshold in self.order.pruning.decision.thresholds]
        return destination.space(self.job.plan, self.job.target, self.job.request.residual, counts)

    def done(self, written: write.Written) -> Baked:
        decision = self.order.pruning.decision
        return Baked(self.job, decision.thresholds, self.stamp, written, decision.notes)


def _choose(request: ExportRequest, match: Match) -> tuple[Variant, str, tuple[str, ...]]:
    """The numbers: from the user's recipe or the family's own, for this size or the nearest, overridden where asked."""
    family = match.family
    found = recipe_files.load(request.recipe) if request.recipe else recipe_files.by_alias(family.id)
    if found is None or found.family != family.id:
        raise RecipeError(
            f"{request.recipe}: not a recipe for {family.title}, which {request.base} is",
            "Leave --recipe out, or give one for this family.",
        )
    check_grid(request.size, family.grid, family.title)
    choice = recipe.choose(found, request.size, request.prompt)
    recipe.check_groups(choice.variant, family.groups, found.name)
    variant = recipe.override(
        choice.variant, family.groups,
        ratio=request.ratio, per_group=request.ratios, poa_weight=request.poa_weight, by=request.given,
    )  # fmt: skip
    # Not a word about a size whose numbers nobody takes.
    given = request.ratio is not None or request.ratios.keys() >= set(family.groups)
    return variant, found.name, (choice.note,) if choice.note and not given else ()


__all__ = ["Baked", "Checkpoint", "ExportJob", "ExportRequest", "export", "prepare", "run", "run_all"]
