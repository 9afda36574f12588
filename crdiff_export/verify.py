"""Does a baked file hold what its header says; and, given the base, is it byte for byte what an export makes of it."""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crdiff_export import bases, criteria, families, floats, kernels, plan, residual, weights
from crdiff_export.baked import DATA_HASH, FILE_HASH, REPAIR, BakedCheckpoint, open_baked
from crdiff_export.checkpoint import Checkpoint, open_checkpoint
from crdiff_export.errors import CheckpointError, VerifyError
from crdiff_export.hashing import SourceHashes, hash_data, hash_file
from crdiff_export.header import show
from crdiff_export.keeping import Comparing, base_head
from crdiff_export.kernels import Kernel
from crdiff_export.plan import Output, Plan, Scope, Target
from crdiff_export.progress import Progress, Silent
from crdiff_export.residual import EMBED, NONE, SAID, SIDECAR, Kept
from crdiff_export.source import SourceFile
from crdiff_export.stamp import Stamp
from crdiff_export.threshold import Threshold
from crdiff_export.weights import Chunk, Pruning, Stream

# diffusers' `_add_variant`: the variant stands before the number of the shard.
_VARIANT = re.compile(r"(?:.*/)?diffusion_pytorch_model\.([\w-]+?)(?:-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found to hold: counts and thresholds always, the hash where the header has one, the base if given.

    `residual` is what the header says of it, or `missing`: a sidecar that is not there and so was not checked.
    """

    path: Path
    stamp: Stamp
    weights: int
    hashed: bool
    base: Path | None
    residual: str = NONE


def verify(path: Path, base: str | None, progress: Progress, device: str = "auto") -> Verified:
    """Check a baked file or folder; VerifyError names the first thing that does not hold.

    Without a base it cannot be known whether the weights that stay, or the zeros, are those that should; the hash, if
    there is one, only tells that they are what was written.
    """
    baked = open_baked(path)
    stamp, planned, thresholds = baked.stamp, baked.plan, baked.thresholds
    _refuse_sparse(baked.checkpoint)
    _check_weights(planned, thresholds, stamp, progress)
    hashed = _check_hashes(planned, progress)
    kept = _check_residual(baked, progress)
    origin = _check_base(planned, thresholds, stamp, base, kept, kernels.load(device), progress) if base else None
    said = stamp.residual if kept or stamp.residual == SAID[NONE] else "missing"
    return Verified(path, stamp, sum(scope.count for scope in planned.scopes), hashed, origin, said)


def _refuse_sparse(checkpoint: Checkpoint) -> None:
    for file in checkpoint.files:
        if file.is_sparse:
            raise VerifyError(
                f"{file.path}: its header holds, but its weights cannot be checked: the file is mostly a hole",
                "Fetch the whole file, then verify it again.",
            )


@dataclass(slots=True)
class _Found:
    """Weights of one scope: +0.0, not above the threshold for all that, and not finite."""

    zeros: int = 0
    left: int = 0
    nonfinite: int = 0


def _check_weights(planned: Plan, thresholds: Sequence[Threshold], stamp: Stamp, progress: Progress) -> None:
    """Count what the targets hold; VerifyError where a weight is left that should be zero, or too many are."""
    path = planned.checkpoint.path
    found = [_Found() for _ in planned.scopes]
    pruned = [t for t in planned.targets if thresholds[t.scope].bits is not None]
    progress.stage("counting", sum(t.count * t.source.itemsize for t in pruned))
    for target in pruned:
        before = found[target.scope].left
        _survey(planned.checkpoint.files[target.file], target, thresholds[target.scope], found[target.scope], progress)
        if left := found[target.scope].left - before:
            raise VerifyError(f"{path}: {show(target.name)} has {left} weights that should be zero", REPAIR)
    for name in planned.groups:
        scopes = [(scope, some) for scope, some in zip(planned.scopes, found, strict=True) if scope.group == name]
        _compare_counts(path, name, stamp, scopes)


def _compare_counts(path: Path, name: str, stamp: Stamp, scopes: Sequence[tuple[Scope, _Found]]) -> None:
    said = stamp.groups[name]
    zeros, nonfinite = sum(found.zeros for _, found in scopes), sum(found.nonfinite for _, found in scopes)
    if zeros != said.pruned:
        raise VerifyError(f"{path}: {zeros} weights of {name} are zero, crdiff.pruned.{name} is {said.pruned}", REPAIR)
    if nonfinite != said.nonfinite:
        raise VerifyError(
            f"{path}: {nonfinite} weights of {name} are not finite, crdiff.nonfinite.{name} is {said.nonfinite}",
            REPAIR,
        )
    for scope, found in scopes:
        if found.zeros < min(scope.rank, scope.count - found.nonfinite):
            raise VerifyError(
                f"{path}: {found.zeros} weights of {show(scope.name)} are zero, "
                f"crdiff.ratio.{name} asks for {scope.rank}",
                REPAIR,
            )


def _survey(file: SourceFile, target: Target, threshold: Threshold, found: _Found, progress: Progress) -> None:
    """Count a target's weights, a chunk at a time."""
    import numpy as np

    form = floats.FORMATS[target.source.dtype]
    limit = min(floats.limit(form.dtype, threshold.bits or 0), form.first_nonfinite - 1)
    start, stop = target.span(target.source)
    buffer = memoryview(bytearray(min(weights.CHUNK, stop - start)))
    with contextlib.closing(file.open()) as reader:
        for place in range(start, stop, weights.CHUNK):
            part = buffer[: min(weights.CHUNK, stop - place)]
            reader.read_into(place, part)
            bits = np.frombuffer(part, f"<u{form.itemsize}")
            magnitudes = bits & bits.dtype.type(form.mask)
            zeros = bits.size - int(np.count_nonzero(bits))
            found.zeros += zeros
            found.left += int(np.count_nonzero(magnitudes <= limit)) - zeros
            found.nonfinite += int(np.count_nonzero(magnitudes >= form.first_nonfinite))
            progress.advance(len(part))


def _check_hashes(planned: Plan, progress: Progress) -> bool:
    """Hash every file whose header has a hash; False where none has."""
    said = [output.source.metadata.get("modelspec.hash_sha256") for output in planned.outputs]
    if not any(said):
        return False
    progress.stage("hashing", planned.data_size)
    for output, expected in zip(planned.outputs, said, strict=True):
        actual = "0x" + hash_data(output.source, progress)
        if actual != expected:
            says = show(expected or "nothing")
            raise VerifyError(f"{output.source.path}: its bytes hash to {actual}, its header says {says}", REPAIR)
    return True


def _check_residual(baked: BakedCheckpoint, progress: Progress) -> tuple[Kept, ...]:
    """The residuals, after a check that they are what was written; none where a sidecar is not there."""
    said, files = baked.stamp.residual, baked.checkpoint.files
    beside = said == SAID[SIDECAR]
    if said == SAID[NONE] or (beside and not all(residual.sidecar(file.path).exists() for file in files)):
        return ()
    kept = residual.find(baked)
    if beside:
        progress.stage("hashing", sum(one.file.data_size for one in kept))
        for one in kept:
            residual.check_hash(one.file, residual.OWN_HASH, hash_data(one.file, progress))
    return kept


def _check_base(
    planned: Plan,
    thresholds: Sequence[Threshold],
    stamp: Stamp,
    base: str,
    kept: Sequence[Kept],
    kernel: Kernel,
    progress: Progress,
) -> Path:
    """Export the base again, into a comparison instead of a file."""
    named = _VARIANT.fullmatch(planned.outputs[0].source.name)
    variant = named[1] if named and planned.checkpoint.kind == "folder" else None
    located = bases.locate(base, variant).path
    checkpoint = open_checkpoint(located, variant)
    match = families.detect(checkpoint.shapes)
    if match.family.id != stamp.family or match.layout.name != stamp.layout:
        raise VerifyError(
            f"{located}: {match.family.title} ({match.layout.name}), the file is {stamp.family} ({stamp.layout})",
            "Give the base that the file was made from; `crdiff inspect` names it.",
        )
    _refuse_sparse(checkpoint)
    again = plan.make(
        checkpoint, match, stamp.resolution, planned.variant, stamp.recipe,
        kinds=stamp.targets, cast=stamp.cast, allow_nonfinite=True,
    )  # fmt: skip
    _check_same_tensors(planned, again)
    (derived,) = criteria.by_name(stamp.criterion)([again], kernel, progress)
    for scope, ours, theirs in zip(again.scopes, derived, thresholds, strict=True):
        if ours.bits != theirs.bits:
            raise VerifyError(
                f"{located}: gives {show(scope.name)} the threshold {ours.value}, the file has {theirs.value}",
                "The file was made from another base; `crdiff inspect` names it.",
            )
    progress.stage("comparing", again.data_size)
    whole = {o.source.name: f.metadata.get(FILE_HASH, "") for o, f in _pairs(again, planned)}
    hashed = any(f.metadata.get(DATA_HASH) for f in planned.checkpoint.files)
    with SourceHashes([again], whole) if hashed else contextlib.nullcontext() as hashes:
        for number, (output, file) in enumerate(_pairs(again, planned)):
            stream = Stream([Pruning(again, derived, keep=bool(kept))], number, kernel, chunk=weights.CHUNK)
            _compare(stream, output, file, kept[number] if kept else None, progress)
            if hashes and not hashes.known(number):
                _check_source(output.source, file, DATA_HASH, hashes.digest(number))
            if FILE_HASH in file.metadata:
                _check_source(output.source, file, FILE_HASH, _hash_whole(output.source))
    return located


def _pairs(base: Plan, baked: Plan) -> list[tuple[Output, SourceFile]]:
    """What each file should be, by its base, and the file."""
    return list(zip(base.outputs, baked.checkpoint.files, strict=True))


def _hash_whole(source: SourceFile) -> str:
    try:
        return hash_file(source.path, Silent())
    except OSError as error:
        raise CheckpointError(f"{source.path}: reading failed: {error.strerror}", "Check the disk.") from error


def _check_source(source: SourceFile, baked: SourceFile, key: str, actual: str | None) -> None:
    if (said := baked.metadata.get(key)) != f"0x{actual}":
        raise VerifyError(f"{source.path}: its bytes hash to 0x{actual}, {key} of {baked.path.name} is {said}", REPAIR)


def _check_same_tensors(baked: Plan, base: Plan) -> None:
    if len(baked.outputs) != len(base.outputs):
        raise VerifyError(
            f"{baked.checkpoint.path}: has {len(baked.outputs)} files, the base {len(base.outputs)}", REPAIR
        )
    for ours, theirs in zip(baked.outputs, base.outputs, strict=True):
        own = residual.own(ours.tensors) if ours.source.metadata.get("crdiff.residual") == SAID[EMBED] else ()
        if {t.name: t for t in ours.tensors if t not in own} != {t.name: t for t in theirs.tensors}:
            raise VerifyError(f"{ours.source.path}: its tensors are not those of {theirs.source.path}", REPAIR)


def _compare(stream: Stream, output: Output, baked: SourceFile, kept: Kept | None, progress: Progress) -> None:
    """Hold a baked file's bytes, and its residual's, against the stream of those that its base gives."""
    import numpy as np

    buffer = memoryview(bytearray(weights.CHUNK))
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(contextlib.closing(baked.open()))
        values = stack.enter_context(Comparing(kept, base_head(output.source))) if kept else None
        chunks = stack.enter_context(contextlib.closing(stream.chunks()))
        for chunk in chunks:
            actual = buffer[: len(chunk.data)]
            reader.read_into(chunk.start, actual)
            same = np.frombuffer(actual, np.uint8) == np.frombuffer(chunk.data, np.uint8)
            if not same.all():
                raise VerifyError(
                    f"{baked.path}: {_place(output, chunk, int(same.argmin()))} is not what the base gives", REPAIR
                )
            if values:
                values.compare(chunk.removed)
            progress.advance(len(actual))
        if values:
            values.finish()


def _place(output: Output, chunk: Chunk, byte: int) -> str:
    place = chunk.start + byte
    tensor = next(t for t in output.tensors if t.start <= place < t.end)
    return f"{show(tensor.name)} at byte {place - tensor.start}"
