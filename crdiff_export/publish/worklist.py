"""Before a plan file is carried out: what its variants will be, what is held of them already, what is to do."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

from crdiff_export.bake import metadata
from crdiff_export.errors import CheckpointError, CrdiffError, HubError, OptionError, PlanError
from crdiff_export.export import ExportRequest, plan_variant
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.formats.crdiff_keys import PREFIX, CalibrationStamp, Stamp, is_baked
from crdiff_export.formats.hashing import git_id, hash_data, hash_file
from crdiff_export.hub import bases, repository
from crdiff_export.hub.bases import Looked
from crdiff_export.hub.repository import RemoteFile
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan
from crdiff_export.publish import plan_file
from crdiff_export.publish.plan_file import Entry, Matrix
from crdiff_export.publish.target import MAIN, Destination, find_pull_request

Action = Literal["make", "send", "skip", "fail"]
# Opens a progress for the work within.
Watching = Callable[[], AbstractContextManager[Progress]]
# What says where numbers come from, not what they are.
_WHENCE = (f"{PREFIX}provenance", f"{PREFIX}evidence")
TITLE = "Publish variants with crdiff"


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """Which plan file, and how. Files are written below `folder`; without `keep` each is taken away once it is pushed.

    Without `push` they are only written.
    """

    plan: Path
    folder: Path
    keep: bool = True
    push: bool = True
    create_pr: bool = False
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One variant: where it goes, what is to be done about it, and why.

    `make` it, `send` it as an earlier run has made it, `skip` it as it is where it should be, or `fail` with `error`.
    `path` is the one in the repository, `commit` the one that holds a skipped one. Without `push` it is only written.
    """

    entry: Entry
    request: ExportRequest
    path: str
    target: Path
    push: bool = True
    action: Action = "make"
    reason: str = "new"
    plan: Plan | None = None
    digest: str | None = None
    commit: str | None = None
    error: CrdiffError | None = None

    @property
    def destination(self) -> Destination | None:
        """Where it goes on the Hub; None for what is only written."""
        return Destination(self.entry.repo, self.entry.revision or MAIN) if self.push and self.entry.repo else None

    def failed(self, error: CrdiffError) -> "Item":
        """The same, now that something stands against it."""
        return replace(self, action="fail", reason=error.message, error=error)


@dataclass(frozen=True, slots=True)
class Reading:
    """A base and all variants that one reading of it can make; `looked` None where it cannot be had."""

    looked: Looked | None
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """Everything that a plan file asks for."""

    request: PublishRequest
    matrix: Matrix
    readings: tuple[Reading, ...]

    @property
    def items(self) -> tuple[Item, ...]:
        """All variants, in the plan file's order."""
        found = {id(item.entry): item for reading in self.readings for item in reading.items}
        return tuple(found[id(entry)] for entry in self.matrix.entries)


def survey(request: PublishRequest, watching: Watching) -> Survey:
    """Read a plan file, the headers of its bases, and those of what the Hub holds already.

    No weights are read, but that a base which is a local file is hashed where there is something to compare it with.
    MatrixError for a plan file that is wrong; what else is wrong fails the variants that it concerns.
    """
    read = plan_file.load(request.plan)
    if request.create_pr:
        _refuse_refs(read)
    grouped: dict[tuple[object, ...], list[Entry]] = {}
    for entry in read.entries:
        same = entry.base, entry.variant, entry.dtype, entry.allow_nonfinite, entry.criterion, entry.calibration
        grouped.setdefault(same, []).append(entry)
    shelves = _Shelves(request, read)
    return Survey(request, read, tuple(_reading(request, read, e, shelves, watching) for e in grouped.values()))


def _refuse_refs(read: Matrix) -> None:
    """OptionError for a plan that cannot go by way of a pull request, as `push` has it."""
    for entry in read.entries:
        if entry.revision not in (None, MAIN):
            message = f"{read.name}: --create-pr does not go with revision = {entry.revision!r} ({entry})"
            raise OptionError(message, "A pull request is one against main; leave revision out.")
        if entry.tag:
            message = f"{read.name}: --create-pr does not go with tag = {entry.tag!r} ({entry})"
            raise OptionError(message, "Leave tag out until the request is merged; a run without --create-pr tags it.")


