"""READ FIRST: the whole way of an export, from a base to a pruned checkpoint.

`prepare` turns an `ExportRequest` into an `ExportJob`, which holds the `Plan`, from headers alone. `run` ranks the
weights (`_rank`), decides for every job which of them go (`Decision`), and makes a `WriteJob`, from which `bake.write`
makes the `Written` output. `Baked` holds the job and what was written.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from crdiff_export.bake import destination, metadata, modelspec, residual, write
from crdiff_export.bake.modelspec import Thumbnail
from crdiff_export.bake.source_hashes import SourceHashes
from crdiff_export.bake.write import Failure, WriteJob, Written
from crdiff_export.errors import OptionError, PlanError
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.crdiff_keys import CalibrationStamp, Stamp
from crdiff_export.hub import bases
from crdiff_export.models.families import LayoutName, load_family
from crdiff_export.models.layouts import change_layout
from crdiff_export.packs import Pack, use
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import architecture, kernels
from crdiff_export.prune.architecture import Architecture
from crdiff_export.prune.criteria import Ranked
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan, recognise
from crdiff_export.prune.plan_request import PlanRequest, plan_variant
from crdiff_export.prune.ranking import rank
from crdiff_export.prune.threshold import Threshold


@dataclass(frozen=True, slots=True)
class ExportRequest(PlanRequest):
    """What to prune, as in `PlanRequest`, and where and how to write it.

    Attributes:
        output: Where to write; None for `STEM-crdiff-WxH` in the current folder.
        device: The device that computes: `auto`, `cpu`, or one of torch's.
        residual: Where to keep the pruned values: `none`, `embed` or `sidecar`.
        hashing: Write the SHA-256 of base and output into the header.
        force: Replace an output that exists.
        all_files: Copy files of a diffusers folder that are no part of its pipeline, too.
        threads: Threads on the CPU; None for all cores.
        thumbnail: A picture for the header, which `verify` does not look at.
        rehash: Hash the base anew, whatever the user's cache of hashes says.
        pack: Has decided already what goes at the size, in place of recipe, ratios and criterion.
        layout: The layout to write, `original` or `diffusers`; None for the base's.
    """

    output: Path | None = None
    _: KW_ONLY
    device: str = "auto"
    residual: str = residual.NONE
    hashing: bool = True
    force: bool = False
    all_files: bool = False
    threads: int | None = None
    thumbnail: Thumbnail | None = None
    rehash: bool = False
    pack: Pack | None = None
    layout: LayoutName | None = None


@dataclass(frozen=True, slots=True)
class ExportJob:
    """A request that has been checked and planned: what `--dry-run` shows."""

    request: ExportRequest
    base: bases.Base
    criterion: CriterionChoice
    plan: Plan
    target: Path

    @property
    def space(self) -> destination.DiskSpace:
        """The disk space that it needs; ties between weights can make it more."""
        return destination.measure_space(self.plan, self.target, self.request.residual)


@dataclass(frozen=True, slots=True)
class Baked:
    """A finished export. `notes` are what only the weights have shown; earlier notes are the plan's."""

    job: ExportJob
    thresholds: tuple[Threshold, ...]
    stamp: Stamp
    written: Written
    notes: tuple[str, ...] = ()


def export(request: ExportRequest, progress: Progress | None = None) -> Baked:
    """Prune a base for a size and write it with its metadata.

    The file appears under its name only when it is complete and has been checked.

    Args:
        request: What to export.
        progress: Is told how far the export is, and may interrupt it.

    Returns:
        The finished export.

    Raises:
        CrdiffError: The export is not possible; nothing is left behind.
    """
    return run(prepare(request), progress or Silent())


def prepare(request: ExportRequest) -> ExportJob:
    """Find the base, read its headers, and plan the export, before a weight is read.

    Raises:
        CrdiffError: The export is not possible.
    """
    (job,) = prepare_all((request,))
    return job


