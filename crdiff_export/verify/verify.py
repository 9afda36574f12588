"""Does a baked file hold what its header says; and, given the base, is it byte for byte what an export makes of it."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crdiff_export.bake import residual, stream
from crdiff_export.bake.residual import NONE, SAID, SIDECAR, Kept
from crdiff_export.errors import OptionError, VerifyError
from crdiff_export.formats import dtypes
from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.formats.hashing import hash_data
from crdiff_export.formats.safetensors import show
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.progress import Progress
from crdiff_export.prune import criteria
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan, Scope, Target
from crdiff_export.prune.threshold import Threshold
from crdiff_export.verify.compare_base import check_base, refuse_sparse
from crdiff_export.verify.reopen import REPAIR, BakedCheckpoint, open_baked

# How far a base has proved a file.
Against = Literal["nothing", "others", "zeros", "all"]
NOTHING: Against = "nothing"


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found to hold: counts and thresholds always, the hash where the header has one, the base if given.

    `against` is what that base has told: everything (`all`); without the calibration, that nothing but zeros was
    brought in (`zeros`); or of a file with moved weights, that everything else is the base's (`others`).
    `residual` is what the header says of it, or `missing`: a sidecar that is not there and so was not checked.
    """

    path: Path
    stamp: Stamp
    weights: int
    hashed: bool
    base: Path | None
    residual: str = NONE
    against: Against = NOTHING


def verify(
    path: Path, base: str | None, progress: Progress, device: str = "auto", calibration: Path | None = None
) -> Verified:
    """Check a baked file or folder; VerifyError names the first thing that does not hold.

    Without a base it cannot be known whether the weights that stay, or the zeros, are those that should; the hash, if
    there is one, only tells that they are what was written. Where a calibration has decided, it takes both.
    """
    if calibration is not None and base is None:
        raise OptionError(
            f"--calibration {calibration}: decides nothing without the base's weights", "Give --base, too."
        )
    baked = open_baked(path)
    stamp, planned = baked.stamp, baked.plan
    criterion = _asked(baked, calibration, progress) if base else None
    refuse_sparse(baked.checkpoint)
    _check_weights(baked, progress)
    hashed = _check_hashes(planned, progress)
    kept = _check_residual(baked, progress)
    said = stamp.residual if kept or stamp.residual == SAID[NONE] else "missing"
    weights = sum(scope.count for scope in planned.scopes)
    if not base:
        return Verified(path, stamp, weights, hashed, None, said)
    origin = check_base(baked, base, criterion, kept, device, progress)
    against: Against = "all" if criterion else "others" if stamp.moved else "zeros"
    return Verified(path, stamp, weights, hashed, origin, said, against)


def _asked(baked: BakedCheckpoint, calibration: Path | None, progress: Progress) -> CriterionChoice | None:
    """The criterion to decide by again; None where that takes a calibration, which is not given.

    OptionError and CalibrationError for a calibration that is not this file's.
    """
    stamp, path = baked.stamp, baked.checkpoint.path
    known = _known(stamp.criterion)
    if known and stamp.moved and not known.moves:
        raise VerifyError(f"{path}: crdiff.moved is true, but {show(stamp.criterion)} moves no weights", REPAIR)
    if calibration is None and (stamp.calibrated or known is None or known.statistics):
        return None
    if calibration is not None and not stamp.calibrated:
        raise OptionError(
            f"{path}: was made without a calibration ({show(stamp.criterion)})", "Leave --calibration out."
        )
    criterion = CriterionChoice.of(stamp.criterion, calibration)
    found = criterion.calibrated(progress)
    if found and stamp.calibrated and found.hash != stamp.calibrated.hash:
        raise VerifyError(
            f"{calibration}: hashes to {found.hash}, crdiff.calibration.file_sha256 of {path.name} is "
            f"{stamp.calibrated.hash}",
            "Give the calibration that the file was made with.",
        )
    return criterion


def _known(criterion: str) -> criteria.Loaded | None:
    """The criterion; None for one of a package that is not installed."""
    try:
        return criteria.load(criterion)
    except OptionError:
        return None


