"""Verification: what holds passes, and everything that does not is refused in its own words."""

import json
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from crdiff_export import ExportRequest, Size, export
from crdiff_export.bake import stream
from crdiff_export.errors import CheckpointError, CrdiffError, FamilyError, VerifyError
from crdiff_export.formats import hashing
from crdiff_export.models import demo
from crdiff_export.progress import Silent
from crdiff_export.verify.verify import Verified, verify
from tests.support import geometry_tables, makers, oracle
from tests.support.exporting import Recorder
from tests.support.makers import changed
from tests.support.messages import raises

UNET, DIT, DEMO = "sd15.original", "sd3-medium.original-transformer", "demo.original-unet"
TOO_SMALL: dict[str, Any] = {"ratio": 0.001, "targets": ("ff", "attn")}  # for some layers, not for others
SIZE = Size(96, 64)
BLOCK = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0."
TARGET = BLOCK + "attn1.to_q.weight"
OTHER = BLOCK + "attn2.to_q.weight"
Made = dict[str, tuple[str, makers.Shape, bytes]]


def bake(base: Path, output: Path, **request: Any) -> Path:
    return export(ExportRequest(str(base), SIZE, output, ratio=request.pop("ratio", 0.3), **request)).written.path


def check(path: Path, base: Path | None = None) -> Verified:
    return verify(path, str(base) if base else None, Silent())


def refused(path: Path, base: Path | None = None) -> str:
    with pytest.raises(VerifyError) as caught:
        check(path, base)
    assert caught.value.exit_code == 3
    assert caught.value.hint
    return caught.value.message


@dataclass(frozen=True)
class Pair:
    base: Path
    output: Path


