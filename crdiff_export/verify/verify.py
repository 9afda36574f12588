"""Check that a baked file holds what its header says and, given the base, that an export gives the same bytes."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from crdiff_export.bake.residual import NONE, OUTPUT_HASH, RESIDUAL_KEYS, SIDECAR, sidecar_path
from crdiff_export.bake.stream import CHUNK
from crdiff_export.errors import OptionError, VerifyError
from crdiff_export.formats import dtypes
from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.formats.safetensors import show
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.progress import Progress
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan, Scope, Target
from crdiff_export.prune.threshold import Threshold
from crdiff_export.verify.compare_base import check_base, plan_base, refuse_sparse
from crdiff_export.verify.reopen import DATA_HASH, REPAIR, BakedCheckpoint, open_baked
from crdiff_export.verify.residual_reader import Residual, base_header, check_hashes, check_sidecars, find_residuals

# What the comparison with a base has proved.
Against = Literal["nothing", "others", "zeros", "all"]
NOTHING: Against = "nothing"


@dataclass(frozen=True, slots=True)
class Verified:
    """What was checked and holds. Counts and thresholds are always checked.

    Attributes:
        path: The baked file or folder.
        stamp: What its header says.
        weights: The number of weights in its targets.
        hashed: Its hash was checked; False where the header has none.
        base: The base that it was compared with, if one was given.
        residual: The value of `crdiff.residual`, or `missing` for a sidecar that is absent and so was not checked.
        against: What the base has proved: every byte (`all`); without the calibration, that only zeros differ from the
            base (`zeros`); for a file with moved weights, that everything else is the base's (`others`).
        notes: What the user should know of the comparison.
    """

    path: Path
    stamp: Stamp
    weights: int
    hashed: bool
    base: Path | None
    residual: str = NONE
    against: Against = NOTHING
    notes: tuple[str, ...] = ()


def verify(
    path: Path, base: str | None, progress: Progress, device: str = "auto", calibration: Path | None = None
) -> Verified:
    """Check a baked file or folder.

    Without its base, nothing can prove that the right weights were pruned; the hash only proves that the file is as it
    was written. If a calibration decided, the proof needs that file, too.

    Args:
        path: The baked file or folder.
        base: The base to compare it with, as for an export; None to compare with none.
        progress: Is told how far the work is, and may interrupt it.
        device: The device that computes.
        calibration: The calibration that the file was made with.

    Returns:
        What was checked and holds.

    Raises:
        VerifyError: The first thing that does not hold.
        OptionError: There is a calibration without a base.
        CrdiffError: A file cannot be read, or the calibration does not fit.
    """
    if calibration is not None and base is None:
        raise OptionError(
            f"--calibration {calibration}: decides nothing without the base's weights", "Give --base, too."
        )
    baked = open_baked(path)
    stamp = baked.stamp
    criterion = _choose_criterion(baked, calibration, progress) if base else None
    refuse_sparse(baked.checkpoint)
    plan_again = plan_base(baked, base) if base else None  # from headers, before gigabytes are read
    _check_weights(baked, progress)
    files = baked.checkpoint.files
    hashed = any(OUTPUT_HASH in file.metadata for file in files)
    if hashed:
        check_hashes(files, OUTPUT_HASH, progress, REPAIR)
    residuals = _check_residuals(baked, progress)
    way = stamp.residual if residuals or stamp.residual == RESIDUAL_KEYS[NONE] else "missing"
    weights = sum(scope.count for scope in baked.plan.scopes)
    if not plan_again:
        return Verified(path, stamp, weights, hashed, None, way)
    base_path = check_base(baked, plan_again, criterion, residuals, device, progress)
    against: Against = "all" if criterion else "others" if stamp.moved else "zeros"
    return Verified(path, stamp, weights, hashed, base_path, way, against, _notes(baked, plan_again))


def _notes(baked: BakedCheckpoint, plan_again: Plan) -> tuple[str, ...]:
    """Say what a base in another layout does not have, and whether the hash of the base proves it all the same."""
    if not plan_again.checkpoint.origin:
        return ()
    proved = all(DATA_HASH in file.metadata for file in baked.checkpoint.files)
    end = "the hash of the base proves them" if proved else "they were not compared"
    return tuple(f"{note}: {end}" for note in plan_again.checkpoint.notes)


def _choose_criterion(baked: BakedCheckpoint, calibration: Path | None, progress: Progress) -> CriterionChoice | None:
    """Return the criterion that decides again; None where that needs a calibration that was not given.

    Raises:
        OptionError: The file was made without a calibration.
        VerifyError: The file was made with another calibration, or its criterion moves no weights.
    """
    stamp, path = baked.stamp, baked.checkpoint.path
    loaded = None
    with contextlib.suppress(OptionError):  # its package may not be installed here
        loaded = CriterionChoice.load(stamp.criterion)
    if loaded and stamp.moved and not loaded.moves:
        raise VerifyError(f"{path}: crdiff.moved is true, but {show(stamp.criterion)} moves no weights", REPAIR)
    if calibration is None and (stamp.calibrated or loaded is None or loaded.statistics):
        return None
    if calibration is not None and not stamp.calibrated:
        raise OptionError(
            f"{path}: was made without a calibration ({show(stamp.criterion)})", "Leave --calibration out."
        )
    criterion = CriterionChoice.of(stamp.criterion, calibration)
    calibrated = criterion.calibrated(progress)
    if calibrated and stamp.calibrated and calibrated.hash != stamp.calibrated.hash:
        raise VerifyError(
            f"{calibration}: hashes to {calibrated.hash}, crdiff.calibration.file_sha256 of {path.name} is "
            f"{stamp.calibrated.hash}",
            "Give the calibration that the file was made with.",
        )
    return criterion


def _check_weights(baked: BakedCheckpoint, progress: Progress) -> None:
    """Count what the targets hold; VerifyError if a weight should be zero but is not, or a count is wrong."""
    planned, path = baked.plan, baked.checkpoint.path
    zeros, nonfinite = [0] * len(planned.scopes), [0] * len(planned.scopes)
    pruned = [t for t in planned.targets if planned.scopes[t.scope].rank]
    progress.stage("checking", sum(t.nbytes for t in pruned))
    for target in pruned:
        counts = _count(planned.checkpoint.files[target.file], target, baked.thresholds[target.scope], progress)
        if counts.missed:
            raise VerifyError(f"{path}: {show(target.name)} has {counts.missed} weights that should be zero", REPAIR)
        zeros[target.scope] += counts.zeros
        nonfinite[target.scope] += counts.nonfinite
    for name in planned.groups:
        counted = zip(planned.scopes, zeros, nonfinite, strict=True)
        _compare_counts(baked, name, [counts for counts in counted if counts[0].group == name])


def _compare_counts(baked: BakedCheckpoint, name: str, scopes: Sequence[tuple[Scope, int, int]]) -> None:
    """Compare the counts of one group with the header, and those of its scopes, zeros and nonfinite, with the ratio."""
    path, group = baked.checkpoint.path, baked.stamp.groups[name]
    pruned, nonfinite = sum(zeros for _, zeros, _ in scopes), sum(count for _, _, count in scopes)
    if pruned != group.pruned:
        raise VerifyError(
            f"{path}: {pruned} weights of {name} are zero, crdiff.pruned.{name} is {group.pruned}", REPAIR
        )
    if nonfinite != group.nonfinite:
        raise VerifyError(
            f"{path}: {nonfinite} weights of {name} are not finite, crdiff.nonfinite.{name} is {group.nonfinite}",
            REPAIR,
        )
    for scope, zeros, unranked in scopes:
        least = _least_pruned(baked, scope)
        # Weights that are not finite rank last in a scope; in a single row they may be all that would be pruned.
        room = scope.count if baked.stamp.compare == "block" else least
        if zeros < min(least, room - unranked):
            raise VerifyError(
                f"{path}: {zeros} weights of {show(scope.name)} are zero, crdiff.ratio.{name} asks for {least}", REPAIR
            )


def _least_pruned(baked: BakedCheckpoint, scope: Scope) -> int:
    """Return how many weights of a scope are pruned at least: each row, or block of columns, rounds down alone."""
    compare = baked.stamp.compare
    if compare == "block":
        return scope.rank
    shapes = [target.shape for target in baked.plan.targets if baked.plan.scopes[target.scope] is scope]
    if compare == "row":
        return sum(rows * int(columns * scope.ratio) for rows, columns in shapes)
    return sum(max(int(rows * columns * scope.ratio) - columns, 0) for rows, columns in shapes)


class _Counts(NamedTuple):
    """How many weights of a target are +0.0, should be zero but are not, and are not finite."""

    zeros: int
    missed: int
    nonfinite: int


def _count(file: SourceFile, target: Target, threshold: Threshold, progress: Progress) -> _Counts:
    """Count a target's weights, a chunk at a time; without a threshold no weight counts as missed."""
    import numpy as np

    form = dtypes.FORMATS[target.source.dtype]
    limit = target.encoding.limit(threshold.value or 0.0)
    start, stop = target.span(target.source)
    buffer = memoryview(bytearray(min(CHUNK, stop - start)))
    zeros = small = nonfinite = 0
    with contextlib.closing(file.open()) as reader:
        for offset in range(start, stop, CHUNK):
            part = buffer[: min(CHUNK, stop - offset)]
            reader.read_into(offset, part)
            bits = np.frombuffer(part, f"<u{form.itemsize}")
            magnitudes = bits & bits.dtype.type(form.mask)
            zeros += bits.size - int(np.count_nonzero(bits))
            small += int(np.count_nonzero(magnitudes <= limit))
            nonfinite += int(np.count_nonzero(magnitudes >= form.first_nonfinite))
            progress.advance(len(part))
    return _Counts(zeros, 0 if threshold.value is None else small - zeros, nonfinite)


def _check_residuals(baked: BakedCheckpoint, progress: Progress) -> tuple[Residual, ...]:
    """Return the residuals after checking their hashes; an empty tuple if there are none or a sidecar is absent."""
    way, files = baked.stamp.residual, baked.checkpoint.files
    missing = way == RESIDUAL_KEYS[SIDECAR] and not all(sidecar_path(file.path).exists() for file in files)
    if way == RESIDUAL_KEYS[NONE] or missing:
        return ()
    residuals = find_residuals(baked)
    check_sidecars(residuals, progress)
    for residual in residuals:
        base_header(residual)  # raises where the base had other tensors
    return residuals
