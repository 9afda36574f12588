"""Push a baked file or folder: one commit with its files and the card, made against the head that was looked at.

Whatever happens on the way, a try begins by looking at what the repository holds by then. So a commit whose answer was
lost is not made twice, and a commit of somebody else's in between is not overwritten.
"""

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote

from crdiff_export.errors import HubError, VerifyError
from crdiff_export.formats.hashing import git_id
from crdiff_export.hub import repository as remote
from crdiff_export.hub.daemon_threads import aside
from crdiff_export.hub.messages import explained, status
from crdiff_export.hub.repository import Known, RemoteFile, Repository
from crdiff_export.hub.retry import patiently
from crdiff_export.publish.card import Card, Row, render
from crdiff_export.publish.licence import bases_of
from crdiff_export.publish.target import MAIN, Destination, find_pull_request
from crdiff_export.publish.upload import LocalFile, Upload

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd

CARD = "README.md"
_OTHER_TAG = "Give another --tag; one that others rely on is not moved."
# How the client begins what the Hub says of the card.
_WARNED, _REFUSED = "Warnings while validating metadata in README.md:", "Invalid metadata in README.md."


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where the files are now. `changed` is False where the repository held them already: no commit was made."""

    repo: str
    revision: str
    commit: str
    changed: bool
    page: str = ""
    urls: Mapping[str, str] = field(default_factory=dict)
    pull_request: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """What will always lead to these bytes: the file, or of several the commit's tree."""
        if len(self.urls) == 1:
            return next(iter(self.urls.values()))
        return f"{self.page}/tree/{self.commit}"


def push(
    upload: Upload,
    destination: Destination,
    sleep: Callable[[float], None] = time.sleep,
    known: Known | None = None,
) -> Pushed:
    """Commit the files, compare what the Hub then holds with them, and tag that commit.

    `known` are headers of files that are not to be asked for again; those of this push are added.
    HubError where the Hub does not take them, VerifyError where it holds something else than was sent.
    """
    pushing = _Pushing(upload, destination, {} if known is None else known)
    with explained(destination.repo, access="write"):
        return aside(lambda: patiently(pushing.once, sleep))


