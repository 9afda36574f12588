"""Read the weights of a checkpoint in pieces, so that memory stays small whatever the file's size."""

from collections.abc import Iterator
from typing import Final

from crdiff_export.errors import CheckpointError
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.weight_file import Bytes

# Bytes of a piece: few enough for a processor's cache, and whole elements of every dtype, also of those with 6 bits.
PIECE: Final = 3 << 17


def refuse_holes(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a sparse file, which has no weights on the disk."""
    for file in checkpoint.files:
        if file.is_sparse:
            raise CheckpointError(
                f"{file.path}: its header can be read, its weights cannot: the file is mostly a hole",
                "Fetch the whole file, then try again.",
            )


def read_pieces(reader: Bytes, start: int, stop: int, size: int = PIECE) -> Iterator[memoryview]:
    """Read bytes of a data section.

    Args:
        reader: A reader of the data section.
        start: The first byte.
        stop: The byte after the last one.
        size: Bytes of a piece.

    Yields:
        The bytes in pieces. All pieces share one buffer: each is valid until the next one is read.

    Raises:
        CheckpointError: The file ends before, or cannot be read.
    """
    buffer = memoryview(bytearray(min(size, stop - start)))
    for offset in range(start, stop, size):
        piece = buffer[: min(size, stop - offset)]
        reader.read_into(offset, piece)
        yield piece
