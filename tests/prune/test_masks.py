"""Pruning by masks while weights stream past: against NumPy, whatever the chunks, dtypes, parts and neighbours are."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from crdiff_export import ExportRequest, Size
from crdiff_export.bake.stream import Pruning, Stream
from crdiff_export.export import plan_variant
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.progress import Silent
from crdiff_export.prune import CriterionChoice, Decision, Kernel, Mask, Plan, Threshold
from crdiff_export.prune.kernels.cpu import CpuKernel
from crdiff_export.prune.kernels.device import DeviceKernel
from crdiff_export.prune.kernels.pick import pick, zeros
from crdiff_export.prune.ranking import rank
from tests.support import makers, oracle

DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@pytest.fixture(params=["cpu", "torch"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return CpuKernel(1) if request.param == "cpu" else DeviceKernel("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_what_is_marked_is_taken_out_in_order(dtype: str, offset: int) -> None:
    rng = np.random.default_rng(5)
    size = makers.SIZES[dtype]
    values = rng.integers(0, 1 << 8 * size, 999, np.uint64).astype(f"u{size}")
    values[3:5] = 0, 1 << (8 * size - 1)  # -0.0 is no +0.0
    weights = memoryview(bytearray(offset) + values.tobytes())[offset:]
    assert zeros(weights, dtype) == np.count_nonzero(values == 0)
    for share in (0, 0.4, 1):
        gone = rng.random(999) < share
        into = memoryview(bytearray(999 * size))
        taken = pick(weights, dtype, gone, into)
        assert bytes(into[:taken]) == values[gone].tobytes()


# The stream.


def base(folder: Path, table: str, dtypes: tuple[str, ...], seed: int = 0) -> Path:
    """A narrow base whose tensors have these dtypes in turn, and lie on odd places."""
    made: dict[str, tuple[str, makers.Shape, bytes]] = {"odd": ("U8", (3,), b"abc")}
    for (name, (_, shape)), dtype in zip(makers.narrow(table).items(), itertools.cycle(dtypes)):
        made[name] = dtype, shape, makers.weights(name, dtype, shape, seed)
    return makers.write(folder / "base.safetensors", made)


def planned(path: Path, cast: str | None = None, ratio: float = 0.3, *, dit: bool = False) -> Plan:
    kinds = ("ff", "attn") if dit else None
    request = ExportRequest(str(path), Size(512, 512), ratio=ratio, targets=kinds, dtype=cast)
    return plan_variant(request, open_checkpoint(path))


def decided(plan: Plan, seed: int, moved: bool = False) -> Decision:
    """Random masks for all targets, and for some of them other weights."""
    rng = np.random.default_rng(seed)
    masks: list[Mask] = []
    weights = {}
    for number, target in enumerate(plan.targets):
        gone = rng.random(target.count) < 0.4
        masks.append(Mask.pack(gone))
        if moved and number % 2:
            bits = rng.integers(1, 255, target.count * target.output.itemsize, np.uint8).view(
                f"u{target.output.itemsize}"
            )
            bits[gone] = 0
            weights[number] = bits
    return Decision(tuple(Threshold(None, 0, scope.count) for scope in plan.scopes), tuple(masks), weights)


def dense(plan: Plan) -> bytearray:
    """The output's data without pruning."""
    source = oracle.read(plan.checkpoint.path)
    if plan.cast is None:
        return bytearray(source.data)
    from crdiff_export.prune.kernels.cast import cast

    data = bytearray(plan.outputs[0].data_size)
    content = source.tensors()
    for tensor in plan.outputs[0].tensors:
        dtype, _, raw = content[tensor.name]
        data[tensor.start : tensor.end] = raw if dtype == tensor.dtype else cast(memoryview(raw), dtype, tensor.dtype)
    return data


def pruned(plan: Plan, decision: Decision) -> tuple[bytes, bytes]:
    """The output's data, and what is taken out of it, by NumPy: targets by the place of their bytes."""
    data, removed = dense(plan), []
    assert decision.masks is not None
    for number, target in sorted(enumerate(plan.targets), key=lambda one: one[1].span(one[1].output)):
        start, stop = target.span(target.output)
        bits = np.frombuffer(data[start:stop], f"u{target.output.itemsize}").copy()
        mask = decision.masks[number]
        assert mask
        gone = np.unpackbits(mask.bits, bitorder="little")[: target.count].astype(bool)
        removed.append(bits[gone].tobytes())
        bits = decision.moved.get(number, np.where(gone, 0, bits).astype(bits.dtype))
        data[start:stop] = bits.tobytes()
    return bytes(data), b"".join(removed)