@dataclass(slots=True)
class _Found:
    """Weights of one scope: +0.0, not above the threshold for all that, and not finite."""

    zeros: int = 0
    left: int = 0
    nonfinite: int = 0


def _check_weights(baked: BakedCheckpoint, progress: Progress) -> None:
    """Count what the targets hold; VerifyError where a weight is left that should be zero, or too many are."""
    planned, thresholds = baked.plan, baked.thresholds
    path = planned.checkpoint.path
    found = [_Found() for _ in planned.scopes]
    pruned = [t for t in planned.targets if planned.scopes[t.scope].rank]
    progress.stage("counting", sum(t.count * t.source.itemsize for t in pruned))
    for target in pruned:
        before = found[target.scope].left
        _survey(planned.checkpoint.files[target.file], target, thresholds[target.scope], found[target.scope], progress)
        if left := found[target.scope].left - before:
            raise VerifyError(f"{path}: {show(target.name)} has {left} weights that should be zero", REPAIR)
    for name in planned.groups:
        scopes = [(scope, some) for scope, some in zip(planned.scopes, found, strict=True) if scope.group == name]
        _compare_counts(baked, name, scopes)


def _compare_counts(baked: BakedCheckpoint, name: str, scopes: Sequence[tuple[Scope, _Found]]) -> None:
    path, said = baked.checkpoint.path, baked.stamp.groups[name]
    zeros, nonfinite = sum(found.zeros for _, found in scopes), sum(found.nonfinite for _, found in scopes)
    if zeros != said.pruned:
        raise VerifyError(f"{path}: {zeros} weights of {name} are zero, crdiff.pruned.{name} is {said.pruned}", REPAIR)
    if nonfinite != said.nonfinite:
        raise VerifyError(
            f"{path}: {nonfinite} weights of {name} are not finite, crdiff.nonfinite.{name} is {said.nonfinite}",
            REPAIR,
        )
    for scope, found in scopes:
        least = _least(baked, scope)
        # Of a scope as a whole those that are not finite rank last; of a row, they may be all that is to go.
        room = scope.count if baked.stamp.compare == "block" else least
        if found.zeros < min(least, room - found.nonfinite):
            raise VerifyError(
                f"{path}: {found.zeros} weights of {show(scope.name)} are zero, crdiff.ratio.{name} asks for {least}",
                REPAIR,
            )


def _least(baked: BakedCheckpoint, scope: Scope) -> int:
    """How many weights of a scope go at least where all are finite: rows, and blocks of columns, round alone."""
    compare = baked.stamp.compare
    if compare == "block":
        return scope.rank
    shapes = [
        (target.count // target.source.shape[-1], target.source.shape[-1])
        for target in baked.plan.targets
        if baked.plan.scopes[target.scope] is scope
    ]
    if compare == "row":
        return sum(rows * int(columns * scope.ratio) for rows, columns in shapes)
    return sum(max(int(rows * columns * scope.ratio) - columns, 0) for rows, columns in shapes)


def _survey(file: SourceFile, target: Target, threshold: Threshold, found: _Found, progress: Progress) -> None:
    """Count a target's weights, a chunk at a time; a scope without a threshold has none left that should be zero."""
    import numpy as np

    form = dtypes.FORMATS[target.source.dtype]
    limit = min(dtypes.limit(form.dtype, threshold.bits or 0), form.first_nonfinite - 1)
    start, stop = target.span(target.source)
    buffer = memoryview(bytearray(min(stream.CHUNK, stop - start)))
    with contextlib.closing(file.open()) as reader:
        for place in range(start, stop, stream.CHUNK):
            part = buffer[: min(stream.CHUNK, stop - place)]
            reader.read_into(place, part)
            bits = np.frombuffer(part, f"<u{form.itemsize}")
            magnitudes = bits & bits.dtype.type(form.mask)
            zeros = bits.size - int(np.count_nonzero(bits))
            found.zeros += zeros
            found.left += int(np.count_nonzero(magnitudes <= limit)) - zeros if threshold.bits is not None else 0
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
