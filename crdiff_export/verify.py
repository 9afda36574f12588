"""Does a baked file hold what its header says; and, given the base, is it byte for byte what an export makes of it."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crdiff_export import bases, criteria, families, floats, kernels, metadata, plan, weights
from crdiff_export.checkpoint import Checkpoint, SourceFile, open_checkpoint
from crdiff_export.errors import VerifyError
from crdiff_export.header import show
from crdiff_export.kernels import Kernel
from crdiff_export.metadata import Stamp
from crdiff_export.plan import Output, Plan, Target
from crdiff_export.progress import Progress
from crdiff_export.recipe import Variant
from crdiff_export.threshold import Threshold
from crdiff_export.weights import Chunk, Stream

REPAIR = "Do not use the file; export it again from its base."


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found to hold: counts and thresholds always, the hash where the header has one, the base if given."""

    path: Path
    stamp: Stamp
    weights: int
    hashed: bool
    base: Path | None


def verify(path: Path, base: str | None, progress: Progress, device: str = "auto") -> Verified:
    """Check a baked file or folder; VerifyError names the first thing that does not hold."""
    checkpoint = open_checkpoint(path)
    stamp = _stamp(checkpoint)
    kernel = kernels.load(device)
    planned = _plan(checkpoint, stamp)
    thresholds = _thresholds(planned, stamp)
    _refuse_sparse(checkpoint)
    hashed = _check_bytes(planned, thresholds, stamp, progress)
    origin = _check_base(planned, thresholds, stamp, base, kernel, progress) if base else None
    return Verified(path, stamp, sum(scope.count for scope in planned.scopes), hashed, origin)


def _stamp(checkpoint: Checkpoint) -> Stamp:
    stamps = [metadata.Stamp.from_metadata(file.metadata, str(file.path)) for file in checkpoint.files]
    for file, stamp in zip(checkpoint.files, stamps, strict=True):
        if _shared(stamp) != _shared(stamps[0]):
            raise VerifyError(f"{file.path}: its header is of another export than its neighbours'", REPAIR)
    return stamps[0]


def _shared(stamp: Stamp) -> dict[str, str]:
    """All that the files of one export have in common: everything but the hash of each one's source."""
    keys = stamp.to_metadata()
    keys.pop("crdiff.source.hash_sha256", None)
    return keys


def _plan(checkpoint: Checkpoint, stamp: Stamp) -> Plan:
    """The plan that made the file, from its header and its layers."""
    match = families.detect(checkpoint.shapes)
    found = match.family.id, match.layout.name, match.prefix
    if found != (stamp.family, stamp.layout, stamp.prefix):
        raise VerifyError(
            f"{checkpoint.path}: its layers are {show(' '.join(found))}, its header says otherwise", REPAIR
        )
    if set(stamp.groups) != set(match.family.groups):
        raise VerifyError(f"{checkpoint.path}: its header has other groups than {match.family.title}", REPAIR)
    variant = Variant(
        resolution=stamp.resolution,
        ratios={name: group.ratio for name, group in stamp.groups.items()},
        poa_weight=stamp.poa_weight,
        provenance="starting-point",
        source=stamp.provenance_source,
    )
    return plan.make(
        checkpoint, match, stamp.resolution, variant, stamp.recipe, kinds=stamp.targets, allow_nonfinite=True
    )


def _thresholds(planned: Plan, stamp: Stamp) -> tuple[Threshold, ...]:
    """The header's thresholds, one per scope, after a check that its counts fit the layers."""
    path = planned.checkpoint.path
    for name in planned.groups:
        total = sum(scope.count for scope in planned.scopes if scope.group == name)
        if stamp.groups[name].total != total:
            raise VerifyError(
                f"{path}: crdiff.total.{name} is {stamp.groups[name].total}, the layers have {total}", REPAIR
            )
    values = [stamp.groups[s.group].threshold for s in planned.scopes] if stamp.thresholds is None else stamp.thresholds
    if len(values) != len(planned.scopes):
        raise VerifyError(
            f"{path}: crdiff.thresholds has {len(values)} values for {len(planned.scopes)} layers", REPAIR
        )
    for scope, value in zip(planned.scopes, values, strict=True):
        if (value is None) != (scope.rank == 0):
            raise VerifyError(f"{path}: the threshold of {show(scope.name)} does not go with its ratio", REPAIR)
    return tuple(
        Threshold(None if value is None else floats.bits(value), 0, scope.count)
        for scope, value in zip(planned.scopes, values, strict=True)
    )


def _refuse_sparse(checkpoint: Checkpoint) -> None:
    for file in checkpoint.files:
        if file.is_sparse:
            raise VerifyError(
                f"{file.path}: its header holds, but its weights cannot be checked: the file is mostly a hole",
                "Fetch the whole file, then verify it again.",
            )


def _check_bytes(planned: Plan, thresholds: Sequence[Threshold], stamp: Stamp, progress: Progress) -> bool:
    """Count the zeros of every target, and hash every file that has a hash."""
    path = planned.checkpoint.path
    zeros = _zeros(planned, thresholds, progress)
    for name, found in zeros.items():
        if found != stamp.groups[name].pruned:
            raise VerifyError(
                f"{path}: {found} weights of {name} are zero, crdiff.pruned.{name} is {stamp.groups[name].pruned}",
                REPAIR,
            )
    hashes = [output.source.metadata.get("modelspec.hash_sha256") for output in planned.outputs]
    if not any(hashes):
        return False
    progress.stage("hashing", planned.data_size)
    for output, expected in zip(planned.outputs, hashes, strict=True):
        actual = "0x" + weights.hash_data(output, progress)
        if actual != expected:
            raise VerifyError(f"{output.source.path}: its bytes hash to {actual}, its header says {expected}", REPAIR)
    return True


