"""Files whose tensors are pieces of others."""

import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from crdiff_export.errors import CheckpointError
from crdiff_export.formats.checkpoint import read_file
from crdiff_export.formats.joined_file import JoinedTensor, Piece, join
from crdiff_export.formats.weight_file import SourceFile


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[SourceFile]:
    """Two files with matrices of two dtypes."""
    folder, rng = tmp_path_factory.mktemp("joined"), np.random.default_rng(0)
    made = []
    for number, dtype in enumerate((np.float16, np.float32)):
        tensors = {f"t{i}": rng.normal(size=(3 + i, 5)).astype(dtype) for i in range(4)}
        path = folder / f"{number}.safetensors"
        safetensors.numpy.save_file(tensors, path)
        made.append(read_file(path, path.name))
    return made


def content(file: SourceFile) -> bytes:
    with closing(file.open()) as reader:
        buffer = bytearray(file.data_size)
        reader.read_into(0, memoryview(buffer))
    return bytes(buffer)


def transposed(file: SourceFile, name: str) -> tuple[JoinedTensor, bytes]:
    """A tensor's transpose, and its bytes by numpy."""
    tensor = next(t for t in file.tensors if t.name == name)
    rows, columns = tensor.shape
    values = np.frombuffer(content(file)[tensor.start : tensor.end], f"u{tensor.itemsize}").reshape(rows, columns)
    piece = Piece(file, tensor.start, tensor.end, (rows, columns))
    return JoinedTensor(name, tensor.dtype, (columns, rows), (piece,)), np.ascontiguousarray(values.T).tobytes()


def all_of(sources: list[SourceFile]) -> tuple[SourceFile, bytes]:
    """Whole tensors, swapped halves, an empty one and two transposed ones, of both files in turn; and the bytes."""
    first, second = sources
    tensors, expected = [], b""
    for number, file in enumerate((first, second, first)):
        whole = next(t for t in file.tensors if t.name == f"t{number}")
        middle = whole.start + whole.nbytes // 10 * 4
        pieces = (Piece(file, middle, whole.end), Piece(file, whole.start, middle))
        tensors += [
            JoinedTensor(f"a{number}", whole.dtype, whole.shape, pieces),
            JoinedTensor(f"e{number}", "F32", (0,)),
        ]
        data = content(file)
        expected += data[middle : whole.end] + data[whole.start : middle]
        turned, turned_bytes = transposed(file, "t3")
        tensors.append(turned)
        expected += turned_bytes
    return join(Path("base"), "made.safetensors", tensors, {"format": "pt"}), expected


def test_bytes_are_those_of_the_pieces(sources: list[SourceFile]) -> None:
    file, expected = all_of(sources)
    assert file.data_size == len(expected)
    assert content(file) == expected


@given(reads=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 2000)), max_size=12))
def test_any_read_gives_its_part(sources: list[SourceFile], reads: list[tuple[int, int]]) -> None:
    file, expected = all_of(sources)
    with closing(file.open()) as reader:
        for offset, size in reads:
            start = min(offset, len(expected))
            buffer = bytearray(min(size, len(expected) - start))
            reader.read_into(start, memoryview(buffer))
            assert bytes(buffer) == expected[start : start + len(buffer)]


def test_a_changed_part_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "part.safetensors"
    safetensors.numpy.save_file({"t": np.zeros(4, np.float32)}, path)
    part = read_file(path, path.name)
    file = join(Path("base"), "made.safetensors", [JoinedTensor("t", "F32", (4,), (Piece(part, 0, 16),))], {})
    file.check_unchanged()
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"part\.safetensors"):
        file.check_unchanged()
