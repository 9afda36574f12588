"""Write a checkpoint in the other layout, without pruning it: an export that sets no weight to zero."""

from dataclasses import dataclass
from pathlib import Path

from crdiff_export.bake import destination, residual, write
from crdiff_export.bake.source_hashes import SourceHashes
from crdiff_export.bake.write import Failure, WriteJob, Written
from crdiff_export.errors import OptionError
from crdiff_export.formats.dtypes import DTYPES
from crdiff_export.hub import bases
from crdiff_export.models.families import LayoutName, load_family
from crdiff_export.models.layouts import change_layout
from crdiff_export.models.recipe import Variant
from crdiff_export.progress import Progress
from crdiff_export.prune import architecture, kernels, plan
from crdiff_export.prune.architecture import Architecture
from crdiff_export.prune.criteria import Decision
from crdiff_export.prune.plan import Plan
from crdiff_export.prune.threshold import Threshold
from crdiff_export.sizes import Size


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """What to write in another layout.

    Attributes:
        base: A path, a Hub id, an `hf://` address or an alias.
        layout: The layout to write.
        output: Where to write.
        variant: The weights to take from a folder that has several, such as `fp16`.
        dtype: Cast all float tensors to `fp16`, `bf16` or `fp32`; None to keep each as it is.
        family: The table of the base's family; None for any family that is built in or installed.
        native: The size that the base was trained at; None for what it says itself, or its family.
        force: Replace an output that exists.
    """

    base: str
    layout: LayoutName
    output: Path
    variant: str | None = None
    dtype: str | None = None
    family: Path | None = None
    native: Size | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class ConvertJob:
    """A request that has been checked: its base in the new layout, and a plan that prunes nothing."""

    request: ConvertRequest
    plan: Plan
    architecture: Architecture

    @property
    def source_layout(self) -> str:
        """The layout of the base."""
        return "diffusers" if self.request.layout == "original" else "original"


def prepare(request: ConvertRequest) -> ConvertJob:
    """Read the headers of a base, and find every tensor of the new layout in it, before a weight is read.

    Args:
        request: What to write.

    Returns:
        The planned conversion.

    Raises:
        OptionError: The base has that layout already.
        CrdiffError: The base cannot be read, or its layout cannot be changed.
    """
    base = bases.locate(request.base, request.variant)
    checkpoint = base.open(request.variant)
    family = load_family(request.family) if request.family else None
    match = plan.recognise(checkpoint, family)
    if match.layout.name == request.layout:
        raise OptionError(
            f"--layout {request.layout}: {request.base} has that layout already", "Use it as it is, or copy it."
        )
    base_architecture = architecture.of_checkpoint(checkpoint, match, request.native)
    native = base_architecture.native
    changed = change_layout(checkpoint, match, request.layout, native)
    destination.check_target(changed, request.output, force=request.force)
    match = plan.recognise(changed, family)
    nothing = Variant(native, dict.fromkeys(match.family.groups, 0.0), 1.0, "starting-point", "")
    cast = DTYPES[request.dtype] if request.dtype else None
    planned = plan.make(changed, match, native, nothing, "", cast=cast, allow_nonfinite=True)
    destination.check_headers(planned)
    return ConvertJob(request, planned, base_architecture)


def run(job: ConvertJob, progress: Progress) -> Written:
    """Write the checkpoint.

    Args:
        job: The planned conversion.
        progress: Is told how far the work is, and may interrupt it.

    Returns:
        What was written.

    Raises:
        CrdiffError: The conversion failed; nothing is left behind.
    """
    request, planned = job.request, job.plan
    destination.check_space(destination.measure_space(planned, request.output, residual.NONE))
    decision = Decision(tuple(Threshold(None, 0, scope.count) for scope in planned.scopes))
    write_job = WriteJob(planned, decision, None, job.architecture, request.output, replace=request.force)
    with SourceHashes([planned]) as hashes:
        (result,) = write.write([write_job], kernels.load("cpu"), progress, hashes=hashes)
    if isinstance(result, Failure):
        raise result.error
    return result
