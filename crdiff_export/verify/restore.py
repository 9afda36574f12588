"""Restore the base, bit for bit, from a baked file with its residual; hashes prove that it is the same."""

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from crdiff_export.bake import destination, residual, staging, stream
from crdiff_export.bake.direct_writer import DirectWriter
from crdiff_export.bake.prefetch import prefetch
from crdiff_export.bake.source_hashes import SourceHashes
from crdiff_export.bake.stream import SEAM, Chunk
from crdiff_export.errors import CheckpointError, VerifyError
from crdiff_export.formats.weight_file import Bytes
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import kernels
from crdiff_export.verify.reopen import DATA_HASH, FILE_HASH, BakedCheckpoint, open_baked
from crdiff_export.verify.residual_reader import (
    Residual,
    ResidualReader,
    base_header,
    check_hash,
    check_sidecars,
    find_residuals,
)  # fmt: skip

if TYPE_CHECKING:
    from hashlib import _Hash


@dataclass(frozen=True, slots=True)
class RestoredFile:
    """One restored file.

    Attributes:
        path: Its path.
        size: Its bytes.
        key: The header key of the baked file that holds the base's hash.
        hash: The base's hash under that key, which the restored file has, too.
        whole: Its header is the base's, too; False for a base that was not a safetensors file.
    """

    path: Path
    size: int
    key: str
    hash: str
    whole: bool


@dataclass(frozen=True, slots=True)
class Restored:
    """The restored base: a file, or a folder with `copied` files beside those of weights.

    `source_layout` is the base's layout, where the baked file and so the restored tensors have another one.
    """

    path: Path
    files: tuple[RestoredFile, ...]
    copied: int = 0
    source_layout: str | None = None

    @property
    def whole(self) -> bool:
        """Whether every file equals the base's to the last byte."""
        return all(file.whole for file in self.files)


def restore(
    path: Path, output: Path, progress: Progress | None = None, *, force: bool = False, chunk: int = stream.CHUNK
) -> Restored:
    """Write the base of a baked file or folder, or leave no trace.

    Args:
        path: The baked file or folder.
        output: Where to write the base.
        progress: Is told how far the work is, and may interrupt it.
        force: Replace an output that exists.
        chunk: Bytes that are read at once.

    Returns:
        The restored base.

    Raises:
        CheckpointError: The path is that of a sidecar.
        VerifyError: The file was merged, altered or damaged, the sidecar belongs to another file, or the result does
            not have the base's hash.
        CrdiffError: The file cannot be read, has no residual, or the output cannot be written.
    """
    if path.suffix == residual.SUFFIX:
        raise CheckpointError(f"{path}: a residual, not the file that it belongs to", "Give the checkpoint beside it.")
    baked, progress = open_baked(path), progress or Silent()
    residuals = find_residuals(baked)
    companions = tuple(name for name in baked.checkpoint.companions if name.suffix != residual.SUFFIX)
    checkpoint = replace(baked.checkpoint, companions=companions)
    destination.check_target(checkpoint, output, force=force, source="baked file")
    size = sum(each.base_size for each in residuals)
    heads = sum(each.head.nbytes if each.head else destination.HEADER_GROWTH for each in residuals)
    needed = size + heads + destination.companions_size(checkpoint)
    destination.check_space(destination.DiskSpace(output.parent, needed))
    check_sidecars(residuals, progress)
    progress.stage("restoring", size)
    folder, files = checkpoint.kind != "file", []
    try:
        with staging.temp_sibling(output, folder) as part, SourceHashes([baked.plan]) as hashes:
            for number, each in enumerate(residuals):
                path, final = (part / each.baked.name, output / each.baked.name) if folder else (part, output)
                path.parent.mkdir(parents=True, exist_ok=True)
                base_file = _BaseFile(baked, number, each, hashes, chunk)
                base_file.write(path, progress)
                files.append(base_file.restored(final))
            staging.copy_companions(checkpoint, part, progress)
            for each in residuals:
                each.baked.check_unchanged()
                each.file.check_unchanged()
            progress.advance(0)  # the last moment to interrupt
            staging.copy_permissions(part, output)
            staging.publish(part, output, replace=force)
    except OSError as error:
        raise staging.as_bake_error(error, output) from error
    return Restored(output, tuple(files), len(companions), baked.stamp.source_layout)


