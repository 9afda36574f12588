"""Compare a baked file with its base: run the export again, into a comparison instead of a file."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from crdiff_export.bake.destination import companions_size
from crdiff_export.bake.residual import EMBED, RESIDUAL_KEYS, residual_tensors
from crdiff_export.bake.residual_writer import header_of
from crdiff_export.bake.source_hashes import SourceHashes
from crdiff_export.bake.stream import CHUNK, PruneRange, Pruning, Stream, prune_ranges
from crdiff_export.errors import CheckpointError, FamilyError, VerifyError
from crdiff_export.formats.checkpoint import Checkpoint, variant_of
from crdiff_export.formats.hashing import hash_file
from crdiff_export.formats.safetensors import show
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.hub import bases
from crdiff_export.models import families
from crdiff_export.models.layouts import CONFIG, arrange, change_layout, network_file
from crdiff_export.models.prediction import ZERO_SNR
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import architecture, kernels, plan
from crdiff_export.prune.criteria import Decision
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import OutputFile, Plan, open_targets
from crdiff_export.prune.ranking import rank
from crdiff_export.verify.reopen import DATA_HASH, FILE_HASH, REPAIR, BakedCheckpoint, read_decision
from crdiff_export.verify.residual_reader import Residual, ResidualReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

# How far moved weights may be from what this machine computes, in units in the last place (a tolerance of our own). The
# last bits of a matrix's factors differ between processors and libraries, which rounds a few weights in a million to
# their neighbours.
ULPS: Final = 2
_GIVE_BASE: Final = "Give the base that the file was made from; `crdiff inspect` names it."


def check_base(
    baked: BakedCheckpoint,
    plan_again: Plan,
    criterion: CriterionChoice | None,
    residuals: Sequence[Residual],
    device: str,
    progress: Progress,
) -> Path:
    """Run the export of a base again and compare every byte with a baked checkpoint.

    Args:
        baked: The baked checkpoint.
        plan_again: The plan of its base, which `plan_base` makes.
        criterion: Decides which weights go. None to take the file's own zeros for the mask; then moved weights are not
            compared, and everything else has to be the base's.
        residuals: The residual of each file, to be compared, too; empty for none.
        device: The device that computes.
        progress: Is told how far the work is, and may interrupt it.

    Returns:
        The path of the base.

    Raises:
        VerifyError: The file is not what its base gives.
        CrdiffError: The base cannot be read.
    """
    files = list(zip(plan_again.outputs, baked.checkpoint.files, strict=True))
    kernel = kernels.load(device)
    decision = read_decision(baked, progress, moved=False)
    if criterion:
        derived = rank(criterion, [plan_again], kernel, progress, device).decide(plan_again, progress)
        _compare_decisions(baked, plan_again, derived, decision)
        _check_moved(baked, plan_again, derived)
        decision = derived
    progress.stage("comparing", plan_again.data_size + companions_size(plan_again.checkpoint))
    hashed = any(DATA_HASH in file.metadata for _, file in files)
    with SourceHashes([plan_again]) if hashed else contextlib.nullcontext() as hashes:
        for number, (output, file) in enumerate(files):
            stream = Stream([Pruning(plan_again, decision, keep=bool(residuals))], number, kernel)
            # Moved weights were compared above, where they could be.
            skipped = prune_ranges(plan_again, number) if baked.stamp.moved else ()
            _compare(stream, output, file, residuals[number] if residuals else None, skipped, progress)
            if output.source.parts and DATA_HASH not in file.metadata:
                continue  # the hash is of a file in another layout; every byte was compared
            if FILE_HASH in file.metadata:
                _check_source(output.source, file, FILE_HASH, _hash_whole(output.source))
            elif hashes:
                _check_source(output.source, file, DATA_HASH, hashes.digest(number))
    _compare_companions(baked.checkpoint, plan_again.checkpoint, progress)
    if baked.stamp.source_layout:
        _compare_generated(baked.checkpoint, plan_again.checkpoint)
    return plan_again.checkpoint.path


def _compare_companions(baked: Checkpoint, base: Checkpoint, progress: Progress) -> None:
    """Compare the files that an export copies: configurations, other components, the index of shards."""
    for name in base.companions:
        path, original = baked.home / name, base.home / name
        if not path.is_file():
            raise VerifyError(f"{path}: no such file, where the base has {original}", REPAIR)
        try:
            with path.open("rb") as ours, original.open("rb") as theirs:
                while part := theirs.read(CHUNK):
                    if ours.read(CHUNK) != part:
                        raise VerifyError(f"{path}: differs from {original}", REPAIR)
                    progress.advance(len(part))
                if ours.read(1):
                    raise VerifyError(f"{path}: differs from {original}", REPAIR)
        except OSError as error:
            message = f"{error.filename or path}: reading failed: {error.strerror}"
            raise CheckpointError(message, "Check the disk and the permissions.") from error


def _compare_generated(baked: Checkpoint, base: Checkpoint) -> None:
    """Compare the files that an export in another layout writes: diffusers' configuration."""
    for name, content in base.generated.items():
        path = baked.home / name
        if not path.is_file() or path.read_bytes() != content:
            raise VerifyError(f"{path}: is not what the base gives", REPAIR)


