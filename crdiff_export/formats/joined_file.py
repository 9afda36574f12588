"""A file of weights that does not exist yet: its tensors are rows of other files' tensors, read as if they were there.

So a checkpoint in another layout can be planned, pruned, hashed and written like one on the disk, a piece at a time.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from crdiff_export.formats.safetensors import BITS, TensorSpec
from crdiff_export.formats.weight_file import Bytes, FileBytes, SourceFile

# Bytes that the disk reads ahead: a reader that goes from piece to piece looks like random access to the system.
AHEAD = 32 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor in a file: bytes `start:stop` of its data section.

    Attributes:
        file: The file.
        start: The first byte.
        stop: The byte behind the last.
        shape: Rows and columns of a matrix that is to be transposed; None to take the bytes as they are.
    """

    file: SourceFile
    start: int
    stop: int
    shape: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class JoinedTensor:
    """A tensor made of pieces of others, one after the other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()


def join(path: Path, name: str, tensors: Sequence[JoinedTensor], metadata: Mapping[str, str]) -> SourceFile:
    """Describe a file with these tensors.

    Args:
        path: What messages call it: the file or folder that the tensors come from.
        name: Its path inside the output.
        tensors: The tensors, in the order of their bytes.
        metadata: The metadata of its header.

    Returns:
        The file, which can be read like one on the disk.
    """
    specs, segments, position = [], [], 0
    for tensor in tensors:
        start = position
        for piece in tensor.pieces:
            if piece.stop > piece.start:
                segments.append(_Segment(position, piece))
            position += piece.stop - piece.start
        specs.append(TensorSpec(tensor.name, tensor.dtype, tensor.shape, start, position))
    parts = tuple({id(segment.piece.file): segment.piece.file for segment in segments}.values())
    size = sum(part.data_start for part in parts)
    return SourceFile(
        path, name, tuple(specs), metadata, size, parts[0].info if parts else None, partial(JoinedBytes, segments),
        parts,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Segment:
    """A piece at its place in the joined file's data section."""

    start: int
    piece: Piece

    @property
    def stop(self) -> int:
        return self.start + self.piece.stop - self.piece.start


class JoinedBytes:
    """A reader of a joined file's data section."""

    def __init__(self, segments: Sequence[_Segment]) -> None:
        self._segments = segments
        self._starts = [segment.start for segment in segments]
        self._readers: dict[int, Bytes] = {}
        self._transposed: tuple[int, memoryview] | None = None
        self._end = self._advised = 0

    def read_into(self, offset: int, target: memoryview) -> None:
        end = offset + len(target)
        if offset == self._end:  # one read after the other
            self.will_need(max(self._advised, end), end + AHEAD - max(self._advised, end))
            self._advised = end + AHEAD
        self._end = end
        for segment, start, stop in self._overlaps(offset, end):
            part = target[start - offset : stop - offset]
            if segment.piece.shape:
                whole = self._transpose(segment, segment.piece.shape)
                part[:] = whole[start - segment.start : stop - segment.start]
            else:
                self._reader(segment).read_into(segment.piece.start + start - segment.start, part)

    def will_need(self, offset: int, size: int) -> None:
        """Tell the system that bytes of the data section are read soon."""
        for segment, start, stop in self._overlaps(offset, offset + size):
            reader = self._reader(segment)
            if isinstance(reader, FileBytes | JoinedBytes):
                reader.will_need(segment.piece.start + start - segment.start, stop - start)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def _overlaps(self, low: int, high: int) -> Iterator[tuple[_Segment, int, int]]:
        """Yield the segments of a range of bytes, each with its first byte and its end in the range."""
        for number in range(max(bisect_right(self._starts, low) - 1, 0), len(self._segments)):
            segment = self._segments[number]
            if segment.start >= high:
                return
            if segment.stop > low:
                yield segment, max(low, segment.start), min(high, segment.stop)

    def _reader(self, segment: _Segment) -> Bytes:
        file = segment.piece.file
        if id(file) not in self._readers:
            self._readers[id(file)] = file.open()
        return self._readers[id(file)]

    def _transpose(self, segment: _Segment, shape: tuple[int, int]) -> memoryview:
        """Read a whole matrix and transpose it; the last one is kept, as it is read in several chunks."""
        if self._transposed and self._transposed[0] == segment.start:
            return self._transposed[1]
        import numpy as np

        piece = segment.piece
        raw = memoryview(bytearray(piece.stop - piece.start))
        self._reader(segment).read_into(piece.start, raw)
        itemsize = len(raw) // (shape[0] * shape[1])
        matrix = np.frombuffer(raw, np.dtype(f"V{itemsize}")).reshape(shape)
        whole = memoryview(matrix.T.tobytes())
        self._transposed = segment.start, whole
        return whole


def file_order(tensors: Sequence[JoinedTensor]) -> list[JoinedTensor]:
    """Put tensors into the order of the safetensors library: wide dtypes first, then by name."""
    return sorted(tensors, key=lambda tensor: (-BITS[tensor.dtype], tensor.name))
