"""The loopback Hub's state, and who may see and change what of it."""

import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from tests.support.loopback.store import Account, Commit, Content, Entry, Repo
from tests.support.loopback.wire import Refusal, Request, Violation
from tests.support.loopback.xet import XetStore

FORBIDDEN = "Forbidden: you must use a write token of a member to change this repository."
ONLY_PROPOSE = "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request."


@dataclass
class Upload:
    """The body of one PUT: how many bytes of it have arrived."""

    oid: str
    part: int | None
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
        """How many bytes belong into a part; None for a part that does not exist."""
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
        self.repositories: dict[str, Repo] = {}
        self.pending: dict[str, Pending] = {}
        self.uploads: list[Upload] = []  # one for every PUT of a large file or a part of one
        self.lies: dict[str, str] = {}  # a path, and the sha256 that listings say it has
        self.part_size = 5 << 30  # larger files come in parts of this many bytes
        self.page_size = 1000  # entries of a tree or pull requests in one answer
        self.lock = threading.RLock()
        self.spool = tempfile.TemporaryDirectory(prefix="loopback-hub-")  # for uploaded files

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

    def account(self, request: Request) -> Account:
        """The account of the request; an error without one."""
        if request.account is None:
            # The client takes this for a missing repository where the address is https and a repository's.
            code = "RepoNotFound" if request.path.startswith("/api/models/") else None
            raise Refusal(401, "Invalid username or password.", code)
        return request.account

    def readable(self, request: Request) -> Repo:
        """The repository of the request's path, if the account may know of it."""
        account = request.account
        repo = self.repositories.get(request.names["repo"])
        if repo is not None and (not repo.private or (account is not None and account.sees(repo.id))):
            return repo
        if account is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def downloadable(self, request: Request) -> Repo:
        """The same, if the account may have its files."""
        repo, account = self.readable(request), request.account
        if not repo.gated or (account is not None and (account.sees(repo.id) or account.user in repo.access)):
            return repo
        message = f"Access to model {repo.id} is restricted."
        raise Refusal(401 if account is None else 403, message, "GatedRepo")

    def writable(self, request: Request) -> Repo:
        """The same, if the account may change it."""
        account, repo = self.account(request), self.readable(request)
        if not account.may_write(repo.id):
            raise Refusal(403, FORBIDDEN)
        return repo

    def committable(self, request: Request, revision: str) -> Repo:
        """The same, if the account may commit to a revision: anyone may to a pull request of their own."""
        account, repo = self.account(request), self.readable(request)
        own = {f"refs/pr/{pull.num}" for pull in repo.pull_requests if pull.author == account.user}
        if not (account.may_write(repo.id) or request.flag("create_pr") or revision in own):
            raise Refusal(403, ONLY_PROPOSE)
        return repo

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        """The commit of a revision in a path, where it is quoted."""
        name = unquote(revision)
        commit = repo.resolve(name)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return commit

    def stored(self, repo: Repo, oid: str, size: int) -> tuple[Content, str | None] | None:
        """A large file that was committed or uploaded to the repository, and its Xet hash if it has one."""
        if oid not in repo.objects:
            for entry in {entry for commit in repo.commits.values() for entry in commit.files.values()}:
                if entry.lfs and size == entry.size and entry.content.sha256 == oid:
                    repo.objects[oid] = entry.content, entry.xet
        return repo.objects.get(oid)

    def shown_sha256(self, path: str, entry: Entry) -> str:
        """The sha256 that listings give a large file."""
        return self.lies.get(path, entry.content.sha256)
