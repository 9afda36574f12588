"""READ FIRST in this room: carry out a plan file, from its worklist to the tags.

`make_worklist` decides for every variant and pack whether to make, send or skip it. `publish` checks that the Hub will
take the results, makes what is missing base by base, and pushes each. `set_tags` tags what belongs together at the end.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Literal

from crdiff_export.bake.destination import companions_size
from crdiff_export.errors import CrdiffError, HubError, PlanError
from crdiff_export.export import Baked, ExportJob, Failure, prepare_located, run_in_turn, run_together
from crdiff_export.hub import bases
from crdiff_export.hub.location import parse_uri
from crdiff_export.hub.remote_headers import RemoteBase
from crdiff_export.packs import create
from crdiff_export.progress import Progress
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.publish import target
from crdiff_export.publish.commit import PushResult, push, tag
from crdiff_export.publish.headers import HeaderCache
from crdiff_export.publish.target import Destination
from crdiff_export.publish.upload import Upload, collect
from crdiff_export.publish.worklist import TITLE, BaseWork, WorkItem, Worklist, pack_request

Status = Literal["published", "written", "unchanged", "failed"]
# Surrounds what talks to the Hub, while no thread of ours works.
PauseProgress = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a variant or a pack.

    Attributes:
        item: The variant or pack.
        status: What became of it.
        digest: `Stamp.digest` of its files, or `PackHeader.digest`.
        size: Bytes that were written or pushed.
        sha256: The SHA-256 of a single file that was pushed, as hex.
        pushed: Its push, if there was one.
        error: Why it failed.
        notes: What only the weights have shown.
    """

    item: WorkItem
    status: Status
    digest: str | None = None
    size: int | None = None
    sha256: str | None = None
    pushed: PushResult | None = None
    error: CrdiffError | None = None
    notes: tuple[str, ...] = ()

    @property
    def commit(self) -> str | None:
        """The commit that holds it, if it is on the Hub."""
        return self.pushed.commit if self.pushed else self.item.commit


def publish(worklist: Worklist, progress: Progress, pause: PauseProgress = nullcontext) -> Iterator[Outcome]:
    """Do everything on a worklist, base by base; a variant that fails does not stop the others.

    Write access is checked before the first weight is read.

    Args:
        worklist: What to do.
        progress: Told how far the work is.
        pause: Entered while the Hub is asked.

    Yields:
        One outcome for each variant and pack.
    """
    run = _Run(worklist, progress, pause)
    with pause():
        run.check_access()
    for work in worklist.bases:
        yield from run.publish_base(work)


