"""The base, bit by bit, from a baked file with its residual: the export run backwards, and proved by hash."""

import contextlib
import shutil
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import cycle
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from crdiff_export.bake import destination, residual, staging
from crdiff_export.bake import stream as weights
from crdiff_export.bake.direct_writer import Writer
from crdiff_export.bake.prefetch import AHEAD, ahead
from crdiff_export.bake.residual import Kept, Values
from crdiff_export.bake.source_hashes import SourceHashes
from crdiff_export.bake.stream import PAGE, SEAM, STAGES, Chunk, Cut
from crdiff_export.errors import CheckpointError, VerifyError
from crdiff_export.formats import dtypes
from crdiff_export.formats.hashing import hash_data
from crdiff_export.formats.weight_file import Bytes
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import kernels
from crdiff_export.verify.reopen import DATA_HASH, FILE_HASH, BakedCheckpoint, open_baked

if TYPE_CHECKING:
    from hashlib import _Hash


@dataclass(frozen=True, slots=True)
class RestoredFile:
    """One restored file. `hash` is the base's, under the name that the baked file's header has it under.

    `whole`: its header is the base's, too. It is not for a base that was no safetensors file.
    """

    path: Path
    size: int
    key: str
    hash: str
    whole: bool


@dataclass(frozen=True, slots=True)
class Restored:
    """What came of a restore: the base again, as a file, or as a folder with `copied` files beside those of weights."""

    path: Path
    files: tuple[RestoredFile, ...]
    copied: int = 0

    @property
    def whole(self) -> bool:
        """Whether every file is the base's to its last byte."""
        return all(file.whole for file in self.files)


def restore(
    path: Path, output: Path, progress: Progress | None = None, *, force: bool = False, chunk: int = weights.CHUNK
) -> Restored:
    """Write the base of the baked file or folder at `path` to `output`, or raise a CrdiffError and leave no trace.

    VerifyError for a file that was merged, altered or damaged, for a sidecar of another file, and for whatever does not
    hash to what the base did.
    """
    if path.suffix == residual.SUFFIX:
        raise CheckpointError(f"{path}: a residual, not the file that it belongs to", "Give the checkpoint beside it.")
    baked, watching = open_baked(path), progress or Silent()
    kept = residual.find(baked)
    companions = tuple(name for name in baked.checkpoint.companions if name.suffix != residual.SUFFIX)
    destination.check(baked.plan, output, force=force, source="baked file")
    work = _Restore(baked, kept, companions, output, chunk)
    destination.check_space(work.space())
    for one in kept:
        if one.file is not one.baked:
            watching.stage("hashing", one.file.data_size)
            residual.check_hash(one.file, residual.OWN_HASH, hash_data(one.file, watching))
    try:
        return work.run(watching, force=force)
    except OSError as error:
        raise staging.explained(error, output) from error


@dataclass(frozen=True)
class _Restore:
    baked: BakedCheckpoint
    kept: tuple[Kept, ...]
    companions: tuple[PurePosixPath, ...]
    output: Path
    chunk: int

    def space(self) -> destination.Space:
        """What it needs of the disk."""
        home = self.baked.checkpoint.home
        sizes = [one.size + (one.head.nbytes if one.head else destination.HEADER_GROWTH) for one in self.kept]
        needed = sum(sizes) + sum((home / name).stat().st_size for name in self.companions)
        return destination.Space(self.output.parent, needed, shutil.disk_usage(self.output.parent).free)

    def run(self, progress: Progress, *, force: bool) -> Restored:
        checkpoint, folder = self.baked.checkpoint, self.baked.checkpoint.kind != "file"
        progress.stage("restoring", sum(one.size for one in self.kept))
        files = []
        with staging.staged(self.output, folder) as part, SourceHashes([self.baked.plan]) as hashes:
            for number, one in enumerate(self.kept):
                path = part / one.baked.name if folder else part
                path.parent.mkdir(parents=True, exist_ok=True)
                file = _File(self.baked, number, one, hashes, self.chunk)
                found = file.write(path, progress)
                files.append(replace(found, path=self.output / one.baked.name if folder else self.output))
            staging.copy_companions(checkpoint.home, self.companions, part, progress)
            for one in self.kept:
                one.baked.check_unchanged()
                one.file.check_unchanged()
            progress.advance(0)  # the last moment at which whoever watches may end it
            staging.settle(part, self.output)
            staging.publish(part, self.output, replace=force)
        return Restored(self.output, tuple(files), len(self.companions))


