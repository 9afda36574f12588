"""Write an export: stream every file to a temp sibling, hash it, check it, and only then give it its name."""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from crdiff_export import header, staging, weights
from crdiff_export.errors import BakeError
from crdiff_export.hashing import SourceHashes
from crdiff_export.kernels import Kernel
from crdiff_export.metadata import RESERVED
from crdiff_export.plan import Output, Plan
from crdiff_export.progress import Progress
from crdiff_export.threshold import Threshold
from crdiff_export.weights import PAGE, Chunk, Stream

# What a file's header will say, given its source's metadata and the two hashes (or None).
Compose = Callable[[Output, str | None, str | None], Mapping[str, str]]
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What `copy_file_range` says between two file systems, or on one that has no such thing (its man page).
_NO_COPY = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass(frozen=True, slots=True)
class BakedFile:
    """One written file; the hashes are SHA-256 of the data sections, None where nobody asked."""

    path: Path
    size: int
    source_hash: str | None
    output_hash: str | None


@dataclass(frozen=True, slots=True)
class Written:
    """A finished output: one file, or a folder with its files of weights and `copied` others."""

    path: Path
    files: tuple[BakedFile, ...]
    copied: int = 0

    @property
    def size(self) -> int:
        """Bytes of the files of weights."""
        return sum(file.size for file in self.files)


def write(
    plan: Plan,
    thresholds: Sequence[Threshold],
    target: Path,
    compose: Compose,
    kernel: Kernel,
    progress: Progress,
    *,
    hashes: SourceHashes | None,
    replace: bool = False,
    chunk: int = weights.CHUNK,
) -> Written:
    """Write the plan's output to `target`, all of it or nothing; BakeError says what stopped it.

    Without `replace` that is also something which has come there since the export was planned.
    """
    folder = plan.checkpoint.kind != "file"
    progress.stage("writing", plan.data_size)
    try:
        with staging.staged(target, folder) as part:
            files = []
            for number, output in enumerate(plan.outputs):
                path = part / output.source.name if folder else part
                path.parent.mkdir(parents=True, exist_ok=True)
                files.append(_write_file(plan, thresholds, number, path, compose, kernel, progress, hashes, chunk))
            _copy_companions(plan, part, progress)
            for output, written in zip(plan.outputs, files, strict=True):
                output.source.check_unchanged()
                _check(output, written, compose)
            _settle(part, target)
            progress.advance(0)  # the last moment at which whoever watches may end it
            staging.publish(part, target, replace=replace)
    except OSError as error:
        raise _explained(error, target) from error
    placed = (
        BakedFile(target / f.path.relative_to(part) if folder else target, f.size, f.source_hash, f.output_hash)
        for f in files
    )
    return Written(target, tuple(placed), len(plan.checkpoint.companions))


def _write_file(
    plan: Plan,
    thresholds: Sequence[Threshold],
    number: int,
    path: Path,
    compose: Compose,
    kernel: Kernel,
    progress: Progress,
    hashes: SourceHashes | None,
    chunk: int,
) -> BakedFile:
    output = plan.outputs[number]
    reserved = RESERVED if hashes else None
    head = header.serialise(output.tensors, compose(output, reserved, reserved))
    size = len(head) + output.data_size
    digests: tuple[str | None, str | None] = None, None
    with _Writer(path) as writer:
        stream = Stream(
            plan, thresholds, number, len(head), kernel, hashes=hashes, skip_untouched=writer.copies, chunk=chunk
        )
        with contextlib.closing(stream.chunks()) as chunks:
            for part in chunks:
                _fill_header(part, head)
                if part.untouched:
                    writer.copy(output, part, len(head))
                else:
                    writer.write(part.window, part.start)
                progress.advance(len(part.data))
        if hashes:
            digests = f"0x{hashes.digest(number)}", f"0x{stream.output_hash}"
            writer.patch(header.serialise(output.tensors, compose(output, *digests)))
        writer.finish(size)
    return BakedFile(path, size, *digests)


def _fill_header(chunk: Chunk, head: bytes) -> None:
    if chunk.start < len(head):
        part = head[chunk.start : chunk.stop]
        chunk.window[: len(part)] = part


