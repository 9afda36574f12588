"""Push a baked file or folder, or a pack: one commit with its files and the model card, on top of what was read.

Every try begins by reading what the repository holds by then. So a commit whose answer was lost is not made twice, and
a commit that somebody else makes in between is not overwritten.
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
from crdiff_export.hub import repository
from crdiff_export.hub.daemon_threads import run_in_daemon_thread
from crdiff_export.hub.messages import as_hub_error, status
from crdiff_export.hub.repository import RemoteFile, Repository
from crdiff_export.hub.retry import retry
from crdiff_export.packs import SUFFIX
from crdiff_export.publish.card_text import CARD, write_card
from crdiff_export.publish.headers import HeaderCache
from crdiff_export.publish.target import Destination, find_pull_request
from crdiff_export.publish.upload import LocalFile, Upload

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd

_OTHER_TAG = "Give another --tag; one that others rely on is not moved."
# How the client begins the Hub's messages about a card.
_WARNED, _REFUSED = "Warnings while validating metadata in README.md:", "Invalid metadata in README.md."


@dataclass(frozen=True, slots=True)
class PushResult:
    """Where the files of a push are now.

    Attributes:
        repo: The repository.
        revision: The branch, or the ref of the pull request.
        commit: The commit that holds the files.
        changed: Whether a commit was made; not if the repository held the files already.
        page: The address of the repository.
        urls: The permanent address of each file, by its path in the repository.
        pull_request: The address of the pull request, if there is one.
        notes: What people should know.
    """

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
        """The permanent address of the one file of weights or pack, or of the tree of several files."""
        weights = [url for path, url in self.urls.items() if path.endswith((".safetensors", SUFFIX))]
        if len(weights) == 1:
            return weights[0]
        return f"{self.page}/tree/{self.commit}"


def push(
    upload: Upload,
    destination: Destination,
    sleep: Callable[[float], None] = time.sleep,
    cache: HeaderCache | None = None,
) -> PushResult:
    """Commit files, compare what the Hub then holds with them, and tag that commit.

    Args:
        upload: What to push.
        destination: Where to, from `target.prepare`.
        sleep: Waits for seconds between tries.
        cache: Headers of files that need no request; those of this push are added.

    Returns:
        Where the files are now.

    Raises:
        HubError: If the Hub does not take them.
        VerifyError: If the Hub then holds something else than was sent.
    """
    attempts = _Push(upload, destination, {} if cache is None else cache)
    with as_hub_error(destination.repo, access="write"):
        return run_in_daemon_thread(lambda: retry(attempts.make, sleep))


class _Push:
    """One push over all its tries; files that one try uploaded are not uploaded again by the next."""

    def __init__(self, upload: Upload, destination: Destination, cache: HeaderCache) -> None:
        self._upload, self._destination, self._cache = upload, destination, cache
        cache |= {file.sha256: file.header for file in upload.files.values()}
        self._additions: dict[str, CommitOperationAdd] = {}
        self._notes: list[str] = []
        self._may_be_committed = False  # an answer may have been lost

    def make(self) -> PushResult:
        """Make one try: read what is there, commit, verify, tag."""
        destination, files = self._destination, self._upload.files
        request = find_pull_request(destination) if destination.pull_request else None
        revision = str(request.git_reference) if request else destination.revision
        remote = repository.read(destination.repo, revision)
        changed = [path for path, file in files.items() if not _is_same(file, remote.files.get(path))]
        commit, page = remote.commit, request.url if request else None
        if changed:
            if self._upload.tag:
                _check_free(destination.repo, self._upload.tag)
            info = self._commit(remote, revision, changed, new=bool(destination.pull_request and not request))
            self._verify(info.oid)
            commit, revision, page = info.oid, info.pr_revision or revision, page or info.pr_url
        if self._upload.tag:
            tag(destination.repo, self._upload.tag, commit, list(files))
        return self._result(commit, revision, page)

    def _commit(self, remote: Repository, revision: str, changed: Sequence[str], *, new: bool) -> "CommitInfo":
        """Commit the changed files and the card, `new`: to a pull request that is opened with them."""
        from huggingface_hub import CommitOperationAdd, HfApi

        for path in changed:
            if path not in self._additions:
                self._additions[path] = CommitOperationAdd(path, str(self._upload.files[path].path))
        operations = [self._additions[path] for path in changed]
        card = self._card(remote)
        if card is not None:
            operations.append(CommitOperationAdd(CARD, card.encode()))
        title, _, description = self._upload.message.partition("\n")
        if new:  # the Hub gives a pull request the title of its first commit, by which the next run finds it
            title = str(self._destination.pull_request)
        with warnings.catch_warnings(record=True) as caught, self._explain_refusals():
            warnings.simplefilter("always")
            info = HfApi().create_commit(
                remote.repo, operations,
                commit_message=title, commit_description=description.strip(),
                revision=None if new else revision, create_pr=new, parent_commit=remote.commit,
            )  # fmt: skip
        self._additions.clear()  # the client takes an addition only once
        self._notes += [_one_line(warning.message) for warning in caught if warning.category is UserWarning]
        return info

    @contextlib.contextmanager
    def _explain_refusals(self) -> Iterator[None]:
        """Turn the client's own refusals into HubErrors, and note whether there may be a commit."""
        from huggingface_hub import errors

        self._may_be_committed = True
        try:
            yield
        except errors.HfHubHTTPError as error:
            self._may_be_committed = (status(error) or 500) >= 500
            raise
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # raised by the client, also for a card that the Hub refuses
            self._may_be_committed = False
            what = "card" if str(error).startswith(_REFUSED) else "upload"
            hint = "Correct the front matter of README.md, then run it again." if what == "card" else "Run it again."
            raise HubError(f"{self._destination.repo}: the Hub refuses the {what}: {_one_line(error)}", hint) from error

    def _card(self, remote: Repository) -> str | None:
        """Write the card of the repository with the files of this push; None if it does not change."""
        card = write_card(remote, self._upload, self._destination.revision, self._cache)
        self._notes = [note for note in self._notes if note not in card.notes] + list(card.notes)
        return None if card.new == card.old else card.new

    def _verify(self, commit: str) -> None:
        """Compare what the Hub holds at the commit with what was sent."""
        repo = self._destination.repo
        files = repository.files_at(repo, commit, list(self._upload.files))
        for path, file in self._upload.files.items():
            remote = files.get(path)
            if not _is_same(file, remote):
                has = f"holds {remote.content}" if remote else "holds no such file"
                raise VerifyError(
                    f"{repo}/{path}: sent {file.sha256}, the Hub {has} at {commit[:10]}",
                    "Do not use what is there; delete it on the Hub, then push again.",
                )

    def _result(self, commit: str, revision: str, page: str | None) -> PushResult:
        from huggingface_hub import constants

        repo = self._destination.repo
        home = f"{constants.ENDPOINT}/{repo}"
        urls = {path: f"{home}/resolve/{commit}/{quote(path)}" for path in self._upload.files}
        notes = (*self._destination.notes, *dict.fromkeys(self._notes))
        return PushResult(repo, revision, commit, self._may_be_committed, home, urls, page, notes)