class _Run:
    def __init__(self, worklist: Worklist, progress: Progress, pause: PauseProgress) -> None:
        self._worklist, self._request = worklist, worklist.request
        self._progress, self._pause = progress, pause
        # What stands at each destination: the checked destination, or why nothing can go there.
        self._destinations: dict[Destination, Destination | CrdiffError] = {}
        self._headers: HeaderCache = {}

    def check_access(self) -> None:
        """Check every repository that something will go to, and create those that do not exist."""
        for item in self._worklist.items:
            wanted = item.destination if item.action in ("make", "send") else None
            if wanted and wanted not in self._destinations:
                try:
                    self._destinations[wanted] = self._prepare(wanted)
                except CrdiffError as error:
                    self._destinations[wanted] = error

    def _prepare(self, destination: Destination) -> Destination:
        """Prepare a destination. All bases decide whether it is private, also those that cannot be read today."""
        works = [(work, item) for work in self._worklist.bases for item in work.items]
        users = [(work, item) for work, item in works if item.entry.repo == destination.repo]
        private = next((item.entry.private for _, item in users if item.entry.private is not None), None)
        if self._request.create_pr:
            destination = replace(destination, pull_request=TITLE)
        return target.prepare(destination, private, (_base_repo(work, item) for work, item in users))

    def publish_base(self, work: BaseWork) -> Iterator[Outcome]:
        """Yield the outcomes of all variants and packs of a base."""
        items = [self._check_destination(item) for item in work.items]
        for item in items:
            if item.action == "fail":
                yield Outcome(item, "failed", item.digest, error=item.error)
            elif item.action == "skip":
                yield Outcome(item, "unchanged", item.digest)
            elif item.action == "send":
                outcome = self._push(item, checked=False)
                if not outcome.error:  # else the files stay for the next run
                    self._remove_output(item)
                yield outcome
        if todo := [item for item in items if item.action == "make"]:
            yield from self._make(work, todo)
        if not self._request.keep:
            self._remove_empty_folders(items)

    def _check_destination(self, item: WorkItem) -> WorkItem:
        """Fail an item if nothing can go to its destination."""
        state = self._destinations.get(item.destination) if item.destination else None
        return item.fail(state) if isinstance(state, CrdiffError) and item.action in ("make", "send") else item

    def _make(self, work: BaseWork, items: Sequence[WorkItem]) -> Iterator[Outcome]:
        """Fetch a base, make its variants and packs, and push each."""
        assert work.remote
        try:
            with self._pause():
                base = work.remote.fetch(items[0].request.variant)
            criterion = CriterionChoice.of(items[0].request.criterion, items[0].request.calibration)
        except CrdiffError as error:
            yield from (Outcome(item, "failed", error=error) for item in items)
            return
        yield from self._bake(base, criterion, [item for item in items if not item.entry.pack])
        for item in items:
            if item.entry.pack:
                yield self._pack(base, criterion, item)

    def _pack(self, base: RemoteBase, criterion: CriterionChoice, item: WorkItem) -> Outcome:
        """Make a pack, for which the base is read again, and push it."""
        try:
            _make_folder(item)
            job = create.prepare_located(pack_request(item), criterion, base.base, base.checkpoint.on_disk)
            made = create.make(job, self._progress)
        except CrdiffError as error:
            return Outcome(item, "failed", error=error)
        file, digest = made.pack.file, made.pack.header.digest()
        return self._finish(Outcome(item, "written", digest, file.data_start + file.data_size, notes=made.notes))

    def _bake(self, base: RemoteBase, criterion: CriterionChoice, items: Sequence[WorkItem]) -> Iterator[Outcome]:
        """Bake the variants of a base from one reading, and push each."""
        jobs: list[tuple[WorkItem, ExportJob]] = []
        for item in items:
            try:
                _make_folder(item)
                jobs.append((item, prepare_located(item.request, criterion, base.base, base.checkpoint)))
            except CrdiffError as error:
                yield Outcome(item, "failed", error=error)
        done = 0
        try:
            run = run_together if self._request.keep else run_in_turn
            results = run([job for _, job in jobs], self._progress) if jobs else ()
            for (item, _), result in zip(jobs, results, strict=False):
                yield self._baked(item, result)
                done += 1
        except CrdiffError as error:
            yield from (Outcome(item, "failed", error=error) for item, _ in jobs[done:])

    def _baked(self, item: WorkItem, result: Baked | Failure) -> Outcome:
        """Finish what was baked."""
        if isinstance(result, Failure):
            return Outcome(item, "failed", error=result.error)
        size = result.written.size + companions_size(result.job.plan.checkpoint)
        return self._finish(Outcome(item, "written", _digest(result), size, notes=result.notes))

    def _finish(self, written: Outcome) -> Outcome:
        """Push what was written, if it goes anywhere."""
        item = written.item
        if not item.destination:
            return written
        try:
            return replace(self._push(item, checked=True), digest=written.digest, notes=written.notes)
        finally:
            self._remove_output(item)

    def _push(self, item: WorkItem, *, checked: bool) -> Outcome:
        """Push the files at an item's target; `checked` if they have just been written."""
        assert item.destination
        destination = self._destinations[item.destination]
        assert isinstance(destination, Destination)
        try:
            files = collect(item.target, item.path, self._progress, checked=checked)
            upload = Upload(files, f"Publish {item.path} with crdiff", item.entry.base_model)
            with self._pause():
                pushed = push(upload, destination, cache=self._headers)
        except CrdiffError as error:
            return Outcome(item, "failed", item.digest, error=error)
        # Notes on the destination are shown with the first push to it alone.
        self._destinations[item.destination] = replace(destination, notes=())
        sha256 = next(iter(files.values())).sha256 if len(files) == 1 else None
        return Outcome(item, "published" if pushed.changed else "unchanged", item.digest, upload.size, sha256, pushed)

    def _remove_output(self, item: WorkItem) -> None:
        if self._request.keep:
            return
        with suppress(OSError):
            if item.target.is_dir():
                shutil.rmtree(item.target)
            else:
                item.target.unlink()

    def _remove_empty_folders(self, items: Iterable[WorkItem]) -> None:
        """Remove the folders that have become empty, except the output folder itself."""
        for item in items:
            folders = [folder for folder in item.target.parents if folder.is_relative_to(self._request.folder)]
            with suppress(OSError):
                for folder in folders[:-1]:
                    folder.rmdir()