class _File:
    """One file of a base in the making. Places are those in the file, so that it can be written unbuffered."""

    def __init__(self, baked: BakedCheckpoint, number: int, kept: Kept, hashes: SourceHashes, chunk: int) -> None:
        self._number, self._kept, self._hashes, self._chunk = number, kept, hashes, chunk
        self._head = residual.head(kept)
        self._size = len(self._head) + kept.size
        found = weights.places(baked.plan, number)
        at = len(self._head)
        self._cuts = [replace(cut, start=cut.start + at, stop=cut.stop + at) for cut in found]
        metadata = kept.baked.metadata
        # The hash of a pickle says nothing about the safetensors file that its tensors become.
        keys = (FILE_HASH, DATA_HASH) if kept.head else (DATA_HASH,)
        self._key = next((key for key in keys if key in metadata), "")
        if not self._key:
            raise VerifyError(
                f"{kept.baked.path}: its header has no {DATA_HASH}, so nothing can prove what is restored",
                "It was changed since; export it again from its base.",
            )

    def write(self, path: Path, progress: Progress) -> RestoredFile:
        """Write the file; VerifyError unless its hash is the base's."""
        digest = self._begin()
        try:
            with Writer(path) as writer, Values(self._kept) as values:
                stream = ahead(self._restored(ahead(self._read()), values, digest))
                with contextlib.closing(stream) as chunks:
                    for chunk in chunks:
                        writer.write(chunk.data, chunk.start)
                        progress.advance(chunk.stop - chunk.start)
                values.finish()
                self._check_baked()
                writer.finish(self._size)
        except VerifyError:
            self._check_baked()  # says more than that its zeros do not fit
            raise
        actual, said = f"0x{digest[0].hexdigest()}", self._kept.baked.metadata[self._key]
        if actual != said:
            raise VerifyError(
                f"{self._kept.baked.path}: what it restores hashes to {actual}, its {self._key} is {said}",
                "Its header or its sidecar was changed; use the base itself.",
            )
        whole = self._kept.head is not None
        return RestoredFile(path, self._size, self._key, said, whole)

    def _begin(self) -> "list[_Hash]":
        """The hash of the result so far, in a list, because a base's data up to the first target are hashed already."""
        return [sha256()] if self._key == FILE_HASH or self._shared() == 0 else []

    def _shared(self) -> int:
        """Bytes of data that the baked file and its base have in common, where those are not all."""
        shared = self._hashes.shared(self._number)
        return shared if shared < self._kept.size else 0

    def _check_baked(self) -> None:
        actual = self._hashes.digest(self._number)
        assert actual
        residual.check_hash(self._kept.baked, residual.OUTPUT_HASH, actual)

    def _read(self) -> Generator[Chunk, None, None]:
        kernel = kernels.load()
        alive = STAGES + (STAGES - 1) * AHEAD
        buffers: Iterator[memoryview] = cycle([kernel.buffer(self._chunk + 2 * PAGE) for _ in range(alive)])
        with contextlib.closing(self._kept.baked.open()) as reader:
            for start in range(0, self._size, self._chunk):
                chunk = Chunk(start, min(start + self._chunk, self._size), next(buffers))
                self._fill(chunk, reader)
                yield chunk

    def _fill(self, chunk: Chunk, reader: Bytes) -> None:
        """Read a chunk and the seam behind it: of the header what lies there, the rest of the baked file."""
        at, high = len(self._head), min(chunk.stop + SEAM, self._size)
        if chunk.start < at:
            stop = min(at, high)
            chunk.part(chunk.start, stop)[:] = self._head[chunk.start : stop]
        if high > at:
            start = max(at, chunk.start)
            reader.read_into(start - at, chunk.part(start, high))

    def _restored(self, chunks: Iterator[Chunk], values: Values, digest: "list[_Hash]") -> Generator[Chunk, None, None]:
        """The chunks with their zeros filled; what of a weight lies on the seam is carried into the next."""
        carried = b""
        for chunk in chunks:
            chunk.part(chunk.start, chunk.start + len(carried))[:] = carried
            carried = _fill_zeros(chunk, self._cuts, values)
            self._update(chunk, digest)
            yield chunk

    def _update(self, chunk: Chunk, digest: "list[_Hash]") -> None:
        """Let the hash see a chunk, as far as it has not yet."""
        start = 0
        if self._key == DATA_HASH:
            start = len(self._head) + self._shared()
        if chunk.stop > start:
            if not digest:
                digest.append(self._hashes.state(self._number))
            digest[0].update(chunk.part(max(chunk.start, start), chunk.stop))


def _fill_zeros(chunk: Chunk, cuts: Sequence[Cut], values: Values) -> bytes:
    """Put the next values into the weights that begin in a chunk; what of the last one lies behind it."""
    carried = b""
    for cut, first, stop in weights.split(cuts, chunk.start, chunk.stop):
        size = dtypes.FORMATS[cut.dtype].itemsize
        start = first if first >= chunk.start else first + size
        if start < stop:
            values.fill(chunk.part(start, stop), cut.dtype)
        if stop > chunk.stop:
            carried = bytes(chunk.part(chunk.stop, stop))
    return carried