def _is_same(local: LocalFile, remote: RemoteFile | None) -> bool:
    """Whether the Hub holds the file: by its SHA-256, or outside of LFS by the id that git gives it."""
    if remote is None or remote.size != local.size:
        return False
    return remote.content == (local.sha256 if remote.sha256 else git_id(local.path))


def _one_line(message: object) -> str:
    """The client's message about a card or an upload, as one line."""
    text = str(message).replace(_WARNED, "README.md:", 1).replace(_REFUSED, "", 1)
    return " ".join(text.replace("\n- ", "; ").replace(":;", ":", 1).removeprefix("; ").split())


@dataclass(frozen=True, slots=True)
class PushPlan:
    """What a push would do: the files that it would send, and the card that it would write.

    Attributes:
        files: "new", "changed" or "unchanged" for each path, the card's included.
        card: The text of the card.
        exists: Whether the repository can be read; else it would be created, or is private.
        notes: What people should know.
    """

    files: Mapping[str, str]
    card: str
    exists: bool
    notes: tuple[str, ...] = ()


def plan(upload: Upload, destination: Destination, *, read: bool = True) -> PushPlan:
    """Find out what a push would send, without sending anything; it needs no token for a public repository.

    Args:
        upload: What would be pushed.
        destination: Where to.
        read: Whether to look at the repository; else it is taken for a new one.

    Returns:
        What would be sent.

    Raises:
        HubError: The Hub does not answer.
        CardError: The card that is there cannot be changed safely.
    """
    remote = repository.read_if_there(destination.repo, destination.revision) if read else None
    repo = remote or Repository(destination.repo, "")
    states = {path: _state(file, repo.files.get(path)) for path, file in upload.files.items()}
    card = write_card(repo, upload, destination.revision, {})
    # Nothing at all is committed where the repository holds every file.
    same = all(state == "unchanged" for state in states.values()) or card.new == card.old
    states[CARD] = "unchanged" if card.old is not None and same else "changed" if card.old is not None else "new"
    return PushPlan(states, card.new, remote is not None, card.notes)


def _state(local: LocalFile, remote: RemoteFile | None) -> str:
    return "new" if remote is None else "unchanged" if _is_same(local, remote) else "changed"


def tag(repo: str, name: str, commit: str, paths: Sequence[str]) -> str:
    """Tag a commit. A tag that exists is never moved; it will do if it holds the same files.

    Args:
        repo: ORG/NAME.
        name: The tag.
        commit: The commit.
        paths: The files, and the folders of files, that are tagged.

    Returns:
        The commit that has the tag.

    Raises:
        HubError: If the tag is at a commit with other files, or the Hub refuses it.
    """
    from huggingface_hub import HfApi, errors

    with as_hub_error(repo, access="write"):
        try:
            HfApi().create_tag(repo, tag=name, revision=commit)
        except errors.HfHubHTTPError as error:
            at = _tagged_commit(repo, name)
            if at and (at == commit or _below(repo, commit, paths) <= _below(repo, at, paths)):
                return at
            if status(error) != 409:
                raise
            what = f"{repo}: the tag {name} is at {str(at)[:10]}, not at the commit {commit[:10]} that was pushed"
            raise HubError(what, _OTHER_TAG) from None
    return commit


def _below(repo: str, commit: str, paths: Sequence[str]) -> set[RemoteFile]:
    """The files of a commit that have these paths or are in folders that have."""
    folders = tuple(f"{path}/" for path in paths)
    files = repository.read(repo, commit).files
    return {file for path, file in files.items() if path in paths or path.startswith(folders)}


def _check_free(repo: str, name: str) -> None:
    """Refuse a tag that exists: wherever it is, that is not the commit that is yet to be made."""
    if at := _tagged_commit(repo, name):
        raise HubError(f"{repo}: the tag {name} is at {at[:10]} already, which holds something else", _OTHER_TAG)


def _tagged_commit(repo: str, name: str) -> str | None:
    """The commit that a tag is at; None if there is no such tag."""
    from huggingface_hub import HfApi

    return next((ref.target_commit for ref in HfApi().list_repo_refs(repo).tags if ref.name == name), None)