class _BaseFile:
    """One file of a base that is being restored. Chunks begin with its header, so that all are written unbuffered."""

    def __init__(
        self, baked: BakedCheckpoint, number: int, residual: Residual, hashes: SourceHashes, chunk: int
    ) -> None:
        self._number, self._residual, self._hashes, self._chunk = number, residual, hashes, chunk
        self._head = base_header(residual)
        self._size = len(self._head) + residual.base_size
        self._ranges = [
            replace(target, start=target.start + len(self._head), stop=target.stop + len(self._head))
            for target in stream.prune_ranges(baked.plan, number)
        ]
        # The hash of a pickle does not describe the safetensors file that its tensors become.
        keys = (FILE_HASH, DATA_HASH) if residual.head else (DATA_HASH,)
        self._key = next((key for key in keys if key in residual.baked.metadata), "")
        if not self._key:
            raise VerifyError(
                f"{residual.baked.path}: its header has no {DATA_HASH}, so nothing can prove what is restored",
                "It was changed since; export it again from its base.",
            )
        # The baked file and its base have these bytes in common, so they are hashed already.
        shared = hashes.shared(number)
        self._shared = shared if self._key == DATA_HASH and shared < residual.base_size else 0
        self._digest: _Hash | None = None if self._shared else sha256()

    def restored(self, path: Path) -> RestoredFile:
        """Describe the file at its final path."""
        key, head = self._key, self._residual.head
        return RestoredFile(path, self._size, key, self._residual.baked.metadata[key], whole=head is not None)

    def write(self, path: Path, progress: Progress) -> None:
        """Write the file; VerifyError unless it has the base's hash."""
        baked = self._residual.baked
        try:
            with DirectWriter(path) as writer, ResidualReader(self._residual) as values:
                chunks = prefetch(self._restore(prefetch(self._read()), values))
                with contextlib.closing(chunks):
                    for chunk in chunks:
                        writer.write(chunk.data, chunk.start)
                        progress.advance(chunk.stop - chunk.start)
                values.finish()
                self._check_baked()
                writer.finish(self._size)
        except VerifyError:
            self._check_baked()  # a wrong hash explains why the zeros do not fit
            raise
        assert self._digest
        actual, expected = f"0x{self._digest.hexdigest()}", baked.metadata[self._key]
        if actual != expected:
            raise VerifyError(
                f"{baked.path}: what it restores hashes to {actual}, its {self._key} is {expected}",
                "Its header or its sidecar was changed; use the base itself.",
            )

    def _check_baked(self) -> None:
        actual = self._hashes.digest(self._number)
        assert actual
        check_hash(self._residual.baked, residual.OUTPUT_HASH, actual)

    def _read(self) -> Generator[Chunk, None, None]:
        with contextlib.closing(self._residual.baked.open()) as reader:
            for chunk in stream.windows(self._size, self._chunk, kernels.load()):
                self._fill(chunk, reader)
                yield chunk

    def _fill(self, chunk: Chunk, reader: Bytes) -> None:
        """Fill a chunk and the seam behind it: with the header where they overlap it, then from the baked file."""
        data_start, high = len(self._head), min(chunk.stop + SEAM, self._size)
        if chunk.start < data_start:
            stop = min(data_start, high)
            chunk.part(chunk.start, stop)[:] = self._head[chunk.start : stop]
        if high > data_start:
            start = max(data_start, chunk.start)
            reader.read_into(start - data_start, chunk.part(start, high))

    def _restore(self, chunks: Iterator[Chunk], values: ResidualReader) -> Generator[Chunk, None, None]:
        """Fill the chunks' zeros; the part of a weight that lies on the seam is carried into the next chunk."""
        carried = b""
        for chunk in chunks:
            chunk.part(chunk.start, chunk.start + len(carried))[:] = carried
            carried = b""
            for target, start, stop in stream.own_parts(self._ranges, chunk.start, chunk.stop):
                values.fill(chunk.part(start, stop), target.dtype)
                if stop > chunk.stop:
                    carried = bytes(chunk.part(chunk.stop, stop))
            self._hash(chunk)
            yield chunk

    def _hash(self, chunk: Chunk) -> None:
        """Feed a chunk to the hash, except for what the hash does not cover or has seen already."""
        start = len(self._head) + self._shared if self._key == DATA_HASH else 0
        if chunk.stop > start:
            self._digest = self._digest or self._hashes.state(self._number)
            self._digest.update(chunk.part(max(chunk.start, start), chunk.stop))
