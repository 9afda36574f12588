"""What is pruned away, kept: against values that an oracle takes out itself, and back to the base's last byte."""

import filecmp
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crdiff_export import CrdiffError, ExportRequest, export
from crdiff_export.bake import staging
from crdiff_export.bake.direct_writer import DirectWriter
from crdiff_export.errors import BakeError, OptionError, PlanError
from crdiff_export.export import prepare, run
from crdiff_export.progress import Silent
from crdiff_export.prune.kernels import pick
from crdiff_export.prune.kernels.cpu import CpuKernel
from crdiff_export.verify.reopen import open_baked
from crdiff_export.verify.residual_reader import check_residuals, dense_weights
from crdiff_export.verify.restore import restore
from crdiff_export.verify.verify import verify
from tests.support import makers, oracle
from tests.support.exporting import SIZE, bake, content, failing, names, write_in_chunks
from tests.support.hostile_weights import (
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
    spoil,
)
from tests.support.makers import Shape, Tensors
from tests.support.messages import raises

NAMES = ("zz_crdiff.residual", "zz_crdiff.header")
BUNDLE = "model.diffusion_model."


# The oracle: the values that a residual has to hold.


def pruned_values(
    files: Sequence[Tensors], number: int, ratios: Mapping[str, float], kinds: Sequence[str], *, dit: bool = False
) -> bytes:
    """The raw bytes of every weight of a file that is not above its threshold, in the order of the file."""
    expected = oracle.expect(files, ratios, kinds, dit=dit)
    values = b""
    for place, piece in enumerate(expected.slices):
        threshold = expected.thresholds[place if dit else list(ratios).index(piece.group)]
        if piece.file == number and threshold is not None:
            dtype, _, data = files[number][piece.tensor]
            numbers = np.abs(oracle.decode(dtype, data)[piece.start : piece.stop])
            raw = np.frombuffer(data, f"<u{oracle.FORMATS[dtype].size}")[piece.start : piece.stop]
            values += raw[numbers <= threshold].tobytes()
    return values