class _Writer:
    """A new file, written in pages past the system's cache where it allows that (O_DIRECT), else through it.

    A cached write costs a copy and a fresh page for every byte, and `fsync` waits for the disk all the same.
    Unbuffered, 6.9 GB take 0.2 s of processor time instead of 3 to 16 (benchmarks/NOTES.md): the hashes need it.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self._cached = os.open(path, flags, 0o666)
        self._direct: int | None = None
        if hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):  # tmpfs and some network file systems have none
                self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        self._source: Any = None

    @property
    def copies(self) -> bool:
        """Whether bytes nobody has to see should be moved by the system. An unbuffered write moves them once, too."""
        return self._direct is None and hasattr(os, "copy_file_range")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)
        if self._source is not None:
            self._source.close()

    def write(self, data: memoryview, offset: int) -> None:
        """Write `data` at `offset`; both begin on a page, and only the file's last piece may end within one."""
        pages = len(data) - len(data) % PAGE
        if self._direct is not None and not self._write_direct(self._direct, data[:pages], offset):
            os.close(self._direct)
            self._direct = None
        done = 0 if self._direct is None else pages
        _write_all(self._cached, data[done:], offset + done)

    @staticmethod
    def _write_direct(handle: int, data: memoryview, offset: int) -> bool:
        """False where the device wants another alignment, or a short write has broken it."""
        try:
            _write_all(handle, data, offset)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        return True

    def copy(self, output: Output, chunk: Chunk, data_start: int) -> None:
        """Let the system copy an untouched chunk from the source."""
        if self._source is None:
            self._source = output.source.path.open("rb", buffering=0)
        source = output.source.data_start - data_start
        done = chunk.start
        while done < chunk.stop:
            moved = self._move(chunk.stop - done, source + done, done)
            if not moved:
                raise BakeError(f"{output.source.path}: became shorter while it was read", "Run the export again.")
            done += moved

    def _move(self, size: int, start: int, offset: int) -> int:
        """Move some of `size` bytes from `start` in the source; 0 where it ends before."""
        handle = self._source.fileno()
        try:
            if moved := os.copy_file_range(handle, self._cached, size, start, offset):
                return moved
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
        os.lseek(handle, start, os.SEEK_SET)
        data = os.read(handle, size)
        _write_all(self._cached, memoryview(data), offset)
        return len(data)

    def patch(self, head: bytes) -> None:
        """Put the final header over the reserved one; it has the same length."""
        _write_all(self._cached, memoryview(head), 0)

    def finish(self, size: int) -> None:
        """Make everything durable."""
        if os.fstat(self._cached).st_size != size:
            raise BakeError(f"wrote {os.fstat(self._cached).st_size} bytes instead of {size}", "Run the export again.")
        os.fsync(self._cached)


def _write_all(handle: int, data: memoryview, offset: int) -> None:
    os.lseek(handle, offset, os.SEEK_SET)
    done = 0
    while done < len(data):
        done += os.write(handle, data[done:])


def _copy_companions(plan: Plan, part: Path, progress: Progress) -> None:
    """Copy everything else of a folder; the system moves the bytes."""
    sizes = {name: (plan.checkpoint.home / name).stat().st_size for name in plan.checkpoint.companions}
    if sizes:
        progress.stage("copying", sum(sizes.values()))
    for name, size in sizes.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.checkpoint.home / name, part / name)
        _sync(part / name)
        progress.advance(size)
    if part.is_dir():
        for folder in {p.parent for p in part.rglob("*")}:
            staging.sync_folder(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check(output: Output, written: BakedFile, compose: Compose) -> None:
    """Open what was written with the safetensors library and hold it against what was meant."""
    from safetensors import SafetensorError, safe_open

    if written.path.stat().st_size != written.size:
        raise BakeError(f"{written.path.name}: has another size than was written", "Check the disk, then run it again.")
    try:
        with safe_open(written.path, framework="numpy") as file:
            names, metadata = set(file.keys()), file.metadata()
    except SafetensorError as error:
        raise BakeError(
            f"{written.path.name}: does not open again: {error}", "This is a bug; please report it."
        ) from error
    expected = dict(compose(output, written.source_hash, written.output_hash))
    if names != {t.name for t in output.tensors} or metadata != expected:
        raise BakeError(f"{written.path.name}: reads back otherwise than written", "Check the disk, then run it again.")


def _settle(part: Path, target: Path) -> None:
    """Give the part the permissions a new file would have; those of a file it replaces stay."""
    if part.is_file() and target.exists():
        with contextlib.suppress(OSError):
            shutil.copymode(target, part)


def _explained(error: OSError, target: Path) -> BakeError:
    what = f"{target}: {error.strerror or error}"
    if isinstance(error, FileExistsError):
        return BakeError(f"{target}: came there during the export", "Give another -o, or --force to replace it.")
    if error.errno in _FULL:
        return BakeError(f"{what}; nothing was left behind", "Free some space, or give another place with -o.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return BakeError(what, "Give a place you may write to with -o.")
    if sys.platform == "win32" and isinstance(error, PermissionError):
        return BakeError(what, "Close the program that has the file open.")
    return BakeError(what, "Check the paths, then run the export again; the target is as it was.")
