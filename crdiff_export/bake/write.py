"""Write exports: stream every file to a temp sibling, hash it, check it, and only then give it its name."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from crdiff_export.bake import residual, staging
from crdiff_export.bake import stream as weights
from crdiff_export.bake.direct_writer import Writer
from crdiff_export.bake.metadata import Hashes
from crdiff_export.bake.residual_writer import Keeping, Sidecar
from crdiff_export.bake.source_hashes import SourceHashes
from crdiff_export.bake.stream import Chunk, Pruning, Stream
from crdiff_export.errors import BakeError
from crdiff_export.formats import safetensors
from crdiff_export.formats.safetensors import TensorSpec
from crdiff_export.progress import Progress
from crdiff_export.prune.kernels import Kernel
from crdiff_export.prune.plan import Output

if TYPE_CHECKING:
    from hashlib import _Hash

# Takes a hash's place until it is known.
_RESERVED = "0" * 64
# What a file's header will say, given its hashes (or None).
Compose = Callable[[Output, Hashes | None], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Order:
    """One output to write. Without `replace` something that has come to `target` in the meantime is left there.

    `residual` is one of `residual.WAYS`.
    """

    pruning: Pruning
    target: Path
    compose: Compose
    replace: bool = False
    residual: str = residual.NONE


@dataclass(frozen=True, slots=True)
class BakedFile:
    """One written file; None for the hashes where nobody asked, and for the sidecar where there is none.

    `residual` are the tensors of the residual that it embeds.
    """

    path: Path
    size: int
    hashes: Hashes | None
    residual: tuple[TensorSpec, ...] = ()
    sidecar: Sidecar | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """A finished output: one file, or a folder with its files of weights and `copied` others."""

    path: Path
    files: tuple[BakedFile, ...]
    copied: int = 0

    @property
    def size(self) -> int:
        """Bytes of the files of weights, and of their sidecars."""
        return sum(file.size + (file.sidecar.size if file.sidecar else 0) for file in self.files)


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
        output.do(output.finish, source, known, stream.digests[place] if hashes else None)


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
            self.error = staging.explained(error, self.order.target)
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
        target = self.order.target
        self._part = self._held.enter_context(staging.staged(target, self._folder))
        beside = self.order.residual == residual.SIDECAR and not self._folder
        self._side = self._held.enter_context(staging.staged(residual.sidecar(target), False)) if beside else None

    def begin(self, number: int, reserved: Hashes | None) -> None:
        """Open file `number`, with room for its header, which will be as long as it is with the reserved hashes."""
        self._output, keep = self._plan.outputs[number], self.order.residual
        self._keeping = Keeping(self.order.pruning, number) if keep != residual.NONE else None
        embedded = self._keeping if keep == residual.EMBED else None
        end = self._output.data_size
        self._head = self._header(reserved, embedded.reserved(end) if embedded else ())
        path = self._part / self._output.source.name if self._folder else self._part
        path.parent.mkdir(parents=True, exist_ok=True)
        self.writer = self._held.enter_context(Writer(path))
        if embedded:
            embedded.begin(self.writer, len(self._head) + end)
        elif self._keeping:
            self._keeping.begin_sidecar(self._held.enter_context(Writer(self._side or residual.sidecar(path))))

    def _header(self, hashes: Hashes | None, more: Sequence[TensorSpec], room: int = 0) -> bytes:
        return safetensors.serialise((*self._output.tensors, *more), self.order.compose(self._output, hashes), room)

    def write(self, chunk: Chunk) -> None:
        """Write a chunk at its place, or let the system copy it."""
        place = len(self._head) + chunk.start
        if chunk.untouched:
            source = self._output.source
            self.writer.copy(source.path, source.data_start + chunk.start, place, chunk.stop - chunk.start)
        else:
            self.writer.write(chunk.data, place)
        if self._keeping:
            self._keeping.add(chunk.removed)

    def finish(self, source: str | None, source_file: str | None, digest: "_Hash | None") -> None:
        """Write what comes behind the tensors and then the header, and make the file durable."""
        more: tuple[TensorSpec, ...] = ()
        size = self._output.data_size
        if digest and self._keeping and self.order.residual == residual.EMBED:
            self._keeping.complete(digest)
            more = self._keeping.tensors(size)
        size = len(self._head) + (more[-1].end if more else size)
        hashes = _hashes(source, source_file, digest.hexdigest()) if digest else None
        self.writer.patch(self._header(hashes, more, len(self._head)))
        self.writer.finish(size)
        self.writer.close()
        sidecar = self._keeping.finish_sidecar(hashes.output) if hashes and self._keeping and not more else None
        self._files.append(BakedFile(self.writer.path, size, hashes, more, sidecar))

    def copy_companions(self, progress: Progress) -> None:
        """Copy everything else of a folder; the system moves the bytes."""
        staging.copy_companions(self._plan.checkpoint.home, self._plan.checkpoint.companions, self._part, progress)

    def check(self) -> None:
        """Open what was written again and hold it against what was meant."""
        for output, file in zip(self._plan.outputs, self._files, strict=True):
            _check(file.path, file.size, (*output.tensors, *file.residual), self.order.compose(output, file.hashes))
            if side := file.sidecar:
                _check(side.path, side.size, side.tensors, side.metadata)

    def publish(self) -> None:
        """Give the output its name."""
        target, replace_it = self.order.target, self.order.replace
        staging.settle(self._part, target)
        beside = staging.published(self._side, residual.sidecar(target), replace=replace_it) if self._side else None
        with beside or contextlib.nullcontext():
            staging.publish(self._part, target, replace=replace_it)

    def clean(self) -> None:
        """Take away what was replaced."""
        self._held.close()

    def written(self) -> Written | BakeError:
        """What has come of it."""
        if self.error:
            return self.error
        target = self.order.target
        return Written(target, tuple(map(self._placed, self._files)), len(self._plan.checkpoint.companions))

    def _placed(self, file: BakedFile) -> BakedFile:
        target = self.order.target
        path = target / file.path.relative_to(self._part) if self._folder else target
        side = file.sidecar and replace(file.sidecar, path=residual.sidecar(path))
        return replace(file, path=path, sidecar=side)


def _alive(outputs: Sequence[_Output]) -> list[_Output]:
    return [output for output in outputs if not output.error]


def _check(path: Path, size: int, tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
    """Open what was written with the safetensors library and hold it against what was meant."""
    from safetensors import SafetensorError, safe_open

    if path.stat().st_size != size:
        raise BakeError(f"{path.name}: has another size than was written", "Check the disk, then run it again.")
    try:
        with safe_open(path, framework="numpy") as file:
            names, found = set(file.keys()), file.metadata()
    except SafetensorError as error:
        raise BakeError(f"{path.name}: does not open again: {error}", "This is a bug; please report it.") from error
    if names != {t.name for t in tensors} or found != dict(metadata):
        raise BakeError(f"{path.name}: reads back otherwise than written", "Check the disk, then run it again.")