def head_of(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[: 8 + struct.unpack("<Q", raw[:8])[0]]


def hold(base: Path, output: Path, values: bytes) -> None:
    """Assert that a baked file keeps just these values and its base's header, where the specification has them."""
    header, source = oracle.read(output).metadata, oracle.read(base)
    baked = oracle.read(output)
    entries = {entry.name: entry for entry in baked.entries}
    own = source.entries
    if header["crdiff.residual"] == "embedded":
        assert [entry.name for entry in baked.entries[len(own) :]] == list(NAMES)
        assert [*sorted(entries), *NAMES][-2:] == [NAMES[0], NAMES[1]]
        assert baked.entries[: len(own)] == own
        kept, start = baked, len(source.data)
    else:
        assert header["crdiff.residual"] == "sidecar"
        assert baked.entries == own
        kept, start = oracle.read(output.with_suffix(".crdiff-residual")), 0
        assert kept.metadata == {
            "crdiff.residual.of": header["modelspec.hash_sha256"],
            "crdiff.residual.hash_sha256": "0x" + hashlib.sha256(kept.data).hexdigest(),
        }
        entries = {entry.name: entry for entry in kept.entries}
    head, end = head_of(base), start + len(values)
    assert entries[NAMES[0]] == (NAMES[0], "U8", (len(values),), start, end)
    assert entries[NAMES[1]] == (NAMES[1], "U8", (len(head),), end, end + len(head))
    assert kept.data[start:end] == values
    assert kept.data[end:] == head
    assert header["modelspec.hash_sha256"] == oracle.sha256(output)


def bake_it(base: Path, ratios: Mapping[str, float], way: str, **options: Any) -> Path:
    beside = base.parent if base.suffix == ".json" else base
    output = beside.with_name("out" if beside.is_dir() else "out.safetensors")
    return export(ExportRequest(str(base), SIZE, output, ratios=ratios, residual=way, **options)).written.path


def back(output: Path, **options: Any) -> Path:
    return restore(output, output.with_name(f"back{output.suffix}"), **options).path


def way_for(table: str) -> str:
    return "embed" if next(iter(makers.narrow(table))).startswith(BUNDLE) or table.endswith("original") else "sidecar"


# Every family and dtype.


def in_turn(table: str) -> dict[str, tuple[str, Shape, bytes]]:
    """A narrow model whose float tensors get all dtypes by turns."""
    tensors = {}
    for number, (name, (own, shape)) in enumerate(makers.narrow(table).items()):
        dtype = DTYPES[number % len(DTYPES)] if own in oracle.FORMATS else own
        tensors[name] = dtype, shape, makers.weights(name, dtype, shape)
    return tensors


MODELS = [
    *("demo.original-unet", "sd15.original", "sdxl.diffusers-unet", "sd3-medium.original-transformer"),
    *("sd35-medium.diffusers-transformer", "flux-dev.original-transformer"),
]


@pytest.mark.parametrize("table", MODELS)
def test_every_kind_of_model_in_every_dtype_comes_back(table: str, tmp_path: Path) -> None:
    tensors = in_turn(table)
    ratios = DIT_RATIOS if is_dit(table) else UNET_RATIOS
    base = makers.write(tmp_path / "base.safetensors", tensors, {"note": "kept"})
    output = bake_it(base, ratios, way_for(table))
    values = pruned_values([tensors], 0, ratios, default_kinds(table), dit=is_dit(table))
    assert values
    hold(base, output, values)
    assert filecmp.cmp(back(output), base, shallow=False)


@pytest.mark.parametrize("table", ["flux-schnell.original-transformer", "sd3-medium.original-transformer"])
def test_a_transformer_in_a_bundle_embeds_its_fused_slices(table: str, tmp_path: Path) -> None:
    plain = {name.removeprefix(BUNDLE): tensor for name, tensor in makers.tiny(table, "BF16").items()}
    tensors = {"odd": ("U8", (1,), b"x"), **{BUNDLE + name: tensor for name, tensor in plain.items()}}
    base = makers.write(tmp_path / "base.safetensors", tensors)
    output = bake_it(base, {"blocks": 0.4}, "embed", targets=("attn", "ff"))
    hold(base, output, pruned_values([tensors], 0, {"blocks": 0.4}, ("attn", "ff"), dit=True))
    assert filecmp.cmp(back(output), base, shallow=False)


# Hostile content.


def test_every_fill_at_odd_places_over_small_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_in_chunks(monkeypatch, 4096)
    for number, fill in enumerate(FILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        tensors = between(demo(fill, list(DTYPES), seed=number), 3 + number % 3)
        base = makers.write(folder / "base.safetensors", tensors)
        output = bake_it(base, UNET_RATIOS, "sidecar")
        hold(base, output, pruned_values([tensors], 0, UNET_RATIOS, ("attn", "ff")))
        assert filecmp.cmp(back(output, chunk=4096), base, shallow=False), fill.__name__


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fill=st.sampled_from(FILLS),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=5),
    ratios=st.fixed_dictionaries({group: st.floats(0, 0.9999) for group in UNET_RATIOS}),
    odd=st.integers(1, 9),
    seed=st.integers(0, 1 << 30),
    chunk=st.sampled_from([4096, 12288, 8 << 20]),
    threads=st.integers(1, 3),
)
def test_any_file_comes_back(
    fill: Fill,
    dtypes: list[str],
    ratios: dict[str, float],
    odd: int,
    seed: int,
    chunk: int,
    threads: int,
    tmp_path: Path,
) -> None:
    tensors = between(demo(fill, dtypes, seed), odd)
    base = makers.write(tmp_path / "base.safetensors", tensors)
    with pytest.MonkeyPatch.context() as patch:
        write_in_chunks(patch, chunk)
        output = bake_it(base, ratios, "sidecar", force=True, threads=threads)
    hold(base, output, pruned_values([tensors], 0, ratios, ("attn", "ff")))
    assert filecmp.cmp(back(output, chunk=chunk, force=True), base, shallow=False)


def test_what_is_not_finite_was_never_taken(tmp_path: Path) -> None:
    tensors = demo(anything, list(DTYPES))
    spoil(tensors, 0.3)
    ratios = {"down": 0.1, "mid": 0.5, "up": 0.9}
    base = makers.write(tmp_path / "base.safetensors", tensors)
    output = bake_it(base, ratios, "sidecar", allow_nonfinite=True)
    hold(base, output, pruned_values([tensors], 0, ratios, ("attn", "ff")))
    assert filecmp.cmp(back(output), base, shallow=False)


@pytest.mark.parametrize("way", ["embed", "sidecar"])
def test_nothing_pruned_keeps_nothing(way: str, tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny("demo.original-unet"))
    output = bake_it(base, dict.fromkeys(UNET_RATIOS, 0.0), way)
    hold(base, output, b"")
    assert filecmp.cmp(back(output), base, shallow=False)


