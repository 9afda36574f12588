"""What the loopback Hub keeps: accounts, repositories, their commits and the contents of their files."""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Literal, Self

# Endings of files that go to the large file storage.
LFS_ENDINGS = (".safetensors", ".ckpt", ".bin", ".model")
GITATTRIBUTES = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LFS_ENDINGS).encode()
Gated = Literal["auto", "manual", False]


@dataclass(frozen=True)
class Account:
    """Whose a token is, and what it may do.

    "write" writes to every namespace of the user, "read" to none, "repo" to `repos` alone and creates nothing, and an
    "expired" one is refused wherever it is shown.
    """

    user: str
    role: Literal["write", "read", "repo", "expired"] = "write"
    namespaces: frozenset[str] = frozenset()
    repos: frozenset[str] = frozenset()

    def owns(self, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in {self.user, *self.namespaces}

    def sees(self, repo_id: str) -> bool:
        return self.owns(repo_id) or repo_id in self.repos

    def may_write(self, repo_id: str) -> bool:
        return (self.role == "write" and self.owns(repo_id)) or (self.role == "repo" and repo_id in self.repos)


class Content:
    """The bytes of one file; its hashes are worked out when they are needed."""

    def __init__(self, source: bytes | Path, sha256: str | None = None) -> None:
        self.source = source
        self.size = len(source) if isinstance(source, bytes) else source.stat().st_size
        self._sha256 = sha256

    def __deepcopy__(self, memo: object) -> Self:
        return self  # it never changes

    def open(self) -> BufferedIOBase:
        return BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb")

    def read(self) -> bytes:
        with self.open() as file:
            return file.read()

    @cached_property
    def sha256(self) -> str:
        if self._sha256 is not None:
            return self._sha256
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def blob(self) -> str:
        """git's id of the bytes."""
        return hashlib.sha1(b"blob %d\0" % self.size + self.read(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One file of a commit: in git itself, or a pointer in git and the content in the large file storage."""

    content: Content
    lfs: bool
    xet: str | None = None  # the hash by which the Xet storage knows it

    @property
    def size(self) -> int:
        return self.content.size

    @property
    def pointer(self) -> bytes:
        """What git holds in place of a large file."""
        head = "version https://git-lfs.github.com/spec/v1"
        return f"{head}\noid sha256:{self.content.sha256}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        """git's id of what git holds."""
        return Content(self.pointer).blob if self.lfs else self.content.blob

    @property
    def etag(self) -> str:
        return self.content.sha256 if self.lfs else self.content.blob


@dataclass(frozen=True)
class Commit:
    """A state of all files; `files` maps a path to its entry."""

    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    files: Mapping[str, Entry]


@dataclass
class PullRequest:
    """A pull request; the changes of number N are on refs/pr/N."""

    num: int
    title: str
    description: str
    author: str
    status: Literal["open", "merged"] = "open"


class Repo:
    """One model repository. It is read and changed only under the Hub's lock."""

    def __init__(self, repo_id: str, *, private: bool = False, gated: Gated = False) -> None:
        self.id = repo_id
        self.private = private
        self.gated: Gated = gated
        self.access: set[str] = set()  # users whom a gated repository lets in
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pulls: dict[int, str] = {}
        self.commits: dict[str, Commit] = {}
        self.pull_requests: list[PullRequest] = []
        self.objects: dict[str, tuple[Content, str | None]] = {}  # large files by sha256, with their Xet hash
        self.add(None, "initial commit", {".gitattributes": Entry(Content(GITATTRIBUTES), lfs=False)}, branch="main")

    def add(
        self,
        parent: str | None,
        title: str,
        files: Mapping[str, Entry],
        description: str = "",
        author: str = "system",
        *,
        branch: str | None = None,
    ) -> str:
        """Add a commit, perhaps as the head of a branch, and return its id."""
        oid = secrets.token_hex(20)  # equal ids in two tests would mix up a client's cache
        self.commits[oid] = Commit(oid, parent, title, description, author, dict(sorted(files.items())))
        if branch:
            self.branches[branch] = oid
        return oid

    def open_pull_request(self, title: str, description: str, author: str, head: str) -> PullRequest:
        """Open a pull request with a commit."""
        pull = PullRequest(len(self.pull_requests) + 1, title, description, author)
        self.pull_requests.append(pull)
        self.pulls[pull.num] = head
        return pull

    @property
    def refs(self) -> dict[str, str]:
        """Every ref under its full name, and its commit."""
        return {
            **{f"refs/heads/{name}": oid for name, oid in self.branches.items()},
            **{f"refs/tags/{name}": oid for name, oid in self.tags.items()},
            **{f"refs/pr/{number}": oid for number, oid in self.pulls.items()},
        }

    def resolve(self, revision: str) -> Commit | None:
        """Find the commit of a branch, a tag, a ref or a commit's id."""
        refs = self.refs
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in refs:
                return self.commits[refs[name]]
        return self.commits.get(revision)

    def log(self, revision: str = "main") -> list[Commit]:
        """The commits of a revision, the newest first; the last one is the Hub's own "initial commit"."""
        commit = self.resolve(revision)
        history = []
        while commit is not None:
            history.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return history

    def files(self, revision: str = "main") -> dict[str, Entry]:
        commit = self.resolve(revision)
        if commit is None:
            raise KeyError(revision)
        return dict(commit.files)


def is_lfs(path: str, size: int, start: bytes) -> bool:
    """Whether the Hub wants a file in the large file storage: by its name, or because it is no text."""
    return size > 0 and (path.endswith(LFS_ENDINGS) or b"\0" in start)