def prepare_all(requests: Sequence[ExportRequest]) -> list[ExportJob]:
    """Find a base, read its headers, and plan several exports of it.

    Args:
        requests: Exports of one base that differ only in size, ratios and output.

    Returns:
        The planned exports, which `run_together` takes.

    Raises:
        OptionError: Two of them would write the same output.
        CrdiffError: One of the exports is not possible.
    """
    request = requests[0]
    criterion = CriterionChoice.of(request.criterion, request.calibration)
    residual.check_request(request.residual, criterion, hashing=request.hashing)
    if request.pack and not request.hashing:
        raise OptionError("--no-hash: only its hash tells that a base is the pack's", "Leave --no-hash out.")
    modelspec.date()  # raises now rather than when the file is written
    base = bases.locate(request.base, request.variant)
    checkpoint = in_layout(request, base.open(request.variant, all_files=request.all_files))
    jobs = [prepare_located(each, criterion, base, checkpoint) for each in requests]
    if request.pack:
        use.check_one_cast(request.pack, [job.plan for job in jobs])
    targets = Counter(job.target for job in jobs)
    if twice := [target for target, count in targets.items() if count > 1]:
        raise OptionError(f"{twice[0]}: {targets[twice[0]]} sizes have this output", "Give each a name of its own.")
    return jobs


def in_layout(request: ExportRequest, checkpoint: Checkpoint) -> Checkpoint:
    """See a base in the layout that a request asks for.

    Args:
        request: What to export.
        checkpoint: The base's headers.

    Returns:
        The base in that layout; itself where it has it.

    Raises:
        PlanError: The layout of this base cannot be changed.
        OptionError: All files of the folder are to be copied, too.
        FamilyError: The base is of no family.
    """
    if request.layout is None:
        return checkpoint
    if request.all_files:
        raise OptionError("--all-files: an output in another layout has no place for them", "Leave it out.")
    family = load_family(request.family) if request.family else None
    if request.pack and request.pack.family.table:
        family = request.pack.family
    match = recognise(checkpoint, family)
    native = architecture.of_checkpoint(checkpoint, match, request.native).native
    return change_layout(checkpoint, match, request.layout, native)


def prepare_located(
    request: ExportRequest, criterion: CriterionChoice, base: bases.Base, checkpoint: Checkpoint
) -> ExportJob:
    """Plan the export of a base whose headers have been read.

    Args:
        request: What to export.
        criterion: Its criterion, resolved.
        base: The base.
        checkpoint: Its headers.

    Returns:
        The planned export.

    Raises:
        CrdiffError: The export is not possible.
    """
    residual.check_base(checkpoint, request.residual, request.dtype)
    target = destination.choose_target(
        checkpoint, request.size, request.output, base.stem, request.residual, force=request.force
    )
    if request.pack:
        planned = use.plan_size(request.pack, request, checkpoint)
    else:
        planned = plan_variant(request, checkpoint, criterion)
    destination.check_headers(planned)
    return ExportJob(request, base, criterion, planned, target)


def run(job: ExportJob, progress: Progress) -> Baked:
    """Read the weights, decide which of them go, and write the output.

    Args:
        job: The planned export.
        progress: Is told how far the work is, and may interrupt it.

    Returns:
        The finished export.

    Raises:
        CrdiffError: The export failed; nothing is left behind.
    """
    (result,) = run_together((job,), progress)
    if isinstance(result, Failure):
        raise result.error
    return result


def run_together(jobs: Sequence[ExportJob], progress: Progress) -> Iterator[Baked | Failure]:
    """Run jobs for one base and write all outputs from one reading.

    A criterion that moves weights keeps the moved layers in memory, so its outputs are written one after the other.

    Args:
        jobs: Jobs for one checkpoint that differ only in size, ratios and output.
        progress: Is told how far the work is, and may interrupt it.

    Yields:
        For each job its finished export, or why that output failed.

    Raises:
        CrdiffError: The base cannot be read or ranked, which concerns all jobs that are left.
    """
    destination.check_space(*(job.space for job in jobs))
    with _rank(jobs, progress) as ranking:
        for batch in [[job] for job in jobs] if jobs[0].criterion.moves else [jobs]:
            yield from ranking.write(batch)