def test_a_header_of_another_writer_comes_back(tmp_path: Path) -> None:
    """Its own order, spaces, escapes and padding."""
    content = oracle.read(makers.write(tmp_path / "base.safetensors", makers.tiny("demo.original-unet")))
    entries = {e.name: {"data_offsets": [e.start, e.stop], "shape": e.shape, "dtype": e.dtype} for e in content.entries}
    body = json.dumps({"__metadata__": {"x": "\u2603"}, **dict(reversed(entries.items()))}, indent=1).encode() + b"   "
    base = tmp_path / "base.safetensors"
    base.write_bytes(struct.pack("<Q", len(body)) + body + content.data)
    assert (8 + len(body)) % 8
    for chunk in (4096, 8 << 20):
        assert filecmp.cmp(back(bake_it(base, UNET_RATIOS, "embed", force=True), chunk=chunk, force=True), base, False)


def test_a_residual_changes_nothing_else(tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny("sd15.original"))
    plain, embedded, beside = (
        bake(base, tmp_path / f"{way}.safetensors", ratio=0.3, residual=way) for way in ("none", "embed", "sidecar")
    )
    assert makers.read(beside) == makers.read(plain)
    assert {n: t for n, t in makers.read(embedded).items() if n not in NAMES} == makers.read(plain)
    differ = {"crdiff.residual", "modelspec.hash_sha256"}
    for other in (embedded, beside):
        ours, theirs = makers.metadata_of(other), makers.metadata_of(plain)
        assert {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)} <= differ


# Shards, folders, pickles, several at once.


def test_shards_each_with_a_sidecar(tmp_path: Path) -> None:
    tensors = makers.tiny("sdxl.diffusers-unet", "F32")
    index = makers.write_shards(tmp_path / "base", tensors, 3)
    output = bake_it(index, UNET_RATIOS, "sidecar")
    shards = sorted((tmp_path / "base").glob("*.safetensors"))
    files = [makers.read(shard) for shard in shards]
    for number, shard in enumerate(shards):
        hold(shard, output / shard.name, pruned_values(files, number, UNET_RATIOS, ("attn", "ff")))
    assert verify(output, str(index), Silent()).residual == "sidecar"
    assert differing(content(back(output)), content(tmp_path / "base")) == set()


def differing(ours: Mapping[str, bytes], theirs: Mapping[str, bytes]) -> set[str]:
    """The names of the files that are not the same."""
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


def test_a_folder_comes_back_with_all_that_is_in_it(shelf: Path, tmp_path: Path) -> None:
    output = export(ExportRequest(str(shelf / "pipe"), SIZE, tmp_path / "out", residual="sidecar")).written.path
    (output / "unet" / "diffusion_pytorch_model.crdiff-residual").stat()
    given = content(shelf / "pipe")
    del given["unet/diffusion_pytorch_model.fp16.safetensors"]  # which was not exported
    assert differing(content(back(output)), given) == set()
    assert verify(output, str(shelf / "pipe"), Silent()).residual == "sidecar"