def plan_base(baked: BakedCheckpoint, base: str) -> Plan:
    """Plan the export of a base once more, and compare its headers with a baked checkpoint's; no weight is read.

    Args:
        baked: The baked checkpoint.
        base: The base that it was made from, as a user names it.

    Returns:
        The plan.

    Raises:
        VerifyError: The base has other tensors, or is known to be another one by its hash.
        CrdiffError: The base cannot be read.
    """
    planned, stamp = baked.plan, baked.stamp
    of_file = variant_of(planned.outputs[0].source.name) if planned.checkpoint.kind == "folder" else None
    variant = stamp.source_variant or of_file
    located = bases.locate(base, variant)
    checkpoint = in_layout_of(baked, located.open(variant))
    family = planned.match.family
    try:
        match = families.detect(checkpoint.shapes, family if family.table else None)
    except FamilyError as error:
        if not family.table:
            raise
        raise VerifyError(f"{checkpoint.path}: not the model of the file: {error.message}", _GIVE_BASE) from error
    if match.family.id != stamp.family or match.layout.name != stamp.layout:
        raise VerifyError(
            f"{checkpoint.path}: {match.family.title} ({match.layout.name}), "
            f"the file is {stamp.family} ({stamp.layout})",
            _GIVE_BASE,
        )
    refuse_sparse(checkpoint)
    again = plan.make(
        checkpoint, match, stamp.resolution, planned.variant, stamp.recipe,
        kinds=stamp.targets, cast=stamp.cast, allow_nonfinite=True,
    )  # fmt: skip
    _check_same_tensors(planned, again)
    for output, file in zip(again.outputs, baked.checkpoint.files, strict=True):
        if not output.source.parts and FILE_HASH in file.metadata and (known := located.hashes.get(output.source.name)):
            _check_source(output.source, file, FILE_HASH, known)
    return again


def in_layout_of(baked: BakedCheckpoint, checkpoint: Checkpoint) -> Checkpoint:
    """See a base in the layout of a baked checkpoint, with its tensors in their order.

    Args:
        baked: The baked checkpoint.
        checkpoint: The base, in either layout.

    Returns:
        The base, itself where it is in that layout and the export did not change it.

    Raises:
        PlanError: The base has another layout and other layers.
    """
    stamp, family = baked.stamp, baked.plan.match.family
    try:
        match = families.detect(checkpoint.shapes, family if family.table else None)
    except FamilyError:
        return checkpoint
    if match.family.id != stamp.family or (match.layout.name == stamp.layout and not stamp.source_layout):
        return checkpoint
    changed = change_layout(checkpoint, match, baked.plan.match.layout.name, stamp.native)
    files = _without_residual(baked)
    _check_names(baked, changed, files, match)
    arranged = arrange(changed, files)
    if stamp.source_layout == "original" and not arranged.generated:  # the base is a folder, too
        config = network_file(arranged.shapes, match.family, stamp.native)
        arranged = replace(arranged, generated={CONFIG: config})
    return arranged


