"""Find out what a plan file leaves to do: what each variant or pack will be, and whether it exists already."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from crdiff_export.bake import metadata
from crdiff_export.errors import CrdiffError, OptionError, PlanError
from crdiff_export.export import ExportRequest, in_layout, plan_variant
from crdiff_export.formats.crdiff_keys import PREFIX, CalibrationStamp, Stamp
from crdiff_export.formats.hashing import hash_data_once
from crdiff_export.hub import bases, remote_headers
from crdiff_export.hub.remote_headers import RemoteBase
from crdiff_export.packs import PackHeader, create
from crdiff_export.packs.create import PackJob, PackRequest
from crdiff_export.progress import Progress
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan
from crdiff_export.publish import plan_file
from crdiff_export.publish.existing import Existing, HubBranch, HubBranches, read_local_output, read_local_pack
from crdiff_export.publish.plan_file import PlanEntry, PlanFile
from crdiff_export.publish.target import MAIN, Destination
from crdiff_export.sizes import Size

Action = Literal["make", "send", "skip", "fail"]
# Opens a progress display for the work inside.
OpenProgress = Callable[[], AbstractContextManager[Progress]]
# Keys that tell where numbers come from.
_ORIGIN_KEYS = (f"{PREFIX}provenance", f"{PREFIX}evidence")
# The title of our pull requests.
TITLE = "Publish variants with crdiff"


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """A run of `crdiff publish`.

    Attributes:
        plan: The plan file.
        folder: Where files are written.
        keep: Whether files stay after their push.
        push: Whether to push at all.
        create_pr: Whether to commit to pull requests.
        device: The device to rank on.
        threads: Threads on the CPU; None for all cores.
        rehash: Hash local bases anew, whatever the user's cache of hashes says.
    """

    plan: Path
    folder: Path
    keep: bool = True
    push: bool = True
    create_pr: bool = False
    device: str = "auto"
    threads: int | None = None
    rehash: bool = False


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One variant or pack, and what to do about it.

    Attributes:
        entry: What the plan says of it.
        request: Its export; of a pack, that of its first size.
        path: Its path in the repository.
        push: Whether it goes to the Hub if the plan names a repository.
        action: `make` it, `send` the files of an earlier run, `skip` it, or `fail` with `error`.
        reason: Why.
        plan: What to prune, if the base could be read; None for a pack.
        job: What a pack will hold, if the base could be read; None for a variant.
        digest: `Stamp.digest`, of a pack `PackHeader.digest`, if it had to be known.
        commit: The commit that holds a skipped one.
        error: What stands against it.
    """

    entry: PlanEntry
    request: ExportRequest
    path: str
    push: bool = True
    action: Action = "make"
    reason: str = "new"
    plan: Plan | None = None
    job: PackJob | None = None
    digest: str | None = None
    commit: str | None = None
    error: CrdiffError | None = None

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Its size, or those of a pack."""
        return tuple(each.size for each in self.entry.pack or (self.request,))

    @property
    def notes(self) -> Sequence[str]:
        """What people should know before it is made."""
        return self.job.notes if self.job else self.plan.notes if self.plan else ()

    @property
    def target(self) -> Path:
        """Where it is written."""
        assert self.request.output
        return self.request.output

    @property
    def destination(self) -> Destination | None:
        """Where it goes on the Hub; None for what is only written."""
        return Destination(self.entry.repo, self.entry.revision or MAIN) if self.push and self.entry.repo else None

    def fail(self, error: CrdiffError) -> "WorkItem":
        """Return the item with something that stands against it."""
        return replace(self, action="fail", reason=error.message, error=error)


@dataclass(frozen=True, slots=True)
class BaseWork:
    """A base and all variants that one reading of it can make, with its packs.

    `remote` is None if the base cannot be read.
    """

    remote: RemoteBase | None
    items: tuple[WorkItem, ...]


@dataclass(frozen=True, slots=True)
class Worklist:
    """Everything that a plan file asks for."""

    request: PublishRequest
    plan: PlanFile
    bases: tuple[BaseWork, ...]

    @property
    def items(self) -> tuple[WorkItem, ...]:
        """All variants and packs, in the plan file's order."""
        items = {id(item.entry): item for work in self.bases for item in work.items}
        return tuple(items[id(entry)] for entry in self.plan.entries)


