"""The header: what the format forbids is refused in one line, and what is written can be read again."""

import json
import re
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from crdiff_export.errors import CheckpointError
from crdiff_export.formats import safetensors
from crdiff_export.formats.safetensors import BITS, TensorSpec
from tests.support import hostile
from tests.support.bounded import linux_only, read_bounded
from tests.support.messages import raises

GOOD = '{"dtype":"F16","shape":[2],"data_offsets":[0,4]}'


def entry(dtype: Any = "F16", shape: Any = (2,), offsets: Any = (0, 4)) -> str:
    return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


def two(first: tuple[int, int], second: tuple[int, int]) -> str:
    both = zip(("a", "b"), (first, second), strict=True)
    return json.dumps({n: {"dtype": "U8", "shape": [e - s], "data_offsets": [s, e]} for n, (s, e) in both})


def parse(body: str | bytes, data: int) -> safetensors.Header:
    raw = body if isinstance(body, bytes) else body.encode()
    return safetensors.parse(raw, 8 + len(raw) + data, "f")


@pytest.mark.parametrize(
    ("size", "file_size"), [(0, 100), (1, 100), (93, 100), (100_000_001, 1 << 40), (2**64 - 2, 100)]
)
def test_lengths_that_lie(size: int, file_size: int) -> None:
    with raises(CheckpointError, f"{size} bytes"):
        safetensors.length(struct.pack("<Q", size), file_size, "f")


def test_length_of_a_good_header() -> None:
    assert safetensors.length(struct.pack("<Q", 92), 100, "f") == 92
    assert safetensors.length(struct.pack("<Q", 100_000_000), 1 << 40, "f") == 100_000_000


