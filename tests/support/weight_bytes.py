"""The bytes of an opened weight file, whole and in ranges."""

from collections.abc import Iterable
from contextlib import closing

from crdiff_export.formats.weight_file import SourceFile


def all_bytes(file: SourceFile) -> bytes:
    """Read a file's weights as one piece."""
    target = bytearray(file.data_size)
    with closing(file.open()) as source:
        source.read_into(0, memoryview(target))
    return bytes(target)


def check_ranges(file: SourceFile, data: bytes, ranges: Iterable[tuple[int, int]]) -> None:
    """Assert that each range is read right, and that the bytes around the buffer stay as they are."""
    with closing(file.open()) as source:
        for start, stop in ranges:
            target = bytearray(b"\xaa" * (stop - start + 2))
            source.read_into(start, memoryview(target)[1:-1])
            assert target == b"\xaa" + data[start:stop] + b"\xaa"
