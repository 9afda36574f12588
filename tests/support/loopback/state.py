"""The loopback Hub's state, and who may see and change what of it."""

import itertools
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from tests.support.loopback.store import (
    Account,
    Commit,
    Content,
    Entry,
    Repo,
    XetStore,
)
from tests.support.loopback.wire import Refusal, Request, Violation

Right = Literal["commit", "write"]


@dataclass
class Upload:
    """The body of one PUT, as far as it has come."""

    oid: str
    part: int | None
    expected: int
    received: int = 0


@dataclass
class Pending:
    """A large file for which upload addresses have been given out."""

    repo: str
    oid: str
    size: int
    chunk: int | None
    parts: dict[int, tuple[str, Path]] = field(default_factory=dict)  # the ETag and the bytes of what has arrived

    def length(self, part: int | None) -> int | None:
        """How many bytes belong into a part; None where there is no such part."""
        if self.chunk is None or part is None:
            return self.size if self.chunk is part is None else None
        start = (part - 1) * self.chunk
        return min(self.chunk, self.size - start) if 0 <= start < self.size else None


class State:
    """Everything that outlives a request. Requests hold `lock` while they look at it or change it."""

    def __init__(self, accounts: Mapping[str, Account], xet: Path | None) -> None:
        self.url = ""
        self.accounts = dict(accounts)
        self.xet = XetStore(xet.resolve()) if xet else None
        self.repos: dict[str, Repo] = {}
        self.pending: dict[str, Pending] = {}
        self.uploads: list[Upload] = []
        self.lies: dict[str, str] = {}  # a path, and the sha256 that listings say it has
        self.part_size = 5 << 30  # larger files come in parts
        self.page_size = 1000  # entries of a tree, commits or discussions
        self.lock = threading.RLock()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._numbers = itertools.count(1)

    def spool(self) -> Path:
        """A new name for a file that goes with the Hub."""
        with self.lock:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="loopback-hub-")
            return Path(self._folder.name, f"{next(self._numbers)}")

    def end(self) -> None:
        if self._folder:
            self._folder.cleanup()

    def authenticate(self, request: Request) -> Account | None:
        """Whose token the request shows; one that is not valid is refused even where none is needed."""
        shown = request.headers.get("authorization")
        if shown is None:
            return None
        kind, _, token = shown.partition(" ")
        if kind != "Bearer" or not token:
            raise Violation(401, "Invalid credentials in Authorization header")
        account = self.accounts.get(token)
        if account is None or account.role == "expired":
            raise Refusal(401, "Invalid credentials in Authorization header")
        return account

    def known(self, request: Request) -> Account:
        if request.account is None:
            # The client takes this for a missing repository where the address is https and a repository's.
            code = "RepoNotFound" if request.path.startswith("/api/models/") else None
            raise Refusal(401, "Invalid username or password.", code)
        return request.account

    def readable(self, request: Request, repo_id: str | None = None) -> Repo:
        """The repository of the request's path, if whoever asks may know of it."""
        account = request.account
        repo = self.repos.get(repo_id or request.names["repo"])
        if repo is not None and (not repo.private or (account is not None and _sees(account, repo))):
            return repo
        if account is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def downloadable(self, request: Request) -> Repo:
        """The same, and whoever asks may have its files."""
        repo = self.readable(request)
        if not repo.gated:
            return repo
        if request.account is None:
            raise Refusal(
                401,
                f"Access to model {repo.id} is restricted. You must have access to it and be authenticated to access "
                "it. Please log in.",
                "GatedRepo",
            )
        if not _sees(request.account, repo) and request.account.user not in repo.access:
            raise Refusal(
                403,
                f"Access to model {repo.id} is restricted and you are not in the authorized list. "
                f"Visit {self.url}/{repo.id} to ask for access.",
                "GatedRepo",
            )
        return repo

    def writable(self, request: Request, right: Right = "write", revision: str | None = None) -> Repo:
        """The same, and whoever asks may change it; anyone may "commit" to a pull request of their own."""
        account = self.known(request)
        repo = self.readable(request)
        if account.may_write(repo.id):
            return repo
        if right == "commit":
            own = {f"refs/pr/{pull.num}" for pull in repo.pull_requests if pull.author == account.user}
            if request.flag("create_pr") or revision in own:
                return repo
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request.")
        raise Refusal(403, "Forbidden: you must use a write token of a member to change this repository.")

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        """What a revision in a path stands for; it comes quoted."""
        name = unquote(revision)
        commit = repo.resolve(name)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return commit

    def page(self, request: Request) -> tuple[int, int]:
        """Where the page that is asked for begins and how long it may be."""
        cursor, limit = (request.asks(name) or "" for name in ("cursor", "limit"))
        if not (cursor + limit).isdecimal() and cursor + limit:
            raise Violation(400, f"no page: cursor={cursor} limit={limit}")
        return int(cursor or 0), min(int(limit or self.page_size), self.page_size)

    def held(self, repo: Repo, oid: str, size: int | None = None) -> tuple[Content, str | None] | None:
        """A large file that the repository has or that was uploaded for it, and its Xet hash if it has one."""
        if oid not in repo.objects:
            for entry in {entry for commit in repo.commits.values() for entry in commit.files.values()}:
                if entry.lfs and size in (None, entry.size) and entry.content.sha256 == oid:
                    repo.objects[oid] = entry.content, entry.xet
        return repo.objects.get(oid)

    def stored(self, repo: Repo, oid: str, size: int | None = None) -> tuple[Content, str | None] | None:
        """The same, or one that has come to Xet's storage, which does not say for which repository."""
        if self.held(repo, oid, size) is None and self.xet and (found := self.xet.find(oid)):
            xet, length = found
            repo.objects[oid] = self.xet.content(oid, xet, length), xet
        return repo.objects.get(oid)

    def listed(self, path: str, entry: Entry) -> str:
        """The sha256 that listings give a large file."""
        return self.lies.get(path, entry.content.sha256)


def _sees(account: Account, repo: Repo) -> bool:
    return account.owns(repo.id) or repo.id in account.repos
