"""SHA-256 of files and of their data sections, and git's id of a small file."""

import hashlib
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crdiff_export.formats import hash_cache
from crdiff_export.formats.hash_cache import FileState
from crdiff_export.formats.weight_file import FileBytes, SourceFile
from crdiff_export.progress import Progress, Silent

if TYPE_CHECKING:
    from hashlib import _Hash

PIECE = 8 << 20
# What the cache calls the hash of a data section.
DATA = "data"


class HashCancelled(Exception):
    """The hash was cancelled."""


def hash_data(file: SourceFile, progress: Progress) -> str:
    """Hash a file's data section (ModelSpec 1.0.1, `hash_sha256`).

    Args:
        file: The file.
        progress: Told of every byte read.

    Returns:
        SHA-256 as hex.
    """
    digest = hashlib.sha256()
    feed(digest, file, 0, file.data_size, threading.Event(), progress)
    return digest.hexdigest()


def remembered_hash(file: SourceFile) -> str | None:
    """Return the hash of a file's data section that the cache has of the file as it is; None if it has none."""
    if file.reader or file.info is None:
        return None
    state = FileState.of(file.info)
    try:
        is_same = state == FileState.of(file.path.stat())  # as when the header was read
    except OSError:
        return None
    return hash_cache.look_up(state, DATA) if is_same else None


def hash_data_once(file: SourceFile, progress: Progress, *, rehash: bool = False) -> str:
    """Take the hash of a file's data section from the cache, or compute and remember it.

    Args:
        file: The file.
        progress: Told of every byte read, or of all of them at once.
        rehash: Compute it, whatever the cache has.

    Returns:
        SHA-256 as hex.
    """
    if not rehash and (known := remembered_hash(file)):
        progress.advance(file.data_size)
        return known
    began, digest = hash_cache.now_ns(), hashlib.sha256()
    before, after = feed(digest, file, 0, file.data_size, threading.Event(), progress)
    if before != after:  # it was changed meanwhile, so the hash may be of no state that it ever had
        return hash_data(file, Silent())
    remember([before, after], digest.hexdigest(), began)
    return digest.hexdigest()


def remember(states: Collection[FileState | None], digest: str, began_ns: int) -> None:
    """Remember the hash of a data section, if the file was one and the same whenever it was looked at.

    Args:
        states: The file before the first byte of each reading and after the last one; None where that is not known.
        digest: SHA-256 as hex.
        began_ns: When hashing began.
    """
    (*_, state), different = states, set(states)
    if state is not None and len(different) == 1:
        hash_cache.store(state, DATA, digest, began_ns)


def hash_file(path: Path, progress: Progress) -> str:
    """Hash a whole file, as `sha256sum` and the Hub do.

    Args:
        path: The file.
        progress: Told of every byte read.

    Returns:
        SHA-256 as hex.
    """
    return hash_from(path, (0,), progress)[0]


def git_id(path: Path) -> str:
    """Return git's id of a small file (gitformat-loose: SHA-1 of `blob SIZE`, a zero byte and the content) as hex."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def hash_from(path: Path, starts: Sequence[int], progress: Progress) -> list[str]:
    """Hash a file from several offsets to its end, in one reading.

    Args:
        path: The file.
        starts: Byte offsets.
        progress: Told of every byte read.

    Returns:
        One SHA-256 for each offset, as hex.
    """
    digests = [hashlib.sha256() for _ in starts]
    buffer, position = memoryview(bytearray(PIECE)), 0
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            for digest, start in zip(digests, starts, strict=True):
                digest.update(buffer[min(max(start - position, 0), size) : size])
            position += size
            progress.advance(size)
    return [digest.hexdigest() for digest in digests]


def feed(
    digest: "_Hash", file: SourceFile, start: int, stop: int, stopped: threading.Event, progress: Progress | None = None
) -> tuple[FileState | None, FileState | None]:
    """Add bytes `start:stop` of a file's data section to a hash.

    Args:
        digest: The hash to update.
        file: The file.
        start: The first byte of the data section.
        stop: The end of the bytes.
        stopped: Cancels the work when it is set.
        progress: Told of every byte read.

    Returns:
        The open file before the first byte was read and after the last one; None for a file in another format.

    Raises:
        HashCancelled: `stopped` was set.
    """
    buffer = memoryview(bytearray(max(1, min(PIECE, stop - start))))
    reader = file.open()
    try:
        before = reader.state() if isinstance(reader, FileBytes) else None
        for position in range(start, stop, PIECE):
            if stopped.is_set():
                raise HashCancelled
            part = buffer[: min(PIECE, stop - position)]
            reader.read_into(position, part)
            digest.update(part)
            if progress:
                progress.advance(len(part))
        return before, reader.state() if isinstance(reader, FileBytes) else None
    finally:
        reader.close()
