"""One file of weights: its parsed header, and readers of its data section."""

import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from crdiff_export.errors import CheckpointError
from crdiff_export.formats.hash_cache import FileState
from crdiff_export.formats.safetensors import TensorSpec


class Bytes(Protocol):
    """A reader of a data section. Use one for each thread."""

    def read_into(self, offset: int, target: memoryview) -> None:
        """Read bytes of the data section.

        Args:
            offset: The first byte.
            target: The buffer to fill.

        Raises:
            CheckpointError: The file ends before, or cannot be read.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


@dataclass(frozen=True)
class SourceFile:
    """One file of weights.

    Attributes:
        path: The file.
        name: Its path inside the checkpoint, which is also its path inside the output, with '/' between the parts.
        tensors: Its tensors, in the order of the header.
        metadata: The header's metadata.
        data_start: Bytes before the data section.
        info: The file's size and times when its header was read; None for a remote file, which can only be planned.
        reader: Opens a reader of a file in another format (a pickle), as if it were the data section of a safetensors
            file.
        parts: The files on the disk that a joined file is made of (`joined_file.py`); empty for any other.
    """

    path: Path
    name: str
    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    data_start: int
    info: os.stat_result | None
    reader: Callable[[], Bytes] | None = None
    parts: "tuple[SourceFile, ...]" = ()

    @cached_property
    def data_size(self) -> int:
        """Bytes of the data section."""
        return max((t.end for t in self.tensors), default=0)

    @cached_property
    def by_offset(self) -> tuple[TensorSpec, ...]:
        """The tensors in the order of their bytes."""
        return tuple(sorted(self.tensors, key=lambda t: (t.start, t.end)))

    @property
    def is_sparse(self) -> bool:
        """Whether most of the file is a hole, as in checkpoints that are made for tests of geometry only."""
        if self.parts:
            return any(part.is_sparse for part in self.parts)
        if self.info is None:
            return False
        # Windows has no st_blocks; there a file counts as stored in full.
        stored = getattr(self.info, "st_blocks", self.info.st_size // 512 + 1) * 512
        return bool(self.data_size > 1 << 20 and stored < self.data_size // 2)

    def open(self) -> Bytes:
        """Open a reader of the data section, one for each thread."""
        return self.reader() if self.reader else FileBytes(self.path, self.data_start)

    def check_unchanged(self) -> None:
        """Check that the file is the one whose header was read, so that all passes saw the same bytes.

        Raises:
            CheckpointError: The file was changed or replaced.
        """
        for part in self.parts:
            part.check_unchanged()
        if self.parts:
            return
        then, now = self.info, check_regular(self.path)
        if then is None or (now.st_size, now.st_mtime_ns, now.st_ino) != (then.st_size, then.st_mtime_ns, then.st_ino):
            raise CheckpointError(
                f"{self.path}: the file changed while it was read",
                "Leave it alone during the export, then run it again.",
            )


class FileBytes:
    """A reader of a file whose data section begins at byte `start`."""

    def __init__(self, path: Path, start: int) -> None:
        self._path, self._start = path, start
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise self._failed(error) from error

    def read_into(self, offset: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            try:
                self._file.seek(self._start + offset + done)
                got = self._file.readinto(target[done:])
            except OSError as error:
                raise self._failed(error) from error
            if not got:
                raise CheckpointError(
                    f"{self._path}: the file became shorter while it was read",
                    "Leave the file alone during the export, then run it again.",
                )
            done += got

    def will_need(self, offset: int, size: int) -> None:
        """Tell the system that bytes of the data section are read soon, so that the disk need not wait for us.

        Args:
            offset: The first byte.
            size: How many bytes.
        """
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # some file systems know no advice
                os.posix_fadvise(self._file.fileno(), self._start + offset, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        self._file.close()

    def state(self) -> FileState:
        """Return what tells the open file from others, and from itself after a change."""
        try:
            return FileState.of(os.fstat(self._file.fileno()))
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: reading failed: {error.strerror}", "Check the disk, or copy the file to another one."
        )


def check_regular(path: Path) -> os.stat_result:
    """Return a file's size and times.

    Args:
        path: An existing path.

    Returns:
        The result of `stat`.

    Raises:
        CheckpointError: The path is a folder, or a pipe or device, where reading may never end.
    """
    info = path.stat()
    if stat.S_ISDIR(info.st_mode):
        raise CheckpointError(f"{path}: a folder, where a file should be", "Put the file itself there.")
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(
            f"{path}: a pipe, device or socket, not a file", "Give a checkpoint file or a diffusers folder."
        )
    return info
