"""Write exports: stream every file to a temp sibling, hash it, check it, and only then give it its name."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crdiff_export.bake import destination, metadata, staging
from crdiff_export.bake.direct_writer import DirectWriter
from crdiff_export.bake.metadata import Hashes
from crdiff_export.bake.modelspec import Thumbnail
from crdiff_export.bake.residual import EMBED, NONE, SIDECAR, sidecar_path
from crdiff_export.bake.residual_writer import ResidualWriter
from crdiff_export.bake.source_hashes import SourceHashes
from crdiff_export.bake.stream import CHUNK, Chunk, Pruning, Stream
from crdiff_export.errors import BakeError, CrdiffError, PackError
from crdiff_export.formats import safetensors
from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.progress import Progress
from crdiff_export.prune.architecture import Architecture
from crdiff_export.prune.criteria import Decision
from crdiff_export.prune.kernels import Kernel
from crdiff_export.prune.plan import OutputFile, Plan

if TYPE_CHECKING:
    from hashlib import _Hash
    from typing import Self

# Takes a hash's place in the header until it is known.
_UNKNOWN_HASH = "0" * 64


@dataclass(frozen=True, slots=True)
class WriteJob:
    """What is written where: the plan, the decision which weights go, and what the headers say.

    Attributes:
        plan: What to write.
        decision: Which weights go.
        stamp: The `crdiff.*` keys that all files have in common; None for a dense checkpoint in another layout.
        architecture: The base's architecture.
        target: The path of the output.
        replace: Replace an output that exists. Otherwise one that appears in the meantime stays, and the job fails.
        residual: How the residual is kept, one of `residual.WAYS`.
        thumbnail: A picture for the headers, on request.
        base_hashes: By file name, what the data sections of the base have to hash to; empty for any base.
    """

    plan: Plan
    decision: Decision
    stamp: Stamp | None
    architecture: Architecture
    target: Path
    replace: bool = False
    residual: str = NONE
    thumbnail: Thumbnail | None = None
    base_hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def pruning(self) -> Pruning:
        """What the stream needs to know."""
        return Pruning(self.plan, self.decision, keep=self.residual != NONE)

    @property
    def space(self) -> destination.DiskSpace:
        """The disk space that it needs, now that the numbers of pruned weights are known."""
        counts = [threshold.pruned for threshold in self.decision.thresholds]
        return destination.measure_space(self.plan, self.target, self.residual, counts)

    def metadata(self, output: OutputFile, hashes: Hashes | None) -> Mapping[str, str]:
        """Make the metadata of one of its files.

        Args:
            output: The file.
            hashes: Its hashes; None for an export without hashes.

        Returns:
            The metadata by key.
        """
        source = output.source.metadata
        if self.stamp is None:
            return metadata.dense_header(self.plan, self.architecture, source, hashes)
        return metadata.header(self.plan, self.stamp, self.architecture, source, hashes, self.thumbnail)


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A written sidecar: its path, and its size in bytes."""

    path: Path
    size: int


@dataclass(frozen=True, slots=True)
class BakedFile:
    """One written file.

    Attributes:
        path: Its path.
        size: Its bytes.
        hashes: The hashes in its header; None for an export without hashes.
        sidecar: The sidecar with its residual, if there is one.
    """

    path: Path
    size: int
    hashes: Hashes | None
    sidecar: Sidecar | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """A finished output: one file, or a folder with its files of weights and `copied` other files."""

    path: Path
    files: tuple[BakedFile, ...]
    copied: int = 0

    @property
    def size(self) -> int:
        """The bytes of the files of weights and their sidecars."""
        return sum(file.size + (file.sidecar.size if file.sidecar else 0) for file in self.files)


@dataclass(frozen=True, slots=True)
class Failure:
    """An output that was not written, and why; the others of the same reading are not affected."""

    target: Path
    error: CrdiffError


def write(
    jobs: Sequence[WriteJob],
    kernel: Kernel,
    progress: Progress,
    *,
    hashes: SourceHashes | None,
    chunk: int = CHUNK,
) -> list[Written | Failure]:
    """Write several variants of a base from one reading, each of them completely or not at all.

    Args:
        jobs: The variants; they share their checkpoint and cast.
        kernel: Prunes the weights.
        progress: Is told about the bytes written, and may interrupt.
        hashes: The base's hashes; None to write no hashes.
        chunk: Bytes that are read at once.

    Returns:
        For each job its output, or why that one failed.

    Raises:
        CrdiffError: The base cannot be read, has changed, or holds weights that cannot be written.
    """
    plan = jobs[0].plan
    progress.stage("writing", sum(job.plan.data_size for job in jobs))
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(VariantWriter(job)) for job in jobs]
        for number in range(len(plan.outputs)):
            _write_file(writers, number, kernel, progress, hashes, chunk)
        for writer in writers:
            writer.do(writer.copy_companions, progress)
        for output in plan.outputs:
            output.source.check_unchanged()
        progress.advance(0)  # the last moment to interrupt
        for writer in writers:
            writer.do(writer.publish)
        return [writer.result() for writer in writers]


