"""Carry out a plan file: make what is missing, push each variant, and say of every one what has come of it."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Literal

from crdiff_export.bake.destination import companions_size
from crdiff_export.errors import CrdiffError, HubError, PlanError
from crdiff_export.export import Baked, ExportJob, Failure, prepare_located, run_in_turn, run_together
from crdiff_export.hub import bases, repository
from crdiff_export.progress import Progress
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.publish import licence, target
from crdiff_export.publish.card import Origin
from crdiff_export.publish.commit import Pushed, push, tag
from crdiff_export.publish.target import Destination
from crdiff_export.publish.upload import Upload, collect
from crdiff_export.publish.worklist import TITLE, Item, Reading, Survey

Status = Literal["published", "written", "unchanged", "failed"]
# Stands around what is said and sent to the Hub, when no thread of ours is at work.
Talking = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a variant. `error` where it failed; `digest` decides its content (`Stamp.digest`).

    `notes` are those of its export.
    """

    item: Item
    status: Status
    digest: str | None = None
    size: int | None = None
    sha256: str | None = None
    pushed: Pushed | None = None
    error: CrdiffError | None = None
    notes: tuple[str, ...] = ()

    @property
    def commit(self) -> str | None:
        """The commit that holds it."""
        return self.pushed.commit if self.pushed else self.item.commit


def publish(survey: Survey, progress: Progress, talking: Talking = nullcontext) -> Iterator[Outcome]:
    """Do what a survey found to be done, base by base; every variant gets one outcome, and none stops another.

    Write access is checked before the first weight is read.
    """
    publishing = _Publishing(survey, progress, talking)
    with talking():
        publishing.check_access()
    for reading in survey.readings:
        yield from publishing.reading(reading)


class _Publishing:
    def __init__(self, survey: Survey, progress: Progress, talking: Talking) -> None:
        self._survey, self._request = survey, survey.request
        self._progress, self._talking = progress, talking
        self._destinations: dict[Destination, Destination | CrdiffError] = {}
        self._known: repository.Known = {}

    def check_access(self) -> None:
        """Find, and make if need be, every repository that something will go to."""
        wanted = (item.destination for item in self._survey.items if item.action in ("make", "send"))
        for place in dict.fromkeys(wanted):
            if place is None:
                continue
            try:
                self._destinations[place] = self._prepared(place)
            except CrdiffError as error:
                self._destinations[place] = error

    def _prepared(self, place: Destination) -> Destination:
        """Visibility is a matter of all bases, even of those that cannot be had today: tomorrow they may be."""
        pairs = [(reading, item) for reading in self._survey.readings for item in reading.items]
        users = [(reading, item) for reading, item in pairs if item.entry.repo == place.repo]
        said = next((item.entry.private for _, item in users if item.entry.private is not None), None)
        repos = dict.fromkeys(_base_repo(reading, item) for reading, item in users) if said is None else ()
        why = next((why for repo in repos if (why := licence.why_private(licence.look_up(repo)[0]))), None)
        if self._request.create_pr:
            place = replace(place, pull_request=TITLE)
        return target.prepare(place, private=why is not None if said is None else said, why_private=why)

    def reading(self, reading: Reading) -> Iterator[Outcome]:
        """The outcomes of all variants of a base."""
        items = [self._admitted(item) for item in reading.items]
        for item in items:
            if item.action == "fail":
                yield Outcome(item, "failed", item.digest, error=item.error)
            elif item.action == "skip":
                yield Outcome(item, "unchanged", item.digest)
            elif item.action == "send":
                outcome = self._sent(item, checked=False)
                if not outcome.error:  # else it is there for the next run
                    self._let_go(item)
                yield outcome
        if wanted := [item for item in items if item.action == "make"]:
            yield from self._made(reading, wanted)
        if not self._request.keep:
            self._tidy(items)

    def _admitted(self, item: Item) -> Item:
        """The item, failed where its destination is closed."""
        found = self._destinations.get(item.destination) if item.destination else None
        return item.failed(found) if isinstance(found, CrdiffError) and item.action in ("make", "send") else item

    def _made(self, reading: Reading, items: Sequence[Item]) -> Iterator[Outcome]:
        jobs: list[tuple[Item, ExportJob]] = []
        try:
            assert reading.looked
            with self._talking():
                looked = reading.looked.here(items[0].entry.variant)
            criterion = CriterionChoice.of(items[0].entry.criterion, items[0].entry.calibration)
            for item in items:
                try:
                    _make_folder(item)
                    jobs.append((item, prepare_located(item.request, criterion, looked.base, looked.checkpoint)))
                except CrdiffError as error:
                    yield Outcome(item, "failed", error=error)
        except CrdiffError as error:
            yield from (Outcome(item, "failed", error=error) for item in items)
            return
        done = 0
        try:
            run = run_together if self._request.keep else run_in_turn
            made = run([job for _, job in jobs], self._progress) if jobs else ()
            for (item, _), outcome in zip(jobs, made, strict=False):
                yield self._outcome(item, outcome)
                done += 1
        except CrdiffError as error:
            yield from (Outcome(item, "failed", error=error) for item, _ in jobs[done:])

    def _outcome(self, item: Item, outcome: Baked | Failure) -> Outcome:
        if isinstance(outcome, Failure):
            return Outcome(item, "failed", error=outcome.error)
        if not item.destination:
            size = outcome.written.size + companions_size(outcome.job.plan)
            return Outcome(item, "written", _digest(outcome), size, notes=outcome.notes)
        try:
            return replace(self._sent(item, checked=True), digest=_digest(outcome), notes=outcome.notes)
        finally:
            self._let_go(item)

    def _let_go(self, item: Item) -> None:
        """Take away what was written, where nobody wants it kept."""
        if self._request.keep:
            return
        with suppress(OSError):
            if item.target.is_dir():
                shutil.rmtree(item.target)
            else:
                item.target.unlink()

    def _tidy(self, items: Iterable[Item]) -> None:
        """Take away the folders that have become empty, but for the output folder itself."""
        for item in items:
            folders = [folder for folder in item.target.parents if folder.is_relative_to(self._request.folder)]
            with suppress(OSError):
                for folder in folders[:-1]:
                    folder.rmdir()

    def _sent(self, item: Item, *, checked: bool) -> Outcome:
        """Push what is at the item's target; `checked` where its bytes have just been written."""
        assert item.destination
        place = self._destinations[item.destination]
        assert isinstance(place, Destination)
        try:
            files = collect(item.target, item.path, self._progress, checked=checked)
            upload = Upload(files, f"Publish {item.path} with crdiff", item.entry.base_model)
            with self._talking():
                pushed = push(upload, place, known=self._known)
        except CrdiffError as error:
            return Outcome(item, "failed", item.digest, error=error)
        # Said once: what was made for the first is there for the next.
        self._destinations[item.destination] = replace(place, notes=())
        sha256 = next(iter(files.values())).sha256 if len(files) == 1 else None
        return Outcome(item, "published" if pushed.changed else "unchanged", item.digest, upload.size, sha256, pushed)


