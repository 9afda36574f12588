"""Make packs: rank a base as an export does, and keep what was decided instead of writing pruned checkpoints."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from crdiff_export.bake import metadata
from crdiff_export.bake.destination import DiskSpace, check_file, check_space
from crdiff_export.bake.source_hashes import SourceHashes
from crdiff_export.errors import OptionError, PackError, PlanError
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.formats.safetensors import show
from crdiff_export.formats.text import amount
from crdiff_export.hub import bases
from crdiff_export.models.families import Family, Match
from crdiff_export.packs.pack import GIVE_BASE, SUFFIX, BaseFile, Pack, with_thresholds_by_name
from crdiff_export.packs.write import Contents, Entry, Masks, write
from crdiff_export.progress import Progress
from crdiff_export.prune import architecture, kernels, plan
from crdiff_export.prune.criteria import Decision, Ranked
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.identity import LayerHashes, read_identity
from crdiff_export.prune.plan import Plan
from crdiff_export.prune.plan_request import PlanRequest, plan_variant
from crdiff_export.prune.ranking import rank
from crdiff_export.prune.threshold import Threshold
from crdiff_export.sizes import Size

# Keys and hashes of a pack take less; masks are counted exactly.
_ROOM = 4 << 20


@dataclass(frozen=True, slots=True)
class PackRequest:
    """What a pack is to hold, and how to make it.

    Attributes:
        plans: What to prune at each size; they differ in the size alone.
        output: The pack's file.
        device: The device that computes, as for an export.
        threads: Threads on the CPU; None for all cores.
        force: Replace a pack that exists, or sizes that the pack has.
        rehash: Hash the base anew, whatever the user's cache of hashes says.
    """

    plans: tuple[PlanRequest, ...]
    output: Path
    device: str = "auto"
    threads: int | None = None
    force: bool = False
    rehash: bool = False


@dataclass(frozen=True)
class PackJob:
    """A request that has been checked and planned, from headers alone.

    Attributes:
        request: The request.
        base: The base.
        criterion: The criterion.
        plans: A plan for each size.
        before: The pack that sizes are added to; None for a new one.
    """

    request: PackRequest
    base: bases.Base
    criterion: CriterionChoice
    plans: tuple[Plan, ...]
    before: Pack | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """The base's headers."""
        return self.plans[0].checkpoint

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of layers of all sizes, those among them that the pack keeps."""
        replaced = {each.size for each in self.plans}
        stamps = [stamp for size, stamp in self.before.variants.items() if size not in replaced] if self.before else []
        kinds = [*(each.kinds for each in self.plans), *(stamp.targets for stamp in stamps)]
        return _join(self.plans[0].match.family, kinds)

    @property
    def mask_bytes(self) -> dict[Size, int]:
        """The bytes of the masks of each size, where the criterion gives masks."""
        if not self.criterion.masks:
            return {}
        return {each.size: sum(-(-weights // 8) for _, weights in _masked(each)) for each in self.plans}

    @property
    def notes(self) -> list[str]:
        """What the user should know before anything is written."""
        notes = list(dict.fromkeys(note for each in self.plans for note in each.notes))
        if masks := self.mask_bytes:
            total, sizes = sum(masks.values()), f"{len(masks)} sizes" if len(masks) > 1 else "one size"
            notes.append(f"{self.criterion.name} needs a mask of one bit a weight: {amount(total)} for {sizes}")
        return notes


@dataclass(frozen=True, slots=True)
class Packed:
    """A finished pack, and what only the weights have shown."""

    job: PackJob
    pack: Pack
    notes: tuple[str, ...] = ()


def prepare_new(request: PackRequest) -> PackJob:
    """Find the base, read its headers, and plan a new pack.

    Raises:
        PlanError: The file has another ending than a pack, or is the base.
        CrdiffError: The pack is not possible.
    """
    if request.output.suffix != SUFFIX:
        name = request.output.with_suffix(SUFFIX).name if request.output.name not in ("", SUFFIX) else f"NAME{SUFFIX}"
        raise PlanError(f"{request.output}: a pack's name ends in {SUFFIX}", f"Name it {name}.")
    check_file(request.output, force=request.force)
    job = _prepare(request, None)
    if request.output.exists() and any(request.output.samefile(file.path) for file in job.checkpoint.files):
        raise PlanError(
            f"{request.output}: that is the base itself", "Give another place with -o; the base is never changed."
        )
    return job


def prepare_more(request: PackRequest, before: Pack) -> PackJob:
    """Plan the sizes that a pack is to get; a native size and a family's table that were given stand in the pack.

    Args:
        request: The sizes, and the path of the pack as output.
        before: The pack.

    Returns:
        The planned pack.

    Raises:
        OptionError: The pack has one of the sizes.
        CrdiffError: They are not possible, or the base is another one.
    """
    there = [str(each.size) for each in request.plans if each.size in before.variants]
    if there and not request.force:
        raise OptionError(f"{before.path}: has {', '.join(there)} already", "Give --force to replace it.")
    if before.common.native_source == architecture.GIVEN:
        native = before.common.native
        request = replace(request, plans=tuple(replace(each, native=each.native or native) for each in request.plans))
    job = _prepare(request, before)
    check_same_model(before, job.plans[0].match, job.checkpoint.path)
    before.match_files(job.checkpoint)
    return job


def _prepare(request: PackRequest, before: Pack | None) -> PackJob:
    first = request.plans[0]
    criterion = check_criterion(request)
    base = bases.locate(first.base, first.variant)
    return prepare_located(request, criterion, base, base.open(first.variant), before)


def check_criterion(request: PackRequest) -> CriterionChoice:
    """Resolve the criterion of a pack.

    Args:
        request: The request.

    Returns:
        The criterion.

    Raises:
        OptionError: The criterion moves weights, or its calibration is for another size.
        CrdiffError: The criterion or its calibration cannot be used at all.
    """
    first = request.plans[0]
    if (named := CriterionChoice.load(first.criterion)).moves:
        raise OptionError(
            f"{named.name} moves weights that stay, and a pack holds none",
            f"Export a file for each size instead: crdiff export --criterion {named.name}.",
        )
    criterion = CriterionChoice.of(first.criterion, first.calibration)
    calibrated = criterion.calibration and criterion.calibration.size
    if other := next((each.size for each in request.plans if calibrated and each.size != calibrated), None):
        raise OptionError(
            f"{first.calibration}: was made at {calibrated}, and is not for {other}",
            f"Add each size with a calibration of its own: crdiff pack add --res {other} --calibration FILE.",
        )
    return criterion


def prepare_located(
    request: PackRequest,
    criterion: CriterionChoice,
    base: bases.Base,
    checkpoint: Checkpoint,
    before: Pack | None = None,
) -> PackJob:
    """Plan a pack of a base whose headers have been read.

    Args:
        request: The request.
        criterion: Its criterion, from `check_criterion`.
        base: The base.
        checkpoint: Its headers.
        before: The pack that sizes are added to; None for a new one.

    Returns:
        The planned pack.

    Raises:
        CrdiffError: The pack is not possible.
    """
    family = before.family if before and before.family.table else None
    plans = tuple(plan_variant(each, checkpoint, criterion, family) for each in request.plans)
    return PackJob(request, base, criterion, plans, before)


def make(job: PackJob, progress: Progress) -> Packed:
    """Rank the base, decide for every size, and write the pack.

    Args:
        job: The planned pack.
        progress: Is told how far the work is, and may interrupt it.

    Returns:
        The finished pack.

    Raises:
        CrdiffError: The pack failed; a pack that was there is as it was.
    """
    request, plans = job.request, job.plans
    old = job.before.masked_sizes if job.before else ()
    old_masks = sum(tensor.nbytes for size in old for tensor in job.before.masks(size)) if job.before else 0
    check_space(DiskSpace(request.output.parent, _ROOM + old_masks + sum(job.mask_bytes.values())))
    with SourceHashes(plans, cached=not request.rehash) as hashes:
        ranked = rank(job.criterion, plans, kernels.load(request.device, request.threads), progress, request.device)
        files = _base_files(job, hashes)
    if job.before:
        files = _same_files(job.before, files, job.checkpoint)
    decider = _Decider(job, ranked, progress)
    entries = [decider.entry(each) for each in plans]
    contents = Contents(job.kinds, files, _identity(job), (*_kept(job, entries), *entries))
    pack = write(request.output, contents, progress, replace=request.force, before=job.before)
    return Packed(job, pack, tuple(decider.notes))


def remove(pack: Pack, sizes: Sequence[Size], progress: Progress) -> Pack:
    """Write a pack anew without some of its sizes.

    Args:
        pack: The pack.
        sizes: The sizes that are to go.
        progress: Is told of the bytes of masks.

    Returns:
        The new pack.

    Raises:
        PackError: It has no such size.
        OptionError: It would have no size left.
    """
    for size in sizes:
        pack.check_size(size)
    left = [entry for entry in kept_entries(pack) if entry.size not in sizes]
    if not left:
        raise OptionError(f"{pack.path}: would have no size left", "Remove the file instead.")
    kinds = _join(pack.family, [entry.stamp.targets for entry in left])
    identity = pack.identity.only({layer.diffusers for layer in pack.layers(kinds)})
    return write(pack.path, Contents(kinds, pack.files, identity, tuple(left)), progress, before=pack)


def _join(family: Family, kinds: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Join lists of kinds of layers, in the family's order."""
    joined = {kind for some in kinds for kind in some}
    return tuple(kind for kind in family.kinds if kind in joined)


