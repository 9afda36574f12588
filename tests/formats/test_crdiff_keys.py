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
from tests.support.messages import raises

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
        native_source=draw(st.sampled_from(["family", "config.json", "modelspec.resolution"])),
        borrowed_from=draw(st.none() | SIZES),
        special=draw(st.none() | TEXT.filter(bool)),
        prediction=draw(st.none() | TEXT.filter(bool)),
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
    with raises(CheckpointError, "file: ", key):
        Stamp.from_metadata(keys, "file")


WRONG = {
    "crdiff.method": ["row-wise"],
    "crdiff.cast": ["F64", ""],
    "crdiff.resolution.target": ["2048", "512 x 512"],
    "crdiff.resolution.native": ["0x512", "512x5120000"],
    "crdiff.poa.weight": ["high", "nan", "1e999", "1_0", " 1.5", ""],
    "crdiff.ratio.mid": ["inf", "1.0", "-0.1"],
    "crdiff.pruned.mid": ["-1", "1.0", "\u0661"],
    "crdiff.total.mid": ["9" * 19],
    "crdiff.nonfinite.mid": ["some"],
    "crdiff.threshold.mid": [
        "0.046875", "None", "-0x1.8p-5", "0x1.0p+128", "0x1.0p+999", "0x1.0p-150", "0x1.0000001p+0",
    ],
    "crdiff.source.hash_sha256": ["ab" * 32, "0x00", "0x" + "AB" * 32],
    "crdiff.thresholds": [
        "", "0x1.8p-5", '{"0": "0x1.8p-5"}', "[0.5]", '["0x1.8p-5", null]', "[" * 100_000, f"[{'9' * 10_000}]",
        '["0x1.8p-5", "0.5"]',
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "text"),
    [pytest.param(key, text, id=f"{key[7:]} {text[:20]}") for key, texts in WRONG.items() for text in texts],
)
def test_a_wrong_value_is_named(key: str, text: str) -> None:
    keys = {**(LAYER_WISE if key == "crdiff.thresholds" else BLOCK_WISE), key: text}
    value = "" if key == "crdiff.thresholds" else ascii(text)
    with raises(CheckpointError, f"some/file: {key} is {value}"):
        Stamp.from_metadata(keys, "some/file")


WRONG_MASKS: list[tuple[dict[str, str | None], str]] = [
    ({"crdiff.mask": "bits"}, "crdiff.mask is 'bits'"),
    ({"crdiff.mask": ""}, "crdiff.mask is ''"),
    ({"crdiff.mask": None}, "crdiff.thresholds"),
    ({"crdiff.thresholds": "[]"}, "'crdiff.thresholds'"),
    ({"crdiff.threshold.blocks": "none"}, "'crdiff.threshold.blocks'"),
    ({"crdiff.moved": "false"}, "crdiff.moved is 'false'"),
    ({"crdiff.method": "row-wise"}, "crdiff.method is 'row-wise'"),
    ({"crdiff.calibration.size": None}, "crdiff.calibration.size"),
    ({"crdiff.calibration.size": "big"}, "crdiff.calibration.size is 'big'"),
    ({"crdiff.calibration.file_sha256": None}, "crdiff.calibration.file_sha256"),
    ({"crdiff.calibration.file_sha256": "0x0"}, "crdiff.calibration.file_sha256 is '0x0'"),
]


@pytest.mark.parametrize(("changes", "key"), WRONG_MASKS, ids=[key for _, key in WRONG_MASKS])
def test_a_mask_that_is_wrong_is_named(changes: dict[str, str | None], key: str) -> None:
    keys = {name: text for name, text in (MASKED | changes).items() if text is not None}
    with raises(CheckpointError, "file: ", key):
        Stamp.from_metadata(keys, "file")


@pytest.mark.parametrize("schema", ["3", "", "1.0", " 1"])
def test_another_schema_needs_a_newer_crdiff(schema: str) -> None:
    with raises(CheckpointError, f"schema {schema!r}"):
        Stamp.from_metadata({**BLOCK_WISE, "crdiff.schema": schema}, "file")


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
