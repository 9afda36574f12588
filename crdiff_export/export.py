"""READ FIRST: the whole story, from a base to a pruned checkpoint."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from crdiff_export import (
    architecture,
    bake,
    bases,
    criteria,
    destination,
    kernels,
    metadata,
    plan,
    recipe,
    recipe_files,
)
from crdiff_export.checkpoint import Checkpoint, open_checkpoint
from crdiff_export.errors import RecipeError
from crdiff_export.families import Match
from crdiff_export.floats import DTYPES
from crdiff_export.hashing import SourceHashes
from crdiff_export.plan import Output, Plan
from crdiff_export.progress import Progress, Silent
from crdiff_export.recipe import Size, Variant
from crdiff_export.stamp import Stamp
from crdiff_export.threshold import Threshold


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What someone wants: which base, for which size, and everything they do not want to leave to us.

    `ratios` are per group and `ratio` is for all of them; either overrides the recipe. `dtype` is fp16, bf16 or fp32.
    `variant` names the weights to take from a folder that has several (`fp16`).
    """

    base: str
    size: Size
    output: Path | None = None
    recipe: Path | None = None
    ratio: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    poa_weight: float | None = None
    targets: tuple[str, ...] | None = None
    criterion: str = "magnitude"
    device: str = "auto"
    dtype: str | None = None
    variant: str | None = None
    hashing: bool = True
    force: bool = False
    allow_nonfinite: bool = False
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A request that nothing stands against: what `--dry-run` shows."""

    request: ExportRequest
    base: bases.Base
    plan: Plan
    target: Path
    space: destination.Space


@dataclass(frozen=True, slots=True)
class Baked:
    """A finished export."""

    job: Job
    thresholds: tuple[Threshold, ...]
    stamp: Stamp
    written: bake.Written


def prepare(request: ExportRequest) -> Job:
    """Find the base, read its headers, and plan; any refusal comes from here, before a weight is read."""
    base = bases.locate(request.base, request.variant)
    checkpoint = open_checkpoint(base.path, request.variant)
    match = plan.recognise(checkpoint)
    variant, recipe_name, notes = _choose(request, match)
    planned = plan.make(
        checkpoint, match, request.size, variant, recipe_name,
        kinds=request.targets, cast=DTYPES[request.dtype] if request.dtype else None,
        allow_nonfinite=request.allow_nonfinite, notes=notes,
    )  # fmt: skip
    target = destination.place(planned, request.output, base.stem, force=request.force)
    return Job(request, base, planned, target, destination.space(planned, target))


def export(request: ExportRequest, progress: Progress | None = None) -> Baked:
    """Prune a base for a size and write it with its metadata; raises a CrdiffError and leaves no trace if it cannot.

    The file appears under its name only when it is complete and has been checked.
    """
    return run(prepare(request), progress or Silent())


def run(job: Job, progress: Progress) -> Baked:
    """Do what was planned: count to find the thresholds, then write."""
    destination.check_space(job.space)
    with SourceHashes(job.plan) if job.request.hashing else nullcontext() as hashes:
        return _run(job, hashes, progress)


def _run(job: Job, hashes: SourceHashes | None, progress: Progress) -> Baked:
    request, planned = job.request, job.plan
    kernel = kernels.load(request.device, request.threads)
    thresholds = criteria.by_name(request.criterion)(planned, kernel, progress)
    model = architecture.find(planned)
    stamp = metadata.stamp(planned, thresholds, request.criterion, job.base.name, model)

    def compose(output: Output, source_hash: str | None, output_hash: str | None) -> Mapping[str, str]:
        return metadata.header(planned, stamp, model, output.source.metadata, source_hash, output_hash)

    written = bake.write(
        planned, thresholds, job.target, compose, kernel, progress, hashes=hashes, replace=request.force
    )
    return Baked(job, thresholds, stamp, written)


def _choose(request: ExportRequest, match: Match) -> tuple[Variant, str, tuple[str, ...]]:
    """The numbers: from the user's recipe or the family's own, for this size or the nearest, overridden where asked."""
    family = match.family
    found = recipe_files.load(request.recipe) if request.recipe else recipe_files.by_alias(family.id)
    if found is None or found.family != family.id:
        raise RecipeError(
            f"{request.recipe}: not a recipe for {family.title}, which {request.base} is",
            "Leave --recipe out, or give one for this family.",
        )
    recipe.check_grid(request.size, family.grid, family.title)
    choice = recipe.choose(found, request.size)
    recipe.check_groups(choice.variant, family.groups, found.name)
    variant = recipe.override(
        choice.variant, family.groups, ratio=request.ratio, per_group=request.ratios, poa_weight=request.poa_weight
    )
    # Not a word about a size whose numbers nobody takes.
    given = request.ratio is not None or request.ratios.keys() >= set(family.groups)
    return variant, found.name, (choice.note,) if choice.note and not given else ()


__all__ = ["Baked", "Checkpoint", "ExportRequest", "Job", "export", "prepare", "run"]
