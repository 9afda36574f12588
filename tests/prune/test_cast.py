"""`--dtype`: every cast as torch does it, the layout that follows from it, and thresholds on what is written."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import PlanError
from crdiff_export.prune import TooWideError
from crdiff_export.prune.criteria import magnitude
from crdiff_export.prune.kernels.cast import cast, nonfinite
from tests.support import makers, oracle
from tests.support.makers import Shape, Tensors
from tests.support.messages import raises

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
CASTS = [(source, target) for source in TORCH for target in NAMES.values() if source != target]
RATIOS = {"down": 0.2, "mid": 0.5, "up": 0.7}
DEMO = "demo.diffusers-unet"


def by_torch(data: bytes, source: str, target: str) -> bytes:
    """The cast as `tensor.to()` does it."""
    if not data:
        return b""
    tensor = torch.frombuffer(bytearray(data), dtype=TORCH[source]).to(TORCH[target])
    return tensor.view(torch.uint8).numpy().tobytes()


def assert_like_torch(data: bytes, source: str, target: str) -> None:
    """The same bits for every number; NaN stays NaN."""
    ours = bytes(cast(memoryview(data), source, target))
    theirs = by_torch(data, source, target)
    kind = f"<u{oracle.FORMATS[target].size}"
    numbers = ~np.isnan(oracle.decode(source, data))
    assert np.array_equal(np.frombuffer(ours, kind)[numbers], np.frombuffer(theirs, kind)[numbers])
    assert np.isnan(oracle.decode(target, ours)[~numbers]).all()
    assert nonfinite(ours, target) == int((~np.isfinite(oracle.decode(target, theirs))).sum())


def narrow_patterns(dtype: str) -> bytes:
    """Every number of a format of at most 16 bits."""
    size = oracle.FORMATS[dtype].size
    return np.arange(1 << 8 * size, dtype=np.uint32).astype(f"<u{size}").tobytes()


def wide_patterns(dtype: str) -> bytes:
    """Numbers around every number of the narrower formats and half way between each two, and random ones."""
    kind = {"F32": np.float32, "F64": np.float64}[dtype]
    whole = {"F32": np.uint32, "F64": np.uint64}[dtype]
    steps = [np.sort(oracle.decode(target, narrow_patterns(target))) for target in ("F16", "BF16")]
    with np.errstate(over="ignore", invalid="ignore"):
        grid = np.concatenate([np.concatenate([s, (s[:-1] + s[1:]) / 2]) for s in steps]).astype(kind)
    bits = grid.view(whole)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 14, np.uint32)
    tiny = np.arange(4096, dtype=np.uint32)
    if dtype == "F64":
        # Also those that lie just beside a float32, where rounding twice shows.
        with np.errstate(invalid="ignore"):
            beside = np.concatenate([random, tiny]).view(np.float32).astype(np.float64).view(whole)
        bits = np.concatenate([bits, beside - whole(1), beside, beside + whole(1)])
    else:
        bits = np.concatenate([bits, random, tiny])
    return np.concatenate([bits - whole(1), bits, bits + whole(1)]).tobytes()


@pytest.mark.parametrize(("source", "target"), CASTS, ids=lambda x: x)
def test_a_cast_is_what_torch_does(source: str, target: str) -> None:
    data = wide_patterns(source) if source in ("F64", "F32") else narrow_patterns(source)
    assert_like_torch(data, source, target)


@settings(max_examples=200)
@given(
    number=st.tuples(st.just("<f8"), st.floats(allow_nan=False, width=64))
    | st.tuples(st.just("<f4"), st.floats(allow_nan=False, width=32)),
    target=st.sampled_from(list(NAMES.values())),
)
def test_any_number(number: tuple[str, float], target: str) -> None:
    kind, value = number
    assert_like_torch(np.array([value], kind).tobytes(), "F64" if kind == "<f8" else "F32", target)


# Whole files


def demo(dtype: str, seed: int = 0) -> dict[str, tuple[str, Shape, bytes]]:
    """The demo UNet, all floats in `dtype`, with other tensors of odd lengths between them."""
    made: dict[str, tuple[str, Shape, bytes]] = {}
    for number, (name, (own, shape)) in enumerate(makers.narrow(DEMO, 4).items()):
        made[f"odd.{number}"] = "U8", (number % 3 + 1,), bytes(range(number % 3 + 1))
        made[f"flag.{number}"] = "BOOL", (), b"\x01"
        made[f"empty.{number}"] = dtype, (0,), b""
        made[name] = dtype if own in oracle.FORMATS else own, shape, makers.weights(name, dtype, shape, seed)
    made["ids"] = "I64", (3,), np.array([1, -1, 1 << 60], "<i8").tobytes()
    made["wide"] = "F64", (3,), np.array([0.1, -1e-9, 3.0], "<f8").tobytes()
    return made


def cast_all(tensors: Tensors, target: str) -> dict[str, tuple[str, Shape, bytes]]:
    """What should be pruned: every float cast by torch."""
    return {
        name: (target, shape, by_torch(data, dtype, target)) if dtype in oracle.FORMATS else (dtype, shape, data)
        for name, (dtype, shape, data) in tensors.items()
    }


def bake(folder: Path, tensors: Tensors, dtype: str, ratios: Mapping[str, float] = RATIOS, **asked: object) -> Path:
    base = makers.write(folder / "base.safetensors", tensors, {"modelspec.title": "x"})
    output = folder / "out.safetensors"
    request = ExportRequest(str(base), Size(512, 512), output, dtype=dtype, ratios=ratios, force=True, **asked)  # type: ignore[arg-type]
    export(request)
    return output


def hold(base: Tensors, output: Path, target: str, ratios: Mapping[str, float] = RATIOS) -> None:
    """Assert that a cast file is the pruned cast of its base, without holes, in the base's order."""
    wanted = cast_all(base, target)
    expected = oracle.expect([wanted], ratios, ("attn", "ff"))
    baked = oracle.read(output)
    assert [entry.name for entry in baked.entries] == list(base)
    position = 0
    for entry in baked.entries:
        dtype, shape, data = wanted[entry.name]
        assert (entry.dtype, entry.shape, entry.start, entry.stop) == (dtype, shape, position, position + len(data))
        assert baked.data[entry.start : entry.stop] == expected.files[0][entry.name], entry.name
        position = entry.stop
    assert len(baked.data) == position
    oracle.hold_numbers(baked.metadata, expected)


