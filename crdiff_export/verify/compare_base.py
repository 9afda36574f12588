"""Hold a baked file against the base that it was made from: the export once more, into a comparison."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from crdiff_export.bake import residual
from crdiff_export.bake import stream as weights
from crdiff_export.bake.residual import EMBED, SAID, Kept
from crdiff_export.bake.residual_writer import Comparing, base_head
from crdiff_export.bake.source_hashes import SourceHashes
from crdiff_export.bake.stream import Chunk, Cut, Pruning, Stream
from crdiff_export.errors import CheckpointError, VerifyError
from crdiff_export.formats.checkpoint import Checkpoint, open_checkpoint
from crdiff_export.formats.hashing import hash_file
from crdiff_export.formats.safetensors import show
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.hub import bases
from crdiff_export.models import families
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import kernels, plan
from crdiff_export.prune.criteria import Decision
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Output, Plan
from crdiff_export.verify.reopen import (
    DATA_HASH,
    FILE_HASH,
    REPAIR,
    BakedCheckpoint,
    decision,
    raw,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Ours: how far weights that were moved may be from what this machine makes of them, in units in the last place. The
# last bits of a matrix's factors differ between processors and libraries, and then a few weights in a million are
# rounded to their neighbours.
ULPS: Final = 2
# diffusers' `_add_variant`: the variant stands before the number of the shard.
_VARIANT = re.compile(r"(?:.*/)?diffusion_pytorch_model\.([\w-]+?)(?:-\d{5}-of-\d{5})?\.safetensors")
_NAMED: Final = "Give the base that the file was made from; `crdiff inspect` names it."
_OTHER: Final = "The file was made from another base; `crdiff inspect` names it."


def check_base(
    baked: BakedCheckpoint,
    base: str,
    criterion: CriterionChoice | None,
    kept: Sequence[Kept],
    device: str,
    progress: Progress,
) -> Path:
    """Export the base again, by `criterion`, into a comparison instead of a file; where the base lies.

    Without `criterion` the file's own zeros are taken for the mask, and moved weights are not looked at.
    """
    planned, stamp = baked.plan, baked.stamp
    again = _again(baked, base)
    _check_same_tensors(planned, again)
    kernel = kernels.load(device)
    # Without what has decided, the file's own zeros have: all else has to be the base's.
    decided = decision(baked, progress, moved=False)
    if criterion:
        derived = criterion.rank([again], kernel, progress, device).decide(again, progress)
        _compare_decisions(baked, again, derived, decided)
        decided = derived
        _check_moved(baked, again, derived)
    open_to_question = [weights.places(again, n) for n in range(len(again.outputs))] if stamp.moved else []
    progress.stage("comparing", again.data_size)
    whole = {o.source.name: f.metadata.get(FILE_HASH, "") for o, f in _pairs(again, planned)}
    hashed = any(f.metadata.get(DATA_HASH) for f in planned.checkpoint.files)
    with SourceHashes([again], whole) if hashed else contextlib.nullcontext() as hashes:
        for number, (output, file) in enumerate(_pairs(again, planned)):
            stream = Stream([Pruning(again, decided, keep=bool(kept))], number, kernel, chunk=weights.CHUNK)
            skipped = open_to_question[number] if open_to_question else ()
            _compare(stream, output, file, kept[number] if kept else None, skipped, progress)
            if hashes and not hashes.known(number):
                _check_source(output.source, file, DATA_HASH, hashes.digest(number))
            if FILE_HASH in file.metadata:
                _check_source(output.source, file, FILE_HASH, _hash_whole(output.source))
    return again.checkpoint.path


def _again(baked: BakedCheckpoint, base: str) -> Plan:
    """The plan of the base's export."""
    planned, stamp = baked.plan, baked.stamp
    named = _VARIANT.fullmatch(planned.outputs[0].source.name)
    variant = named[1] if named and planned.checkpoint.kind == "folder" else None
    located = bases.locate(base, variant).path
    checkpoint = open_checkpoint(located, variant)
    match = families.detect(checkpoint.shapes)
    if match.family.id != stamp.family or match.layout.name != stamp.layout:
        raise VerifyError(
            f"{located}: {match.family.title} ({match.layout.name}), the file is {stamp.family} ({stamp.layout})",
            _NAMED,
        )
    refuse_sparse(checkpoint)
    return plan.make(
        checkpoint, match, stamp.resolution, planned.variant, stamp.recipe,
        kinds=stamp.targets, cast=stamp.cast, allow_nonfinite=True,
    )  # fmt: skip


def _compare_decisions(baked: BakedCheckpoint, again: Plan, ours: Decision, theirs: Decision) -> None:
    """VerifyError where the base gives other thresholds or masks than the file has."""
    located = again.checkpoint.path
    if ours.masks is None:
        for scope, own, other in zip(again.scopes, ours.thresholds, theirs.thresholds, strict=True):
            if own.bits != other.bits:
                raise VerifyError(
                    f"{located}: gives {show(scope.name)} the threshold {own.value}, the file has {other.value}", _OTHER
                )
        return
    if bool(ours.moved) != baked.stamp.moved:
        moves = "moves" if ours.moved else "does not move"
        raise VerifyError(
            f"{located}: {show(baked.stamp.criterion)} {moves} weights, crdiff.moved says otherwise", REPAIR
        )
    same_file = "The file was made from another base, or on a machine that rounds otherwise."
    for target, mine, their in zip(again.targets, ours.masks, theirs.masks or (), strict=True):
        if mine and their and (differ := int((mine.unpack() != their.unpack()).sum())):
            raise VerifyError(
                f"{located}: {differ} of {mine.count} weights of {show(target.name)} go otherwise", same_file
            )


def _check_moved(baked: BakedCheckpoint, again: Plan, ours: Decision) -> None:
    """VerifyError where weights that were moved are not those that the calibration gives, but for their last bits."""
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(contextlib.closing(file.open())) for file in baked.checkpoint.files]
        for number, mine in ours.moved.items():
            target = baked.plan.targets[number]
            if differ := _apart(raw(readers[target.file], target), mine):
                raise VerifyError(
                    f"{baked.checkpoint.path}: {differ} of {target.count} weights of {show(target.name)} are not what "
                    f"{again.checkpoint.path} and the calibration give",
                    "It was made from others, or changed since: export it again.",
                )


def _apart(one: "NDArray[Any]", other: "NDArray[Any]") -> int:
    """How many numbers, given as raw bits, are further apart than `ULPS`, or differ in sign."""
    import numpy as np

    bits = 8 * one.itemsize - 1
    signs = (one >> bits) != (other >> bits)
    sizes = [(some & ((1 << bits) - 1)).astype(np.int64) for some in (one, other)]
    return int(np.count_nonzero(signs | (np.abs(sizes[0] - sizes[1]) > ULPS)))


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


def _compare(
    stream: Stream, output: Output, baked: SourceFile, kept: Kept | None, skipped: Sequence[Cut], progress: Progress
) -> None:
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
            for cut in skipped:
                same[max(cut.start - chunk.start, 0) : max(cut.stop - chunk.start, 0)] = True
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


def refuse_sparse(checkpoint: Checkpoint) -> None:
    """VerifyError for a file that has no weights on the disk."""
    for file in checkpoint.files:
        if file.is_sparse:
            raise VerifyError(
                f"{file.path}: its header holds, but its weights cannot be checked: the file is mostly a hole",
                "Fetch the whole file, then verify it again.",
            )