def _check_names(baked: BakedCheckpoint, base: Checkpoint, files: Sequence[SourceFile], match: families.Match) -> None:
    """Refuse a file that has other tensors than its base gives in the file's layout.

    A base in the layout that the export began with gives them all. One in another layout may have more, such as a VAE,
    or less, such as noise schedules; then the hash of the base has to prove what only one of the two has. Marks of what
    a model predicts are empty, so no hash covers them.
    """
    stamp, path = baked.stamp, baked.checkpoint.path
    baked_names = {tensor.name for file in files for tensor in file.tensors}
    base_names = base.shapes.keys()
    prediction = architecture.of_checkpoint(base, match, stamp.native).prediction
    if prediction and str(prediction) != stamp.prediction:
        raise VerifyError(
            f"{base.path}: predicts as {prediction}, crdiff.prediction of {path.name} is {stamp.prediction or 'none'}",
            _GIVE_BASE,
        )
    marks = {"v_pred"} if (stamp.prediction or "").startswith("v") else set()
    marks |= {"ztsnr"} if (stamp.prediction or "").endswith(ZERO_SNR) else set()
    has_marks = stamp.source_layout == "diffusers" and stamp.prediction
    is_exact = stamp.source_layout == match.layout.name
    hashed = all(DATA_HASH in file.metadata for file in files)
    wrong = [name for name in baked_names ^ base_names if is_exact or (not hashed and name in base_names)]
    wrong += [name for name in ("v_pred", "ztsnr") if has_marks and (name in baked_names) != (name in marks)]
    if wrong:
        raise VerifyError(f"{path}: its tensors are not those of {base.path}: {show(min(wrong))}", REPAIR)


def _without_residual(baked: BakedCheckpoint) -> list[SourceFile]:
    """Return the files of a baked checkpoint without what an export adds to a base."""
    if baked.stamp.residual != RESIDUAL_KEYS[EMBED]:
        return list(baked.checkpoint.files)
    files = []
    for file in baked.checkpoint.files:
        embedded = residual_tensors(file.tensors)
        files.append(replace(file, tensors=tuple(tensor for tensor in file.tensors if tensor not in embedded)))
    return files


def _compare_decisions(baked: BakedCheckpoint, again: Plan, ours: Decision, theirs: Decision) -> None:
    """Raise VerifyError if the base gives other thresholds or masks than the file has."""
    path = again.checkpoint.path
    if ours.masks is None:
        for scope, mine, other in zip(again.scopes, ours.thresholds, theirs.thresholds, strict=True):
            if mine.value != other.value:
                raise VerifyError(
                    f"{path}: gives {show(scope.name)} the threshold {mine.value}, the file has {other.value}",
                    "The file was made from another base, which `crdiff inspect` names, or its header was changed.",
                )
        return
    if bool(ours.moved) != baked.stamp.moved:
        moves = "moves" if ours.moved else "does not move"
        raise VerifyError(f"{path}: {show(baked.stamp.criterion)} {moves} weights, crdiff.moved says otherwise", REPAIR)
    for target, mask, other_mask in zip(again.targets, ours.masks, theirs.masks or (), strict=True):
        if mask and other_mask and (differ := int((mask.unpack() != other_mask.unpack()).sum())):
            raise VerifyError(
                f"{path}: {differ} of {mask.count} weights of {show(target.name)} go otherwise",
                "The file was made from another base, or on a machine that rounds otherwise.",
            )