def _write_file(
    writers: Sequence["VariantWriter"],
    number: int,
    kernel: Kernel,
    progress: Progress,
    hashes: SourceHashes | None,
    chunk: int,
) -> None:
    """Write file `number` of every variant."""
    file_hash = hashes.file_hash(number) if hashes else None
    reserved = _hashes(None if file_hash else _UNKNOWN_HASH, file_hash, _UNKNOWN_HASH) if hashes else None
    for writer in writers:
        writer.do(writer.begin, number, reserved)
    active = [writer for writer in writers if not writer.error]
    if not active:
        return
    stream = Stream([writer.job.pruning for writer in active], number, kernel, hashes=hashes, chunk=chunk)
    with contextlib.closing(stream.chunks()) as chunks:
        for part in chunks:
            active[part.variant].do(active[part.variant].write, part)
            progress.advance(part.stop - part.start)
            if all(writer.error for writer in active):
                return
    source = hashes.digest(number) if hashes else None
    for variant, writer in enumerate(active):
        writer.do(writer.finish, source, file_hash, stream.digests[variant] if hashes else None)


def _hashes(source: str | None, source_file: str | None, output: str) -> Hashes:
    """Put hashes into ModelSpec's spelling."""
    return Hashes(source and f"0x{source}", source_file and f"0x{source_file}", f"0x{output}")


class VariantWriter:
    """Writes one variant, step by step. A failed step ends this variant and removes its temp files, no other's."""

    def __init__(self, job: WriteJob) -> None:
        self.job = job
        self._folder = job.plan.checkpoint.kind != "file"
        self._files: list[BakedFile] = []
        self._resources = contextlib.ExitStack()
        self.error: BakeError | None = None

    def __enter__(self) -> "Self":
        self.do(self._stage)
        return self

    def __exit__(self, *exc: object) -> None:
        self._clean_up()

    def do(self, step: Callable[..., None], *args: Any) -> None:
        """Take a step, unless an earlier one has failed."""
        if self.error:
            return
        try:
            step(*args)
        except OSError as error:
            self.error = staging.as_bake_error(error, self.job.target)
            self.error.__cause__ = error
        except BakeError as error:
            self.error = error
        if self.error:
            self._clean_up()

    def _clean_up(self) -> None:
        """Close and remove the temp files. Ignore errors here; the original error matters more."""
        with contextlib.suppress(OSError):
            self._resources.close()

    def _stage(self) -> None:
        target = self.job.target
        self._part = self._resources.enter_context(staging.temp_sibling(target, self._folder))
        self._sidecar_part: Path | None = None
        if self.job.residual == SIDECAR and not self._folder:
            self._sidecar_part = self._resources.enter_context(staging.temp_sibling(sidecar_path(target), False))

    def begin(self, number: int, reserved: Hashes | None) -> None:
        """Open file `number` and leave room for its header, which has the same length with the reserved hashes."""
        job = self.job
        self._output = job.plan.outputs[number]
        self._residual = ResidualWriter(job.plan, number) if job.residual != NONE else None
        embedded = self._residual if job.residual == EMBED else None
        end = self._output.data_size
        tensors = self._output.tensors + (embedded.largest_tensors(end) if embedded else ())
        self._header_size = len(safetensors.serialise(tensors, job.metadata(self._output, reserved)))
        name = self._output.source.name
        path, self._final = (self._part / name, job.target / name) if self._folder else (self._part, job.target)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self._resources.enter_context(DirectWriter(path))
        if embedded:
            embedded.begin(self.file, self._header_size + end)
        elif self._residual:
            sidecar = DirectWriter(self._sidecar_part or sidecar_path(path))
            self._residual.begin_sidecar(self._resources.enter_context(sidecar))

    def write(self, chunk: Chunk) -> None:
        """Write a chunk."""
        self.file.write(chunk.data, self._header_size + chunk.start)
        if self._residual:
            self._residual.add(chunk.pruned)

    def finish(self, source: str | None, source_file: str | None, digest: "_Hash | None") -> None:
        """Write what comes behind the tensors and then the header, make the file durable, and check it."""
        base = self._output.source
        expected = self.job.base_hashes.get(base.name)
        if source and expected and source != expected:
            raise PackError(
                f"{base.path}: hashes to 0x{source}, the base of the pack to 0x{expected}",
                "Give the base that the pack was made from; `crdiff pack show` names it.",
            )
        tensors = self._output.tensors
        if digest and self._residual and self.job.residual == EMBED:
            self._residual.complete(digest)
            tensors += self._residual.tensors(self._output.data_size)
        hashes = _hashes(source, source_file, digest.hexdigest()) if digest else None
        size = self.file.complete(tensors, self.job.metadata(self._output, hashes), self._header_size)
        sidecar = None
        if hashes and self._residual and self.job.residual == SIDECAR:
            sidecar = Sidecar(sidecar_path(self._final), self._residual.finish_sidecar(hashes.output))
        self._files.append(BakedFile(self._final, size, hashes, sidecar))

    def copy_companions(self, progress: Progress) -> None:
        """Copy everything else of a folder."""
        staging.copy_companions(self.job.plan.checkpoint, self._part, progress)

    def publish(self) -> None:
        """Give the output its name, and remove what it replaces."""
        target, replacing = self.job.target, self.job.replace
        staging.copy_permissions(self._part, target)
        sidecar: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self._sidecar_part:
            sidecar = staging.publish_first(self._sidecar_part, sidecar_path(target), replace=replacing)
        with sidecar:
            staging.publish(self._part, target, replace=replacing)
        self._resources.close()

    def result(self) -> Written | Failure:
        """Return what was written, or why it failed."""
        if self.error:
            return Failure(self.job.target, self.error)
        checkpoint = self.job.plan.checkpoint
        return Written(self.job.target, tuple(self._files), len(checkpoint.companions) + len(checkpoint.generated))