def streamed(prunings: list[Pruning], kernel: Kernel, chunk: int) -> Iterator[tuple[bytes, bytes]]:
    """The data and what was taken out of each variant."""
    found = [(bytearray(), bytearray()) for _ in prunings]
    for part in Stream(prunings, 0, kernel, chunk=chunk).chunks():
        assert part.start == len(found[part.variant][0])
        found[part.variant][0].extend(part.data)
        found[part.variant][1].extend(part.pruned)
    return ((bytes(data), bytes(removed)) for data, removed in found)


def check(plan: Plan, kernel: Kernel, chunk: int) -> None:
    """Assert that masks, and moved weights from the same reading, leave the stream as they leave NumPy."""
    masked, moved = decided(plan, 1), decided(plan, 2, moved=True)
    first, second = streamed([Pruning(plan, masked, keep=True), Pruning(plan, moved)], kernel, chunk)
    assert first == pruned(plan, masked)
    assert second[0] == pruned(plan, moved)[0]


@pytest.mark.parametrize(
    ("table", "dtypes", "cast", "chunk", "kernel"),
    [
        ("demo.original-unet", ("F16",), None, 4099, "cpu"),
        ("demo.original-unet", ("F16",), None, 1 << 20, "torch"),
        *(
            ("demo.original-unet", ("F32", "F16", "BF16"), cast, 4099, kernel)
            for cast, kernel in (("fp16", "torch"), ("bf16", "cpu"), ("fp32", "cpu"))
        ),
        ("demo.diffusers-unet", ("F32", "BF16", "F8_E5M2"), None, 12288, "cpu"),
        ("sd3-medium.original-transformer", ("F16", "F32"), None, 4099, "cpu"),
        ("flux-dev.original-transformer", ("BF16",), None, 4099, "torch"),
        ("flux-dev.diffusers-transformer", ("F8_E4M3", "F16"), None, 4099, "cpu"),
    ],
    indirect=["kernel"],
)
def test_chunks_end_anywhere(
    table: str, dtypes: tuple[str, ...], cast: str | None, chunk: int, tmp_path: Path, kernel: Kernel
) -> None:
    """Within a weight, within a byte of its mask, within a part of a fused tensor; a cast comes first."""
    check(planned(base(tmp_path, table, dtypes), cast, dit="transformer" in table), kernel, chunk)


@pytest.mark.parametrize("chunk", [5, 129])
def test_chunks_that_are_hardly_larger_than_a_weight(chunk: int, tmp_path: Path) -> None:
    made: dict[str, tuple[str, makers.Shape, bytes]] = {"odd": ("U8", (3,), b"abc")}
    for (name, (_, shape)), dtype in zip(
        makers.narrow("demo.original-unet", 32).items(), itertools.cycle(("F32", "F16"))
    ):
        if "transformer_blocks" in name:
            made[name] = dtype, shape, makers.weights(name, dtype, shape)
        else:  # what is never pruned would take most of the time
            made[name] = "U8", shape[:1] + (1,) * (len(shape) - 1), bytes(shape[0])
    check(planned(makers.write(tmp_path / "base.safetensors", made)), CpuKernel(1), chunk)


@pytest.mark.parametrize(("chunk", "kernel"), [(4099, "cpu"), (1 << 20, "torch")], indirect=["kernel"])
def test_variants_of_every_kind_come_from_one_reading(chunk: int, tmp_path: Path, kernel: Kernel) -> None:
    """Thresholds, masks, moved weights, another set of masks, and one that leaves everything."""
    path = base(tmp_path, "demo.original-unet", ("F16",))
    plan, nothing = planned(path), planned(path, ratio=0)
    by_threshold = rank(CriterionChoice.of("magnitude", None), [plan], kernel, Silent()).decide(plan)
    left = Decision(tuple(Threshold(None, 0, scope.count) for scope in nothing.scopes), (None,) * len(nothing.targets))
    decisions = [by_threshold, decided(plan, 4), decided(plan, 5, moved=True), left, decided(plan, 6)]
    plans = [plan, plan, plan, nothing, plan]
    prunings = [Pruning(p, d, keep=not d.moved) for p, d in zip(plans, decisions, strict=True)]
    found = list(streamed(prunings, kernel, chunk))
    for number in (1, 4):
        assert found[number] == pruned(plan, decisions[number])
    assert found[2][0] == pruned(plan, decisions[2])[0]
    assert found[3] == (bytes(dense(plan)), b"")
    expected = oracle.expect([makers.read(path)], dict.fromkeys(("down", "mid", "up"), 0.3), ("attn", "ff"))
    at = {entry.name: entry for entry in oracle.read(path).entries}
    for name, data in expected.files[0].items():
        assert found[0][0][at[name].start : at[name].stop] == data, name
