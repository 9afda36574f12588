"""A baked checkpoint read back: what its headers say of it, and the plan and the thresholds that made it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crdiff_export import criteria, families, floats, plan
from crdiff_export.checkpoint import Checkpoint, open_checkpoint
from crdiff_export.errors import VerifyError
from crdiff_export.header import show
from crdiff_export.plan import Plan
from crdiff_export.recipe import Variant
from crdiff_export.stamp import Stamp
from crdiff_export.threshold import Threshold

REPAIR = "Do not use the file; export it again from its base."
DATA_HASH, FILE_HASH = "crdiff.source.hash_sha256", "crdiff.source.file_sha256"
NEWER = "Install a newer crdiff."


@dataclass(frozen=True, slots=True)
class BakedCheckpoint:
    """What an export has left: its files, their common stamp, and the plan and thresholds rebuilt from them.

    The thresholds are one for each of the plan's scopes; what they pruned is not known to them.
    """

    checkpoint: Checkpoint
    stamp: Stamp
    plan: Plan
    thresholds: tuple[Threshold, ...]


def open_baked(path: Path) -> BakedCheckpoint:
    """Read the headers of a baked file or folder.

    CheckpointError for one that crdiff has not made, VerifyError where headers and layers contradict each other.
    """
    checkpoint = open_checkpoint(path)
    stamp = _stamp(checkpoint)
    planned = _plan(checkpoint, stamp)
    return BakedCheckpoint(checkpoint, stamp, planned, _thresholds(planned, stamp))


def _stamp(checkpoint: Checkpoint) -> Stamp:
    stamps = [Stamp.from_metadata(file.metadata, str(file.path)) for file in checkpoint.files]
    for file, stamp in zip(checkpoint.files, stamps, strict=True):
        if _shared(stamp) != _shared(stamps[0]):
            raise VerifyError(f"{file.path}: its header is of another export than its neighbours'", REPAIR)
    if stamps[0].criterion not in criteria.NAMES:
        raise VerifyError(f"{checkpoint.path}: ranked by {show(stamps[0].criterion)}, which is not known here", NEWER)
    return stamps[0]


def _shared(stamp: Stamp) -> dict[str, str]:
    """All that the files of one export have in common: everything but the hash of each one's source."""
    keys = stamp.to_metadata()
    return {key: text for key, text in keys.items() if key not in (DATA_HASH, FILE_HASH)}


def _plan(checkpoint: Checkpoint, stamp: Stamp) -> Plan:
    """The plan that made the file, from its header and its layers."""
    match = families.detect(checkpoint.shapes)
    family = match.family
    for what, said, found in (
        ("family", stamp.family, family.id),
        ("layout", stamp.layout, match.layout.name),
        ("prefix", stamp.prefix, match.prefix),
        ("ratio", sorted(stamp.groups), sorted(family.groups)),
        ("targets", stamp.targets, tuple(kind for kind in family.kinds if kind in stamp.targets)),
    ):
        if said != found:
            raise VerifyError(
                f"{checkpoint.path}: crdiff.{what} is for {_words(said)}, its layers are of {_words(found)}", REPAIR
            )
    ratios = {name: group.ratio for name, group in stamp.groups.items()}
    variant = Variant(stamp.resolution, ratios, stamp.poa_weight, "starting-point", stamp.provenance_source)
    return plan.make(
        checkpoint, match, stamp.resolution, variant, stamp.recipe, kinds=stamp.targets, allow_nonfinite=True
    )


def _words(value: str | Sequence[str]) -> str:
    return show(value if isinstance(value, str) else ", ".join(value)) if value else "none"


def _thresholds(planned: Plan, stamp: Stamp) -> tuple[Threshold, ...]:
    """The header's thresholds, one per scope, after a check that its counts fit the layers."""
    path, scopes = planned.checkpoint.path, planned.scopes
    for name in planned.groups:
        total = sum(scope.count for scope in scopes if scope.group == name)
        if stamp.groups[name].total != total:
            raise VerifyError(
                f"{path}: crdiff.total.{name} is {stamp.groups[name].total}, the layers have {total}", REPAIR
            )
    if (stamp.thresholds is not None) != (planned.match.family.scope == "layer"):
        raise VerifyError(f"{path}: crdiff.method is not that of {planned.match.family.title}", REPAIR)
    values = [stamp.groups[scope.group].threshold for scope in scopes]
    values = values if stamp.thresholds is None else list(stamp.thresholds)
    if len(values) != len(scopes):
        raise VerifyError(f"{path}: crdiff.thresholds has {len(values)} values for {len(scopes)} layers", REPAIR)
    for scope, value in zip(scopes, values, strict=True):
        if (value is None) != (scope.rank == 0):
            raise VerifyError(f"{path}: the threshold of {show(scope.name)} does not go with its ratio", REPAIR)
    return tuple(
        Threshold(None if value is None else floats.bits(value), 0, scope.count)
        for scope, value in zip(scopes, values, strict=True)
    )
