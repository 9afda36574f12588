"""The `crdiff.*` keys: values to header and back without loss, and every way in which they can be wrong."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdiff_export.errors import CheckpointError
from crdiff_export.formats import crdiff_keys, safetensors
from crdiff_export.formats.crdiff_keys import CalibrationStamp, GroupStamp, Stamp
from crdiff_export.sizes import Size

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)

# Any text a header can hold, and more often than chance would have it what looks like the start of an object.
TEXT = st.one_of(st.text(), st.builds("{}{}".format, st.sampled_from(["{", " {", "  {", " ", "\t{", "["]), st.text()))
SIZES = st.builds(Size, st.integers(1, 999_999), st.integers(1, 999_999))
HASHES = st.from_regex("0x[0-9a-f]{64}", fullmatch=True)
COUNTS = st.integers(0, 10**18 - 1)
RATIOS = st.floats(0, 1, exclude_max=True)
THRESHOLDS = st.none() | st.floats(0, LARGEST, width=32)


@st.composite
def stamped(draw: st.DrawFn) -> Stamp:
    """Any stamp that an export could make, and many that none would."""
    per_layer, masked = draw(st.booleans()), draw(st.booleans())
    groups = {
        name: GroupStamp(
            ratio=draw(RATIOS),
            pruned=draw(COUNTS),
            total=draw(COUNTS),
            threshold=None if per_layer or masked else draw(THRESHOLDS),
            nonfinite=draw(COUNTS),
        )
        for name in draw(st.sampled_from([("blocks",), ("down", "mid", "up")]))
    }
    return Stamp(
        family=draw(TEXT),
        layout=draw(TEXT),
        prefix=draw(TEXT),
        criterion=draw(TEXT),
        targets=draw(st.sampled_from([("attn",), ("ff", "attn"), ("ff", "attn", "attn2")])),
        groups=groups,
        resolution=draw(SIZES),
        native=draw(SIZES),
        source_name=draw(TEXT),
        recipe=draw(TEXT),
        provenance=draw(TEXT),
        provenance_source=draw(TEXT),
        poa_weight=draw(st.floats(allow_nan=False, allow_infinity=False)),
        thresholds=tuple(draw(st.lists(THRESHOLDS))) if per_layer and not masked else None,
        masked=("layer-wise" if per_layer else "block-wise") if masked else None,
        moved=masked and draw(st.booleans()),
        calibrated=draw(st.none() | st.builds(CalibrationStamp, HASHES, SIZES)),
        source_hash=draw(st.none() | HASHES),
        cast=draw(st.sampled_from([None, "F16", "BF16", "F32"])),
        prompt=draw(st.none() | TEXT),
        evidence=draw(st.dictionaries(TEXT, TEXT)),
        residual=draw(TEXT),
        version=draw(TEXT),
    )


@given(stamped())
def test_header_holds_a_stamp_without_loss(made: Stamp) -> None:
    keys = made.to_metadata()
    assert all(isinstance(text, str) and not text.startswith("{") for text in keys.values())
    raw = safetensors.serialise([], keys)
    assert len(raw) % 8 == 0
    assert raw[8:].startswith(b'{"')
    read = safetensors.parse(raw[8:], len(raw), "file").metadata
    assert read == keys
    assert list(read) == sorted(read)
    again = Stamp.from_metadata(read, "file")
    assert again == made
    assert again.to_metadata() == keys


@pytest.mark.parametrize("value", [0.0, SMALLEST, 2.0**-24, 1.0, LARGEST])
def test_extreme_thresholds_are_exact(value: float) -> None:
    keys = {**BLOCK_WISE, "crdiff.threshold.mid": value.hex()}
    assert Stamp.from_metadata(keys, "file").groups["mid"].threshold == value


@pytest.mark.parametrize(
    ("text", "stored"),
    [("", ""), ("{", " {"), (" {x", "  {x"), (" x", " x"), ("\t{", "\t{"), ("x{", "x{"), ("[1]", "[1]")],
)
def test_braces_are_moved_from_the_start(text: str, stored: str) -> None:
    assert crdiff_keys.safe(text) == stored
    assert Stamp.from_metadata({**BLOCK_WISE, "crdiff.prompt": stored}, "file").prompt == text


GROUPS = ("down", "mid", "up")
COMMON = {
    "crdiff.schema": "1",
    "crdiff.version": "0.1.0",
    "crdiff.paper": "arXiv:2604.05524",
    "crdiff.criterion": "magnitude",
    "crdiff.family": "sdxl",
    "crdiff.layout": "original",
    "crdiff.prefix": "",
    "crdiff.targets": "attn,ff",
    "crdiff.resolution.target": "2048x1024",
    "crdiff.resolution.native": "1024x1024",
    "crdiff.source.name": "model.safetensors",
    "crdiff.recipe": "sdxl.toml 2048x2048",
    "crdiff.provenance": "starting-point",
    "crdiff.provenance.source": "nobody",
    "crdiff.poa.weight": "1.5",
    "crdiff.residual": "none",
}
BLOCK_WISE = {
    **COMMON,
    "crdiff.method": "block-wise",
    **{f"crdiff.ratio.{group}": "0.3" for group in GROUPS},
    **{f"crdiff.pruned.{group}": "31" for group in GROUPS},
    **{f"crdiff.total.{group}": "100" for group in GROUPS},
    **{f"crdiff.threshold.{group}": "0x1.8p-5" for group in GROUPS},
}
LAYER_WISE = {
    **COMMON,
    "crdiff.method": "layer-wise",
    "crdiff.ratio.blocks": "0.3",
    "crdiff.pruned.blocks": "31",
    "crdiff.total.blocks": "100",
    "crdiff.thresholds": '["0x1.8p-5","none","0x0.0p+0"]',
}
MASKED = {
    **{key: text for key, text in LAYER_WISE.items() if key != "crdiff.thresholds"},
    "crdiff.criterion": "wanda:compare=row",
    "crdiff.mask": "zeros",
    "crdiff.moved": "true",
    "crdiff.calibration.file_sha256": "0x" + "ab" * 32,
    "crdiff.calibration.size": "512x384",
}


def test_keys_are_read_as_the_specification_says() -> None:
    block_wise, layer_wise = Stamp.from_metadata(BLOCK_WISE, "file"), Stamp.from_metadata(LAYER_WISE, "file")
    assert block_wise.groups["up"] == GroupStamp(ratio=0.3, pruned=31, total=100, threshold=0.046875)
    assert (block_wise.resolution, block_wise.native) == (Size(2048, 1024), Size(1024, 1024))
    assert block_wise.thresholds is None
    assert layer_wise.thresholds == (0.046875, None, 0.0)
    assert layer_wise.groups == {"blocks": GroupStamp(ratio=0.3, pruned=31, total=100)}


def test_the_keys_of_a_mask() -> None:
    made = Stamp.from_metadata(MASKED, "file")
    assert (made.masked, made.moved, made.thresholds) == ("layer-wise", True, None)
    assert made.calibrated == CalibrationStamp("0x" + "ab" * 32, Size(512, 384))
    assert made.compare == "row"
    assert made.groups == {"blocks": GroupStamp(ratio=0.3, pruned=31, total=100)}
    block = Stamp.from_metadata({**BLOCK_WISE, "crdiff.moved": "true"}, "file")
    assert (block.masked, block.moved, block.compare) == (None, False, "block")


def test_what_ranks_decides_a_files_content() -> None:
    made = replace(Stamp.from_metadata(MASKED, "file"), source_hash="0x" + "12" * 32)
    other = replace(made, calibrated=CalibrationStamp("0x" + "cd" * 32, Size(512, 384)))
    bigger = replace(made, calibrated=CalibrationStamp("0x" + "ab" * 32, Size(1024, 1024)))
    assert made.digest() not in (None, other.digest(), replace(made, criterion="wanda").digest())
    assert made.digest() == bigger.digest(), "the data have the hash"
    assert made.request_keys()["crdiff.calibration.file_sha256"] == "0x" + "ab" * 32


def test_unknown_keys_are_for_a_later_reader() -> None:
    assert Stamp.from_metadata({**BLOCK_WISE, "crdiff.new": "{", "other": "{"}, "file") == Stamp.from_metadata(
        BLOCK_WISE, "file"
    )


@pytest.mark.parametrize("key", sorted({*BLOCK_WISE, *LAYER_WISE} - {"crdiff.paper"}))
def test_missing_key_is_named(key: str) -> None:
    keys: dict[str, Any] = dict(BLOCK_WISE if key in BLOCK_WISE else LAYER_WISE)
    keys.pop(key)
    with pytest.raises(CheckpointError) as caught:
        Stamp.from_metadata(keys, "file")
    missing = "not made by crdiff (no crdiff.schema in its header)" if key == "crdiff.schema" else f"{key} is missing"
    assert caught.value.message == f"file: {missing}"


SIZE = "not a size such as 512x512"
MAGNITUDE = "not the hex float of a float32"
ARRAY = "is not a JSON array of hex floats"
WRONG = [
    ("crdiff.method", "row-wise", "is 'row-wise', not block-wise or layer-wise"),
    ("crdiff.cast", "F64", "is 'F64', not F16 or BF16 or F32"),
    ("crdiff.cast", "", "is '', not F16 or BF16 or F32"),
    ("crdiff.resolution.target", "2048", f"is '2048', {SIZE}"),
    ("crdiff.resolution.target", "512 x 512", f"is '512 x 512', {SIZE}"),
    ("crdiff.resolution.native", "0x512", f"is '0x512', {SIZE}"),
    ("crdiff.resolution.native", "512x5120000", f"is '512x5120000', {SIZE}"),
    ("crdiff.poa.weight", "high", "is 'high', not a number"),
    ("crdiff.poa.weight", "nan", "is 'nan', not a number"),
    ("crdiff.poa.weight", "1e999", "is '1e999', not a number"),
    ("crdiff.poa.weight", "1_0", "is '1_0', not a number"),
    ("crdiff.poa.weight", " 1.5", "is ' 1.5', not a number"),
    ("crdiff.poa.weight", "", "is '', not a number"),
    ("crdiff.ratio.mid", "inf", "is 'inf', not a number"),
    ("crdiff.ratio.mid", "1.0", "is '1.0', not a ratio from 0 to below 1"),
    ("crdiff.ratio.mid", "-0.1", "is '-0.1', not a ratio from 0 to below 1"),
    ("crdiff.pruned.mid", "-1", "is '-1', not a whole number"),
    ("crdiff.pruned.mid", "1.0", "is '1.0', not a whole number"),
    ("crdiff.pruned.mid", "\u0661", "is '\\u0661', not a whole number"),
    ("crdiff.total.mid", "9" * 19, f"is '{'9' * 19}', not a whole number"),
    ("crdiff.nonfinite.mid", "some", "is 'some', not a whole number"),
    ("crdiff.threshold.mid", "0.046875", f"is '0.046875', {MAGNITUDE}"),
    ("crdiff.threshold.mid", "None", f"is 'None', {MAGNITUDE}"),
    ("crdiff.threshold.mid", "-0x1.8p-5", f"is '-0x1.8p-5', {MAGNITUDE}"),
    ("crdiff.threshold.mid", "0x1.0p+128", f"is '0x1.0p+128', {MAGNITUDE}"),
    ("crdiff.threshold.mid", "0x1.0p+999", f"is '0x1.0p+999', {MAGNITUDE}"),
    ("crdiff.threshold.mid", "0x1.0p-150", f"is '0x1.0p-150', {MAGNITUDE}"),
    ("crdiff.threshold.mid", "0x1.0000001p+0", f"is '0x1.0000001p+0', {MAGNITUDE}"),
    ("crdiff.source.hash_sha256", "ab" * 32, f"is '{'ab' * 32}', not 0x and 64 lowercase hex digits"),
    ("crdiff.source.hash_sha256", "0x00", "is '0x00', not 0x and 64 lowercase hex digits"),
    ("crdiff.source.hash_sha256", "0x" + "AB" * 32, f"is '0x{'AB' * 32}', not 0x and 64 lowercase hex digits"),
]
WRONG_LISTS = [
    ("crdiff.thresholds", "", ARRAY),
    ("crdiff.thresholds", "0x1.8p-5", ARRAY),
    ("crdiff.thresholds", '{"0": "0x1.8p-5"}', ARRAY),
    ("crdiff.thresholds", "[0.5]", ARRAY),
    ("crdiff.thresholds", '["0x1.8p-5", null]', ARRAY),
    ("crdiff.thresholds", "[" * 100_000, ARRAY),
    ("crdiff.thresholds", f"[{'9' * 10_000}]", ARRAY),
    ("crdiff.thresholds", '["0x1.8p-5", "0.5"]', f"is '0.5', {MAGNITUDE}"),
]


@pytest.mark.parametrize(
    ("key", "text", "message"), WRONG + WRONG_LISTS, ids=[f"{k[7:]} {t[:20]}" for k, t, _ in WRONG + WRONG_LISTS]
)
def test_wrong_value_is_named(key: str, text: str, message: str) -> None:
    keys = {**(LAYER_WISE if key == "crdiff.thresholds" else BLOCK_WISE), key: text}
    with pytest.raises(CheckpointError) as caught:
        Stamp.from_metadata(keys, "some/file")
    assert caught.value.message == f"some/file: {key} {message}"
    assert caught.value.hint == "The header was changed after crdiff wrote it; export the file again from its base."


WRONG_MASKS: list[tuple[dict[str, str | None], str]] = [
    ({"crdiff.mask": "bits"}, "crdiff.mask is 'bits', not zeros"),
    ({"crdiff.mask": ""}, "crdiff.mask is '', not zeros"),
    ({"crdiff.mask": None}, "crdiff.thresholds is missing"),
    ({"crdiff.thresholds": "[]"}, "crdiff.mask stands beside 'crdiff.thresholds'"),
    ({"crdiff.threshold.blocks": "none"}, "crdiff.mask stands beside 'crdiff.threshold.blocks'"),
    ({"crdiff.moved": "false"}, "crdiff.moved is 'false', not true"),
    ({"crdiff.method": "row-wise"}, "crdiff.method is 'row-wise', not block-wise or layer-wise"),
    ({"crdiff.calibration.size": None}, "crdiff.calibration.size is missing"),
    ({"crdiff.calibration.size": "big"}, f"crdiff.calibration.size is 'big', {SIZE}"),
    ({"crdiff.calibration.file_sha256": None}, "crdiff.calibration.file_sha256 is missing"),
    ({"crdiff.calibration.file_sha256": "0x0"},
     "crdiff.calibration.file_sha256 is '0x0', not 0x and 64 lowercase hex digits"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG_MASKS, ids=[text for _, text in WRONG_MASKS])
def test_a_mask_that_is_wrong_is_named(changes: dict[str, str | None], message: str) -> None:
    keys = {key: text for key, text in (MASKED | changes).items() if text is not None}
    with pytest.raises(CheckpointError) as caught:
        Stamp.from_metadata(keys, "file")
    assert caught.value.message == f"file: {message}"


@pytest.mark.parametrize("schema", ["2", "", "1.0", " 1"])
def test_other_schema_is_for_a_newer_crdiff(schema: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Stamp.from_metadata({**BLOCK_WISE, "crdiff.schema": schema}, "file")
    assert caught.value.message == f"file: its header has schema {schema!r}, this crdiff reads 1"
    assert caught.value.hint == "Install a newer crdiff."


@given(
    st.sampled_from([BLOCK_WISE, LAYER_WISE, MASKED]).flatmap(
        lambda keys: st.tuples(st.just(keys), st.sampled_from([*keys]), TEXT)
    )
)
def test_any_value_is_read_or_refused(changed: tuple[dict[str, str], str, str]) -> None:
    keys, key, text = changed
    try:
        made = Stamp.from_metadata({**keys, key: text}, "file")
    except CheckpointError:
        return
    assert safetensors.serialise([], made.to_metadata())


def test_thresholds_are_written_without_spaces() -> None:
    written = Stamp.from_metadata(LAYER_WISE, "file").to_metadata()["crdiff.thresholds"]
    assert written == '["0x1.8000000000000p-5","none","0x0.0p+0"]'
