"""Damaged on purpose, tens of thousands of times: what is read holds every promise of the format, or is refused.

The mutations are the same in every run. What is accepted is checked again without the code under test, and by the
official library: we may be stricter than it, never laxer.
"""

import contextlib
import io
import json
import math
import random
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdiff_export.errors import CheckpointError
from crdiff_export.formats import safetensors, torch_zip, unpickle
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.formats.safetensors import Header
from tests.support import hostile, makers

# How many mutants of each header are read.
COUNTS = [2000, pytest.param(6000, marks=pytest.mark.slow)]
# safetensors' README and the names of its dtypes: bits of an element.
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def spell(entries: dict[str, tuple[str, tuple[int, ...]]], metadata: Any = None, **options: Any) -> bytes:
    """A header's JSON for tensors that lie one behind the other."""
    found: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape) in entries.items():
        size = math.prod(shape) * BITS[dtype] // 8
        found[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    return json.dumps(found, **options).encode()


PLAIN = {"a": ("F16", (2, 3)), "b": ("F32", (2,)), "c": ("U8", ())}
CORPORA: dict[str, bytes] = {
    "plain": spell(PLAIN, separators=(",", ":")),
    "metadata": spell(PLAIN, {"format": "pt", "modelspec.title": 'ü {[,:]} \\ " 😀', "n": "1"}, ensure_ascii=False),
    "escapes": spell({"ä\n": ("BF16", (2,)), "\U0001f600": ("I64", (1,))}, {"\t": "\u2028"}, indent=1),
    "scalars-and-empties": spell({
        "s": ("F64", ()), "e": ("F32", (0, 5)), "e2": ("F16", (3, 0, 2)), "t": ("BOOL", (1, 1, 1)), "z": ("U8", (0,)),
    }),
    "every-dtype": spell({dtype: (dtype, (8,)) for dtype in BITS}, separators=(",", ":")),
    "unet": spell({
        name: (dtype, shape) for name, (dtype, shape) in list(makers.narrow("demo.diffusers-unet").items())[:5]
    }, {"format": "pt"}),
}  # fmt: skip
TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"0", b"-", b"1", b".5", b"e9", b"true", b"false", b"null", b"NaN",
    b"-0", b"[]", b"{}", b'""', b" ", b"\n", b"\0", b"\x1f", b"\xff", b"\xed\xa0\x80", b"\xc3", b"\\u0000", b"\\ud800",
    b"\\udc00", b'"__metadata__":{},', b'"dtype":"F16",', b'"shape":[],', b'"data_offsets":[0,0],', b'"x":1,',
    b'"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b'"x":[[[[]]]],', b"/*", b"//", b"'", b"\xef\xbb\xbf",
]  # fmt: skip
NUMBERS = [
    b"0", b"1", b"-1", b"-0", b"2", b"7", b"8", b"255", b"4294967295", b"4294967296", b"9223372036854775807",
    b"9223372036854775808", b"18446744073709551615", b"18446744073709551616", b"1e3", b"1.0", b"1e400", b"NaN",
    b"Infinity", b"true", b"null", b'"1"', b"01", b"9" * 30, b"9" * 5000, b"0x10", b"[1]", b"{}",
]  # fmt: skip
Value = TypeVar("Value")
Mutation = Callable[[bytes, random.Random], bytes]


def swap(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    i, j = rng.randrange(len(data)), rng.randrange(len(data))
    data[i], data[j] = data[j], data[i]
    return bytes(data)


def change(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), rng.randrange(32, 127)))
    return bytes(data)


def delete(raw: bytes, rng: random.Random) -> bytes:
    i = rng.randrange(len(raw))
    return raw[:i] + raw[i + rng.choice((1, 1, 2, 8, 40)) :]


def duplicate(raw: bytes, rng: random.Random) -> bytes:
    i = rng.randrange(len(raw))
    j = i + rng.choice((1, 2, 8, 60))
    return raw[:j] + raw[i:]


def insert(raw: bytes, rng: random.Random) -> bytes:
    i = rng.randrange(len(raw) + 1)
    return raw[:i] + rng.choice(TOKENS) * rng.choice((1, 1, 1, 3, 300)) + raw[i:]


def renumber(raw: bytes, rng: random.Random) -> bytes:
    places = list(re.finditer(rb"\d+", raw))
    place = rng.choice(places) if places else re.match(b"", raw)
    assert place
    return raw[: place.start()] + rng.choice(NUMBERS) + raw[place.end() :]


def truncate(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw))]


def splice(raw: bytes, rng: random.Random) -> bytes:
    other = rng.choice(list(CORPORA.values()))
    return raw[: rng.randrange(len(raw) + 1)] + other[rng.randrange(len(other)) :]


def pad(raw: bytes, rng: random.Random) -> bytes:
    return raw + rng.choice((b" ", b"\n\t\r", b"\0", b"x", b"{}", b",")) * rng.randrange(9)