def kept_entries(pack: Pack) -> list[Entry]:
    """Return what a pack holds, to be written again."""
    entries = []
    for size, stamp in pack.variants.items():
        current = replace(stamp, version=metadata.tool_version())
        layers = tuple((tensor.name.partition("/")[2], 8 * tensor.nbytes) for tensor in pack.masks(size))
        read = partial(_read_again, pack, size, current) if stamp.masked else None
        entries.append(Entry(size, current, layers, read))
    return entries


def _read_again(pack: Pack, size: Size, stamp: Stamp) -> tuple[Stamp, Masks]:
    return stamp, (bits for _, bits in pack.read_masks(size))


def _kept(job: PackJob, new: Sequence[Entry]) -> list[Entry]:
    """Return the entries of the pack as it was, without those that are replaced."""
    replaced = {entry.size for entry in new}
    return [entry for entry in kept_entries(job.before) if entry.size not in replaced] if job.before else []


def check_same_model(pack: Pack, match: Match, path: Path) -> None:
    """Refuse a base whose headers tell that it is not the pack's.

    Args:
        pack: The pack.
        match: The family, layout and prefix of the base.
        path: Its path.

    Raises:
        PackError: The base has another family, layout or prefix.
    """
    stamp = pack.common
    special = match.special.id if match.special else None
    for what, ours, theirs in (
        ("of the family", match.family.id, stamp.family),
        ("of the kind", special or "plain", "plain" if stamp.special in (None, "base") else stamp.special),
        ("in the layout", match.layout.name, stamp.layout),
        ("with the prefix", match.prefix or "none", stamp.prefix or "none"),
    ):
        if ours != theirs:
            raise PackError(
                f"{path}: a model {what} {show(ours)}, {pack.path} is for one {what} {show(theirs)}", GIVE_BASE
            )


