"""An export's bytes, thresholds and counts against the oracle, for every model and dtype and for hostile content."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import PlanError
from crdiff_export.models.families import by_id
from tests.support import geometry_tables, makers, oracle
from tests.support.hostile_weights import (
    DEMO,
    DIT_RATIOS,
    DTYPES,
    FILLS,
    UNET_RATIOS,
    Fill,
    anything,
    between,
    default_kinds,
    demo,
    is_dit,
    patterns,
    spoil,
    ties,
    zeros,
)
from tests.support.makers import Shape, Tensors
from tests.support.messages import raises

# The parts of the public code that say what it prunes (lib/prune_unet.py, lib/prune_dit.py).
REFERENCE_GROUPS = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}
REFERENCE_TAILS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")


def bake(base: Path, ratios: Mapping[str, float], **asked: object) -> Path:
    output = base.with_name("out.safetensors")
    request = ExportRequest(str(base), Size(512, 512), output, ratios=ratios, force=True, **asked)  # type: ignore[arg-type]
    export(request)
    return output


def check(
    folder: Path,
    tensors: Tensors,
    ratios: Mapping[str, float] = UNET_RATIOS,
    kinds: Sequence[str] = ("attn", "ff"),
    **asked: object,
) -> Path:
    """Bake a base and compare the file with the oracle."""
    base = makers.write(folder / "base.safetensors", tensors)
    output = bake(base, ratios, **asked)
    oracle.hold(base, output, oracle.expect([tensors], ratios, kinds, dit="blocks" in ratios))
    return output


def ratios_of(table: str) -> dict[str, float]:
    groups = by_id(table.partition(".")[0]).groups
    return {group: ratio for group, ratio in (DIT_RATIOS | UNET_RATIOS).items() if group in groups}


# Families with the blocks of another one; tests/models/test_families.py compares their targets with diffusers' modules.
ALIKE = (
    "sd21.", "sd35-large.", "flux-schnell.", "flux-2-klein-", "sana-600m.", "sana-4800m.", "cosmos2-14b."
)  # fmt: skip
# Every other model in one dtype; the other pairs are slow.
MODELS = [
    pytest.param(
        table, dtype,
        marks=() if number % len(DTYPES) == turn and not table.startswith(ALIKE) else pytest.mark.slow,
    )
    for number, table in enumerate(geometry_tables.names())
    for turn, dtype in enumerate(DTYPES)
]  # fmt: skip


@pytest.mark.parametrize(("table", "dtype"), MODELS)
def test_every_model_in_every_dtype(table: str, dtype: str, tmp_path: Path) -> None:
    said = oracle.read(check(tmp_path, makers.tiny(table, dtype), ratios_of(table), default_kinds(table))).metadata
    assert all(int(said[f"crdiff.pruned.{group}"]) for group in ratios_of(table))


@pytest.mark.parametrize(
    ("table", "dtype"),
    [("demo.diffusers-unet", "F32"), ("sd15.diffusers-unet", "F16"), ("sd35-medium.diffusers-transformer", "BF16")],
)
def test_the_public_code_gives_the_same_but_for_the_sign_of_zero(table: str, dtype: str, tmp_path: Path) -> None:
    tensors, ratios = makers.tiny(table, dtype), ratios_of(table)
    baked = makers.read(bake(makers.write(tmp_path / "base.safetensors", tensors), ratios))
    reference = prune_dit(tensors, 0.37) if is_dit(table) else prune_unet(tensors, ratios)
    assert baked.keys() == tensors.keys()
    for name, (_, _, data) in baked.items():
        if name not in reference:
            assert data == tensors[name][2], name
            continue
        theirs = bits(reference[name])
        negative_zero = theirs == theirs.dtype.type(1 << (theirs.itemsize * 8 - 1))
        assert data == np.where(negative_zero, 0, theirs).astype(theirs.dtype).tobytes(), name


def as_torch(tensors: Tensors, name: str) -> torch.Tensor:
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    dtype, shape, data = tensors[name]
    return torch.frombuffer(bytearray(data), dtype=kinds[dtype]).reshape(shape)


def bits(tensor: torch.Tensor) -> NDArray[np.unsignedinteger]:
    found: NDArray[np.unsignedinteger] = tensor.view(torch.uint8).numpy().view(f"<u{tensor.element_size()}")
    return found.reshape(-1)


def prune_unet(tensors: Tensors, ratios: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """`prune_by_ratio` of the public code: one kthvalue over all of a group, then a product with the mask."""
    pruned: dict[str, torch.Tensor] = {}
    for start, group in REFERENCE_GROUPS.items():
        layers = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
        layers = [n for n in layers if n.startswith(start) and ("attn" in n or "ff" in n) and "attn2" not in n]
        own = {f"{n}.weight": as_torch(tensors, f"{n}.weight") for n in layers}
        every = torch.cat([w.abs().flatten() for w in own.values()])
        threshold = torch.kthvalue(every, int(every.numel() * ratios[group])).values
        pruned |= {name: w.mul_(w.abs() > threshold) for name, w in own.items()}
    return pruned


def prune_dit(tensors: Tensors, ratio: float) -> dict[str, torch.Tensor]:
    """`prune_magnitude` of the public code: a kthvalue for each layer."""
    pruned = {}
    for name in tensors:
        layer = name.removesuffix(".weight")
        if layer == name or not layer.endswith(REFERENCE_TAILS):
            continue
        weight = as_torch(tensors, name)
        threshold = torch.kthvalue(weight.abs().flatten(), int(weight.numel() * ratio)).values
        pruned[name] = weight.mul_(weight.abs() > threshold)
    return pruned


# Hostile content


CONTENTS = [
    (fill, dtypes)
    for turn, fill in enumerate(FILLS)
    for dtypes in (["F32"], [DTYPES[1 + turn % 4]], [*DTYPES[turn % 5 :], *DTYPES[: turn % 5]])
]


@pytest.mark.parametrize(("fill", "dtypes"), CONTENTS, ids=lambda x: "+".join(x) if isinstance(x, list) else x.__name__)
def test_hostile_weights(fill: Fill, dtypes: Sequence[str], tmp_path: Path) -> None:
    check(tmp_path, demo(fill, dtypes))


def counts(tensors: Tensors) -> dict[str, int]:
    return oracle.expect([tensors], dict.fromkeys(UNET_RATIOS, 0.0), ("attn", "ff")).total


# Of each group's count n: the ratio, and the k that it must give.
RANKS: Mapping[str, tuple[Callable[[int], float], Callable[[int], int]]] = {
    "zero": (lambda n: 0.0, lambda n: 0),
    "a-half": (lambda n: 0.5 / n, lambda n: 0),
    "just-below-one": (lambda n: float(np.nextafter(1 / n, 0)), lambda n: int(n * float(np.nextafter(1 / n, 0)))),
    "one": (lambda n: 1.0 / n, lambda n: int(n * (1.0 / n))),
    "one-and-a-half": (lambda n: 1.5 / n, lambda n: 1),
    "most": (lambda n: 0.999, lambda n: int(n * 0.999)),
    "all-but-one": (lambda n: float(np.nextafter(1.0, 0)), lambda n: n - 1),
}


@pytest.mark.parametrize(("turn", "rank"), list(enumerate(RANKS)))
def test_extreme_ratios(turn: int, rank: str, tmp_path: Path) -> None:
    tensors = demo(anything, ["F8_E4M3" if turn % 2 else "F32"])
    ratio, k = RANKS[rank]
    ratios = {group: ratio(n) for group, n in counts(tensors).items()}
    output = check(tmp_path, tensors, ratios)
    said = oracle.read(output).metadata
    for group, n in counts(tensors).items():
        assert (said[f"crdiff.threshold.{group}"] == "none") == (k(n) == 0)
        assert int(said[f"crdiff.pruned.{group}"]) >= k(n)


def test_a_group_with_ratio_0_keeps_its_negative_zeros(tmp_path: Path) -> None:
    tensors = demo(zeros, ["F16"])
    output = check(tmp_path, tensors, {"down": 0.5, "mid": 0.0, "up": 0.5})
    baked = makers.read(output)
    mid = next(name for name in tensors if name.startswith("mid_block") and name.endswith("attn1.to_q.weight"))
    assert baked[mid] == tensors[mid]
    assert b"\x00\x80" in baked[mid][2]


def test_one_ratio_for_all_groups(tmp_path: Path) -> None:
    tensors = demo(anything, ["F16"])
    check(tmp_path, tensors, dict.fromkeys(UNET_RATIOS, 0.3))
    one = makers.read(tmp_path / "out.safetensors")
    assert makers.read(bake(tmp_path / "base.safetensors", {}, ratio=0.3)) == one


@pytest.mark.parametrize(
    ("dtypes", "share"),
    [(["F32"], 0.6), (["F8_E4M3"], 0.6), *((list(DTYPES), share) for share in (0.01, 0.6, 1.0))],
)
def test_weights_that_are_no_numbers_stay_where_that_is_allowed(
    dtypes: list[str], share: float, tmp_path: Path
) -> None:
    tensors = demo(anything, dtypes)
    spoil(tensors, share)
    output = check(tmp_path, tensors, {"down": 0.1, "mid": 0.5, "up": 0.9}, allow_nonfinite=True)
    assert int(oracle.read(output).metadata["crdiff.nonfinite.mid"]) > 0


@pytest.mark.parametrize("dtype", ["F32", "F8_E4M3"])
def test_weights_that_are_no_numbers_are_refused_by_name(dtype: str, tmp_path: Path) -> None:
    tensors = demo(anything, [dtype])
    names = spoil(tensors, 0.001)
    assert len(names) > 3
    base = makers.write(tmp_path / "base.safetensors", tensors)
    (tmp_path / "out.safetensors").write_bytes(b"old")
    with raises(PlanError, *sorted(names)[:3], f"and {len(names) - 3} more"):
        bake(base, UNET_RATIOS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "out.safetensors"]
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"


def test_what_is_no_number_elsewhere_is_none_of_our_business(tmp_path: Path) -> None:
    tensors = demo(anything, ["F16"])
    tensors["conv_in.bias"] = ("F16", (8,), np.array([np.inf, -np.inf, *[np.nan] * 6], "<f2").tobytes())
    check(tmp_path, tensors)


# Places


@pytest.mark.parametrize(("dtypes", "odd"), [(["F16"], 1), (["F32"], 1), (["F32"], 2), (list(DTYPES), 3)])
def test_weights_at_any_place(dtypes: list[str], odd: int, tmp_path: Path) -> None:
    tensors = between(demo(anything, dtypes), odd)
    starts = {entry.start % 4 for entry in oracle.read(makers.write(tmp_path / "x.safetensors", tensors)).entries}
    assert starts & {1, 3} or odd == 2
    check(tmp_path, tensors)


def test_a_header_in_another_order_than_the_bytes(tmp_path: Path) -> None:
    tensors = between(demo(anything, list(DTYPES)), 3)
    base = makers.write(tmp_path / "base.safetensors", tensors)
    content = oracle.read(base)
    shuffled = [content.entries[i] for i in np.random.default_rng(1).permutation(len(content.entries))]
    entries = {e.name: {"dtype": e.dtype, "shape": e.shape, "data_offsets": [e.start, e.stop]} for e in shuffled}
    base.write_bytes(makers.frame(json.dumps(entries).encode()) + content.data)
    output = bake(base, UNET_RATIOS)
    oracle.hold(base, output, oracle.expect([tensors], UNET_RATIOS, ("attn", "ff")))
    assert [e.name for e in oracle.read(output).entries] == [e.name for e in shuffled]


def test_shards_and_one_without_a_single_byte(tmp_path: Path) -> None:
    tensors = demo(anything, list(DTYPES))
    names = list(tensors)
    half = len(names) // 2
    parts: list[dict[str, tuple[str, Shape, bytes]]] = [
        {name: tensors[name] for name in names[half:]},
        {"empty": ("F16", (0, 3), b"")},
        {name: tensors[name] for name in names[:half]},
    ]
    folder = tmp_path / "base"
    folder.mkdir()
    shards = [f"m-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    for shard, part in zip(shards, parts, strict=True):
        makers.write(folder / shard, part, {"format": "pt"})
    weight_map = {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    export(ExportRequest(str(index), Size(512, 512), tmp_path / "out", ratios=UNET_RATIOS))
    expected = oracle.expect(parts, UNET_RATIOS, ("attn", "ff"))
    for number, shard in enumerate(shards):
        oracle.hold(folder / shard, tmp_path / "out" / shard, expected, number)
        said = oracle.read(tmp_path / "out" / shard).metadata
        assert said["crdiff.source.hash_sha256"] == oracle.sha256(folder / shard)
        assert said["modelspec.hash_sha256"] == oracle.sha256(tmp_path / "out" / shard)


@pytest.mark.parametrize(
    ("prefix", "table"),
    [("model.diffusion_model.", DEMO), ("net.", "demo.original-unet"), ("unet.", "flux-schnell.diffusers-transformer")],
)
def test_prefixes(prefix: str, table: str, tmp_path: Path) -> None:
    """The recognition of all of them is in tests/models/test_families.py."""
    plain = {name.removeprefix("model.diffusion_model."): t for name, t in makers.tiny(table, "F16").items()}
    tensors = {prefix + name: tensor for name, tensor in plain.items()}
    output = check(tmp_path, tensors, ratios_of(table), default_kinds(table))
    assert oracle.read(output).metadata["crdiff.prefix"] == prefix


def test_an_averaged_copy_stays_as_it_is(tmp_path: Path) -> None:
    tensors = makers.tiny("demo.original-unet", "F16", seed=1)
    copy = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": tensor for name, tensor in tensors.items()}
    copy |= {f"model_ema.{name}": tensor for name, tensor in tensors.items()}
    check(tmp_path, {**copy, **tensors})


# Targets

# All kinds of every transformer in both layouts, and each kind alone.
TARGETS = [
    *((table, ("ff", "attn")) for table in ("sd3-medium.original", "flux-dev.original", "flux-dev.diffusers")),
    *((f"sd35-medium.{layout}", ("ff", "attn", "attn2")) for layout in ("original", "diffusers")),
    ("sd3-medium.diffusers", ("attn",)),
    ("sd35-medium.diffusers", ("ff",)),
    ("sd35-medium.original", ("attn2",)),
    ("lumina-2.original", ("ff-shared", "attn")),
    ("pixart-sigma.original", ("attn", "attn2")),
]


@pytest.mark.parametrize(("table", "kinds"), TARGETS, ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_targets_of_transformers(table: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    tensors = makers.tiny(f"{table}-transformer")
    check(tmp_path, tensors, DIT_RATIOS, kinds, targets=kinds)
    if table == "flux-dev.original":
        expected = oracle.expect([tensors], DIT_RATIOS, kinds, dit=True)
        linear1 = [piece for piece in expected.slices if piece.tensor.endswith("single_blocks.8.linear1.weight")]
        assert len({expected.thresholds[expected.slices.index(piece)] for piece in linear1}) == 3


@pytest.mark.parametrize("kinds", [("attn",), ("ff",)], ids="+".join)
def test_targets_of_unets(kinds: tuple[str, ...], tmp_path: Path) -> None:
    check(tmp_path, makers.tiny("demo.original-unet", "F16"), UNET_RATIOS, kinds, targets=kinds)


def test_row_slices_of_mixed_dtypes_at_odd_places(tmp_path: Path) -> None:
    rng, narrow = np.random.default_rng(3), makers.narrow("sd3-medium.original-transformer")
    tensors: dict[str, tuple[str, Shape, bytes]] = {"odd": ("U8", (3,), b"abc")}
    for (name, (_, shape)), dtype in zip(narrow.items(), itertools.cycle(["BF16", "F8_E4M3", "F32"])):
        tensors[name] = dtype, shape, patterns(ties(rng, dtype, int(np.prod(shape))), dtype, rng)
    check(tmp_path, tensors, {"blocks": 0.6}, targets=("attn", "ff"))


def test_an_untouched_layer_says_none(tmp_path: Path) -> None:
    tensors = makers.tiny("sd3-medium.diffusers-transformer")
    layers = oracle.expect([tensors], {"blocks": 0.0}, ("attn", "ff"), dit=True).slices
    # Enough for one weight of the largest layers, for none of the smaller.
    ratios = {"blocks": 1.0 / max(layer.stop - layer.start for layer in layers)}
    output = check(tmp_path, tensors, ratios, targets=("attn", "ff"))
    assert {"none"} < set(json.loads(oracle.read(output).metadata["crdiff.thresholds"]))


# Anything


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fill=st.sampled_from(FILLS),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=7),
    ratios=st.fixed_dictionaries({group: st.floats(0, 0.9999) for group in UNET_RATIOS}),
    odd=st.integers(1, 9),
    seed=st.integers(0, 1 << 30),
    threads=st.integers(1, 3),
    hashing=st.booleans(),
)
def test_any_file(
    fill: Fill,
    dtypes: list[str],
    ratios: dict[str, float],
    odd: int,
    seed: int,
    threads: int,
    hashing: bool,
    tmp_path: Path,
) -> None:
    tensors = between(demo(fill, dtypes, seed), odd)
    check(tmp_path, tensors, ratios, threads=threads, hashing=hashing)