def restructure(raw: bytes, rng: random.Random) -> bytes:
    """Change the value and not its spelling: a field, an order, a name, a kind."""
    try:
        value = json.loads(raw)
    except ValueError:
        return raw
    if not isinstance(value, dict) or not value:
        return raw
    name = rng.choice(list(value))
    entry = value[name]
    kind = rng.randrange(7)
    if kind == 0 and isinstance(entry, dict) and entry:
        entry[rng.choice([*entry, "new", "dtype", "shape"])] = rng.choice(
            (None, 0, [], {}, "F16", "F32", [0], [2, 3], [0, 4], [True], [[1]], "x", [2**62, 4], [-1], 1.5, [2.0])
        )
    elif kind == 1 and isinstance(entry, dict) and entry:
        del entry[rng.choice(list(entry))]
    elif kind == 2:
        items = list(value.items())
        rng.shuffle(items)
        value = dict(items)
    elif kind == 3:
        value[rng.choice(("", "a", "__metadata__", "new", "b\0", "\ud800"))] = value.pop(name)
    elif kind == 4:
        value[name] = rng.choice((None, 1, "x", [], [entry], {}, {"a": entry}, rng.choice(list(value.values()))))
    elif kind == 5 and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 0], entry["shape"][1:])
        )
    elif kind == 6 and isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
        shift = rng.choice((-1, 1, 4, 2**32, -(2**63)))
        entry["data_offsets"] = [n + shift if type(n) is int else n for n in entry["data_offsets"]]
    return json.dumps(value, separators=rng.choice(((",", ":"), (", ", ": "))), ensure_ascii=rng.random() < 0.5).encode(
        "utf-8", "surrogatepass"
    )


MUTATIONS: tuple[Mutation, ...] = (
    swap, change, delete, duplicate, insert, renumber, truncate, splice, pad, restructure, restructure, renumber,
)  # fmt: skip