def _same_files(pack: Pack, files: Sequence[BaseFile], checkpoint: Checkpoint) -> tuple[BaseFile, ...]:
    """Return the pack's files, with what is now known of them; refuse a base whose files hash otherwise."""
    same = []
    for (source, theirs), ours in zip(pack.match_files(checkpoint), files, strict=True):
        if ours.data_hash != theirs.data_hash:
            raise other_base(pack, source.path, ours.data_hash, theirs.data_hash)
        same.append(replace(theirs, file_hash=theirs.file_hash or ours.file_hash))
    return tuple(same)


def other_base(pack: Pack, path: Path, actual: str, stated: str) -> PackError:
    """Make the error for a file that is not the base's."""
    return PackError(f"{path}: hashes to 0x{actual}, the base of {pack.path} to 0x{stated}", GIVE_BASE)


def _base_files(job: PackJob, hashes: SourceHashes) -> tuple[BaseFile, ...]:
    files = []
    for number, file in enumerate(job.checkpoint.files):
        digest = hashes.digest(number)
        assert digest is not None
        name = file.name.encode("utf-8", "replace").decode()  # a file's name may be any bytes
        files.append(BaseFile(name, digest, job.base.hashes.get(file.name)))
    return tuple(sorted(files, key=lambda file: file.name))


def _identity(job: PackJob) -> LayerHashes:
    first = job.plans[0]
    every = plan.make(first.checkpoint, first.match, first.size, first.variant, first.recipe, kinds=job.kinds)
    return read_identity(first.checkpoint, every.targets)


class _Decider:
    """Decides which weights go at each size of a job, as an export does; `notes` are what the weights have shown."""

    def __init__(self, job: PackJob, ranked: Ranked, progress: Progress) -> None:
        self._criterion, self._ranked, self._progress = job.criterion, ranked, progress
        self._calibrated = job.criterion.calibrated(progress)
        self._architecture = architecture.find(job.plans[0])
        self._source_name = job.before.common.source_name if job.before else job.base.name
        self.notes: dict[str, None] = {}

    def entry(self, planned: Plan) -> Entry:
        """Decide on a size with thresholds; one with masks is decided when it is written, to hold one at a time."""
        if not self._criterion.masks:
            return Entry(planned.size, self._stamp(planned, self._decide(planned)))
        thresholds = tuple(Threshold(None, 0, scope.count) for scope in planned.scopes)
        draft = self._stamp(planned, Decision(thresholds, (None,) * len(planned.targets)))
        return Entry(planned.size, draft, tuple(_masked(planned)), partial(self._masks, planned))

    def _masks(self, planned: Plan) -> tuple[Stamp, Masks]:
        decision = self._decide(planned)
        by_name = dict(zip((t.layer.diffusers for t in planned.targets), decision.masks or (), strict=True))
        masks = (mask.bits.data for layer, _ in _masked(planned) if (mask := by_name[layer]))
        return self._stamp(planned, decision), masks

    def _decide(self, planned: Plan) -> Decision:
        decision = self._ranked.decide(planned, self._progress)
        self.notes.update(dict.fromkeys(decision.notes))
        return decision

    def _stamp(self, planned: Plan, decision: Decision) -> Stamp:
        stamp = metadata.stamp(
            planned, decision, self._criterion.name, self._source_name, self._architecture, calibrated=self._calibrated
        )
        return with_thresholds_by_name(stamp, [target.layer.diffusers for target in planned.targets])


def _masked(planned: Plan) -> list[tuple[str, int]]:
    """Return the layers of a plan that would have a mask, by name, with the number of their weights."""
    pruned = [target for target in planned.targets if planned.scopes[target.scope].rank]
    return sorted((target.layer.diffusers, target.count) for target in pruned)