def tags(outcomes: Iterable[Outcome]) -> Iterator[tuple[str, str, str | CrdiffError]]:
    """Tag the last commit of the variants that share a tag, once all of them are there: repository, tag, and commit.

    A tag that is there and has all of them as they are stays where it is.
    """
    grouped: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        entry = outcome.item.entry
        if entry.repo and entry.tag:
            grouped.setdefault((entry.repo, entry.tag), []).append(outcome)
    for (repo, name), members in grouped.items():
        commits = [outcome.commit for outcome in members]
        last = [outcome.pushed.commit for outcome in members if outcome.pushed] or commits
        failed = next((outcome.error for outcome in members if outcome.error), None)
        if failed or not all(commits):
            kind = type(failed) if failed else CrdiffError  # so that the exit code is that of the cause
            yield repo, name, kind(f"{repo}: not tagged {name}, as not all of it is there", "Run it again.")
            continue
        commit = str(last[-1])
        try:
            tag(repo, name, commit)
        except CrdiffError as error:
            yield repo, name, _tagged(repo, name, commit, members) or error
        else:
            yield repo, name, commit


def _tagged(repo: str, name: str, commit: str, members: Sequence[Outcome]) -> str | None:
    """The commit that has a tag already, if it holds the variants as `commit` does; None if not."""
    try:
        there, wanted = repository.read(repo, name), repository.read(repo, commit)
    except HubError:
        return None
    for outcome in members:
        path = outcome.item.path
        files = {name for name in wanted.files if name == path or name.startswith(f"{path}/")}
        if any(there.files.get(name) != wanted.files[name] for name in files):
            return None
    return there.commit


def exit_code(outcomes: Iterable[Outcome], tagged: Iterable[str | CrdiffError] = ()) -> int:
    """0 if nothing failed, 4 if the Hub or the network was the reason for all that did, else 1."""
    codes = {outcome.error.exit_code for outcome in outcomes if outcome.error}
    codes |= {found.exit_code for found in tagged if isinstance(found, CrdiffError)}
    return 0 if not codes else HubError.exit_code if codes == {HubError.exit_code} else CrdiffError.exit_code


def _base_repo(reading: Reading, item: Item) -> str | None:
    """The Hub id of the base that an item is made from."""
    name = reading.looked.base.name if reading.looked else bases.remote(item.entry.base)
    origin = Origin.parse(name) if name else None
    return origin.repo if origin else item.entry.base_model


def _make_folder(item: Item) -> None:
    """Make the folder of an item's target."""
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


__all__ = ["Outcome", "exit_code", "publish", "tags"]