@pytest.fixture(scope="module")
def pairs(
    narrow_exports: Callable[[str], tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Pair]:
    """A narrow base and its export, made once for each question; not to be changed."""

    @cache
    def pair(table: str = UNET, **request: Any) -> Pair:
        base, output = narrow_exports(table)
        if request:
            output = bake(base, tmp_path_factory.mktemp("pair") / "out.safetensors", **request)
        return Pair(base, output)

    return pair


def halves(path: Path, name: str) -> list[float]:
    """A tensor's numbers, of a file in half precision."""
    _, _, data = makers.read(path)[name]
    return list(struct.unpack(f"<{len(data) // 2}e", data))


# What holds.


@pytest.mark.parametrize("table", geometry_tables.names())
def test_every_family_holds(table: str, pairs: Callable[..., Pair]) -> None:
    pair = pairs(table)
    verified = check(pair.output, pair.base)
    assert (verified.path, verified.base, verified.hashed) == (pair.output, pair.base, True)
    assert verified.stamp.family == table.partition(".")[0]
    assert verified.weights == sum(group.total for group in verified.stamp.groups.values())
    if table == UNET:
        assert check(pair.output) == Verified(pair.output, verified.stamp, verified.weights, hashed=True, base=None)


KINDS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "all kinds of layers": ("sd35-medium.original-transformer", None, {"targets": ("ff", "attn", "attn2")}),
    "one kind": (DEMO, None, {"targets": ("ff",)}),
    "nothing pruned": (DEMO, None, {"ratio": 0}),
    "one group": (DEMO, None, {"ratio": None, "ratios": {"down": 0, "mid": 0.5, "up": 0}}),
    "nearly all pruned": (DEMO, None, {"ratio": 0.9999}),
    "some layers too small": (DIT, None, TOO_SMALL),
    "fp32": (DEMO, "F32", {}),
    "bf16": (DIT, "BF16", {}),
    "fp8": (DEMO, "F8_E4M3", {}),
    "cast to fp32": (DEMO, None, {"dtype": "fp32"}),
    "cast to fp16": (DEMO, "F32", {"dtype": "fp16"}),
    "cast to bf16": (DIT, "F32", {"dtype": "bf16"}),
    "cast to what it was": (DEMO, None, {"dtype": "fp16"}),
    "no hash": (DEMO, None, {"hashing": False}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_export_holds(kind: str, tmp_path: Path) -> None:
    table, dtype, request = KINDS[kind]
    base = makers.write(tmp_path / "base.safetensors", makers.tiny(table, dtype))
    output = bake(base, tmp_path / "out.safetensors", **request)
    verified = check(output, base)
    assert verified.hashed == request.get("hashing", True)
    assert verified.stamp.cast == {"fp32": "F32", "fp16": "F16", "bf16": "BF16", None: None}[request.get("dtype")]


def test_nonfinite_weights_hold(tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", nonfinite(makers.tiny(UNET)))
    output = bake(base, tmp_path / "out.safetensors", allow_nonfinite=True)
    assert check(output, base).stamp.groups["down"].nonfinite == 3
    assert refused(makers.said(output, {"crdiff.nonfinite.down": "2"}, tmp_path / "less")).endswith(
        "3 weights of down are not finite, crdiff.nonfinite.down is 2"
    )


def nonfinite(tensors: Made) -> Made:
    dtype, shape, data = tensors[TARGET]
    odd = b"\x00\x7e\x00\x7c\x00\xfc"  # NaN and both infinities
    return {**tensors, TARGET: (dtype, shape, odd + data[6:])}


def test_more_nonfinite_weights_than_the_ratio_leaves_hold(tmp_path: Path) -> None:
    tensors: Made = {
        name: (dtype, shape, b"\x00\x7e" * (len(data) // 2) if ".attn1." in name and dtype == "F16" else data)
        for name, (dtype, shape, data) in makers.tiny(UNET).items()
    }
    base = makers.write(tmp_path / "base.safetensors", tensors)
    output = bake(base, tmp_path / "out.safetensors", allow_nonfinite=True, ratio=0.95)
    assert check(output, base).stamp.groups["up"].threshold == float.fromhex("0x1.fffffep+127")


def test_chunks_may_end_anywhere(pairs: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK", 4096)
    monkeypatch.setattr(hashing, "PIECE", 1000)
    for pair in (pairs(DEMO), pairs(DIT, targets=("ff", "attn"))):
        assert check(pair.output, pair.base).hashed


def test_memory_does_not_grow_with_the_file(pairs: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK", 1 << 16)
    monkeypatch.setattr(hashing, "PIECE", 1 << 16)
    output = pairs("sdxl.original").output
    check(output)
    tracemalloc.start()
    try:
        check(output)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    header = 2_500 * 2_000  # bytes of Python objects for the header's tensors
    assert output.stat().st_size > 12_000_000
    assert peak < header + 10 * (1 << 16)


def test_stages_come_to_their_ends(pairs: Callable[..., Pair]) -> None:
    pair = pairs(DIT, **TOO_SMALL)  # layers without a threshold are not counted
    data = len(oracle.read(pair.output).data)
    progress = Recorder()
    verified = verify(pair.output, str(pair.base), progress)
    counted = sum(
        shape[0] * shape[1] * 2
        for name, (_, shape, _) in makers.read(pair.output).items()
        if ".x_block.mlp.fc" in name and name.endswith("weight")
    )
    assert [title for title, _ in progress.stages] == ["checking", "hashing", "counting", "comparing"]
    assert [size for _, size in progress.stages] == [counted, data, counted, data]
    assert progress.done == [size for _, size in progress.stages]
    assert counted < 2 * verified.weights


# Other places and shapes.


def in_shards(folder: Path) -> tuple[Path, Path, str]:
    makers.write_shards(folder / "base", makers.tiny("sd15.diffusers-unet"), 3)
    return folder / "base", folder / "base", "diffusion_pytorch_model.safetensors.index.json"


def in_shards_of_another_name(folder: Path) -> tuple[Path, Path, str]:
    return makers.write_shards(folder / "base", makers.tiny(DIT), 2, stem="model"), folder / "base", ""


def in_a_pipeline(folder: Path) -> tuple[Path, Path, str]:
    makers.write_shards(folder / "base" / "transformer", makers.tiny("flux-dev.diffusers-transformer"), 3)
    (folder / "base" / "model_index.json").write_text("{}")
    return folder / "base", folder / "base", ""


def in_a_pickle(folder: Path) -> tuple[Path, Path, str]:
    import torch

    loaded = {
        name: torch.frombuffer(bytearray(data), dtype=torch.float16).reshape(shape)
        for name, (_, shape, data) in makers.tiny("demo.original-unet", "F16").items()
    }
    torch.save(loaded, folder / "base.ckpt")
    return folder / "base.ckpt", folder / "base.ckpt", ""


@pytest.mark.parametrize("make", [in_shards, in_shards_of_another_name, in_a_pipeline, in_a_pickle])
def test_bases_of_other_shapes_hold(make: Callable[[Path], tuple[Path, Path, str]], tmp_path: Path) -> None:
    """By whatever name the base is given, and by the index of the output's shards, too."""
    base, other_name, index = make(tmp_path)
    output = bake(base, tmp_path / ("out" if other_name.is_dir() else "out.safetensors"))
    assert check(output, base).hashed
    assert check(output / index if index else output, other_name).hashed


def without_a_part(output: Path) -> None:
    (output / "scheduler/scheduler_config.json").unlink()


def with_another_part(output: Path) -> None:
    (output / "scheduler/scheduler_config.json").write_text('{"prediction_type": "epsilon"}')


def with_a_longer_part(output: Path) -> None:
    with (output / "scheduler/scheduler_config.json").open("a") as file:
        file.write(" ")


@pytest.mark.parametrize("change", [without_a_part, with_another_part, with_a_longer_part])
def test_the_other_parts_of_a_pipeline_are_the_bases(change: Callable[[Path], None], tmp_path: Path) -> None:
    base = in_a_pipeline(tmp_path)[0]
    (base / "scheduler").mkdir()
    (base / "scheduler/scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    output = bake(base, tmp_path / "out")
    (output / "notes.txt").write_text("what else is there is not compared")
    assert check(output, base).hashed
    change(output)
    with raises(VerifyError, "scheduler_config.json"):
        verify(output, str(base), Silent())


@pytest.mark.parametrize("count", [1, 2], ids=["whole", "shards"])
def test_variant_is_held_against_the_bases_same_variant(count: int, tmp_path: Path) -> None:
    home = tmp_path / "base" / "unet"
    home.mkdir(parents=True)
    for dtype, variant in (("F32", ""), ("F16", "fp16")):
        tensors = makers.tiny("demo.diffusers-unet", dtype)
        if count > 1:
            makers.write_shards(home, tensors, count, variant=variant)
        else:
            makers.write(home / f"diffusion_pytorch_model{variant and '.'}{variant}.safetensors", tensors)
    for name in ("fp16", None):
        output = bake(tmp_path / "base", tmp_path / str(name), variant=name)
        assert check(output, tmp_path / "base").hashed


def test_base_by_its_alias_holds(tmp_path: Path) -> None:
    output = export(ExportRequest("demo", SIZE, tmp_path / "out.safetensors")).written.path
    assert verify(output, "demo", Silent()).base == demo.path()


# Bytes that are not what they should be.


def test_weight_that_should_be_zero(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    pair = pairs()
    threshold = float.fromhex(makers.metadata_of(pair.output)["crdiff.threshold.down"])
    place = 2 * next(i for i, number in enumerate(halves(pair.output, TARGET)) if number)
    for number, count in ((threshold, 1), (-threshold, 1), (2.0**-24, 1), (-0.0, 1)):
        broken = changed(pair.output, TARGET, {place: struct.pack("<e", number)}, tmp_path / "broken")
        assert refused(broken) == f"{broken}: {TARGET!r} has {count} weights that should be zero"
    zeros = [2 * i for i, number in enumerate(halves(pair.output, TARGET)) if not number]
    broken = changed(pair.output, TARGET, dict.fromkeys(zeros[:3], b"\x00\x80"), tmp_path / "broken")
    assert refused(broken) == f"{broken}: {TARGET!r} has 3 weights that should be zero"


def test_row_slice_that_should_be_zero(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    pair = pairs("flux-dev.original-transformer", targets=("attn",), dtype="fp16")
    name = "single_blocks.7.linear1.weight"
    _, (_, columns), _ = makers.read(pair.output)[name]
    broken = changed(pair.output, name, {2 * columns * (columns + 1): b"\x01\x00"}, tmp_path / "broken")
    assert refused(broken) == f"{broken}: '{name}[{columns}:{2 * columns}]' has 1 weights that should be zero"
    rest = changed(pair.output, name, {2 * columns * 3 * columns: b"\x01\x00"}, tmp_path / "rest")
    assert "its bytes hash to" in refused(rest)  # rows that are no layer's


def test_zero_that_should_be_a_weight(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    pair = pairs()
    pruned = int(makers.metadata_of(pair.output)["crdiff.pruned.down"])
    numbers = halves(pair.output, TARGET)
    kept = next(i for i, number in enumerate(numbers) if number)
    less = changed(pair.output, TARGET, {2 * kept: b"\x00\x00"}, tmp_path / "more zeros")
    assert refused(less) == f"{less}: {pruned + 1} weights of down are zero, crdiff.pruned.down is {pruned}"
    more = changed(pair.output, TARGET, {2 * numbers.index(0.0): b"\x00\x3c"}, tmp_path / "fewer zeros")
    assert refused(more) == f"{more}: {pruned - 1} weights of down are zero, crdiff.pruned.down is {pruned}"


def test_byte_that_nothing_else_would_notice(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    pair = pairs()
    kept = next(i for i, number in enumerate(halves(pair.output, TARGET)) if abs(number) > 0.01)
    for name, place in ((OTHER, 2), (TARGET, 2 * kept)):
        last = makers.read(pair.output)[name][2][place : place + 1]
        broken = changed(pair.output, name, {place: bytes([last[0] ^ 1])}, tmp_path / "broken")
        assert refused(broken).startswith(f"{broken}: its bytes hash to 0x")
        assert refused(broken).endswith(f"its header says '{makers.metadata_of(broken)['modelspec.hash_sha256']}'")
        silent = makers.said(broken, {"modelspec.hash_sha256": None}, tmp_path / "silent")
        assert not check(silent).hashed
        assert refused(silent, pair.base) == f"{silent}: {name!r} at byte {place} is not what the base gives"


# Headers that are not what they should be.

HEADERS: dict[str, tuple[dict[str, str | None], str]] = {
    "total": ({"crdiff.total.mid": "1"}, "crdiff.total.mid is 1, the layers have 6400"),
    "pruned": ({"crdiff.pruned.mid": "7"}, "weights of mid are zero, crdiff.pruned.mid is 7"),
    "nonfinite": ({"crdiff.nonfinite.mid": "7"}, "0 weights of mid are not finite, crdiff.nonfinite.mid is 7"),
    "ratio 0": ({"crdiff.ratio.mid": "0.0"}, "the threshold of 'mid' does not go with its ratio"),
    "ratio higher": ({"crdiff.ratio.mid": "0.5"}, "weights of 'mid' are zero, crdiff.ratio.mid asks for 3200"),
    "no threshold": ({"crdiff.threshold.mid": "none"}, "the threshold of 'mid' does not go with its ratio"),
    "threshold higher": ({"crdiff.threshold.mid": "0x1.0p-1"}, "weights that should be zero"),
    "family": ({"crdiff.family": "sd21"}, "crdiff.family is for 'sd21', its layers are of 'sd15'"),
    "layout": ({"crdiff.layout": "diffusers"}, "crdiff.layout is for 'diffusers', its layers are of 'original'"),
    "prefix": ({"crdiff.prefix": ""}, "crdiff.prefix is for none, its layers are of 'model.diffusion_model.'"),
    "group": (
        {"crdiff.ratio.x": "0.3", "crdiff.pruned.x": "0", "crdiff.total.x": "0", "crdiff.threshold.x": "none"},
        "crdiff.ratio is for 'down, mid, up, x', its layers are of 'down, mid, up'",
    ),
    "fewer targets": ({"crdiff.targets": "attn"}, "crdiff.total.down is 16800, the layers have 4200"),
    "other targets": ({"crdiff.targets": "attn,x"}, "crdiff.targets is for 'attn, x', its layers are of 'attn'"),
    "their order": ({"crdiff.targets": "ff,attn"}, "crdiff.targets is for 'ff, attn', its layers are of 'attn, ff'"),
    "no targets": ({"crdiff.targets": ""}, "crdiff.targets is for '', its layers are of none"),
    "criterion": ({"crdiff.criterion": "taylor"}, "ranked by 'taylor', which is not known here"),
    "method": (
        {"crdiff.method": "layer-wise", "crdiff.thresholds": '["none"]'}, "crdiff.method is not that of SD1.5"
    ),
    "hash": ({"modelspec.hash_sha256": "0x12"}, "its header says '0x12'"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_header_that_does_not_hold(case: str, pairs: Callable[..., Pair], tmp_path: Path) -> None:
    changes, message = HEADERS[case]
    broken = makers.said(pairs().output, changes, tmp_path / "broken")
    assert re.fullmatch(f"{re.escape(str(broken))}: .*{re.escape(message)}", refused(broken))


def test_header_that_only_the_base_can_disprove(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    pair = pairs()
    keys = makers.metadata_of(pair.output)
    lower = (float.fromhex(keys["crdiff.threshold.mid"]) / 2).hex()
    for key, text, message in (
        ("crdiff.threshold.mid", lower, "the file has"),
        ("crdiff.ratio.mid", "0.2", "gives 'mid' the threshold"),
        ("crdiff.source.hash_sha256", "0x" + "ab" * 32, f"of broken is 0x{'ab' * 32}"),
        ("crdiff.cast", "F32", "its tensors are not those of"),
    ):
        broken = makers.said(pair.output, {key: text}, tmp_path / "broken")
        assert check(broken).hashed
        assert message in refused(broken, pair.base)


def test_thresholds_of_layers_that_do_not_hold(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    pair = pairs(DIT)
    values = json.loads(makers.metadata_of(pair.output)["crdiff.thresholds"])
    layer = "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"
    for thresholds, message in (
        (values[:-1], "crdiff.thresholds has 47 values for 48 layers"),
        ([*values, "none"], "crdiff.thresholds has 49 values for 48 layers"),
        (["none", *values[1:]], f"the threshold of {layer!r} does not go with its ratio"),
        (["0x1.0p+0", *values[1:]], "weights that should be zero"),
    ):
        broken = makers.said(pair.output, {"crdiff.thresholds": json.dumps(thresholds)}, tmp_path / "broken")
        assert refused(broken).endswith(message)
    lower = [(float.fromhex(values[0]) / 2).hex(), *values[1:]]
    broken = makers.said(pair.output, {"crdiff.thresholds": json.dumps(lower)}, tmp_path / "broken")
    assert check(broken).hashed
    assert refused(broken, pair.base).startswith(f"{pair.base}: gives {layer!r} the threshold ")


def test_layer_with_fewer_zeros_than_its_ratio_asks_for(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    """Even where the group's count holds: one layer's zero has become another's."""
    pair = pairs(DIT, dtype="fp32")
    one, other = (f"model.diffusion_model.joint_blocks.{i}.x_block.mlp.fc1.weight" for i in (0, 1))
    numbers = {name: struct.unpack(f"<{24 * 96}f", makers.read(pair.output)[name][2]) for name in (one, other)}
    kept = next(i for i, number in enumerate(numbers[other]) if number)
    broken = changed(pair.output, one, {4 * numbers[one].index(0.0): struct.pack("<f", 9)}, tmp_path / "first")
    broken = changed(broken, other, {4 * kept: bytes(4)}, tmp_path / "broken")
    wanted = int(24 * 96 * 0.3)
    assert refused(broken) == (
        f"{broken}: {wanted - 1} weights of {one!r} are zero, crdiff.ratio.blocks asks for {wanted}"
    )


LAST_SHARD = "diffusion_pytorch_model-00002-of-00002.safetensors"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A base of two shards."""
    makers.write_shards(tmp_path / "base", makers.tiny("demo.diffusers-unet"), 2)
    return tmp_path / "base"


def test_shard_of_another_export(shards: Path, tmp_path: Path) -> None:
    first, second = bake(shards, tmp_path / "first"), bake(shards, tmp_path / "second", ratio=0.2)
    shutil.copy(second / LAST_SHARD, first / LAST_SHARD)
    assert refused(first).startswith(f"{first / LAST_SHARD}: ")


def test_shard_without_the_others_hash(shards: Path, tmp_path: Path) -> None:
    output = bake(shards, tmp_path / "out")
    shard, other = output / LAST_SHARD, makers.metadata_of(next(output.glob("*1-of*")))["modelspec.hash_sha256"]
    makers.said(shard, {"modelspec.hash_sha256": None}, shard)
    assert refused(output).endswith("its header says 'nothing'")
    makers.said(shard, {"modelspec.hash_sha256": other}, shard)
    assert refused(output).startswith(f"{shard}: its bytes hash to")


def test_shard_that_the_base_does_not_give(shards: Path, tmp_path: Path) -> None:
    output = bake(shards, tmp_path / "out", hashing=False)
    shard = output / LAST_SHARD
    name = next(name for name in makers.read(shard) if name.endswith("norm1.bias"))
    changed(shard, name, {0: b"\x01\x02"}, shard)
    assert not check(output).hashed
    assert refused(output, shards) == f"{shard}: {name!r} at byte 0 is not what the base gives"


def hollow(path: Path, to: Path) -> Path:
    """A copy of a file's header with a hole for its weights."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    with to.open("wb") as file:
        file.write(raw[: 8 + length])
        file.truncate(len(raw))
    return to


def test_file_that_is_mostly_a_hole(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    output = pairs("sdxl.original").output
    message = refused(hollow(output, tmp_path / "hole"))
    assert message.endswith("its header holds, but its weights cannot be checked: the file is mostly a hole")
    broken = makers.said(output, {"crdiff.total.down": "1"}, tmp_path / "broken")
    assert "crdiff.total.down is 1" in refused(hollow(broken, tmp_path / "hole"))  # the header comes first


# Bases that are not the file's.


def test_base_with_other_weights(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    other = makers.write(tmp_path / "other.safetensors", makers.tiny(UNET, seed=1))
    threshold = float.fromhex(makers.metadata_of(pairs().output)["crdiff.threshold.down"])
    message = refused(pairs().output, other)
    assert message.startswith(f"{other}: gives 'down' the threshold ")
    assert message.endswith(f", the file has {threshold}")


def test_base_that_differs_in_a_tensor_that_is_no_target(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    other = changed(pairs().base, OTHER, {6: b"\x12\x34"}, tmp_path / "other.safetensors")
    assert refused(pairs().output, other) == f"{pairs().output}: {OTHER!r} at byte 6 is not what the base gives"


def test_base_that_differs_in_a_weight_that_is_pruned(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    """The output would be the same, and still it is not the base that the header names."""
    numbers, dense = halves(pairs().output, TARGET), halves(pairs().base, TARGET)
    place = next(i for i, number in enumerate(numbers) if not number and abs(dense[i]) > 0.001)
    other = changed(pairs().base, TARGET, {2 * place: struct.pack("<e", -dense[place])}, tmp_path / "other.safetensors")
    assert refused(pairs().output, other).startswith(f"{other}: its bytes hash to 0x")
    silent = makers.said(pairs().output, {"crdiff.source.hash_sha256": None}, tmp_path / "silent")
    assert check(silent, other).hashed


BASES: dict[str, tuple[Callable[[], Made] | None, str]] = {
    "family": (lambda: makers.tiny("demo.original-unet"), "demo (original), the file is sd15 (original)"),
    "layout": (lambda: makers.tiny("sd15.diffusers-unet"), "the threshold"),
    "dtype": (lambda: makers.tiny(UNET, "F32"), "its tensors are not those of"),
    "prefix": (lambda: behind("net."), "its tensors are not those of"),
    "order": (lambda: dict(reversed(makers.tiny(UNET).items())), "its tensors are not those of"),
    "one tensor more": (lambda: {**makers.tiny(UNET), "v_pred": ("F16", (0,), b"")}, "its tensors are not those of"),
    "shards": (None, "has 1 files, the base 2"),
    "hole": (None, "its weights cannot be checked: the file is mostly a hole"),
}


def behind(prefix: str) -> Made:
    old = "model.diffusion_model."
    return {
        prefix + name.removeprefix(old) if name.startswith(old) else name: tensor
        for name, tensor in makers.tiny(UNET).items()
    }


@pytest.mark.parametrize("case", BASES)
def test_base_of_another_shape(case: str, pairs: Callable[..., Pair], tmp_path: Path) -> None:
    make, message = BASES[case]
    base = tmp_path / "base.safetensors"
    if make:
        makers.write(base, make())
    elif case == "shards":
        base = makers.write_shards(tmp_path / "base", makers.tiny(UNET), 2)
    else:
        makers.write_sparse(base, UNET)
    assert message in refused(pairs().output, base)


def test_a_base_of_another_shape_is_refused_before_a_weight_is_read(
    pairs: Callable[..., Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: tensor for name, tensor in makers.read(pairs().base).items() if name != OTHER}
    other = makers.write(tmp_path / "other.safetensors", tensors)
    monkeypatch.setattr("crdiff_export.verify.verify._check_weights", lambda *_: pytest.fail("read weights"))
    with pytest.raises(VerifyError):
        verify(pairs().output, str(other), Silent())


def test_base_without_the_variant_or_the_shards(tmp_path: Path) -> None:
    tensors = makers.tiny("demo.diffusers-unet", "F16")
    for name, variant in (("half", "fp16"), ("plain", "")):
        makers.write_shards(tmp_path / name, tensors, 2, variant=variant)
    output = bake(tmp_path / "half", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no 'fp16' variant of the weights"):
        check(output, tmp_path / "plain")
    whole = makers.write(tmp_path / "whole.safetensors", tensors)
    assert refused(output, whole) == f"{output}: has 2 files, the base 1"


# What is no file of ours.


def test_file_that_lost_a_layer(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    tensors = makers.read(pairs().output)
    del tensors[TARGET]
    with pytest.raises(FamilyError):
        check(makers.write(tmp_path / "lost", tensors, makers.metadata_of(pairs().output)))


def test_accelerator_that_is_not_there(pairs: Callable[..., Pair]) -> None:
    assert verify(pairs().output, None, Silent(), device="nowhere").hashed  # the CPU does what needs no base
    with pytest.raises(CrdiffError, match="nowhere"):
        verify(pairs().output, str(pairs().base), Silent(), device="nowhere")
