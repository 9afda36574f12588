"""Write exports: stream every file to a temp sibling, hash it, check it, and only then give it its name."""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from crdiff_export import header, staging, weights
from crdiff_export.errors import BakeError
from crdiff_export.hashing import SourceHashes
from crdiff_export.kernels import Kernel
from crdiff_export.metadata import Hashes
from crdiff_export.plan import Output
from crdiff_export.progress import Progress
from crdiff_export.weights import Chunk, Pruning, Stream
from crdiff_export.writer import Writer

# Takes a hash's place until it is known.
_RESERVED = "0" * 64
# What a file's header will say, given its hashes (or None).
Compose = Callable[[Output, Hashes | None], Mapping[str, str]]
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class Order:
    """One output to write. Without `replace` something that has come to `target` in the meantime is left there."""

    pruning: Pruning
    target: Path
    compose: Compose
    replace: bool = False


@dataclass(frozen=True, slots=True)
class BakedFile:
    """One written file; None for the hashes where nobody asked."""

    path: Path
    size: int
    hashes: Hashes | None


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
    orders: Sequence[Order],
    kernel: Kernel,
    progress: Progress,
    *,
    hashes: SourceHashes | None,
    chunk: int = weights.CHUNK,
) -> list[Written | BakeError]:
    """Write several variants of a base from one reading, each of them whole or not at all.

    The variants share their checkpoint and cast. What stops one of them, BakeError says in its place; what is wrong
    with the base is raised and stops all.
    """
    plan = orders[0].pruning.plan
    progress.stage("writing", sum(order.pruning.plan.data_size for order in orders))
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(_Output(order)) for order in orders]
        for number in range(len(plan.outputs)):
            _write_file(outputs, number, kernel, progress, hashes, chunk)
        for output in _alive(outputs):
            output.do(output.copy_companions, progress)
        for source in plan.outputs:
            source.source.check_unchanged()
        for output in _alive(outputs):
            output.do(output.check)
        progress.advance(0)  # the last moment at which whoever watches may end it
        for output in _alive(outputs):
            output.do(output.publish)
            output.do(output.clean)
        return [output.written() for output in outputs]


def _write_file(
    outputs: Sequence["_Output"],
    number: int,
    kernel: Kernel,
    progress: Progress,
    hashes: SourceHashes | None,
    chunk: int,
) -> None:
    """Write file `number` of every output."""
    known = hashes.known(number) if hashes else None
    reserved = _hashes(None if known else _RESERVED, known, _RESERVED) if hashes else None
    for output in _alive(outputs):
        output.do(output.begin, number, reserved)
    alive = _alive(outputs)
    if not alive:
        return
    copies = all(output.writer.copies for output in alive)
    prunings = [output.order.pruning for output in alive]
    stream = Stream(prunings, number, kernel, hashes=hashes, skip_untouched=copies, chunk=chunk)
    with contextlib.closing(stream.chunks()) as chunks:
        for part in chunks:
            alive[part.variant].do(alive[part.variant].write, part)
            progress.advance(part.stop - part.start)
            if not _alive(outputs):
                return
    source = hashes.digest(number) if hashes else None
    for place, output in enumerate(alive):
        output.do(output.finish, _hashes(source, known, stream.output_hashes[place]) if hashes else None)


def _hashes(source: str | None, source_file: str | None, output: str) -> Hashes:
    """Hashes in ModelSpec's spelling."""
    return Hashes(source and f"0x{source}", source_file and f"0x{source_file}", f"0x{output}")


class _Output:
    """One variant in the making. A failure of its own ends it and takes its temp files away, but not its neighbours."""

    def __init__(self, order: Order) -> None:
        self.order, self._plan = order, order.pruning.plan
        self._folder = self._plan.checkpoint.kind != "file"
        self._files: list[BakedFile] = []
        self._held = contextlib.ExitStack()
        self.error: BakeError | None = None

    def __enter__(self) -> Self:
        self.do(self._stage)
        return self

    def __exit__(self, *exc: object) -> None:
        self._give_up()

    def do(self, step: Callable[..., None], *args: Any) -> None:
        """Take a step, unless an earlier one has failed."""
        if self.error:
            return
        try:
            step(*args)
        except OSError as error:
            self.error = _explained(error, self.order.target)
            self.error.__cause__ = error
        except BakeError as error:
            self.error = error
        if self.error:
            self._give_up()

    def _give_up(self) -> None:
        """Take the temp files away, if they are still there; what ended the work says more than an error in that."""
        with contextlib.suppress(OSError):
            self._held.close()

    def _stage(self) -> None:
        self._part = self._held.enter_context(staging.staged(self.order.target, self._folder))

    def begin(self, number: int, reserved: Hashes | None) -> None:
        """Open file `number`, with room for its header, which will be as long as it is with the reserved hashes."""
        self._output = self._plan.outputs[number]
        self._head = self._header(reserved)
        path = self._part / self._output.source.name if self._folder else self._part
        path.parent.mkdir(parents=True, exist_ok=True)
        self.writer = self._held.enter_context(Writer(path))

    def _header(self, hashes: Hashes | None) -> bytes:
        return header.serialise(self._output.tensors, self.order.compose(self._output, hashes))

    def write(self, chunk: Chunk) -> None:
        """Write a chunk at its place, or let the system copy it."""
        place = len(self._head) + chunk.start
        if chunk.untouched:
            source = self._output.source
            self.writer.copy(source.path, source.data_start + chunk.start, place, chunk.stop - chunk.start)
        else:
            self.writer.write(chunk.data, place)

    def finish(self, hashes: Hashes | None) -> None:
        """Write the header and make the file durable."""
        head, size = self._header(hashes), len(self._head) + self._output.data_size
        self.writer.patch(head)
        self.writer.finish(size)
        self.writer.close()
        self._files.append(BakedFile(self.writer.path, size, hashes))

    def copy_companions(self, progress: Progress) -> None:
        """Copy everything else of a folder; the system moves the bytes."""
        home = self._plan.checkpoint.home
        sizes = {name: (home / name).stat().st_size for name in self._plan.checkpoint.companions}
        if sizes:
            progress.stage("copying", sum(sizes.values()))
        for name, size in sizes.items():
            (self._part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(home / name, self._part / name)
            _sync(self._part / name)
            progress.advance(size)
        if self._part.is_dir():
            for folder in {p.parent for p in self._part.rglob("*")}:
                staging.sync_folder(folder)

    def check(self) -> None:
        """Open what was written again and hold it against what was meant."""
        for output, file in zip(self._plan.outputs, self._files, strict=True):
            _check(output, file, self.order.compose)

    def publish(self) -> None:
        """Give the output its name."""
        _settle(self._part, self.order.target)
        staging.publish(self._part, self.order.target, replace=self.order.replace)

    def clean(self) -> None:
        """Take away what was replaced."""
        self._held.close()

    def written(self) -> Written | BakeError:
        """What has come of it."""
        if self.error:
            return self.error
        target = self.order.target
        placed = (
            replace(file, path=target / file.path.relative_to(self._part) if self._folder else target)
            for file in self._files
        )
        return Written(target, tuple(placed), len(self._plan.checkpoint.companions))


def _alive(outputs: Sequence[_Output]) -> list[_Output]:
    return [output for output in outputs if not output.error]


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
    expected = dict(compose(output, written.hashes))
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