def _check_moved(baked: BakedCheckpoint, again: Plan, ours: Decision) -> None:
    """Raise VerifyError if moved weights differ, by more than their last bits, from what the calibration gives."""
    import numpy as np

    with open_targets(baked.checkpoint) as read:
        for number, weights in ours.moved.items():
            target = baked.plan.targets[number]
            if differ := _count_apart(np.frombuffer(read(target), f"u{target.source.itemsize}"), weights):
                raise VerifyError(
                    f"{baked.checkpoint.path}: {differ} of {target.count} weights of {show(target.name)} are not what "
                    f"{again.checkpoint.path} and the calibration give",
                    "It was made from others, or changed since: export it again.",
                )


def _count_apart(left: "NDArray[Any]", right: "NDArray[Any]") -> int:
    """Count the numbers, given as raw bits, that are further apart than `ULPS` or differ in sign."""
    import numpy as np

    bits = 8 * left.itemsize - 1
    signs = (left >> bits) != (right >> bits)
    sizes = [(numbers & ((1 << bits) - 1)).astype(np.int64) for numbers in (left, right)]
    return int(np.count_nonzero(signs | (np.abs(sizes[0] - sizes[1]) > ULPS)))


def _hash_whole(source: SourceFile) -> str:
    try:
        return hash_file(source.path, Silent())
    except OSError as error:
        raise CheckpointError(f"{source.path}: reading failed: {error.strerror}", "Check the disk.") from error


def _check_source(source: SourceFile, baked: SourceFile, key: str, actual: str | None) -> None:
    if (expected := baked.metadata.get(key)) != f"0x{actual}":
        raise VerifyError(
            f"{source.path}: its bytes hash to 0x{actual}, {key} of {baked.path.name} is {expected}", REPAIR
        )


def _check_same_tensors(baked: Plan, base: Plan) -> None:
    if len(baked.outputs) != len(base.outputs):
        raise VerifyError(
            f"{baked.checkpoint.path}: has {len(baked.outputs)} files, the base {len(base.outputs)}", REPAIR
        )
    for ours, theirs in zip(baked.outputs, base.outputs, strict=True):
        embeds = ours.source.metadata.get("crdiff.residual") == RESIDUAL_KEYS[EMBED]
        embedded = residual_tensors(ours.tensors) if embeds else ()
        if {t.name: t for t in ours.tensors if t not in embedded} != {t.name: t for t in theirs.tensors}:
            raise VerifyError(f"{ours.source.path}: its tensors are not those of {theirs.source.path}", REPAIR)


def _compare(
    stream: Stream,
    output: OutputFile,
    baked: SourceFile,
    residual: Residual | None,
    skipped: Sequence[PruneRange],
    progress: Progress,
) -> None:
    """Compare the bytes of a baked file, and of its residual, with the stream that its base gives."""
    import numpy as np

    buffer = memoryview(bytearray(CHUNK))
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(contextlib.closing(baked.open()))
        values = stack.enter_context(ResidualReader(residual)) if residual else None
        chunks = stack.enter_context(contextlib.closing(stream.chunks()))
        for chunk in chunks:
            actual = buffer[: len(chunk.data)]
            reader.read_into(chunk.start, actual)
            same = np.frombuffer(actual, np.uint8) == np.frombuffer(chunk.data, np.uint8)
            for target in skipped:
                same[max(target.start - chunk.start, 0) : max(target.stop - chunk.start, 0)] = True
            if not same.all():
                byte = chunk.start + int(same.argmin())
                tensor = next(t for t in output.tensors if t.start <= byte < t.end)
                raise VerifyError(
                    f"{baked.path}: {show(tensor.name)} at byte {byte - tensor.start} is not what the base gives",
                    REPAIR,
                )
            if values:
                values.compare(chunk.pruned)
            progress.advance(len(actual))
        if values:
            values.finish_comparison(header_of(output.source))


def refuse_sparse(checkpoint: Checkpoint) -> None:
    """Raise VerifyError for a sparse file, which has no weights on the disk."""
    for file in checkpoint.files:
        if file.is_sparse:
            raise VerifyError(
                f"{file.path}: its header holds, but its weights cannot be checked: the file is mostly a hole",
                "Fetch the whole file, then verify it again.",
            )
