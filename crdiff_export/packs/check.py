"""Verify a pack: that it holds what it says and, given the base, that an export would decide the same."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from crdiff_export.bake import metadata
from crdiff_export.errors import OptionError, PackError, VerifyError
from crdiff_export.formats.checkpoint import Checkpoint, variant_of
from crdiff_export.formats.crdiff_keys import GroupStamp
from crdiff_export.formats.hashing import hash_data, hash_from
from crdiff_export.hub import bases
from crdiff_export.packs import use
from crdiff_export.packs.pack import Pack, open_pack, with_thresholds_by_name
from crdiff_export.progress import Progress
from crdiff_export.prune import architecture, kernels, plan
from crdiff_export.prune.criteria import Decision
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.identity import read_identity
from crdiff_export.prune.plan import Plan
from crdiff_export.prune.plan_request import PlanRequest
from crdiff_export.prune.ranking import rank
from crdiff_export.sizes import Size

_AGAIN = "Do not use the pack; make it again from its base."


@dataclass(frozen=True, slots=True)
class CheckedPack:
    """What was checked of a pack and holds.

    Attributes:
        pack: The pack.
        base: The base that it was compared with, if one was given.
        unranked: Sizes whose weights were not ranked again, because that takes a calibration that was not given, or a
            criterion that is not installed.
    """

    pack: Pack
    base: Path | None = None
    unranked: tuple[Size, ...] = ()


def verify_pack(
    path: Path, base: str | None, progress: Progress, device: str = "auto", calibration: Path | None = None
) -> CheckedPack:
    """Check a pack.

    Args:
        path: The pack.
        base: The base to rank again, as for an export; None to compare with none.
        progress: Is told how far the work is, and may interrupt it.
        device: The device that computes.
        calibration: The calibration of those sizes that were made with one.

    Returns:
        What was checked and holds.

    Raises:
        OptionError: There is a calibration without a base, or no size was made with it.
        PackError: The file is not a pack, or its header is damaged.
        VerifyError: It does not hold what its header says, or is not what its base gives.
        CrdiffError: A file cannot be read, or the calibration is not the pack's.
    """
    if calibration is not None and base is None:
        raise OptionError(
            f"--calibration {calibration}: decides nothing without the base's weights", "Give --base, too."
        )
    pack = open_pack(path)
    try:
        progress.stage("checking", sum(t.nbytes for size in pack.variants for t in pack.masks(size)))
        for size in pack.variants:
            _check_counts(pack, size, progress)
        return CheckedPack(pack) if base is None else _compare_base(pack, base, progress, device, calibration)
    except PackError as error:
        raise VerifyError(error.message, error.hint) from error


def _compare_base(pack: Pack, base: str, progress: Progress, device: str, calibration: Path | None) -> CheckedPack:
    variant = variant_of(pack.files[0].name)
    checkpoint = bases.locate(base, variant).open(variant)
    plans = {size: use.plan_size(pack, PlanRequest(base, size), checkpoint) for size in pack.variants}
    _check_files(pack, checkpoint, progress)
    _check_identity(pack, next(iter(plans.values())))
    for planned in plans.values():
        _check_model(pack, planned)
    ranked: set[Size] = set()
    for choice, sizes in _choices(pack, calibration, progress):
        some = [plans[size] for size in sizes]
        weights = rank(choice, some, kernels.load(device), progress, device)
        for planned in some:
            _check_decision(pack, planned, weights.decide(planned, progress))
        ranked.update(sizes)
    return CheckedPack(pack, checkpoint.path, tuple(size for size in pack.variants if size not in ranked))


def _check_counts(pack: Pack, size: Size, progress: Progress) -> None:
    """Count the bits of a size's masks, and compare them with its counts."""
    import numpy as np

    stamp = pack.variants[size]
    groups = {layer.diffusers: layer.group for layer in pack.layers(stamp.targets)}
    bits = dict.fromkeys(stamp.groups, 0)
    for name, data in pack.read_masks(size) if stamp.masked else ():
        bits[groups[name]] += int(np.unpackbits(np.frombuffer(data, np.uint8)).sum())
        progress.advance(len(data))
    for name, group in stamp.groups.items():
        if stamp.masked and bits[name] != group.pruned:
            raise VerifyError(
                f"{pack.path}: {bits[name]} weights of {name} are in the masks of {size}, crdiff.pruned says "
                f"{group.pruned}", _AGAIN,
            )  # fmt: skip
        if group.pruned > group.total:
            raise VerifyError(f"{pack.path}, {size}: {group.pruned} of {group.total} weights of {name}", _AGAIN)