def test_a_pickles_tensors_come_back(tmp_path: Path) -> None:
    tensors = {
        name: torch.frombuffer(bytearray(data), dtype={"F16": torch.float16, "F32": torch.float32}[dtype])
        .clone()
        .reshape(shape)
        for name, (dtype, shape, data) in makers.tiny("demo.original-unet").items()
        if dtype in ("F16", "F32")
    }
    torch.save(tensors, tmp_path / "base.ckpt")
    job = prepare(ExportRequest(str(tmp_path / "base.ckpt"), SIZE, tmp_path / "out.safetensors", residual="embed"))
    # The Hub's hash of the pickle could not prove what is restored.
    known = replace(job, base=replace(job.base, hashes={"base.ckpt": "ab" * 32}))
    output = run(known, Silent()).written.path
    assert [name for name in makers.read(output) if name in NAMES] == [NAMES[0]]
    assert verify(output, str(tmp_path / "base.ckpt"), Silent()).residual == "embedded"
    restored = restore(output, tmp_path / "back.safetensors")
    assert not restored.whole
    assert {n: d for n, (_, _, d) in makers.read(restored.path).items()} == {
        name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("known", [True, False], ids=["file-hash", "data-hash"])
@pytest.mark.parametrize("ratios", [UNET_RATIOS, dict.fromkeys(UNET_RATIOS, 0.0)], ids=["pruned", "nothing"])
def test_either_hash_proves_it(known: bool, ratios: dict[str, float], tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny("demo.original-unet"))
    job = prepare(ExportRequest(str(base), SIZE, tmp_path / "out.safetensors", ratios=ratios, residual="embed"))
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    hashes = {base.name: digest} if known else {}
    output = run(replace(job, base=replace(job.base, hashes=hashes)), Silent()).written.path
    restored = restore(output, tmp_path / "back.safetensors", chunk=4096)
    assert restored.whole
    (file,) = restored.files
    assert (file.key.rpartition(".")[2], file.hash) == (
        ("file_sha256", f"0x{digest}") if known else ("hash_sha256", oracle.sha256(base))
    )
    assert filecmp.cmp(restored.path, base, shallow=False)


# For whoever mixes both models.


@pytest.mark.parametrize("table", ["demo.original-unet", "sd3-medium.original-transformer"])
def test_dense_gives_every_target(table: str, tmp_path: Path) -> None:
    tensors = makers.tiny(table, "F32" if "demo" in table else None)
    base = makers.write(tmp_path / "base.safetensors", tensors)
    kinds = ("ff", "attn") if is_dit(table) else ("attn", "ff")
    ratios = {"blocks": 0.3} if is_dit(table) else {"down": 0.3, "mid": 0.0, "up": 0.6}
    baked = open_baked(bake_it(base, ratios, way_for(table), targets=kinds))
    check_residuals(baked, Silent())
    dense = list(dense_weights(baked))
    assert [target for target, _ in dense] == list(baked.plan.targets)
    for target, weights in dense:
        size = target.source.itemsize
        assert (weights.dtype, weights.ndim) == (np.dtype(f"u{size}"), 1)
        assert weights.tobytes() == tensors[target.source.name][2][target.start * size : target.stop * size]


# Packing alone.


@settings(max_examples=200)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), offset=st.integers(0, 3))
def test_what_is_taken_can_be_put_back(data: st.DataObject, dtype: str, offset: int) -> None:
    size = oracle.FORMATS[dtype].size
    top = (1 << 8 * size) - 1
    near = st.sampled_from([0, 1, 5, 6, 7, 1 << (8 * size - 1), (1 << (8 * size - 1)) | 6])
    raw = np.array(data.draw(st.lists(st.integers(0, top) | near, max_size=64)) * data.draw(st.sampled_from([1, 97])))
    raw = raw.astype(f"<u{size}")
    limit = data.draw(st.integers(0, oracle.FORMATS[dtype].finite - 1) | st.just(6))
    small = (raw & (top >> 1)) <= limit
    buffer = bytearray(raw.nbytes + 8)
    weights, into = memoryview(buffer)[offset : offset + raw.nbytes], memoryview(bytearray(raw.nbytes + 8))
    weights[:] = raw.tobytes()
    taken = pick.take(weights, dtype, limit, into)
    assert bytes(into[:taken]) == raw[small].tobytes()
    assert bytes(weights) == raw.tobytes()
    CpuKernel(1).zero(weights, dtype, limit)
    assert pick.zeros(weights, dtype) == small.sum()
    pick.put(weights, dtype, into[:taken])
    assert bytes(weights) == raw.tobytes()


# What cannot be asked for.


def refused(
    base: object, way: str, folder: Path, key: object, kind: type[CrdiffError] = PlanError, **more: Any
) -> None:
    with raises(kind, key):
        export(ExportRequest(str(base), SIZE, folder / "o.safetensors", residual=way, **more))
    assert not list(folder.glob("*o.*"))


@pytest.mark.parametrize("way", ["embed", "sidecar"])
def test_what_a_residual_excludes(way: str, shelf: Path, tmp_path: Path) -> None:
    refused("demo", way, tmp_path, f"--residual {way} and --no-hash", OptionError, hashing=False)
    refused(shelf / "sd15.safetensors", way, tmp_path, f"--residual {way} and --dtype", OptionError, dtype="bf16")
    refused("demo", "both", tmp_path, "--residual both", OptionError)


def test_a_cast_to_what_it_was_is_none(tmp_path: Path) -> None:
    tensors = {n: t for n, t in makers.tiny("demo.original-unet", "F16").items() if t[0] == "F16"}
    base = makers.write(tmp_path / "base.safetensors", tensors)
    assert filecmp.cmp(back(bake_it(base, UNET_RATIOS, "embed", dtype="fp16")), base, shallow=False)