REFUSED: dict[str, tuple[str | bytes, int, str]] = {
    # JSON
    "no-object": ("[1]", 0, "'{'"),
    "space-before": (' {"w":' + GOOD + "}", 4, "'{'"),
    "byte-order-mark": (b"\xef\xbb\xbf{}", 0, "'{'"),
    "zeros": (bytes(16), 0, "'{'"),
    "cut": ('{"w":' + GOOD, 4, "character 53"),
    "only-a-brace": ("{ ", 0, "character 2"),
    "more-after": ("{} {}", 0, "character 3"),
    "zero-byte-after": ("{}\0", 0, "character 2"),
    "single-quotes": ("{'w':1}", 0, "character 1"),
    "comment": ("{/**/}", 0, "character 1"),
    "line-break-in-text": ('{"a\nb":' + GOOD + "}", 4, "character 3"),
    "not-utf-8": (b'{"\xff":' + GOOD.encode() + b"}", 4, "byte 2"),
    "utf-8-cut": (b'{"\xc3":' + GOOD.encode() + b"}", 4, "byte 2"),
    "utf-8-too-long": (b'{"\xc0\xaf":' + GOOD.encode() + b"}", 4, "byte 2"),
    "utf-8-surrogate": (b'{"\xed\xa0\x80":' + GOOD.encode() + b"}", 4, "byte 2"),
    "utf-16": ('{"w":1}'.encode("utf-16-le"), 0, "character 1"),
    "lone-surrogate": (r'{"\ud800":' + GOOD + "}", 4, r"'\ud800'"),
    "lone-surrogate-in-metadata": (r'{"__metadata__":{"a":"\udfff"}}', 0, r"'\udfff'"),
    "lone-surrogate-in-a-metadata-key": (r'{"__metadata__":{"\ud83d":"a"}}', 0, r"'\ud83d'"),
    "surrogates-the-wrong-way": (r'{"\ude00\ud83d":' + GOOD + "}", 4, r"'\ude00\ud83d'"),
    "deep": ('{"a":' * 200_000 + "1" + "}" * 200_000, 0, "nests"),
    "deep-lists": ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", 0, "nests"),
    "deep-value": (entry().replace('"F16"', "[" * 300 + "]" * 300), 4, "unknown dtype [a list]"),
    # keys
    "tensor-twice": ('{"w":' + GOOD + ',"w":' + GOOD + "}", 4, "'w'"),
    "tensor-twice-spelt-apart": (r'{"w":' + GOOD + r',"\u0077":' + GOOD + "}", 4, "'w'"),
    "field-twice": ('{"w":{"dtype":"F16","dtype":"F16","shape":[2],"data_offsets":[0,4]}}', 4, "'dtype'"),
    "metadata-twice": ('{"__metadata__":{},"__metadata__":{}}', 0, "'__metadata__'"),
    "metadata-key-twice": ('{"__metadata__":{"a":"1","a":"1"}}', 0, "'a'"),
    "endless-key-twice": ('{"' + "k" * 1000 + '":1,"' + "k" * 1000 + '":1}', 0, f"'{'k' * 78}…'"),
    "no-dtype": ('{"w":{"shape":[2],"data_offsets":[0,4]}}', 4, "no dtype"),
    "no-shape": ('{"w":{"dtype":"F16","data_offsets":[0,4]}}', 4, "no shape"),
    "no-offsets": ('{"w":{"dtype":"F16","shape":[2]}}', 4, "no data_offsets"),
    "unknown-key": (GOOD.join(('{"w":', "}")).replace("[0,4]", '[0,4],"strides":[1]'), 4, "'strides'"),
    "old-offsets": ('{"w":{"dtype":"F16","shape":[2],"offsets":[0,4]}}', 4, "no data_offsets"),
    # metadata
    "metadata-list": ('{"__metadata__":[]}', 0, "__metadata__"),
    "metadata-text": ('{"__metadata__":"pt"}', 0, "__metadata__"),
    "metadata-number": ('{"__metadata__":{"steps":7}}', 0, "'steps'"),
    "metadata-object": ('{"__metadata__":{"a":{"b":"c"}}}', 0, "'a'"),
    "metadata-fraction": ('{"__metadata__":{"a":0.5}}', 0, "'0.5'"),
    # entries
    "entry-null": ('{"w":null}', 0, "entry of tensor 'w'"),
    "entry-list": ('{"w":["F16",[2],[0,4]]}', 4, "entry of tensor 'w'"),
    "dtype-unknown": (entry("float16"), 4, "unknown dtype 'float16'"),
    "dtype-lower": (entry("f16"), 4, "unknown dtype 'f16'"),
    "dtype-number": (entry(16), 4, "unknown dtype 16"),
    "dtype-null": (entry(None), 4, "unknown dtype null"),
    "dtype-object": (entry({"a": 1}), 4, "unknown dtype an object"),
    "dtype-long": (entry("x" * 10_000), 4, f"unknown dtype '{'x' * 78}…'"),
    "dtype-controls": (entry("\x1b[2J\n"), 4, r"unknown dtype '\x1b[2J\n'"),
    "shape-number": (entry(shape=2), 4, ": 2"),
    "shape-object": (entry(shape={}), 4, ": an object"),
    "shape-null": (entry(shape=None), 4, ": null"),
    "shape-nested": (entry(shape=[[2]]), 4, ": [a list]"),
    "shape-text": (entry(shape=["2"]), 4, ": ['2']"),
    "shape-endless-text": (entry(shape=["x" * 999] * 999), 4, f": [{', '.join([repr('x' * 22 + '…')] * 9)}, …]"),
    "shape-true": (entry(shape=[True, 2]), 4, ": [true, 2]"),
    "shape-negative": (entry(shape=[-1, -2]), 4, ": [-1, -2]"),
    "shape-fraction": (entry(shape=[2.0]), 4, "'2.0'"),
    "shape-exponent": (entry().replace("[2]", "[2e0]"), 4, "'2e0'"),
    "shape-nan": (entry().replace("[2]", "[NaN]"), 4, "'NaN'"),
    "shape-infinite": (entry().replace("[2]", "[-Infinity]"), 4, "'-Infinity'"),
    "shape-minus-zero": (entry(shape=[0], offsets=[0, 0]).replace("[0]", "[-0]"), 0, "'-0'"),
    "shape-2**63": (entry(shape=[2**63]), 4, f": [{2**63}]"),
    "shape-endless-number": (entry().replace("[2]", f"[{'9' * 5000}]"), 4, f"'{'9' * 28}…'"),
    "shape-65-dimensions": (entry(shape=[1] * 64 + [2]), 4, "65 dimensions"),
    "shape-overflow": (entry(shape=[2**40, 2**40]), 4, f"F16 [{2**40}, {2**40}]"),
    "shape-overflow-before-zero": (entry(shape=[2**40, 2**40, 0], offsets=[0, 0]), 0, f"F16 [{2**40}, {2**40}, 0]"),
    "shape-wraps-to-its-size": (entry(shape=[2**62 + 1, 4], offsets=[0, 8]), 8, f"F16 [{2**62 + 1}, 4]"),
    "shape-too-large": (entry(shape=[3]), 4, "6 bytes, has 4"),
    "shape-too-small": (entry(shape=[1]), 4, "2 bytes, has 4"),
    "shape-empty": (entry(shape=[]), 4, "2 bytes, has 4"),
    "shape-of-another-dtype": (entry("F32"), 4, "8 bytes, has 4"),
    "half-a-byte": (entry("F4", [1], [0, 0]), 0, "F4 [1]"),
    "offsets-number": (entry(offsets=4), 4, ": 4"),
    "offsets-one": (entry(offsets=[0]), 4, ": [0]"),
    "offsets-three": (entry(offsets=[0, 4, 4]), 4, ": [0, 4, 4]"),
    "offsets-backwards": (entry(offsets=[4, 0]), 4, ": [4, 0]"),
    "offsets-negative": (entry(offsets=[-4, 0]), 4, ": [-4, 0]"),
    "offsets-true": (entry("U8", [1], [False, True]), 1, ": [false, true]"),
    "offsets-huge": (entry(offsets=[2**63 - 4, 2**63]), 4, f": [{2**63 - 4}, {2**63}]"),
    # layout
    "overlap": (two((0, 4), (2, 6)), 6, "'b' overlaps"),
    "same-bytes": (two((0, 4), (0, 4)), 4, "'b' overlaps"),
    "inside": (two((0, 6), (2, 4)), 6, "'b' overlaps"),
    "empty-inside": (two((0, 6), (2, 2)), 6, "'b' overlaps"),
    "hole": (two((0, 4), (6, 8)), 8, "2 bytes before tensor 'b'"),
    "hole-at-the-start": (two((2, 4), (4, 8)), 8, "2 bytes before tensor 'a'"),
    "empty-beyond": (two((0, 4), (6, 6)), 8, "2 bytes before tensor 'b'"),
    "out-of-range": (entry(shape=[2], offsets=[2**62, 2**62 + 4]), 4, f"{2**62} bytes before tensor 'w'"),
    "trailing": (entry(), 7, "3 bytes"),
    "trailing-after-nothing": ("{}", 1, "1 bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "data", "key"), REFUSED.values(), ids=REFUSED)
def test_headers_that_the_format_forbids(body: str | bytes, data: int, key: str) -> None:
    with raises(CheckpointError, "f: ", key) as caught:
        parse(body, data)
    assert caught.value.message.isprintable()


def test_the_error_of_a_truncated_file_says_how_much_is_missing() -> None:
    with raises(CheckpointError, "1000 bytes of tensors, 300") as caught:
        parse(two((0, 4), (4, 1000)), 300)
    assert "700 bytes more" in caught.value.hint


ALLOWED: dict[str, tuple[str, int]] = {
    "no-tensors": ("{}", 0),
    "only-metadata": ('{"__metadata__":{"format":"pt"}}', 0),
    "empty-metadata": ('{"__metadata__":{},"w":' + GOOD + "}", 4),
    "metadata-last": ('{"w":' + GOOD + ',"__metadata__":{"format":"pt"}}', 4),
    "metadata-of-many-brackets": (json.dumps({"__metadata__": {"workflow": "[{,:}]" * 10_000}}), 0),
    "white-space": ('{ "w"\n:\t' + GOOD + "}" + " \t\r\n" * 9, 4),
    "scalar": (entry("F64", [], [0, 8]), 8),
    "no-elements": (entry("F32", [0, 5], [0, 0]), 0),
    "huge-but-empty": (entry("U8", [2**60, 0], [0, 0]), 0),
    "64-dimensions": (entry("U8", [1] * 64, [0, 1]), 1),
    "two-halves-of-a-byte": (entry("F4", [2], [0, 1]), 1),
    "six-bits": (entry("F6_E2M3", [4], [0, 3]), 3),
    "bytes-against-the-order-of-names": (two((4, 8), (0, 4)), 8),
    "empty-between": (json.dumps({
        "c": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]},
        "b": {"dtype": "U8", "shape": [0], "data_offsets": [4, 4]},
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
    }), 8),
    "keys-in-any-order": ('{"w":{"data_offsets":[0,4],"shape":[2],"dtype":"F16"}}', 4),
    "empty-name": (GOOD.join(('{"":', "}")), 4),
    "name-like-a-path": (GOOD.join(('{"../../etc/passwd":', "}")), 4),
    "name-of-controls": (GOOD.join((r'{"\u0000\n\u001b":', "}")), 4),
    "name-beyond-the-first-plane": (GOOD.join((r'{"\ud83d\ude00 模型":', "}")), 4),
    "metadata-key-as-tensor-field": (GOOD.join(('{"dtype":', "}")), 4),
}  # fmt: skip


