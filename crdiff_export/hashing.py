"""The SHA-256 of a base, in a thread of its own beside all other work: it is the longest single task of an export."""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from crdiff_export.plan import Plan
from crdiff_export.progress import Progress
from crdiff_export.source import SourceFile

if TYPE_CHECKING:
    from hashlib import _Hash

PIECE = 8 << 20


class _Stopped(Exception):
    """Nobody wants the hash any more."""


class SourceHashes:
    """The hashes of the data sections of a base's files (ModelSpec 1.0.1, `hash_sha256`), one after another.

    Up to its first target weight an output is its source, so the state there serves all of them: what comes before, a
    bundle's text encoders for instance, is hashed once. `known` are hashes of whole files, by file name, that somebody
    else vouches for; such a file is hashed no further than that. The plans share their checkpoint and cast.
    """

    def __init__(self, plans: Sequence[Plan], known: Mapping[str, str] = MappingProxyType({})) -> None:
        self._files: Sequence[SourceFile] = plans[0].checkpoint.files
        self._known = known
        self._shared = [min(plan.unchanged(number) for plan in plans) for number in range(len(self._files))]
        self._states: list[Future[_Hash]] = [Future() for _ in self._files]
        self._digests: list[Future[str]] = [Future() for _ in self._files]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="crdiff-hash", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        self._thread.join()

    def shared(self, number: int) -> int:
        """How many bytes at the start of file `number`'s data section all outputs share with it."""
        return self._shared[number]

    def state(self, number: int) -> "_Hash":
        """The hash of what file `number` shares with its outputs, to be continued; waits for it."""
        return self._states[number].result().copy()

    def known(self, number: int) -> str | None:
        """The hash of the whole of file `number` as hex, where it was known."""
        return self._known.get(self._files[number].name)

    def digest(self, number: int) -> str | None:
        """The hash of file `number`'s data section as hex, waiting for it; None where the whole file's is known."""
        return None if self.known(number) else self._digests[number].result()

    def _run(self) -> None:
        for number, file in enumerate(self._files):
            try:
                self._hash(number, file)
            except BaseException as error:  # noqa: BLE001  handed to whoever asks for the hash
                self._fail(error)
                return

    def _fail(self, error: BaseException) -> None:
        futures: list[Future[Any]] = [*self._states, *self._digests]
        for future in futures:
            if not future.done():
                future.set_exception(error)

    def _hash(self, number: int, file: SourceFile) -> None:
        digest, shared = hashlib.sha256(), self._shared[number]
        _feed(digest, file, 0, shared, self._stopped)
        self._states[number].set_result(digest.copy())
        if not self.known(number):
            _feed(digest, file, shared, file.data_size, self._stopped)
            self._digests[number].set_result(digest.hexdigest())


def hash_data(file: SourceFile, progress: Progress) -> str:
    """SHA-256 of a file's data section as hex."""
    digest = hashlib.sha256()
    _feed(digest, file, 0, file.data_size, threading.Event(), progress)
    return digest.hexdigest()


def hash_file(path: Path, progress: Progress) -> str:
    """SHA-256 of a whole file as hex, as `sha256sum` and the Hub give it."""
    return hash_from(path, (0,), progress)[0]


def git_id(path: Path) -> str:
    """git's id of a small file's content (gitformat-loose: SHA-1 of `blob SIZE`, a zero byte and the content)."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def hash_from(path: Path, starts: Sequence[int], progress: Progress) -> list[str]:
    """The SHA-256 of a file from each of several places to its end, as hex, from one reading."""
    digests = [hashlib.sha256() for _ in starts]
    buffer, place = memoryview(bytearray(PIECE)), 0
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            for digest, start in zip(digests, starts, strict=True):
                digest.update(buffer[min(max(start - place, 0), size) : size])
            place += size
            progress.advance(size)
    return [digest.hexdigest() for digest in digests]


def _feed(
    digest: "_Hash", file: SourceFile, start: int, stop: int, stopped: threading.Event, progress: Progress | None = None
) -> None:
    """Hash data bytes `start:stop` of a file."""
    if start == stop:
        return
    buffer = memoryview(bytearray(min(PIECE, stop - start)))
    reader = file.open()
    try:
        for place in range(start, stop, PIECE):
            if stopped.is_set():
                raise _Stopped
            part = buffer[: min(PIECE, stop - place)]
            reader.read_into(place, part)
            digest.update(part)
            if progress:
                progress.advance(len(part))
    finally:
        reader.close()
