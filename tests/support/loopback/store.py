"""What the loopback Hub keeps: accounts, repositories, their commits and the contents of their files."""

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from functools import cached_property, partial
from io import BufferedIOBase, BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, Literal

LFS_ABOVE = 10 * 1024 * 1024
LFS_PATTERNS = """
*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot
*.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz *.wasm *.xz
*.zip *.zst *tfevents*
"""
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS.split()).encode()
Gated = Literal["auto", "manual", False]


def stamp(date: datetime) -> str:
    """A time as the Hub writes it."""
    return date.strftime("%Y-%m-%dT%H:%M:%S.") + f"{date.microsecond // 1000:03d}Z"


@dataclass(frozen=True)
class Account:
    """What a token is worth: whose it is, and what it may do.

    "write" writes to every namespace of the user, "read" to none, "repo" to `repos` alone and creates nothing, and an
    "expired" one is refused wherever it is shown.
    """

    user: str
    role: Literal["write", "read", "repo", "expired"] = "write"
    namespaces: frozenset[str] = frozenset()
    repos: frozenset[str] = frozenset()

    def owns(self, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in {self.user, *self.namespaces}

    def may_write(self, repo_id: str) -> bool:
        return (self.role == "write" and self.owns(repo_id)) or (self.role == "repo" and repo_id in self.repos)


class Content:
    """The bytes of one file. What they are called (sha256, git's sha1) is found out when somebody asks."""

    def __init__(self, source: bytes | Path | Callable[[], Path], *, size: int = -1, sha256: str | None = None) -> None:
        """A callable is asked where the bytes lie when they are wanted; with one, `size` must be given."""
        self.source = source
        self._sha256 = sha256
        if isinstance(source, bytes):
            size = len(source)
        elif isinstance(source, Path):
            size = source.stat().st_size
        self.size = size

    def open(self) -> BufferedIOBase:
        if isinstance(self.source, bytes):
            return BytesIO(self.source)
        return (self.source if isinstance(self.source, Path) else self.source()).open("rb")

    def read(self, size: int = -1) -> bytes:
        with self.open() as file:
            return file.read(size)

    @cached_property
    def sha256(self) -> str:
        if self._sha256 is not None:
            return self._sha256
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def blob(self) -> str:
        """git's name of the bytes."""
        digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with self.open() as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest()


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
        """git's name of what git holds."""
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
    date: datetime
    files: Mapping[str, Entry]


@dataclass
class Discussion:
    """A discussion or a pull request; the changes of pull request N are on refs/pr/N."""

    num: int
    title: str
    description: str
    author: str
    is_pull_request: bool
    base: str  # the commit that a pull request starts from
    status: Literal["draft", "open", "closed", "merged"] = "open"
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    events: list[dict[str, Any]] = field(default_factory=list)
    merged_as: str | None = None

    def note(self, kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
        """Something that happened to it, as the Hub's clients are told."""
        name = f"{self.num:012x}{len(self.events):012x}"
        event = {
            "id": name,
            "type": kind,
            "createdAt": stamp(datetime.now(UTC)),
            "author": {"name": author},
            "data": data,
        }
        self.events.append(event)
        return event

    def say(self, author: str, text: str) -> dict[str, Any]:
        return self.note("comment", author, {"latest": {"raw": text}, "edited": False, "hidden": False})


class Repo:
    """One model repository. Reading it needs no lock; it is changed only under the Hub's."""

    def __init__(self, repo_id: str, *, private: bool = False, gated: Gated = False) -> None:
        self.id = repo_id
        self.private = private
        self.gated: Gated = gated
        self.access: set[str] = set()  # users whom a gated repository lets in
        self.created = datetime.now(UTC)
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pulls: dict[int, str] = {}
        self.commits: dict[str, Commit] = {}
        self.discussions: list[Discussion] = []
        self.objects: dict[str, tuple[Content, str | None]] = {}  # large files by sha256, with their Xet hash
        self.branches["main"] = self.add(
            None, "initial commit", {".gitattributes": Entry(Content(GITATTRIBUTES), False)}
        )

    def add(
        self,
        parent: str | None,
        title: str,
        files: Mapping[str, Entry],
        description: str = "",
        author: str = "system",
    ) -> str:
        """The name of a new commit that no ref points to yet."""
        oid = secrets.token_hex(20)  # no two are alike, or a client's cache would have the one for the other
        date = self.created + timedelta(seconds=len(self.commits))  # in order, whatever the clock does
        self.commits[oid] = Commit(oid, parent, title, description, author, date, dict(sorted(files.items())))
        return oid

    @property
    def refs(self) -> dict[str, str]:
        """Every ref under its full name, and its commit."""
        return {
            **{f"refs/heads/{name}": oid for name, oid in self.branches.items()},
            **{f"refs/tags/{name}": oid for name, oid in self.tags.items()},
            **{f"refs/pr/{number}": oid for number, oid in self.pulls.items()},
        }

    @property
    def pull_requests(self) -> list[Discussion]:
        return [discussion for discussion in self.discussions if discussion.is_pull_request]

    def resolve(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag, a ref or the beginning of a commit's name stands for."""
        refs = self.refs
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in refs:
                return self.commits[refs[name]]
        found = [oid for oid in self.commits if oid.startswith(revision)] if len(revision) >= 7 else []
        return self.commits[found[0]] if len(found) == 1 else None

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

    def is_lfs(self, path: str, size: int, sample: bytes, commit: Commit) -> bool:
        """Whether the Hub wants a file in the large file storage: by name, by size, or because it is no text."""
        if size == 0:
            return False
        attributes = commit.files.get(".gitattributes")
        lines = b"" if attributes is None else attributes.content.read()
        patterns = [line.split()[0] for line in lines.decode().splitlines() if "filter=lfs" in line.split()]
        return size > LFS_ABOVE or b"\0" in sample or any(_matches(path, pattern) for pattern in patterns)

    def entry(self, path: str, content: Content, commit: Commit, store: "XetStore | None" = None) -> Entry:
        """How a file comes to lie in the repository that somebody puts there from inside, perhaps on Xet."""
        lfs = self.is_lfs(path, content.size, content.read(512), commit)
        return Entry(content, lfs, store.put(content) if lfs and store else None)


def _matches(path: str, pattern: str) -> bool:
    return fnmatch(path, pattern) if "/" in pattern else fnmatch(PurePosixPath(path).name, pattern)


class XetStore:
    """The folder that hf_xet writes to for the address local://FOLDER, read from the server's side."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"local://{folder}"
        self._lock = threading.Lock()

    def find(self, sha256: str) -> tuple[str, int] | None:
        """The Xet hash and the size of a file that somebody has uploaded, as the storage's shards have it."""
        for shard in self.folder.rglob("shards/*.mdb"):
            for hashed, size, xet in _shard_files(shard.read_bytes()):
                if hashed == sha256:
                    return xet, size
        return None

    def put(self, content: Content) -> str:
        """Upload as a client does, and say the Xet hash."""
        import hf_xet  # type: ignore[import-untyped, unused-ignore]

        with hf_xet.XetSession().new_upload_commit(endpoint=self.url) as commit:
            if isinstance(content.source, bytes):
                upload = commit.start_upload_bytes(content.source, sha256=hf_xet.COMPUTE_SHA256, name="file")
            else:
                upload = commit.start_upload_file(str(content.source), sha256=hf_xet.COMPUTE_SHA256)
        return str(upload.result().xet_info.hash)

    def content(self, sha256: str, xet: str, size: int) -> Content:
        """The bytes, put together by hf_xet when they are wanted, and kept."""
        return Content(partial(self._fetch, sha256, xet, size), size=size, sha256=sha256)

    def _fetch(self, sha256: str, xet: str, size: int) -> Path:
        import hf_xet  # type: ignore[import-untyped, unused-ignore]

        path = self.folder / "read" / xet
        with self._lock:
            if path.exists():
                return path
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(".part")
            group = hf_xet.XetSession().new_download_stream_group(endpoint=self.url)
            with part.open("wb") as file:
                for piece in group.download_stream(hf_xet.XetFileInfo(xet, size)):
                    file.write(piece)
            found = Content(part)
            if (found.size, found.sha256) != (size, sha256):
                raise ValueError(f"the Xet storage has {found.size} bytes of sha256 {found.sha256} for {sha256}")
            part.rename(path)
        return path


def _shard_files(shard: bytes) -> Iterator[tuple[str, int, str]]:
    """The sha256, size and Xet hash of every file in a shard's first section.

    Records of 48 bytes: one of the file (hash, flags, number of segments), its segments, as many for verification
    (flag 31) and one with the sha256 (flag 30); the section ends with a hash of all ones.
    """
    at = 48
    while (name := shard[at : at + 32]) != b"\xff" * 32:
        flags, count = (int.from_bytes(shard[i : i + 4], "little") for i in (at + 32, at + 36))
        segments = range(at + 48, at + 48 * (1 + count), 48)
        size = sum(int.from_bytes(shard[i + 36 : i + 40], "little") for i in segments)
        at += 48 * (1 + count + (count if flags >> 31 & 1 else 0))
        if flags >> 30 & 1:
            yield _hex(shard[at : at + 32]), size, _hex(name)
            at += 48


def _hex(raw: bytes) -> str:
    """As xet-core writes a hash: four numbers of 64 bits, each little-endian in memory."""
    return "".join(raw[i : i + 8][::-1].hex() for i in range(0, 32, 8))