@pytest.mark.parametrize(("body", "data"), ALLOWED.values(), ids=ALLOWED)
def test_headers_that_the_format_allows(body: str, data: int) -> None:
    found = parse(body, data)
    theirs = hostile.read_by_the_library(hostile.file(body, bytes(data)))
    assert {t.name: (t.dtype, t.shape, bytes(t.nbytes)) for t in found.tensors} == theirs
    assert found.data_start == 8 + len(body.encode())
    assert dict(found.metadata) == json.loads(body).get("__metadata__", {})


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_is_as_wide_as_the_library_says(dtype: str) -> None:
    body = entry(dtype, [8], [0, BITS[dtype]])
    (spec,) = parse(body, BITS[dtype]).tensors
    assert (spec.count, spec.nbytes) == (8, BITS[dtype])
    assert hostile.read_by_the_library(hostile.file(body, bytes(BITS[dtype])))["w"][0] == dtype
    if BITS[dtype] % 8 == 0:
        assert spec.itemsize * 8 == BITS[dtype]


def test_the_library_accepts_some_headers_that_are_refused() -> None:
    """We are stricter where a file would mean different things to different readers, never laxer (test_fuzz)."""
    laxer = {name for name, (body, data, _) in REFUSED.items() if _library_accepts(hostile.file(body, bytes(data)))}
    assert laxer == {
        "space-before", "tensor-twice", "tensor-twice-spelt-apart", "metadata-key-twice",
        "unknown-key", "entry-list", "shape-65-dimensions",
    }  # fmt: skip


