"""Export from a pack: the plan of one of its sizes, and what was decided for it, without counting a weight."""

import contextlib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from crdiff_export.errors import OptionError, PackError, RecipeError
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.formats.dtypes import DTYPES
from crdiff_export.formats.hashing import hash_data_once
from crdiff_export.models.recipe import Provenance, Variant
from crdiff_export.packs.create import check_same_model, other_base
from crdiff_export.packs.pack import GIVE_BASE, Pack
from crdiff_export.progress import Progress
from crdiff_export.prune import architecture, plan
from crdiff_export.prune.criteria import Decision, Mask, Ranked
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.identity import read_identity
from crdiff_export.prune.kernels import Kernel
from crdiff_export.prune.plan import Plan
from crdiff_export.prune.plan_request import PlanRequest
from crdiff_export.prune.ranking import rank
from crdiff_export.prune.threshold import Threshold
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def plan_size(pack: Pack, request: PlanRequest, checkpoint: Checkpoint) -> Plan:
    """Plan the export of a base for one of a pack's sizes, and compare the first weights of its layers.

    Args:
        pack: The pack.
        request: Its size, and its cast if it has another one than the pack.
        checkpoint: The base's headers.

    Returns:
        The plan.

    Raises:
        PackError: The pack has no such size, or is of another base.
        OptionError: The cast does not go with the pack's masks.
    """
    pack.check_size(request.size)
    stamp = pack.variants[request.size]
    cast = DTYPES[request.dtype] if request.dtype else stamp.cast
    if stamp.masked and cast != stamp.cast:
        raise OptionError(
            f"--dtype {request.dtype}: the masks of {pack.path} are for {stamp.cast or 'the dtype of its base'}",
            "Leave --dtype out, or make the pack with it.",
        )
    family = pack.family if pack.family.table else None
    match = plan.recognise(checkpoint, family)
    of_base = plan.recognise(checkpoint.on_disk, family) if checkpoint.origin else match
    check_same_model(pack, of_base, checkpoint.path)
    pack.match_files(checkpoint.on_disk)
    variant = Variant(
        stamp.resolution, {name: group.ratio for name, group in stamp.groups.items()}, stamp.poa_weight,
        typing.cast(Provenance, stamp.provenance), stamp.provenance_source, prompt=stamp.prompt,
        borrowed_from=stamp.borrowed_from,
    )  # fmt: skip
    recipe, _, found_for = stamp.recipe.rpartition(" ")
    with contextlib.suppress(RecipeError):
        variant = replace(variant, resolution=Size.parse(found_for))
    planned = plan.make(
        checkpoint, match, request.size, variant, recipe, kinds=stamp.targets, cast=cast,
        # The base is the one that the pack was made of, and so are its weights that are not finite.
        allow_nonfinite=request.allow_nonfinite or any(group.nonfinite for group in stamp.groups.values()),
    )  # fmt: skip
    if stamp.native_source == architecture.GIVEN:
        planned = replace(planned, native=stamp.native)
    _check_totals(pack, planned)
    if layer := pack.identity.differing(read_identity(checkpoint, planned.targets, rounded=False)):
        name = layer.removesuffix(".weight")
        raise PackError(
            f"{checkpoint.path}: the weights of {name} are not those of the base of {pack.path}",
            GIVE_BASE,
        )
    return planned


def _check_totals(pack: Pack, planned: Plan) -> None:
    """Refuse a base whose layers have other numbers of weights, or other scales, than the pack says."""
    stamp, path = pack.variants[planned.size], planned.checkpoint.path
    for name, group in stamp.groups.items():
        total = sum(scope.count for scope in planned.scopes if scope.group == name)
        if total != group.total:
            raise PackError(
                f"{path}: has {total} weights in {name}, {pack.path} says {group.total} at {planned.size}", GIVE_BASE
            )
    if stamp.scaled != planned.has_scales:
        raise PackError(
            f"{path}: has {'layers' if planned.has_scales else 'no layers'} with a scale, {pack.path} says otherwise",
            GIVE_BASE,
        )


def check_one_cast(pack: Pack, plans: Sequence[Plan]) -> None:
    """Refuse plans that cannot be written from one reading of the base, as they are cast differently.

    Args:
        pack: The pack.
        plans: Plans of its sizes.

    Raises:
        OptionError: The plans have several casts.
    """
    first, *others = plans
    if other := next((each for each in others if each.cast != first.cast), None):
        casts = [f"{each.size} is {f'cast to {each.cast}' if each.cast else 'not cast'}" for each in (first, other)]
        raise OptionError(
            f"{pack.path}: {', '.join(casts)}", "Export one after the other, or give --dtype for all of them."
        )