def make_worklist(request: PublishRequest, open_progress: OpenProgress) -> Worklist:
    """Read a plan file, the headers of its bases, and the headers of what the Hub and the disk hold.

    No weights are read, except that a local base is hashed if there is something to compare it with.

    Args:
        request: The run.
        open_progress: Opens a progress display for hashing.

    Returns:
        Every variant and pack, and what to do about it; an error in one fails that variant alone.

    Raises:
        PlanFileError: If the plan file is wrong.
        OptionError: If the plan does not go with the request's options.
    """
    plan = plan_file.load(request.plan)
    if request.create_pr:
        _refuse_refs(plan)
    groups: dict[tuple[object, ...], list[PlanEntry]] = {}
    for entry in plan.entries:
        export = entry.request
        shared = (
            export.base,
            export.variant,
            export.dtype,
            export.allow_nonfinite,
            export.criterion,
            export.calibration,
            export.family,
            export.native if export.layout else None,
            export.layout,
        )
        groups.setdefault(shared, []).append(entry)
    branches = HubBranches(plan, TITLE if request.create_pr else None)
    return Worklist(
        request, plan, tuple(_base_work(request, plan, group, branches, open_progress) for group in groups.values())
    )


def _refuse_refs(plan: PlanFile) -> None:
    """Refuse branches and tags in a plan for pull requests, as `push` does."""
    for entry in plan.entries:
        if entry.revision not in (None, MAIN):
            message = f"{plan.name}: --create-pr does not go with revision = {entry.revision!r} ({entry})"
            raise OptionError(message, "A pull request is one against main; leave revision out.")
        if entry.tag:
            message = f"{plan.name}: --create-pr does not go with tag = {entry.tag!r} ({entry})"
            raise OptionError(message, "Leave tag out until the request is merged; a run without --create-pr tags it.")


def _base_work(
    request: PublishRequest, plan: PlanFile, entries: Sequence[PlanEntry], branches: HubBranches,
    open_progress: OpenProgress,
) -> BaseWork:  # fmt: skip
    export = entries[0].request
    try:
        remote = _read_base(export)
    except CrdiffError as error:
        return BaseWork(None, tuple(_item(request, plan, entry, folder=False).fail(error) for entry in entries))
    # Packs are of a base as it is on the disk, whatever the layout of files.
    of_packs = replace(remote, checkpoint=remote.checkpoint.on_disk)
    stamps, pack_stamps = (_ExpectedStamps(each, export, open_progress) for each in (remote, of_packs))
    folder = remote.checkpoint.kind != "file"
    items = []
    for entry in entries:
        item = _item(request, plan, entry, folder=folder)
        try:
            if entry.pack:
                wanted = pack_request(item)
                criterion = create.check_criterion(wanted)
                job = create.prepare_located(wanted, criterion, of_packs.base, of_packs.checkpoint)
                item = replace(item, job=job)
            else:
                _check_name(item, folder=folder)
                item = replace(item, plan=plan_variant(item.request, remote.checkpoint))
            branch = branches.read(item.destination) if item.destination else HubBranch()
            if entry.pack:
                items.append(_decide_pack(item, of_packs, branch, pack_stamps))
            else:
                items.append(_decide(item, remote, branch, stamps))
        except CrdiffError as error:
            items.append(item.fail(error))
    return BaseWork(remote, tuple(items))


def _read_base(export: ExportRequest) -> RemoteBase:
    """Read the headers of a base; one that is written in another layout is fetched, as all of its parts are needed."""
    if export.layout is None:
        return remote_headers.read_headers(export.base, export.variant)
    local = bases.locate(export.base, export.variant)
    return RemoteBase(local, in_layout(export, local.open(export.variant)))