class _Pushing:
    """One push over all its tries. Files that were uploaded in one of them are not uploaded again in the next."""

    def __init__(self, upload: Upload, destination: Destination, known: Known) -> None:
        self._upload, self._destination, self._known = upload, destination, known
        known |= {file.sha256: file.found for file in upload.files.values()}
        self._additions: dict[str, CommitOperationAdd] = {}
        self._notes: list[str] = []
        self._committed = False  # perhaps: an answer may have been lost

    def once(self) -> Pushed:
        """One try, from a look at what is there to the tag."""
        destination = self._destination
        opened = find_pull_request(destination) if destination.pull_request else None
        revision = opened.revision if opened else destination.revision
        there = remote.read(destination.repo, revision)
        changed = [path for path, file in self._upload.files.items() if not same(file, there.files.get(path))]
        commit, page = there.commit, opened.page if opened else None
        if changed:
            if self._upload.tag:
                _check_free(destination.repo, self._upload.tag)
            made = self._commit(there, revision, changed, new=bool(destination.pull_request and not opened))
            self._verify(made.oid)
            commit, revision, page = made.oid, made.pr_revision or revision, page or made.pr_url
        if self._upload.tag:
            tag(destination.repo, self._upload.tag, commit, list(self._upload.files))
        return self._pushed(commit, revision, changed=self._committed, page=page)

    def _commit(self, there: Repository, revision: str, changed: Sequence[str], *, new: bool) -> "CommitInfo":
        from huggingface_hub import CommitOperationAdd, HfApi

        for path in changed:
            if path not in self._additions:
                self._additions[path] = CommitOperationAdd(path, str(self._upload.files[path].path))
        operations = [self._additions[path] for path in changed]
        card = self._card(there)
        if card is not None and CARD not in self._upload.files:
            operations.append(CommitOperationAdd(CARD, card.encode()))
        title, _, description = self._upload.message.partition("\n")
        if new:  # the Hub calls a pull request by its first commit, and the next run looks for it by that
            title = str(self._destination.pull_request)
        with warnings.catch_warnings(record=True) as heard, self._refusals():
            warnings.simplefilter("always")
            made = HfApi().create_commit(
                there.repo, operations,
                commit_message=title, commit_description=description.strip(),
                revision=None if new else revision, create_pr=new, parent_commit=there.commit,
            )  # fmt: skip
        self._additions.clear()  # the client takes none twice
        self._notes += [_said(warning.message) for warning in heard if warning.category is UserWarning]
        return made

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """What stands against a commit, and whether it may be there all the same."""
        from huggingface_hub import errors

        self._committed = True
        try:
            yield
        except errors.HfHubHTTPError as error:
            self._committed = (status(error) or 500) >= 500
            raise
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # the client's own, also for a card that the Hub refuses
            self._committed = False
            what = "card" if str(error).startswith(_REFUSED) else "upload"
            hint = "Mend the front matter of README.md, then run it again." if what == "card" else "Run it again."
            raise HubError(f"{self._destination.repo}: the Hub refuses the {what}: {_said(error)}", hint) from error

    def _card(self, there: Repository) -> str | None:
        """The new card; None where the one that is there already says all."""
        sent = self._upload.files
        new = {path: file.found for path, file in sent.items() if file.found}
        found = {path: one for path, one in remote.baked(there, known=self._known).items() if path not in sent} | new
        files = {**there.files, **{path: RemoteFile(path, f.size, f.sha256, "") for path, f in sent.items()}}
        rows: list[Row] = remote.rows(files, found)
        bases, notes = bases_of(rows, self._upload.base_model)
        self._notes = [note for note in self._notes if note not in notes] + notes
        old = remote.text(there, CARD)
        branch = self._destination.revision
        shown = MAIN if branch.startswith("refs/") else branch  # a pull request is for main
        card = render(Card(there.repo, tuple(rows), bases, self._upload.relation, shown), old)
        return None if card == old else card

    def _verify(self, commit: str) -> None:
        """Hold what the Hub has at the commit against what was sent."""
        repo = self._destination.repo
        held = remote.files_at(repo, commit, list(self._upload.files))
        for path, file in self._upload.files.items():
            if not same(file, found := held.get(path)):
                has = f"holds {found.sha256 or found.blob}" if found else "holds no such file"
                raise VerifyError(
                    f"{repo}/{path}: sent {file.sha256}, the Hub {has} at {commit[:10]}",
                    "Do not use what is there; delete it on the Hub, then push again.",
                )

    def _pushed(self, commit: str, revision: str, *, changed: bool, page: str | None) -> Pushed:
        from huggingface_hub import constants

        repo = self._destination.repo
        home = f"{constants.ENDPOINT}/{repo}"
        urls = {path: f"{home}/resolve/{commit}/{quote(path)}" for path in self._upload.files}
        notes = (*self._destination.notes, *dict.fromkeys(self._notes))
        return Pushed(repo, revision, commit, changed, home, urls, page, notes)


def same(local: LocalFile, there: RemoteFile | None) -> bool:
    """Whether the Hub holds the file: by its SHA-256, or, outside of LFS, by the id that git gives it."""
    if there is None or there.size != local.size:
        return False
    return there.sha256 == local.sha256 if there.sha256 else there.blob == git_id(local.path)


def _said(what: object) -> str:
    """What the client says of a card or an upload, on one line."""
    text = str(what).replace(_WARNED, "README.md:", 1).replace(_REFUSED, "", 1)
    return " ".join(text.replace("\n- ", "; ").replace(":;", ":", 1).removeprefix("; ").split())


def tag(repo: str, name: str, commit: str, paths: Sequence[str] = ()) -> None:
    """Tag a commit; HubError where the tag is at another one, for a tag that moves is no tag.

    One at which the files at `paths` are the same will do.
    """
    from huggingface_hub import HfApi, errors

    with explained(repo, access="write"):
        try:
            HfApi().create_tag(repo, tag=name, revision=commit)
        except errors.HfHubHTTPError as error:
            if status(error) != 409:
                raise
            at = _tagged(repo, name)
            held = [remote.files_at(repo, one, list(paths)) for one in (at, commit) if one and paths]
            if at != commit and not (len(held) == 2 and held[0] == held[1]):
                what = f"{repo}: the tag {name} is at {str(at)[:10]}, not at the commit {commit[:10]} that was pushed"
                raise HubError(what, _OTHER_TAG) from None


def _check_free(repo: str, name: str) -> None:
    """HubError where a tag exists: wherever it is, that is not the commit that is yet to be made."""
    if at := _tagged(repo, name):
        raise HubError(f"{repo}: the tag {name} is at {at[:10]} already, which holds something else", _OTHER_TAG)


def _tagged(repo: str, name: str) -> str | None:
    """The commit that a tag is at; None where there is no such tag."""
    from huggingface_hub import HfApi

    return next((ref.target_commit for ref in HfApi().list_repo_refs(repo).tags if ref.name == name), None)