@dataclass(frozen=True, slots=True)
class TagResult:
    """A tag of a repository: the commit that has it, or why it was not set."""

    repo: str
    tag: str
    commit: str | None = None
    error: CrdiffError | None = None


def set_tags(outcomes: Iterable[Outcome]) -> Iterator[TagResult]:
    """Tag the last commit of the variants and packs that share a tag, if all of them are there.

    A tag that exists and holds all of them as they are stays where it is.

    Args:
        outcomes: What became of the variants.

    Yields:
        One result for each tag.
    """
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        entry = outcome.item.entry
        if entry.repo and entry.tag:
            groups.setdefault((entry.repo, entry.tag), []).append(outcome)
    for (repo, name), members in groups.items():
        commits = [outcome.commit for outcome in members]
        failed = next((outcome.error for outcome in members if outcome.error), None)
        if failed or not all(commits):
            kind = type(failed) if failed else CrdiffError  # so that the exit code is that of the cause
            error = kind(f"{repo}: not tagged {name}, as not all of it is there", "Run it again.")
            yield TagResult(repo, name, error=error)
            continue
        commit = str([*commits, *(outcome.pushed.commit for outcome in members if outcome.pushed)][-1])
        try:
            result = TagResult(repo, name, tag(repo, name, commit, [outcome.item.path for outcome in members]))
        except CrdiffError as error:
            result = TagResult(repo, name, error=error)
        yield result


def exit_code(outcomes: Iterable[Outcome], tags: Iterable[TagResult] = ()) -> int:
    """Return the exit code of a run.

    Args:
        outcomes: What became of the variants.
        tags: What became of the tags.

    Returns:
        0 if nothing failed, 4 if the Hub or the network was the reason for every failure, else 1.
    """
    errors = [*(outcome.error for outcome in outcomes), *(tag.error for tag in tags)]
    codes = {error.exit_code for error in errors if error}
    return 0 if not codes else HubError.exit_code if codes == {HubError.exit_code} else CrdiffError.exit_code


def _base_repo(work: BaseWork, item: WorkItem) -> str | None:
    """The Hub id of the base of an item."""
    location = parse_uri(work.remote.base.name) if work.remote else bases.hub_location(item.request.base)
    return location.repo if location else item.entry.base_model


def _make_folder(item: WorkItem) -> None:
    folder = item.target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"{item.target}: {error.strerror}: {folder}", "Give another -o.") from error


def _digest(baked: Baked) -> str | None:
    hashes = baked.written.files[0].hashes
    if hashes is None:
        return None
    return replace(baked.stamp, source_hash=hashes.source, source_file_hash=hashes.source_file).digest()