def run_in_turn(jobs: Sequence[ExportJob], progress: Progress) -> Iterator[Baked | Failure]:
    """Run jobs for one base and write each output when the caller asks for it.

    So the disk has to hold no more outputs than the caller keeps. The base is ranked and hashed once.

    Args:
        jobs: Jobs for one checkpoint that differ only in size, ratios and output.
        progress: Is told how far the work is, and may interrupt it.

    Yields:
        For each job its finished export, or why that output failed.

    Raises:
        CrdiffError: The base cannot be read or ranked, which concerns all jobs that are left.
    """
    with _rank(jobs, progress) as ranking:
        for job in jobs:
            yield from ranking.write([job])


@dataclass(frozen=True, slots=True)
class _Ranking:
    """A base whose weights have been ranked, and what its exports have in common."""

    calibrated: CalibrationStamp | None
    ranked: Ranked
    architecture: Architecture
    kernel: kernels.Kernel
    hashes: SourceHashes | None
    progress: Progress

    def write(self, jobs: Sequence[ExportJob]) -> Iterator[Baked | Failure]:
        """Decide which weights go, and write the outputs from one reading."""
        write_jobs = [self._write_job(job) for job in jobs]
        try:
            destination.check_space(*(write_job.space for write_job in write_jobs))
        except PlanError as error:
            yield from (Failure(job.target, error) for job in jobs)
            return
        results = write.write(write_jobs, self.kernel, self.progress, hashes=self.hashes)
        for job, write_job, result in zip(jobs, write_jobs, results, strict=True):
            if isinstance(result, Failure):
                yield result
            else:
                decision = write_job.decision
                assert write_job.stamp
                yield Baked(job, decision.thresholds, write_job.stamp, result, decision.notes)

    def _write_job(self, job: ExportJob) -> WriteJob:
        request, decision = job.request, self.ranked.decide(job.plan, self.progress)
        stamp = metadata.stamp(
            job.plan, decision, job.criterion.name, job.base.name, self.architecture,
            residual.RESIDUAL_KEYS[request.residual], self.calibrated,
        )  # fmt: skip
        base_hashes = {}
        if request.pack:
            stamp = use.complete_stamp(request.pack, job.plan, stamp)
            if not job.plan.checkpoint.origin:
                pairs = request.pack.match_files(job.plan.checkpoint)
                base_hashes = {file.name: stated.data_hash for file, stated in pairs}
        return WriteJob(
            job.plan, decision, stamp, self.architecture, job.target, replace=request.force,
            residual=request.residual, thumbnail=request.thumbnail, base_hashes=base_hashes,
        )  # fmt: skip


@contextmanager
def _rank(jobs: Sequence[ExportJob], progress: Progress) -> Iterator[_Ranking]:
    """Read the base that the jobs share and rank its weights, while a thread hashes it."""
    request, criterion = jobs[0].request, jobs[0].criterion
    plans = [job.plan for job in jobs]
    hashing = SourceHashes(plans, _known_hashes(jobs), cached=not request.rehash) if request.hashing else nullcontext()
    with hashing as hashes:
        kernel = kernels.load(request.device, request.threads)
        calibrated = criterion.calibrated(progress)
        if request.pack:
            checkpoint, known = jobs[0].plan.checkpoint, jobs[0].base.hashes
            use.check_known_hashes(request.pack, checkpoint, known, progress, rehash=request.rehash)
            ranked = use.ranked(request.pack, plans, kernel, progress)
        else:
            ranked = rank(criterion, plans, kernel, progress, request.device)
        yield _Ranking(calibrated, ranked, architecture.find(plans[0]), kernel, hashes, progress)


def _known_hashes(jobs: Sequence[ExportJob]) -> Mapping[str, str]:
    """Return the files' hashes that the Hub told; none if a pickle's restore will need the hash of its tensors."""
    pickled = any(file.reader for file in jobs[0].plan.checkpoint.files)
    restorable = any(job.request.residual != residual.NONE for job in jobs)
    return {} if pickled and restorable else jobs[0].base.hashes


__all__ = [
    "Baked", "ExportJob", "ExportRequest", "Failure", "export", "plan_variant", "prepare", "prepare_all",
    "prepare_located", "run", "run_in_turn", "run_together",
]  # fmt: skip