def _library_accepts(raw: bytes) -> bool:
    try:
        hostile.read_by_the_library(raw)
    except SafetensorError:
        return False
    return True


# Time and memory.

TOO_MANY, TOO_WIDE = "more tensors", "more text"
BOUNDED = {
    "brackets": ("""b'{"a":' + b'[' * N""", TOO_MANY),
    "objects": ("""b'{"a":' * (N // 5)""", TOO_MANY),
    "keys": ("""b'{' + b','.join(b'"%07d":1' % i for i in range(999_000)) + b'}'""", "'0000000'"),
    "metadata": ("""b'{"__metadata__":{' + b','.join(b'"%07d":""' % i for i in range(999_000)) + b'}}'""", "accepted"),
    "one-key": ("""b'{"' + b'k' * N + b'":1}'""", f"'{'k' * 78}…'"),
    "one-wide-key": ("""b'{"' + b'k' * N + '\\U0001f600'.encode() + b'":1}'""", TOO_WIDE),
    "escapes": ("""b'{"' + b'\\\\n' * (N // 2) + b'":1}'""", TOO_WIDE),
    "one-number": ("""b'{"a":' + b'1' * N + b'}'""", f"'{'1' * 28}…'"),
    "one-shape": (
        """b'{"a":{"dtype":"U8","shape":[' + b'4611686018427387904,' * 999_000 + b'1],"data_offsets":[0,0]}}'""",
        "999001 dimensions",
    ),
    "long-shapes": (
        """b'{' + b','.join(b'"%d":{"dtype":"U8","shape":[' % i + b'9223372036854775807,' * 63
        + b'0],"data_offsets":[0,0]}' for i in range(20_000)) + b'}'""",
        f"U8 [{f'{2**63 - 1}, ' * 9}…]",
    ),
    "many-tensors": (
        """b'{' + b','.join(
        b'"%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % (i, i, i + 1) for i in range(150_000)) + b'}'""",
        "150000 bytes of tensors, 0",
    ),
    "white-space": ("""b'{' + b' ' * N + b'}'""", "accepted"),
}
READ = (
    'safetensors.length(len(raw).to_bytes(8, "little"), 8 + len(raw), "f"); safetensors.parse(raw, 8 + len(raw), "f")'
)


@linux_only
@pytest.mark.parametrize(("raw", "key"), BOUNDED.values(), ids=BOUNDED)
def test_memory_and_time_are_bounded(raw: str, key: str) -> None:
    assert key in read_bounded(READ, raw, 99_000_000)


# Writing.

