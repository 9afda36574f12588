"""What differs between two checkpoints, compared with numpy alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdiff_export.errors import CheckpointError
from crdiff_export.formats.safetensors import BITS, TensorSpec
from crdiff_export.models import demo
from crdiff_export.progress import Silent
from crdiff_export.verify import diff
from crdiff_export.verify.diff import OTHER_LAYERS, OTHER_MODELS, Comparison, TensorDifference, compare
from crdiff_export.verify.inspect import inspect
from tests.support import makers, oracle
from tests.support.messages import raises
from tests.verify.test_layers import Counted, Memory

Made = dict[str, tuple[str, makers.Shape, bytes]]


def compare_files(a: Path, b: Path) -> Comparison:
    return compare(inspect(a), inspect(b), Silent())


@pytest.fixture
def of(tmp_path: Path) -> Callable[[Made, Made], Comparison]:
    """Compares two files with these tensors."""
    return lambda a, b: compare_files(
        makers.write(tmp_path / "a.safetensors", a), makers.write(tmp_path / "b.safetensors", b)
    )


def compare_tensor(dtype_a: str, a: bytes, dtype_b: str | None = None, b: bytes = b"") -> TensorDifference | None:
    """What differs between two tensors in memory."""
    specs = [
        TensorSpec("x", dtype, (8 * len(data) // BITS[dtype],), 0, len(data))
        for dtype, data in ((dtype_a, a), (dtype_b or dtype_a, b))
    ]
    pair = diff._Pair(specs[0], specs[1], Memory(a), Memory(b))
    return None if pair.is_equal() else pair.compare("blocks")


def array(*numbers: float, dtype: type[np.floating[Any]] = np.float64) -> bytes:
    """Numbers as bytes."""
    return np.array(numbers, dtype).tobytes()


# --- a base and its baked file ---


@pytest.fixture(scope="module")
def demo_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from crdiff_export import ExportRequest, Size, export

    target = tmp_path_factory.mktemp("baked") / "x.safetensors"
    return demo.path(), export(ExportRequest("demo", Size(48, 48), target)).written.path


def test_a_baked_file_differs_in_what_its_header_says(demo_pair: tuple[Path, Path]) -> None:
    base, baked = demo_pair
    comparison, header = compare_files(base, baked), makers.metadata_of(baked)
    groups = {group.group: group for group in comparison.groups}
    assert list(groups) == ["down", "mid", "up", OTHER_LAYERS, OTHER_MODELS]
    for name in ("down", "mid", "up"):
        group = groups[name]
        assert group.newly_zero + group.zero_in_both == int(header[f"crdiff.pruned.{name}"])
        assert group.weights == int(header[f"crdiff.total.{name}"])
    assert [groups[name].differing for name in (OTHER_LAYERS, OTHER_MODELS)] == [0, 0]
    assert not comparison.equal
    assert not comparison.header.only_a + comparison.header.only_b
    assert {change.name for change in comparison.header.metadata} == {
        key for key in (header | makers.metadata_of(base)) if header.get(key) != makers.metadata_of(base).get(key)
    }


def test_every_tensor_of_a_baked_file_is_that_of_numpy(demo_pair: tuple[Path, Path]) -> None:
    base, baked = (makers.read(path) for path in demo_pair)
    differences = compare_files(*demo_pair).tensors
    assert {tensor.name for tensor in differences} == {name for name in base if base[name] != baked[name]}
    for tensor in differences:
        (_, _, data_a), (_, _, data_b) = base[tensor.name], baked[tensor.name]
        a, b = (np.frombuffer(data, "<f2").astype(np.float64) for data in (data_a, data_b))
        differing = np.frombuffer(data_a, "<u2") != np.frombuffer(data_b, "<u2")
        assert (tensor.weights, tensor.differing) == (a.size, differing.sum())
        assert tensor.newly_zero == ((a != 0) & (b == 0)).sum()
        assert tensor.no_longer_zero == ((a == 0) & (b != 0)).sum()
        assert tensor.zero_in_both == ((a == 0) & (b == 0)).sum()
        assert tensor.largest == np.abs(b - a).max()
        assert tensor.relative == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a))
    sizes = [tensor.relative or 0 for tensor in differences]
    assert sizes == sorted(sizes, reverse=True)


def test_a_file_equals_itself_and_its_copy_with_other_metadata(tmp_path: Path) -> None:
    copy = makers.said(demo.path(), {"modelspec.title": "another"}, tmp_path / "copy.safetensors")
    comparison = compare_files(demo.path(), copy)
    assert comparison.equal
    assert not comparison.tensors
    assert [change.name for change in comparison.header.metadata] == ["modelspec.title"]
    assert sum(group.tensors for group in comparison.groups) == len(makers.read(copy))


def test_shards_and_their_order_do_not_matter(tmp_path: Path) -> None:
    tensors = makers.tiny("sd15.diffusers-unet")
    index = makers.write_shards(tmp_path / "shards", dict(reversed(tensors.items())), 3)
    assert compare_files(makers.write(tmp_path / "a.safetensors", tensors), index).equal


# --- headers ---


def test_other_tensors_shapes_and_dtypes_are_told(of: Callable[[Made, Made], Comparison]) -> None:
    same: Made = {"same": ("F16", (2,), b"\0\x3c\0\x3c")}
    a: Made = same | {"a": ("F16", (1,), bytes(2)), "shape": ("F16", (2, 1), bytes(4)), "int": ("I8", (2,), bytes(2)),
                      "wide": ("F16", (2,), b"\0\x3c\0\0")}  # fmt: skip
    b: Made = {"b": ("F16", (1,), bytes(2)), "wide": ("F32", (2,), array(1, 0, dtype=np.float32)),
               "shape": ("F16", (1, 2), bytes(4)), "int": ("F16", (2,), bytes(4))} | same  # fmt: skip
    comparison = of(a, b)
    header = comparison.header
    assert (header.only_a, header.only_b, header.common) == (("a",), ("b",), 4)
    assert header.shapes == (("shape", "[2, 1]", "[1, 2]"),)
    assert set(header.dtypes) == {("int", "I8", "F16"), ("wide", "F16", "F32")}
    assert comparison.tensors == ()  # the values of `wide` are equal
    assert not comparison.equal
    assert comparison.total.tensors == 2
    assert len(comparison.notes) == 2


@pytest.mark.parametrize("change", ["only in A", "only in B", "shape", "dtype", "value"])
def test_files_with_one_difference_are_not_equal(of: Callable[[Made, Made], Comparison], change: str) -> None:
    a: Made = {"x": ("F16", (2,), bytes(4)), "y": ("F16", (2,), bytes(4))}
    b = dict(a)
    if change.startswith("only"):
        del (b if change.endswith("A") else a)["y"]
    else:
        b["y"] = {
            "shape": ("F16", (2, 1), bytes(4)), "dtype": ("BF16", (2,), bytes(4)), "value": ("F16", (2,), b"\0\0\0\1"),
        }[change]  # fmt: skip
    assert not of(a, b).equal
    assert of(a, a).equal


def test_names_without_anything_in_common_are_told(shelf: Path, tmp_path: Path) -> None:
    unet = makers.write(tmp_path / "a.safetensors", makers.tiny("sd15.diffusers-unet"))
    comparison = compare_files(shelf / "sd15.safetensors", unet)
    assert comparison.header.common == 0
    assert comparison.groups == ()
    (note,) = comparison.notes
    assert "layouts" in note
    assert compare_files(shelf / "sd15.safetensors", shelf / "sd15.safetensors").notes == []


def test_tensors_of_an_unknown_model_are_one_group(shelf: Path) -> None:
    (group,) = compare_files(shelf / "lora.safetensors", shelf / "lora.safetensors").groups
    assert (group.group, group.tensors) == (OTHER_LAYERS, 3)


def test_a_hole_is_refused(shelf: Path) -> None:
    with raises(CheckpointError, "sparse.safetensors"):
        compare_files(shelf / "sparse.safetensors", shelf / "sparse.safetensors")


def test_scales_are_not_part_of_the_comparison(of: Callable[[Made, Made], Comparison]) -> None:
    scaled: Made = {"x.weight": ("F8_E4M3", (1,), b"\x38"), "x.scale_weight": ("F32", (), bytes(4))}
    assert any("scale" in note for note in of(scaled, scaled).notes)


def test_the_progress_ends_at_its_size(demo_pair: tuple[Path, Path]) -> None:
    progress = Counted()
    compare(inspect(demo_pair[0]), inspect(demo_pair[1]), progress)
    assert progress.done == progress.size == sum(len(data) for _, _, data in makers.read(demo_pair[0]).values())


# --- single tensors ---

FLOATS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"]


@given(st.data(), st.sampled_from(FLOATS), st.sampled_from(FLOATS))
def test_any_floats(data: st.DataObject, dtype_a: str, dtype_b: str) -> None:
    """All codes: zeros of both signs, infinities and NaN, too."""
    count = data.draw(st.integers(1, 40))
    raw_a = data.draw(st.binary(min_size=count * 8, max_size=count * 8))[: count * BITS[dtype_a] // 8]
    fresh = data.draw(st.binary(min_size=count * 8, max_size=count * 8))[: count * BITS[dtype_b] // 8]
    raw_b = raw_a if dtype_a == dtype_b and data.draw(st.booleans()) else fresh
    difference = compare_tensor(dtype_a, raw_a, dtype_b, raw_b)
    if dtype_a == dtype_b and raw_a == raw_b:
        assert difference is None
        return
    assert difference
    a, b = oracle.decode(dtype_a, raw_a), oracle.decode(dtype_b, raw_b)
    if dtype_a == dtype_b:
        size = BITS[dtype_a] // 8
        pieces = [(raw_a[i : i + size], raw_b[i : i + size]) for i in range(0, len(raw_a), size)]
        differing = np.array([left != right for left, right in pieces])
    else:
        differing = (a != b) & ~(np.isnan(a) & np.isnan(b))
    with np.errstate(all="ignore"):
        step = b - a
        finite = np.isfinite(step)
        squares, squares_a = (step[finite] ** 2).sum(), (a[np.isfinite(a)] ** 2).sum()
        relative = math.sqrt(squares / squares_a) if squares_a else squares and math.inf
    assert (difference.weights, difference.differing) == (count, differing.sum())
    assert difference.nonfinite == (differing & ~finite).sum()
    assert difference.newly_zero == ((a != 0) & (b == 0)).sum()
    assert difference.no_longer_zero == ((a == 0) & (b != 0)).sum()
    assert difference.zero_in_both == ((a == 0) & (b == 0)).sum()
    assert difference.largest == np.abs(step[finite]).max(initial=0)
    assert difference.relative == (pytest.approx(relative) if math.isfinite(relative) else None)


@pytest.mark.parametrize("dtype", [dtype for dtype in BITS if dtype not in FLOATS])
def test_other_dtypes_are_only_counted(dtype: str) -> None:
    """Elements of 4 and 6 bits, too, in every place of a byte."""
    bits = BITS[dtype]
    rng = np.random.default_rng(0)
    count = 200_000
    numbers = rng.integers(0, 2, (count, bits), np.uint8)
    changed = numbers.copy()
    some = np.sort(rng.choice(count, 777, replace=False))
    changed[some, rng.integers(0, bits, some.size)] ^= 1
    difference = compare_tensor(
        dtype,
        np.packbits(numbers, bitorder="little").tobytes(),
        dtype,
        np.packbits(changed, bitorder="little").tobytes(),
    )
    assert difference
    assert (difference.weights, difference.differing) == (count, 777)
    assert (difference.largest, difference.relative) == (None, None)
    if dtype in ("U8", "I8"):
        zero_a, zero_b = ~numbers.any(axis=1), ~changed.any(axis=1)
        assert difference.newly_zero == (zero_b & ~zero_a).sum() > 0
        assert difference.no_longer_zero == (zero_a & ~zero_b).sum() > 0


def test_a_difference_in_the_last_of_many_pieces(tmp_path: Path) -> None:
    count = 3 * diff._ELEMENTS + 5
    a = np.ones(count, np.float16)
    b = a.copy()
    b[[0, -1]] = 0
    difference = compare_tensor("F16", a.tobytes(), "F16", b.tobytes())
    assert difference
    assert (difference.differing, difference.newly_zero, difference.largest) == (2, 2, 1)
    assert difference.relative == pytest.approx(math.sqrt(2 / count))
    wide = compare_tensor("F16", a.tobytes(), "F32", b.astype(np.float32).tobytes())
    assert wide
    assert (wide.differing, wide.relative) == (2, difference.relative)


def test_a_sign_of_zero_differs_but_is_no_new_zero() -> None:
    difference = compare_tensor("F16", b"\0\x80", "F16", b"\0\0")
    assert difference
    assert (difference.differing, difference.newly_zero, difference.zero_in_both, difference.largest) == (1, 0, 1, 0)


def test_fp64_stays_fp64() -> None:
    difference = compare_tensor("F64", array(1), "F64", array(1 + 2**-50))
    assert difference
    assert (difference.differing, difference.largest) == (1, 2**-50)
    narrow = compare_tensor("F32", array(1, dtype=np.float32), "F64", array(1 + 2**-50))
    assert narrow
    assert (narrow.differing, narrow.largest) == (1, 2**-50)


def test_sizes_beyond_fp64_are_left_out() -> None:
    largest = np.finfo(np.float64).max
    difference = compare_tensor("F64", array(largest, 1), "F64", array(-largest, 2))
    assert difference
    assert (difference.differing, difference.nonfinite, difference.largest) == (2, 1, 1)
    difference = compare_tensor("F64", array(1e200), "F64", array(2e200))
    assert difference
    assert (difference.nonfinite, difference.largest, difference.relative) == (0, 1e200, None)


def test_a_tensor_that_was_all_zero_comes_first(of: Callable[[Made, Made], Comparison]) -> None:
    ones = array(1, 1, dtype=np.float16)
    a: Made = {"x": ("F16", (2,), ones), "zero": ("F16", (2,), bytes(4)), "int": ("I8", (2,), bytes(2))}
    b: Made = {"x": ("F16", (2,), bytes(4)), "zero": ("F16", (2,), ones), "int": ("I8", (2,), b"\0\1")}
    assert [tensor.name for tensor in of(a, b).tensors] == ["zero", "x", "int"]