@pytest.mark.parametrize("base", ["plain", "diffusers", "pipe", "shards"])
def test_only_bundles_embed(base: str, shelf: Path, tmp_path: Path) -> None:
    plain = {name.removeprefix(BUNDLE): tensor for name, tensor in makers.tiny("demo.original-unet").items()}
    tensors = {"plain": plain, "diffusers": makers.tiny("demo.diffusers-unet", prefix=BUNDLE)}
    path = makers.write(tmp_path / "base.safetensors", tensors[base]) if base in tensors else shelf / base
    refused(path, "embed", tmp_path, BUNDLE)


def test_a_file_that_holds_one_embeds_none(tmp_path: Path) -> None:
    """A merger has left it there, and our keys out."""
    base = makers.write(tmp_path / "base.safetensors", makers.tiny("demo.original-unet"))
    merged = makers.write(tmp_path / "merged.safetensors", makers.read(bake_it(base, UNET_RATIOS, "embed")))
    refused(merged, "embed", tmp_path, "zz_crdiff.residual")
    export(ExportRequest(str(merged), SIZE, tmp_path / "plain.safetensors"))


# Sidecars and their places.


def test_a_sidecar_that_is_there_is_replaced_by_force_alone(tmp_path: Path) -> None:
    (tmp_path / "o.crdiff-residual").write_text("mine")
    request = ExportRequest("demo", SIZE, tmp_path / "o.safetensors", residual="sidecar")
    with raises(PlanError, tmp_path / "o.crdiff-residual", "already exists"):
        export(request)
    assert names(tmp_path) == ["o.crdiff-residual"]
    export(replace(request, force=True))
    assert back(tmp_path / "o.safetensors")
    export(replace(request, force=True, ratio=0.5))
    assert back(tmp_path / "o.safetensors", force=True)


def test_a_folder_in_a_sidecars_place(tmp_path: Path) -> None:
    (tmp_path / "o.crdiff-residual").mkdir()
    with pytest.raises(PlanError, match="not a regular file"):
        export(ExportRequest("demo", SIZE, tmp_path / "o.safetensors", residual="sidecar", force=True))


def test_a_folder_with_sidecars_is_replaced_by_force(shelf: Path, tmp_path: Path) -> None:
    request = ExportRequest(str(shelf / "pipe"), SIZE, tmp_path / "out", residual="sidecar")
    export(request)
    export(replace(request, residual="none", force=True))
    assert not list((tmp_path / "out").rglob("*.crdiff-residual"))


def test_a_name_in_the_bases_folder_is_not_taken(shelf: Path, tmp_path: Path) -> None:
    index = makers.write_shards(tmp_path / "base", makers.tiny("sd15.diffusers-unet"), 1)
    stranger = index.parent / "diffusion_pytorch_model-00001-of-00001.crdiff-residual"
    stranger.write_text("mine")
    refused(index.parent, "sidecar", tmp_path, stranger.name, all_files=True)


@pytest.mark.parametrize("force", [True, False])
def test_a_file_that_cannot_get_its_name_takes_its_sidecar_along(
    force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "o.safetensors"
    if force:
        export(ExportRequest("demo", SIZE, target, residual="sidecar"))
    before = content(tmp_path)
    publish = staging.publish

    def failing(part: Path, to: Path, *, replace: bool = True) -> None:
        if to == target:
            raise PermissionError(13, "in use")
        publish(part, to, replace=replace)

    monkeypatch.setattr(staging, "publish", failing)
    with pytest.raises(BakeError):
        export(ExportRequest("demo", SIZE, target, residual="sidecar", ratio=0.6, force=force))
    assert differing(content(tmp_path), before) == set()


@pytest.mark.parametrize("way", ["embed", "sidecar"])
def test_a_write_that_fails_leaves_nothing(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DirectWriter, "append", failing())
    with pytest.raises(BakeError, match="nothing was left behind"):
        export(ExportRequest("demo", SIZE, tmp_path / "o.safetensors", residual=way))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["embed", "sidecar"])
def test_the_space_is_counted(way: str, tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny("sd15.original"))
    plain, more = (
        prepare(ExportRequest(str(base), SIZE, tmp_path / "o.safetensors", residual=w, ratio=0.3)).space.needed
        for w in ("none", way)
    )
    written = export(ExportRequest(str(base), SIZE, tmp_path / "o.safetensors", residual=way, ratio=0.3)).written
    assert plain < written.size <= more
    assert sum(path.stat().st_size for path in tmp_path.glob("o.*")) == written.size