@pytest.mark.parametrize("asked", NAMES)
def test_a_cast_of_all_dtypes(asked: str, tmp_path: Path) -> None:
    tensors: dict[str, tuple[str, Shape, bytes]] = {}
    by_dtype = {dtype: demo(dtype) for dtype in TORCH}
    for number, name in enumerate(by_dtype["F32"]):
        tensors[name] = by_dtype[list(TORCH)[number % len(TORCH)]][name]
    output = bake(tmp_path, tensors, asked)
    hold(tensors, output, NAMES[asked])
    said = oracle.read(output).metadata
    assert said["crdiff.cast"] == NAMES[asked]
    assert said["crdiff.source.hash_sha256"] == oracle.sha256(tmp_path / "base.safetensors")
    assert said["modelspec.hash_sha256"] == oracle.sha256(output)


def test_a_cast_to_the_same_dtype_changes_nothing(tmp_path: Path) -> None:
    tensors = demo("F16")
    del tensors["wide"]
    cast_to_it = bake(tmp_path, tensors, "fp16").read_bytes()
    output = tmp_path / "plain.safetensors"
    export(ExportRequest(str(tmp_path / "base.safetensors"), Size(512, 512), output, ratios=RATIOS))
    assert oracle.read(output).data == cast_to_it[-len(oracle.read(output).data) :]


@pytest.mark.parametrize("chunk", [1, 64])
def test_doubles_are_counted_in_any_pieces(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magnitude, "CHUNK", chunk * 64)
    tensors = demo("F64")
    hold(tensors, bake(tmp_path, tensors, "fp16"), "F16")


TARGET = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def test_a_number_too_large_is_refused_by_name(tmp_path: Path) -> None:
    for name, ratio in (("conv_in.bias", 0.3), (TARGET, 0.3), (TARGET, 0.0), ("wide", 0.3)):
        with raises(PlanError, name):
            bake(tmp_path, too_large(name), "fp16", dict.fromkeys(RATIOS, ratio))
        assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", ["conv_in.bias", TARGET], ids=["elsewhere", "target"])
def test_a_number_too_large_is_infinite_where_that_is_allowed(name: str, tmp_path: Path) -> None:
    tensors = too_large(name)
    hold(tensors, bake(tmp_path, tensors, "fp16", allow_nonfinite=True), "F16")


def too_large(name: str) -> dict[str, tuple[str, Shape, bytes]]:
    """A file that fits fp16 but for one number: the first that rounds to infinity."""
    tensors = demo("F32")
    dtype, shape, data = tensors[name]
    values = np.frombuffer(data, {"F32": "<f4", "F64": "<f8"}[dtype]).copy()
    values[-1] = -65520.0
    tensors[name] = dtype, shape, values.tobytes()
    return tensors


def test_the_last_numbers_that_fit(tmp_path: Path) -> None:
    tensors = demo("F32")
    dtype, shape, data = tensors[TARGET]
    values = np.resize(np.array([65519.0, -65519.0, 2.0**-25, -(2.0**-24)], "<f4"), len(data) // 4)
    tensors[TARGET] = dtype, shape, values.tobytes()
    hold(tensors, bake(tmp_path, tensors, "fp16"), "F16")


def test_infinities_and_nan_of_the_source_stay_where_they_are_no_targets(tmp_path: Path) -> None:
    tensors = demo("F32")
    dtype, shape, data = tensors["conv_in.bias"]
    values = np.resize(np.array([np.inf, -np.inf, 1.0], "<f4"), len(data) // 4)
    tensors["conv_in.bias"] = dtype, shape, values.tobytes()
    hold(tensors, bake(tmp_path, tensors, "fp16"), "F16")


def test_doubles_are_pruned_only_with_a_cast(tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", demo("F64"))
    with raises(TooWideError, "F64"):
        export(ExportRequest(str(base), Size(512, 512), tmp_path / "out.safetensors"))