def _check_files(pack: Pack, checkpoint: Checkpoint, progress: Progress) -> None:
    """Hash every byte of the base, whatever any cache remembers."""
    for file, stated in pack.match_files(checkpoint):
        progress.stage("hashing", file.data_size)
        whole = None
        if file.reader:
            data = hash_data(file, progress)
        else:
            whole, data = hash_from(file.path, (0, file.data_start), progress)
        if data != stated.data_hash:
            _refuse_hash(pack, file.path, "the tensors", data, stated.data_hash)
        if whole and stated.file_hash and whole != stated.file_hash:
            _refuse_hash(pack, file.path, "the whole file", whole, stated.file_hash)


def _refuse_hash(pack: Pack, path: Path, what: str, actual: str, stated: str) -> NoReturn:
    raise VerifyError(
        f"{path}: the hash of {what} is 0x{actual}, {pack.path} has 0x{stated}",
        "Give the base that the pack was made from; if this is it, make the pack again.",
    )


def _check_identity(pack: Pack, planned: Plan) -> None:
    every = plan.make(
        planned.checkpoint, planned.match, planned.size, planned.variant, planned.recipe, kinds=pack.kinds
    )
    if read_identity(planned.checkpoint, every.targets) != pack.identity:
        _differs(pack, planned.checkpoint.path, "the hashes of layers")


def _choices(
    pack: Pack, calibration: Path | None, progress: Progress
) -> Iterator[tuple[CriterionChoice, Sequence[Size]]]:
    """Yield every criterion that can rank again, with its sizes of one cast."""
    sizes: dict[tuple[str, str | None, str | None], list[Size]] = {}
    for size, stamp in pack.variants.items():
        calibrated_by = stamp.calibrated.hash if stamp.calibrated else None
        sizes.setdefault((stamp.criterion, calibrated_by, stamp.cast), []).append(size)
    is_used = False
    for (criterion, hashed, _), some in sizes.items():
        if hashed is None:
            with contextlib.suppress(OptionError):  # its package may not be installed here
                yield CriterionChoice.of(criterion, None), some
        elif calibration is not None:
            choice = CriterionChoice.of(criterion, calibration)
            calibrated = choice.calibrated(progress)
            if calibrated and calibrated.hash == hashed:
                is_used = True
                yield choice, some
    if calibration is not None and not is_used:
        raise OptionError(
            f"{calibration}: no size of {pack.path} was made with it", "Give the calibration of one of its sizes."
        )


def _check_model(pack: Pack, planned: Plan) -> None:
    """Compare what the pack says of the base with what the base's headers say, and its masks with the base's layers."""
    stamp, found = pack.variants[planned.size], architecture.find(planned)
    decision = use.PackedDecisions(pack).decide(planned)
    derived = metadata.stamp(planned, decision, stamp.criterion, stamp.source_name, found)
    for key in ("special", "prediction", "native", "native_source"):
        if getattr(derived, key) != getattr(stamp, key):
            name = f"crdiff.{key if key in ('special', 'prediction') else key.replace('native', 'resolution.native')}"
            _differs(pack, planned.checkpoint.path, name, getattr(derived, key), getattr(stamp, key))


def _check_decision(pack: Pack, planned: Plan, decision: Decision) -> None:
    """Compare what the base gives for a size with what the pack has."""
    stamp, path = pack.variants[planned.size], planned.checkpoint.path
    plain = metadata.stamp(planned, decision, stamp.criterion, stamp.source_name, architecture.find(planned))
    derived = with_thresholds_by_name(plain, [target.layer.diffusers for target in planned.targets])
    for name, group in stamp.groups.items():
        ours = derived.groups[name]
        if ours != group:
            _differs(pack, path, f"{name} at {planned.size}", _shown(ours), _shown(group))
    if derived.thresholds != stamp.thresholds:
        _differs(pack, path, f"the thresholds at {planned.size}")
    if decision.masks is None:
        return
    masks = {t.layer.diffusers: mask for t, mask in zip(planned.targets, decision.masks, strict=True) if mask}
    for name, data in pack.read_masks(planned.size):
        if name not in masks or masks[name].bits.tobytes() != data:
            _differs(pack, path, f"bits of {name.removesuffix('.weight')} at {planned.size}")


def _shown(group: GroupStamp) -> str:
    """Name a group's counts, and its threshold where it has one."""
    counts = f"{group.pruned} of {group.total} weights"
    counts += f" and {group.nonfinite} that are not finite" if group.nonfinite else ""
    return counts if group.threshold is None else f"{counts} up to {group.threshold_text}"


def _differs(pack: Pack, path: Path, what: str, ours: object = None, theirs: object = None) -> NoReturn:
    if ours is None and theirs is None:
        raise VerifyError(f"{pack.path}: {what} are not those that {path} gives", _AGAIN)
    raise VerifyError(f"{pack.path}: {what} is {theirs or 'absent'}, {path} gives {ours or 'none'}", _AGAIN)
