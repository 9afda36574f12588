"""Open a baked checkpoint: its stamp, and the plan and thresholds that made it, rebuilt from its headers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crdiff_export.errors import FamilyError, VerifyError
from crdiff_export.formats.checkpoint import Checkpoint, open_checkpoint
from crdiff_export.formats.crdiff_keys import LAYER_WISE, Stamp
from crdiff_export.formats.safetensors import show
from crdiff_export.models import families
from crdiff_export.models.recipe import Variant
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import plan
from crdiff_export.prune.criteria import Decision, Mask
from crdiff_export.prune.criteria.spec import MAGNITUDES, installed
from crdiff_export.prune.plan import Plan, open_targets
from crdiff_export.prune.threshold import Threshold

if TYPE_CHECKING:
    from numpy.typing import NDArray

REPAIR = "Do not use the file; export it again from its base."
DATA_HASH, FILE_HASH = "crdiff.source.hash_sha256", "crdiff.source.file_sha256"
NEWER = "Install a newer crdiff."


@dataclass(frozen=True, slots=True)
class BakedCheckpoint:
    """The files of an export, and the plan and thresholds that made them.

    Attributes:
        checkpoint: The files.
        stamp: The `crdiff.*` keys that all files have in common.
        plan: The plan, rebuilt from headers and layers; it reads the baked files, not the base.
        thresholds: One for each scope of the plan, without the number of pruned weights. For a file without
            thresholds, whose zeros are the mask, they prune nothing.
    """

    checkpoint: Checkpoint
    stamp: Stamp
    plan: Plan
    thresholds: tuple[Threshold, ...]


def open_baked(path: Path) -> BakedCheckpoint:
    """Read the headers of a baked file or folder.

    Raises:
        CheckpointError: It cannot be read, or crdiff has not made it.
        VerifyError: Its headers and layers contradict each other.
    """
    checkpoint = open_checkpoint(path)
    stamp = _stamp(checkpoint)
    planned = _plan(checkpoint, stamp)
    return BakedCheckpoint(checkpoint, stamp, planned, _thresholds(planned, stamp))


def read_decision(baked: BakedCheckpoint, progress: Progress | None = None, *, moved: bool = True) -> Decision:
    """Read from a baked checkpoint which weights were pruned: its thresholds, or its zeros as masks.

    Args:
        baked: The baked checkpoint.
        progress: Is told how far the reading of the zeros is.
        moved: Of a file with moved weights, keep the new weights of its pruned layers in memory, too.

    Returns:
        The decision, as far as the file tells it.
    """
    if not baked.stamp.masked:
        return Decision(baked.thresholds)
    import numpy as np

    pruned = [(i, t) for i, t in enumerate(baked.plan.targets) if baked.plan.scopes[t.scope].rank]
    progress = progress or Silent()
    progress.stage("reading", sum(target.nbytes for _, target in pruned))
    masks: dict[int, Mask] = {}
    weights: dict[int, NDArray[Any]] = {}
    with open_targets(baked.checkpoint) as read:
        for number, target in pruned:
            bits = np.frombuffer(read(target), f"u{target.source.itemsize}")
            masks[number] = Mask.pack(bits == 0)
            if baked.stamp.moved and moved:
                weights[number] = bits
            progress.advance(bits.nbytes)
    counts = [0] * len(baked.plan.scopes)
    for number, mask in masks.items():
        counts[baked.plan.targets[number].scope] += mask.pruned
    thresholds = tuple(replace(t, pruned=count) for t, count in zip(baked.thresholds, counts, strict=True))
    return Decision(thresholds, tuple(masks.get(i) for i in range(len(baked.plan.targets))), weights)


def _stamp(checkpoint: Checkpoint) -> Stamp:
    stamps = [Stamp.from_metadata(file.metadata, str(file.path)) for file in checkpoint.files]
    # Only the hash of each file's source differs between the files of one export.
    shared = [replace(stamp, source_hash=None, source_file_hash=None) for stamp in stamps]
    for file, stamp in zip(checkpoint.files, shared, strict=True):
        if stamp != shared[0]:
            raise VerifyError(f"{file.path}: its header is of another export than its neighbours'", REPAIR)
    stamp = stamps[0]
    if not stamp.masked and stamp.criterion not in MAGNITUDES:
        if stamp.criterion.partition(":")[0] in installed():
            message = f"{checkpoint.path}: has no crdiff.mask, which goes with {show(stamp.criterion)}"
            raise VerifyError(message, REPAIR)
        raise VerifyError(f"{checkpoint.path}: ranked by {show(stamp.criterion)}, which is not known here", NEWER)
    if stamp.masked and stamp.criterion in MAGNITUDES:
        raise VerifyError(
            f"{checkpoint.path}: crdiff.mask does not go with {stamp.criterion}, which has thresholds", REPAIR
        )
    return stamp


def _plan(checkpoint: Checkpoint, stamp: Stamp) -> Plan:
    """Rebuild the plan that made the file, from its header and its layers."""
    try:
        match = families.detect_baked(checkpoint.shapes, checkpoint.metadata, str(checkpoint.path))
    except FamilyError as error:
        if families.TABLE_KEY not in checkpoint.metadata:
            raise FamilyError(f"{checkpoint.path}: {error.message}", error.hint) from error
        where = f"{checkpoint.path}: {families.TABLE_KEY}"
        raise VerifyError(
            f"{where} is not of its layers: {error.message.removeprefix(f'{where}: ')}", REPAIR
        ) from error
    family = match.family
    for key, stated, actual in (
        ("family", stamp.family, family.id),
        ("layout", stamp.layout, match.layout.name),
        ("prefix", stamp.prefix, match.prefix),
        ("ratio", sorted(stamp.groups), sorted(family.groups)),
        ("targets", stamp.targets, tuple(kind for kind in family.kinds if kind in stamp.targets)),
        ("special", stamp.special or "", match.special.id if match.special else ""),
    ):
        # Headers of older exports have no word for most special models; `base` is seen in the weights alone.
        if stated != actual and not (key == "special" and stated in ("", "base")):
            raise VerifyError(
                f"{checkpoint.path}: crdiff.{key} is for {_words(stated)}, its layers are of {_words(actual)}", REPAIR
            )
    ratios = {name: group.ratio for name, group in stamp.groups.items()}
    variant = Variant(stamp.resolution, ratios, stamp.poa_weight, "starting-point", stamp.provenance_source)
    return plan.make(
        checkpoint, match, stamp.resolution, variant, stamp.recipe, kinds=stamp.targets, allow_nonfinite=True
    )


def _words(value: str | Sequence[str]) -> str:
    return show(value if isinstance(value, str) else ", ".join(value)) if value else "none"


def _thresholds(planned: Plan, stamp: Stamp) -> tuple[Threshold, ...]:
    """Return the header's thresholds, one per scope, after a check that its counts fit the layers."""
    path, scopes = planned.checkpoint.path, planned.scopes
    for name in planned.groups:
        total = sum(scope.count for scope in scopes if scope.group == name)
        if stamp.groups[name].total != total:
            raise VerifyError(
                f"{path}: crdiff.total.{name} is {stamp.groups[name].total}, the layers have {total}", REPAIR
            )
    layer_wise = stamp.masked == LAYER_WISE if stamp.masked else stamp.thresholds is not None
    if layer_wise != (planned.match.family.scope == "layer"):
        raise VerifyError(f"{path}: crdiff.method is not that of {planned.match.family.title}", REPAIR)
    if stamp.scaled != planned.has_scales:
        raise VerifyError(f"{path}: crdiff.scaled does not go with its layers", REPAIR)
    if stamp.masked:
        return tuple(Threshold(None, 0, scope.count) for scope in scopes)
    values = [stamp.groups[scope.group].threshold for scope in scopes]
    values = values if stamp.thresholds is None else list(stamp.thresholds)
    if len(values) != len(scopes):
        raise VerifyError(f"{path}: crdiff.thresholds has {len(values)} values for {len(scopes)} layers", REPAIR)
    for scope, value in zip(scopes, values, strict=True):
        if (value is None) != (scope.rank == 0):
            raise VerifyError(f"{path}: the threshold of {show(scope.name)} does not go with its ratio", REPAIR)
    return tuple(Threshold(value, 0, scope.count) for scope, value in zip(scopes, values, strict=True))