def check_known_hashes(
    pack: Pack, checkpoint: Checkpoint, known: Mapping[str, str], progress: Progress, *, rehash: bool = False
) -> None:
    """Compare files whose hash is known without reading them with those of the pack's base.

    A file that has another hash than the pack's, or of which the pack has none, may still have the same tensors: then
    these are hashed. So are all files of a base that is written in another layout, where no later hash is theirs.

    Args:
        pack: The pack.
        checkpoint: The base.
        known: The SHA-256 of whole files as hex, by file name, as the Hub gives them.
        progress: Told of the bytes that are hashed.
        rehash: Hash them anew, whatever the user's cache of hashes says.

    Raises:
        PackError: A file is not the base's.
    """
    for file, stated in pack.match_files(checkpoint.on_disk):
        is_same = known[file.name] == stated.file_hash if file.name in known else not checkpoint.origin
        if is_same:
            continue
        progress.stage("hashing", file.data_size)
        if (actual := hash_data_once(file, progress, rehash=rehash)) != stated.data_hash:
            raise other_base(pack, file.path, actual, stated.data_hash)


def ranked(pack: Pack, plans: Sequence[Plan], kernel: Kernel, progress: Progress) -> Ranked:
    """Return what decides for plans of `plan_size`: the pack itself, or magnitudes counted anew for another cast.

    Args:
        pack: The pack.
        plans: The plans, which have one cast.
        kernel: Counts magnitudes.
        progress: Told of the bytes that are counted.

    Returns:
        What decides.
    """
    if all(each.cast == pack.variants[each.size].cast for each in plans):
        return PackedDecisions(pack)
    return rank(CriterionChoice.load("magnitude"), plans, kernel, progress)


@dataclass(frozen=True, slots=True)
class PackedDecisions:
    """What was decided for the sizes of a pack."""

    pack: Pack

    def decide(self, plan: Plan, progress: Progress | None = None) -> Decision:
        """Read the decision for a plan of `plan_size`, whose counts by layer are what the ratios ask for."""
        stamp = self.pack.variants[plan.size]
        values = self.pack.thresholds(plan.size) if not stamp.masked else {}
        thresholds = []
        for scope, name in zip(plan.scopes, _first_layers(plan), strict=True):
            group, value = stamp.groups[scope.group], values.get(name)
            if (value is None) == bool(scope.rank) and not stamp.masked:
                raise PackError(
                    f"{self.pack.path}, {plan.size}: the threshold of {scope.name} does not go with its ratio",
                    "Make the pack again.",
                )
            whole = plan.match.family.scope == "group"
            counts = (group.pruned, group.nonfinite) if whole else (scope.rank, 0)
            thresholds.append(Threshold(value, counts[0], scope.count, counts[1]))
        masks = self._masks(plan) if stamp.masked else None
        return Decision(tuple(thresholds), masks)

    def _masks(self, plan: Plan) -> tuple[Mask | None, ...]:
        import numpy as np

        bits = {name: np.frombuffer(data, np.uint8) for name, data in self.pack.read_masks(plan.size)}
        masks: list[Mask | None] = []
        for target in plan.targets:
            name, is_pruned = target.layer.diffusers, bool(plan.scopes[target.scope].rank)
            mask = bits.get(name)
            if (mask is not None) != is_pruned or (mask is not None and not _fits(mask, target.count)):
                raise PackError(
                    f"{self.pack.path}, {plan.size}: the mask of {name.removesuffix('.weight')} is not one of its "
                    f"{target.count} weights",
                    "Make the pack again.",
                )
            masks.append(None if mask is None else Mask(mask, target.count))
        return tuple(masks)


def complete_stamp(pack: Pack, planned: Plan, stamp: Stamp) -> Stamp:
    """Say in a header what a plain export would say: the pack's keys, in place of those that its plan does not know.

    Args:
        pack: The pack.
        planned: The plan of `plan_size`.
        stamp: The stamp of that plan and its decision.

    Returns:
        The stamp for the header.
    """
    packed = pack.variants[planned.size]
    return replace(
        packed, version=stamp.version, source_name=stamp.source_name, residual=stamp.residual, cast=stamp.cast,
        thresholds=stamp.thresholds, layout=stamp.layout, prefix=stamp.prefix, source_layout=stamp.source_layout,
        source_variant=stamp.source_variant,
        groups=packed.groups if stamp.cast == packed.cast else stamp.groups,
    )  # fmt: skip


def _fits(mask: "NDArray[np.uint8]", count: int) -> bool:
    """Whether a mask has a bit for each weight; the bits that are left of its last byte are 0."""
    return mask.size == -(-count // 8) and not (count % 8 and mask[-1] >> (count % 8))


def _first_layers(plan: Plan) -> list[str]:
    """Return for every scope a layer that has its threshold."""
    first: dict[int, str] = {}
    for target in plan.targets:
        first.setdefault(target.scope, target.layer.diffusers)
    return [first.get(number, "") for number in range(len(plan.scopes))]