def _zeros(planned: Plan, thresholds: Sequence[Threshold], progress: Progress) -> dict[str, int]:
    """The +0.0 of every group that has a threshold; VerifyError where a weight is left that should be one."""
    pruned = [t for t in planned.targets if thresholds[t.scope].bits is not None]
    progress.stage("counting", sum(t.count * t.source.itemsize for t in pruned))
    zeros = dict.fromkeys((t.group for t in pruned), 0)
    for target in pruned:
        found, left = _survey(planned, target, thresholds[target.scope], progress)
        if left:
            raise VerifyError(
                f"{planned.checkpoint.path}: {show(target.name)} has {left} weights that should be zero", REPAIR
            )
        zeros[target.group] += found
    return zeros


def _survey(planned: Plan, target: Target, threshold: Threshold, progress: Progress) -> tuple[int, int]:
    """How many of a target's weights are +0.0, and how many others are not above the threshold."""
    import numpy as np

    form = floats.FORMATS[target.source.dtype]
    limit = min(floats.limit(form.dtype, threshold.bits or 0), form.first_nonfinite - 1)
    start, stop = target.span(target.source)
    zeros = low = 0
    with contextlib.closing(planned.checkpoint.files[target.file].open()) as reader:
        buffer = memoryview(bytearray(min(weights.CHUNK, stop - start)))
        for place in range(start, stop, weights.CHUNK):
            part = buffer[: min(weights.CHUNK, stop - place)]
            reader.read_into(place, part)
            bits = np.frombuffer(part, f"<u{form.itemsize}")
            zeros += bits.size - int(np.count_nonzero(bits))
            low += int(np.count_nonzero((bits & bits.dtype.type(form.mask)) <= limit))
            progress.advance(len(part))
    return zeros, low - zeros


def _check_base(
    planned: Plan, thresholds: Sequence[Threshold], stamp: Stamp, base: str, kernel: Kernel, progress: Progress
) -> Path:
    """Export the base again, into a comparison instead of a file."""
    located = bases.locate(base).path
    checkpoint = open_checkpoint(located)
    match = families.detect(checkpoint.shapes)
    if match.family.id != stamp.family or match.layout.name != stamp.layout:
        raise VerifyError(
            f"{located}: {match.family.title} ({match.layout.name}), the file is {stamp.family} ({stamp.layout})",
            REPAIR,
        )
    again = plan.make(
        checkpoint, match, stamp.resolution, planned.variant, stamp.recipe,
        kinds=stamp.targets, cast=stamp.cast, allow_nonfinite=True,
    )  # fmt: skip
    _check_same_tensors(planned, again)
    derived = criteria.by_name(stamp.criterion)(again, kernel, progress)
    for scope, ours, theirs in zip(again.scopes, derived, thresholds, strict=True):
        if ours.bits != theirs.bits:
            raise VerifyError(
                f"{located}: gives {show(scope.name)} the threshold {ours.value}, the file has {theirs.value}",
                "The file was made from another base; `crdiff inspect` names it.",
            )
    progress.stage("comparing", again.data_size)
    for number, output in enumerate(again.outputs):
        cuts = weights.cuts(again, derived, number)
        _compare(output, cuts, planned.outputs[number].source, kernel, progress)
    return located


def _check_same_tensors(baked: Plan, base: Plan) -> None:
    for ours, theirs in zip(baked.outputs, base.outputs, strict=False):
        if {t.name: t for t in ours.tensors} != {t.name: t for t in theirs.tensors}:
            raise VerifyError(f"{ours.source.path}: its tensors are not those of {theirs.source.path}", REPAIR)
    if len(baked.outputs) != len(base.outputs):
        raise VerifyError(
            f"{baked.checkpoint.path}: has {len(baked.outputs)} files, the base {len(base.outputs)}", REPAIR
        )


def _compare(
    output: Output, cuts: Sequence[weights.Cut], baked: SourceFile, kernel: Kernel, progress: Progress
) -> None:
    stream = Stream(output, cuts, 0, kernel, hashing=False, allow_nonfinite=True)
    actual = memoryview(bytearray(weights.CHUNK))
    reader = baked.open()
    with contextlib.closing(reader), contextlib.closing(stream.chunks()) as chunks:
        for chunk in chunks:
            part = actual[: len(chunk.data)]
            reader.read_into(chunk.start, part)
            if part != chunk.data:
                raise VerifyError(
                    f"{baked.path}: {_first_difference(output, chunk, part)} is not what the base gives", REPAIR
                )
            progress.advance(len(part))


def _first_difference(output: Output, chunk: Chunk, actual: memoryview) -> str:
    place = chunk.start + next(i for i, (a, b) in enumerate(zip(chunk.data, actual, strict=True)) if a != b)
    tensor = next(t for t in output.tensors if t.start <= place < t.end)
    return f"{show(tensor.name)} at byte {place - tensor.start}"