NAMES = st.text(max_size=12).filter(lambda name: name != safetensors.METADATA)
WHOLE = st.sampled_from([d for d, bits in BITS.items() if bits % 8 == 0])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[TensorSpec, ...]:
    """Tensors that lie one behind the other, in the header in any order."""
    specs, position = [], 0
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
        spec = TensorSpec(name, draw(WHOLE), shape, position, position)
        position += spec.count * spec.itemsize
        specs.append(TensorSpec(name, spec.dtype, shape, spec.start, position))
    return tuple(draw(st.permutations(specs)))


METADATA = st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=4)


@given(layouts(), METADATA)
def test_what_is_written_is_read_again(tensors: tuple[TensorSpec, ...], metadata: dict[str, str]) -> None:
    raw = safetensors.serialise(tensors, metadata)
    size = safetensors.length(raw[:8], len(raw), "f")
    data = max((t.end for t in tensors), default=0)
    found = safetensors.parse(raw[8:], len(raw) + data, "f")
    assert (found.tensors, dict(found.metadata), found.data_start) == (tensors, metadata, len(raw))
    assert (8 + size) % 4096 == 0  # the tensors begin on a page
    assert _library_accepts(raw + bytes(data))


@given(layouts(), METADATA, st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=200)
def test_any_spelling_of_a_header_is_read(
    tensors: tuple[TensorSpec, ...], metadata: dict[str, str], random: Any, ascii_only: bool
) -> None:
    entries: list[tuple[str, Any]] = [("__metadata__", metadata)] if metadata else []
    for t in tensors:
        fields = [("dtype", t.dtype), ("shape", t.shape), ("data_offsets", (t.start, t.end))]
        random.shuffle(fields)
        entries.append((t.name, dict(fields)))
    random.shuffle(entries)
    spaces = ["", " ", "\n", "\t\r\n "]
    separators = (
        f"{random.choice(spaces)},{random.choice(spaces)}",
        f"{random.choice(spaces)}:{random.choice(spaces)}",
    )
    body = json.dumps(dict(entries), separators=separators, ensure_ascii=ascii_only, indent=random.choice([None, 0, 3]))
    found = parse(body + random.choice(spaces), max((t.end for t in tensors), default=0))
    assert sorted(found.tensors, key=lambda t: t.name) == sorted(tensors, key=lambda t: t.name)
    assert dict(found.metadata) == metadata


def test_a_written_header_depends_on_nothing_but_its_content() -> None:
    tensors = (TensorSpec("b", "F16", (2,), 0, 4), TensorSpec("a", "U8", (), 4, 5))
    raw = safetensors.serialise(tensors, {"z": "ü", "a": "1", "m": "2"})
    assert raw == safetensors.serialise(tensors, {"m": "2", "z": "ü", "a": "1"})
    assert raw[8:].rstrip().decode() == (
        '{"__metadata__":{"a":"1","m":"2","z":"ü"},'
        '"b":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[],"data_offsets":[4,5]}}'
    )
    assert raw[8:10] == b'{"'  # what A1111 looks for
    assert b"__metadata__" not in safetensors.serialise(tensors, {})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        pytest.param("attn1.to_q.weight", "'attn1.to_q.weight'", id="name"),
        pytest.param("x" * 80, f"'{'x' * 80}'", id="just-fits"),
        pytest.param("x" * 81, f"'{'x' * 78}…'", id="too-long"),
        pytest.param("it's", '"it\'s"', id="quote"),
        pytest.param("\x1b]0;title\x07\n", r"'\x1b]0;title\x07\n'", id="controls"),
        pytest.param("\u202egnp.exe", r"'\u202egnp.exe'", id="right-to-left"),
        pytest.param("\ud800", r"'\ud800'", id="surrogate"),
        pytest.param("😀" * 70, "'" + r"\U0001f600" * 7 + r"\U0001f6…'", id="wide"),
        pytest.param([1, 2], "[1, 2]", id="shape"),
        pytest.param(list(range(20)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, …]", id="long-list"),
        pytest.param([[[]], {}], "[a list, an object]", id="deep"),
        pytest.param(None, "null", id="null"),
    ],
)
def test_values_from_files_fit_on_one_line(value: object, shown: str) -> None:
    assert safetensors.show(value) == shown
    assert safetensors.show(value).isprintable()
    assert re.fullmatch(r"[\x20-\x7e…]*", safetensors.show(value))