def _item(request: PublishRequest, plan: PlanFile, entry: PlanEntry, *, folder: bool) -> WorkItem:
    target, path = request.folder / plan.local_path(entry), entry.path
    if folder and entry.default_name:
        path = path.removesuffix(".safetensors")
        target = target.with_name(target.name.removesuffix(".safetensors"))
    export = replace(
        entry.request, output=target, device=request.device, threads=request.threads, rehash=request.rehash
    )
    return WorkItem(entry, export, path, request.push)


def pack_request(item: WorkItem) -> PackRequest:
    """Return what makes the pack of an item."""
    export = item.request
    return PackRequest(item.entry.pack, item.target, export.device, export.threads, force=True, rehash=export.rehash)


def _check_name(item: WorkItem, *, folder: bool) -> None:
    """Refuse a name that does not fit, now that the headers tell whether the result is a file or a folder."""
    safetensors = item.path.endswith(".safetensors")
    if folder and safetensors:
        name = item.path.removesuffix(".safetensors")
        raise PlanError(f"{item.path}: the base is a folder, and so is the output", f"Name it {name}.")
    if not folder and not safetensors:
        raise PlanError(f"{item.path}: the output is a safetensors file", f"Name it {item.path}.safetensors.")


def _decide(item: WorkItem, remote: RemoteBase, branch: HubBranch, expected: "_ExpectedStamps") -> WorkItem:
    """Decide what to do about an item that has a plan: compare the headers that it will have with those that exist."""
    assert item.plan
    weights = [output.source.name for output in item.plan.outputs] if remote.checkpoint.kind != "file" else [""]
    published, reason = branch.at(item.path, weights), None
    if published.stamps:
        wanted = expected.stamps(item.plan)
        reason = _difference(wanted, published, remote)
        if reason is None:
            return replace(item, action="skip", reason="unchanged", digest=wanted[0].digest(), commit=branch.commit)
    local = read_local_output(item.target)
    if not local.stamps and not published.stamps:
        foreign = any(name in published.files for name in weights)
        return replace(item, reason="replaces what crdiff did not make") if foreign else item
    wanted = expected.stamps(item.plan)
    item = replace(item, digest=wanted[0].digest())
    if local.stamps:
        beside = {*map(str, remote.checkpoint.companions), *remote.checkpoint.generated}
        extra = sorted(local.files.keys() - beside)
        difference = _difference(wanted, local, remote) or (f"what is there holds {extra[0]}, too" if extra else None)
        if difference is None and item.destination:
            return replace(item, action="send", reason="made by an earlier run")
        if difference is None:
            return replace(item, action="skip", reason="unchanged")
        reason = reason or difference
    return replace(item, reason=reason or item.reason)


def _decide_pack(item: WorkItem, remote: RemoteBase, branch: HubBranch, expected: "_ExpectedStamps") -> WorkItem:
    """Decide what to do about a pack, as `_decide` does about a variant."""
    assert item.job
    published, reason = branch.pack_at(item.path), None
    if published:
        reason = _pack_difference(item.job, published, remote, expected)
        if reason is None:
            return replace(
                item, action="skip", reason="unchanged", digest=published.digest(), commit=branch.commit
            )  # fmt: skip
    elif item.path in branch.files:
        reason = "replaces what crdiff did not make"
    if local := read_local_pack(item.target):
        difference = _pack_difference(item.job, local, remote, expected)
        if difference is None:
            action: Action = "send" if item.destination else "skip"
            why = "made by an earlier run" if item.destination else "unchanged"
            return replace(item, action=action, reason=why, digest=local.digest())
        reason = reason or difference
    return replace(item, reason=reason or item.reason)


