"""SHA-256 of files and of their data sections, and git's id of a small file."""

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.progress import Progress

if TYPE_CHECKING:
    from hashlib import _Hash

PIECE = 8 << 20


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
) -> None:
    """Add bytes `start:stop` of a file's data section to a hash.

    Args:
        digest: The hash to update.
        file: The file.
        start: The first byte of the data section.
        stop: The end of the bytes.
        stopped: Cancels the work when it is set.
        progress: Told of every byte read.

    Raises:
        HashCancelled: `stopped` was set.
    """
    if start == stop:
        return
    buffer = memoryview(bytearray(min(PIECE, stop - start)))
    reader = file.open()
    try:
        for position in range(start, stop, PIECE):
            if stopped.is_set():
                raise HashCancelled
            part = buffer[: min(PIECE, stop - position)]
            reader.read_into(position, part)
            digest.update(part)
            if progress:
                progress.advance(len(part))
    finally:
        reader.close()