def _reading(
    request: PublishRequest, read: Matrix, entries: Sequence[Entry], shelves: "_Shelves", watching: Watching
) -> Reading:
    try:
        looked = bases.look(entries[0].base, entries[0].variant)
    except CrdiffError as error:
        return Reading(None, tuple(_item(request, read, entry, folder=False).failed(error) for entry in entries))
    hashes = _Hashes(looked, watching, entries[0].criterion, entries[0].calibration)
    items = []
    for entry in entries:
        item = _item(request, read, entry, folder=looked.checkpoint.kind != "file")
        try:
            _check_name(item, folder=looked.checkpoint.kind != "file")
            item = replace(item, plan=plan_variant(item.request, looked.checkpoint))
            items.append(_decided(item, looked, shelves, hashes))
        except CrdiffError as error:
            items.append(item.failed(error))
    return Reading(looked, tuple(items))


def _item(request: PublishRequest, read: Matrix, entry: Entry, *, folder: bool) -> Item:
    target, path = request.folder / read.local(entry), entry.path
    if folder and entry.default_name:
        path = path.removesuffix(".safetensors")
        target = target.with_name(target.name.removesuffix(".safetensors"))
    asked = ExportRequest(
        entry.base, entry.size, target, recipe=entry.recipe, ratio=entry.ratio, ratios=entry.ratios,
        poa_weight=entry.poa_weight, targets=entry.targets, criterion=entry.criterion, calibration=entry.calibration,
        device=request.device, dtype=entry.dtype,
        variant=entry.variant, force=True, allow_nonfinite=entry.allow_nonfinite, threads=request.threads,
        given="in the plan file",
    )  # fmt: skip
    return Item(entry, asked, path, target, request.push)


def _check_name(item: Item, *, folder: bool) -> None:
    """PlanError for a name that the result cannot have, where only the base's headers tell what it will be."""
    safetensors = item.path.endswith(".safetensors")
    if folder and safetensors:
        name = item.path.removesuffix(".safetensors")
        raise PlanError(f"{item.path}: the base is a folder, and so is the output", f"Name it {name}.")
    if not folder and not safetensors:
        raise PlanError(f"{item.path}: the output is a safetensors file", f"Name it {item.path}.safetensors.")


def _decided(item: Item, looked: Looked, shelves: "_Shelves", hashes: "_Hashes") -> Item:
    """What is to be done about an item whose plan stands."""
    plan = item.plan
    assert plan
    shelf = shelves.of(item) if item.destination else _Shelf()
    places = [_place(item, plan, output.source.name) for output in plan.outputs]
    there = [shelf.stamps[place] for place in places if place in shelf.stamps]
    wanted = [hashes.stamp(plan, number) for number in range(len(plan.outputs))] if there else []
    if there and _equal(wanted, there) and _has_companions(shelf, item, plan, looked):
        return replace(item, action="skip", reason="unchanged", digest=wanted[0].digest(), commit=shelf.commit)
    here, local = _stamps(item.target)
    if not here and not there:
        foreign = any(place in shelf.files for place in places)
        return replace(item, reason="replaces what crdiff did not make") if foreign else item
    wanted = wanted or [hashes.stamp(plan, number) for number in range(len(plan.outputs))]
    item = replace(item, digest=wanted[0].digest())
    if _equal(wanted, here):
        if why := _unfit(item, local, looked):
            return replace(item, reason=why)
        if item.destination:
            return replace(item, action="send", reason="made by an earlier run")
        return replace(item, action="skip", reason="unchanged")
    changed = _changed(shelf, item, plan, looked) if _equal(wanted, there) else None
    return replace(item, reason=changed or _difference(wanted, there or here))


def _has_companions(shelf: "_Shelf", item: Item, plan: Plan, looked: Looked) -> bool:
    """Whether everything beside the weights is there, and is the base's as far as its contents are known."""
    names = map(str, looked.checkpoint.companions)
    return all(_place(item, plan, name) in shelf.files for name in names) and not _changed(shelf, item, plan, looked)


def _changed(shelf: "_Shelf", item: Item, plan: Plan, looked: Looked) -> str | None:
    """The first file beside the weights that is there and is not the base's any more."""
    for name, content in looked.contents.items():
        file = shelf.files.get(_place(item, plan, name))
        if file and file.content != content:
            return f"changed: {name}"
    return None


def _unfit(item: Item, local: Sequence[PurePosixPath], looked: Looked) -> str | None:
    """Why a folder of an earlier run is not sent, though its weights are as they should be."""
    if strange := sorted(set(local) - set(looked.checkpoint.companions)):
        return f"what is there holds {strange[0]}, too"
    stale = (name for name in map(str, local) if not _is(item.target / name, looked.contents.get(name)))
    return next((f"changed: {name}" for name in stale), None)


def _is(path: Path, content: str | None) -> bool:
    """Whether a file holds a content that the Hub names by its SHA-256 or by git's id; also where it names none."""
    if content is None:
        return True
    return content == (hash_file(path, Silent()) if len(content) == 64 else git_id(path))