def mutants(raw: bytes, seed: str, count: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(count):
        made = raw
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            made = rng.choice(MUTATIONS)(made, rng) if made else made
        yield made


def data_size(raw: bytes) -> int:
    """What a mutant seems to need, so that not all of them fail at the size of their file."""
    ends = [int(end) for end in re.findall(rb'"data_offsets":\s*\[\s*\d{1,9},\s*(\d{1,9})\s*\]', raw)]
    return max(ends, default=0)


def check(found: Header, raw: bytes, data: int) -> None:
    """Every invariant of the format, from the JSON again."""
    value = json.loads(raw)
    metadata = value.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    assert found.metadata == metadata
    assert all(type(key) is str and type(text) is str for key, text in metadata.items())
    assert [t.name for t in found.tensors] == list(value)
    assert found.data_start == 8 + len(raw)
    position = 0
    for t in sorted(found.tensors, key=lambda t: (t.start, t.end)):
        entry = value[t.name]
        assert (t.dtype, list(t.shape), [t.start, t.end]) == (entry["dtype"], entry["shape"], entry["data_offsets"])
        assert all(type(n) is int and n >= 0 for n in (*t.shape, t.start, t.end))
        assert t.start == position
        assert math.prod(t.shape) * BITS[t.dtype] == 8 * t.nbytes == 8 * (t.end - t.start)
        position = t.end
    assert position == data
    for text in (*value, *metadata, *metadata.values()):
        text.encode()


def read(call: Callable[[], Value], start: str) -> Value | None:
    """The result; None where it was refused as it should be: in one line, short, printable, and with a hint."""
    try:
        return call()
    except CheckpointError as caught:
        error = caught
    assert error.message.startswith(start)
    assert error.message.isprintable()
    assert len(error.message) < 500 + len(start)
    assert error.hint.isprintable()
    assert error.hint
    return None


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", CORPORA)
def test_mutated_headers(name: str, count: int) -> None:
    base, accepted = CORPORA[name], 0
    sizes = random.Random(name)
    for raw in mutants(base, name, count):
        data = sizes.choice((data_size(base), data_size(raw)))
        found = read(partial(safetensors.parse, raw, 8 + len(raw) + data, "f"), "f: ")
        if found is not None:
            accepted += 1
            check(found, raw, data)
            theirs = hostile.read_by_the_library(hostile.file(raw, bytes(data)))
            assert theirs == {t.name: (t.dtype, t.shape, bytes(t.nbytes)) for t in found.tensors}
    assert accepted > count // 50


@given(st.binary(max_size=60), st.integers(0, 100))
@settings(max_examples=300)
def test_any_bytes_for_a_header(raw: bytes, data: int) -> None:
    for body in (raw, b"{" + raw, b'{"a":' + raw + b"}"):
        with contextlib.suppress(CheckpointError):
            check(safetensors.parse(body, 8 + len(body) + data, "f"), body, data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(sorted(BITS)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["a", "b", "__metadata__", "dtype", "shape", "data_offsets", "weight_map"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), JSON, max_size=3))
@settings(max_examples=300)
def test_any_object_for_a_header(value: dict[str, Any]) -> None:
    raw = json.dumps(value).encode()
    with contextlib.suppress(CheckpointError):
        check(safetensors.parse(raw, 8 + len(raw), "f"), raw, 0)


def test_mutated_files(tmp_path: Path) -> None:
    """The length too, and the way through the file system; the library must read what is accepted."""
    path, rng, accepted = tmp_path / "model.safetensors", random.Random(1), 0
    tensors = {"a": ("F16", (2, 3), bytes(range(12))), "b": ("F32", (2,), bytes(range(8)))}
    good = makers.write(path, tensors, {"format": "pt"}).read_bytes()
    for _ in range(1000):
        raw = bytearray(good)
        for _ in range(rng.choice((1, 1, 3))):
            raw[rng.choice((rng.randrange(8), rng.randrange(len(raw))))] = rng.choice((0, 1, 0x20, rng.randrange(256)))
        raw = raw[: rng.choice((len(raw), len(raw), rng.randrange(len(raw) + 1)))]
        path.write_bytes(raw)
        found = read(lambda: _tensors(path), f"{path}: ")
        if found is not None:
            accepted += 1
            assert found == hostile.read_by_the_library(bytes(raw))
    assert accepted > 60


def test_mutated_indexes(tmp_path: Path) -> None:
    index = hostile.sharded(tmp_path)
    good, accepted = index.read_bytes(), 0
    for raw in mutants(good, "index", 1000):
        index.write_bytes(raw)
        checkpoint = read(lambda: open_checkpoint(index), f"{tmp_path}")
        if checkpoint is not None:
            accepted += 1
            assert {f.path.parent for f in checkpoint.files} == {tmp_path}
            assert {t.name: f.name for f in checkpoint.files for t in f.tensors} == json.loads(raw)["weight_map"]
    assert accepted > 10


PICKLES = {
    "weights": hostile.state(weight=hostile.tensor(), bias=hostile.tensor(shape=(3,), strides=(2,))),
    "wrapped": hostile.opcodes(b"}(" + hostile.text("state_dict") + b"}(" + hostile.text("w") + hostile.tensor() + b"u"
                               + hostile.text("epoch") + b"K\x07" + hostile.text("lr") + b"G?\xf0" + bytes(6) + b"u"),
    "memo": hostile.opcodes(b"}q\0(" + hostile.text("w") + b"q\1" + hostile.tensor() + b"q\2h\1h\2"
                            + hostile.text("list") + b"]q\3(K\1K\2h\0e\x85u"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_mutated_pickles(name: str, tmp_path: Path) -> None:
    """Straight into the reader, then through an archive for those that it takes."""
    accepted = 0
    for number, raw in enumerate(mutants(PICKLES[name], name, 2500)):
        try:
            unpickle.unpickle(raw)
        except unpickle.UnpickleError:
            continue
        accepted += 1
        path = hostile.archive(tmp_path / f"{number}.ckpt", raw, {"0": bytes(24)})
        read(partial(_tensors, path), f"{path}: ")
        path.unlink()
    assert accepted > 25


def test_mutated_archives(tmp_path: Path) -> None:
    """Bytes anywhere in the file: the records, the directory, its end."""
    path = hostile.weights(tmp_path / "model.ckpt")
    good, rng, accepted = path.read_bytes(), random.Random(3), 0
    for _ in range(2500):
        raw = good
        for _ in range(rng.choice((1, 2, 4))):
            raw = rng.choice((swap, change, delete, duplicate, truncate, change, change))(raw, rng) or good
        path.write_bytes(raw)
        accepted += read(lambda: _tensors(path), f"{path}: ") is not None
    assert accepted > 100


def _tensors(path: Path) -> dict[str, tuple[str, makers.Shape, bytes]]:
    (file,) = open_checkpoint(path).files
    assert file.data_size < 1 << 20
    data = bytearray(file.data_size)
    with closing(file.open()) as source:
        source.read_into(0, memoryview(data))
    return {t.name: (t.dtype, t.shape, bytes(data[t.start : t.end])) for t in file.tensors}


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes_for_a_pickle(raw: bytes) -> None:
    for made in (raw, b"\x80\x02" + raw, b"\x80\x04" + raw + b"."):
        with contextlib.suppress(unpickle.UnpickleError):
            unpickle.unpickle(made)


def test_any_end_of_a_directory(tmp_path: Path) -> None:
    """Zip's own record of its end, with every count and size at its limits."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("model/data.pkl", hostile.state(w=hostile.tensor()))
        archive.writestr("model/data/0", bytes(24))
    good, path = made.getvalue(), tmp_path / "model.ckpt"
    values = (0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
    fields = [(offset, size) for offset, size in ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))]
    for offset, size in fields:
        for value in values:
            raw = bytearray(good)
            start = len(raw) - 22 + offset
            raw[start : start + size] = struct.pack("<I", value & (256**size - 1))[:size]
            path.write_bytes(raw)
            read(lambda: _tensors(path), f"{path}: ")
    assert torch_zip.MAX_DIRECTORY < 1 << 24