def _pack_difference(job: PackJob, existing: PackHeader, remote: RemoteBase, expected: "_ExpectedStamps") -> str | None:
    """Say in what an existing pack differs from what is wanted; None if in nothing."""
    plans = {plan.size: plan for plan in job.plans}
    if plans.keys() != existing.variants.keys():
        return "changed: sizes"
    wanted = {size: expected.stamp(plan).request_keys() for size, plan in plans.items()}
    for size, stamp in existing.variants.items():
        if changed := _changed_keys(wanted[size], stamp.request_keys()):
            return f"changed: {changed} ({size})"
    files = remote.checkpoint.files
    if len(files) != len(existing.files):
        return "changed: files of the base"
    in_order = sorted(range(len(files)), key=lambda number: files[number].name)  # as `Pack.match_files` has them
    for number, there in zip(in_order, existing.files, strict=True):
        stamp = expected.with_source_hash(expected.stamp(job.plans[0]), number)
        ours, theirs = stamp.source_hash, f"0x{there.data_hash}"
        if stamp.source_file_hash:
            ours, theirs = stamp.source_file_hash, f"0x{there.file_hash}"
        if ours is None:
            return "its base's hash is not known"
        if ours != theirs:
            return f"changed: source.{'file' if stamp.source_file_hash else 'hash'}_sha256"
    return None


def _difference(wanted: Sequence[Stamp], existing: Existing, remote: RemoteBase) -> str | None:
    """Say in what existing files differ from what is wanted; None if in nothing."""
    digests = [stamp.digest() for stamp in wanted]
    if None in digests or digests != [stamp.digest() for stamp in existing.stamps]:
        changed = _changed_keys(wanted[0].request_keys(), existing.stamps[0].request_keys())
        if not changed:
            return "incomplete" if digests[0] else "its base's hash is not known"
        return f"changed: {changed}"
    if any(name not in existing.files for name in remote.checkpoint.generated):
        return "incomplete"
    for name in map(str, remote.checkpoint.companions):
        if name not in existing.files:
            return "incomplete"
        if not existing.has_content(name, remote.contents.get(name)):
            return f"changed: {name}"
    return None


def _changed_keys(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Name the keys that differ, at most three; empty if there are none."""
    changed = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    keys = sorted(changed, key=lambda key: (key.startswith(_ORIGIN_KEYS), key))  # numbers before their origin
    named = ", ".join(key.removeprefix(PREFIX) for key in keys[:3])
    return f"{named}{', …' if len(keys) > 3 else ''}"


class _ExpectedStamps:
    """The headers that variants of a base will have, as far as they can be known without reading its weights.

    Hashes that the Hub does not give are computed when they are first needed.
    """

    def __init__(self, remote: RemoteBase, export: ExportRequest, open_progress: OpenProgress) -> None:
        self._remote, self._export, self._open_progress = remote, export, open_progress
        self._computed: dict[int, str] = {}

    def stamps(self, plan: Plan) -> list[Stamp]:
        """Return the header of each file."""
        stamp = self.stamp(plan)
        return [self.with_source_hash(stamp, number) for number in range(len(plan.outputs))]

    def stamp(self, plan: Plan) -> Stamp:
        """Return what the headers of all files of a variant have in common."""
        criterion, calibrated = self._criterion
        return metadata.stamp_of_plan(plan, criterion, self._remote.base.name, calibrated=calibrated)

    @cached_property
    def _criterion(self) -> tuple[str, CalibrationStamp | None]:
        choice = CriterionChoice.of(self._export.criterion, self._export.calibration)
        if choice.calibration is None:
            return choice.name, None
        with self._open_progress() as progress:
            return choice.name, choice.calibrated(progress)

    def with_source_hash(self, stamp: Stamp, number: int) -> Stamp:
        """Add the hash of one of the base's files, as far as it can be known."""
        file = self._remote.checkpoint.files[number]
        if sha256 := self._remote.base.hashes.get(file.name):
            return replace(stamp, source_file_hash=f"0x{sha256}")
        if file.info is None:
            return stamp
        if number not in self._computed:
            with self._open_progress() as progress:
                progress.stage("hashing", file.data_size)
                self._computed[number] = hash_data_once(file, progress, rehash=self._export.rehash)
        return replace(stamp, source_hash=f"0x{self._computed[number]}")