def _place(item: Item, plan: Plan, name: str) -> str:
    """The path in the repository of a file of an item."""
    return item.path if plan.checkpoint.kind == "file" else f"{item.path}/{name}"


def _equal(wanted: Sequence[Stamp], found: Sequence[Stamp]) -> bool:
    """Whether the files found, in the order of their names, hold what is wanted."""
    digests = [stamp.digest() for stamp in wanted]
    return None not in digests and digests == [stamp.digest() for stamp in found]


def _difference(wanted: Sequence[Stamp], found: Sequence[Stamp]) -> str:
    """Why what was found is not what is wanted."""
    ours, theirs = wanted[0].request_keys(), found[0].request_keys()
    changed = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    keys = sorted(changed, key=lambda key: (key.startswith(_WHENCE), key))
    if not keys:
        return "incomplete" if wanted[0].digest() else "its base's hash is not known"
    named = ", ".join(key.removeprefix(PREFIX) for key in keys[:3])
    return f"changed: {named}{', …' if len(keys) > 3 else ''}"


def _stamps(target: Path) -> tuple[list[Stamp], tuple[PurePosixPath, ...]]:
    """What an earlier run has left at a target, by the files' names, and what lies beside it there.

    PlanError for what is not ours to replace.
    """
    try:
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return [], ()
    except OSError as error:
        raise PlanError(f"{target}: {error.strerror}", "Give another name, or another -o.") from error
    try:
        found = open_checkpoint(target)
        if all(is_baked(file.metadata) for file in found.files):
            return [Stamp.from_metadata(file.metadata, str(file.path)) for file in found.files], found.companions
    except CheckpointError:
        pass
    raise PlanError(f"{target}: not made by crdiff, and so not replaced", "Remove it, or give another -o.")


@dataclass
class _Hashes:
    """The hashes of a base's files: those that the Hub gives, and those of local files, computed when they matter."""

    looked: Looked
    watching: Watching
    criterion: str
    calibration: Path | None
    computed: dict[int, str] = field(default_factory=dict)

    @cached_property
    def ranked(self) -> tuple[str, CalibrationStamp | None]:
        """The criterion as headers spell it, and what they say of the calibration."""
        asked = CriterionChoice.of(self.criterion, self.calibration)
        if asked.calibration is None:
            return asked.name, None
        with self.watching() as progress:
            return asked.name, asked.calibrated(progress)

    def stamp(self, plan: Plan, number: int) -> Stamp:
        """What the header of file `number` will say that is known before its weights are read."""
        criterion, calibrated = self.ranked
        intended = metadata.intended(plan, criterion, self.looked.base.name, calibrated=calibrated)
        file = self.looked.checkpoint.files[number]
        if known := self.looked.base.hashes.get(file.name):
            return replace(intended, source_file_hash=f"0x{known}")
        if file.info is None:
            return intended
        if number not in self.computed:
            with self.watching() as progress:
                progress.stage("hashing", file.data_size)
                self.computed[number] = hash_data(file, progress)
        return replace(intended, source_hash=f"0x{self.computed[number]}")


@dataclass(frozen=True, slots=True)
class _Shelf:
    """What a revision of a repository holds of the plan's variants."""

    commit: str | None = None
    files: Mapping[str, RemoteFile] = field(default_factory=dict)
    stamps: Mapping[str, Stamp] = field(default_factory=dict)


class _Shelves:
    """Every revision that the plan names, each looked at once."""

    def __init__(self, request: PublishRequest, read: Matrix) -> None:
        self._request, self._matrix = request, read
        self._seen = cache(self._look)

    def of(self, item: Item) -> _Shelf:
        """The shelf that an item goes to; empty where there is none yet. HubError, without asking again, if need be."""
        assert item.destination
        found = self._seen(item.destination)
        if isinstance(found, HubError):
            raise found
        return found

    def _look(self, destination: Destination) -> _Shelf | HubError:
        try:
            return self._found(destination)
        except HubError as error:
            if type(error.__cause__).__name__ in ("RepositoryNotFoundError", "RevisionNotFoundError"):
                return _Shelf()
            return error

    def _found(self, destination: Destination) -> _Shelf:
        revision = destination.revision
        if self._request.create_pr:
            opened = find_pull_request(replace(destination, pull_request=TITLE))
            revision = opened.revision if opened else revision
        there = repository.read(destination.repo, revision)
        names = {e.path for e in self._matrix.entries if e.repo == destination.repo}
        folders = tuple(f"{name.removesuffix('.safetensors')}/" for name in names)
        wanted = [path for path in there.files if path in names or path.startswith(folders)]
        found = repository.baked(there, wanted)
        return _Shelf(there.commit, there.files, {path: one.stamp for path, one in found.items()})
