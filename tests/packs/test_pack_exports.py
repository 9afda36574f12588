"""An export from a pack gives the bytes of a plain export, and refuses any other base."""

import os
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import CheckpointError, OptionError, PackError, PlanError, VerifyError
from crdiff_export.export import Baked, prepare_all, run_together
from crdiff_export.formats import hash_cache
from crdiff_export.formats.hash_cache import FileState
from crdiff_export.packs import Pack, open_pack
from crdiff_export.packs.check import verify_pack
from crdiff_export.progress import Silent
from crdiff_export.prune.criteria import magnitude
from tests.support import geometry_tables, makers, masking, mixed_models
from tests.support.exporting import SIZE, bake, names
from tests.support.hostile_weights import DIT_RATIOS, UNET_RATIOS, is_dit
from tests.support.loopback_hub import WRITE_TOKEN, LoopbackHub
from tests.support.masking import Base
from tests.support.messages import raises
from tests.support.packing import add_sizes, from_pack, new_pack, same_as_plain
from tests.support.scaled_models import FUSED, SPELLINGS, UNET, Scaled

OTHER = Size(384, 640)
RATIOS = {"down": 0.3, "mid": 0.55, "up": 0.1}
FEW = (
    "sd15.original", "sdxl.diffusers-unet", "sd3-medium.original-transformer", "flux-dev.original-transformer",
    "flux-dev.diffusers-transformer",
)  # fmt: skip


def ratios_of(table: str) -> dict[str, float]:
    """Ratios for the groups that a model of a table has."""
    from crdiff_export.models.families import by_id

    groups = by_id(table.partition(".")[0]).groups
    return DIT_RATIOS if is_dit(table) else {name: UNET_RATIOS[name] for name in groups}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow UNet. No test may change it."""
    return makers.write(tmp_path_factory.mktemp("base") / "base.safetensors", makers.tiny("demo.original-unet"))


@pytest.fixture(scope="module")
def pack(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """A pack of it. No test may change it."""
    return new_pack(base, tmp_path_factory.mktemp("pack") / "sizes.crdiff", SIZE, OTHER, ratios=RATIOS)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """Narrow bases with calibrations, each made once. No test may change them."""

    @cache
    def made(table: str) -> Base:
        return masking.base(tmp_path_factory.mktemp("masked"), table)

    return made


# --- bases of every kind ---


@pytest.mark.parametrize("table", FEW)
def test_families(table: str, tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny(table))
    same_as_plain(base, tmp_path / "out", SIZE, OTHER, ratios=ratios_of(table))


@pytest.mark.slow
@pytest.mark.parametrize("table", geometry_tables.names())
def test_all_tables(table: str, tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny(table))
    pack = same_as_plain(base, tmp_path / "out", Size(512, 512), ratios=ratios_of(table))
    assert verify_pack(pack.path, str(base), Silent()).unranked == ()
    every = pack.family.kinds
    pack = same_as_plain(base, tmp_path / "all", Size(512, 512), ratios=ratios_of(table), targets=every)
    assert pack.kinds == every


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny("demo.original-unet", dtype))
    same_as_plain(base, tmp_path / "out", ratios=RATIOS)


@pytest.mark.parametrize("make", [mixed_models.unet, mixed_models.sd3])
def test_several_dtypes_at_odd_places(make: Callable[[], makers.Tensors], tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", make(), {"format": "pt"})
    ratios = RATIOS if make is mixed_models.unet else {"blocks": 0.25}
    pack = same_as_plain(base, tmp_path / "out", ratios=ratios, targets=("attn", "ff"))
    assert verify_pack(pack.path, str(base), Silent()).base == base


@pytest.mark.parametrize(
    ("table", "spelling", "plain"),
    [
        (UNET, "scaled_fp8", ()),
        *((table, each, ("F16", "F32", "BF16")) for table in (UNET, FUSED) for each in SPELLINGS),
    ],
)
def test_scaled_fp8(table: str, spelling: str, plain: tuple[str, ...], tmp_path: Path) -> None:
    base = Scaled(table, spelling, plain).write(tmp_path / "base.safetensors")
    pack = same_as_plain(base, tmp_path / "out", ratios=ratios_of(table), targets=("attn", "ff"))
    assert pack.common.scaled
    assert verify_pack(pack.path, str(base), Silent()).base == base


def test_scaled_fp8_by_masks(tmp_path: Path) -> None:
    base = Scaled(UNET, "comfy_quant").write(tmp_path / "base.safetensors")
    same_as_plain(base, tmp_path / "out", ratios=UNET_RATIOS, criterion="random")


def test_shards_by_their_folder_and_by_their_index(shelf: Path, tmp_path: Path) -> None:
    index = next((shelf / "shards").glob("*.json"))
    pack = same_as_plain(shelf / "shards", tmp_path / "folder", ratios=RATIOS)
    assert len(pack.files) == 3
    same_as_plain(index, tmp_path / "index", ratios=RATIOS)
    assert from_pack(index, pack, tmp_path / "crossed").is_dir()


@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"residual": "sidecar"}, {"all_files": True}], ids=str)
def test_a_folder(options: dict[str, Any], shelf: Path, tmp_path: Path) -> None:
    pack = same_as_plain(shelf / "pipe", tmp_path / "out", ratios=RATIOS, **options)
    assert verify_pack(pack.path, str(shelf / "pipe"), Silent()).base == shelf / "pipe"


def test_a_pickle(tmp_path: Path) -> None:
    dtypes = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64}
    state = {
        name: torch.frombuffer(bytearray(data), dtype=dtypes[dtype]).reshape(shape)
        for name, (dtype, shape, data) in makers.tiny("sd15.original").items()
    }
    torch.save({"state_dict": state}, tmp_path / "base.ckpt")
    for number, residual in enumerate(("none", "sidecar")):
        pack = same_as_plain(tmp_path / "base.ckpt", tmp_path / str(number), ratios=RATIOS, residual=residual)
    assert verify_pack(pack.path, str(tmp_path / "base.ckpt"), Silent()).base == tmp_path / "base.ckpt"


def test_a_special_model(tmp_path: Path) -> None:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    tensors = makers.tiny("sd15.original")
    dtype, (rows, _, *kernel), _ = tensors[name]
    shape = (rows, 9, *kernel)
    tensors[name] = dtype, shape, makers.weights(name, dtype, shape)
    base = makers.write(tmp_path / "base.safetensors", tensors)
    pack = same_as_plain(base, tmp_path / "out", ratios=RATIOS)
    assert pack.common.special == "inpainting"
    plain = makers.write(tmp_path / "plain.safetensors", makers.tiny("sd15.original"))
    with raises(PackError, "inpainting"):
        from_pack(plain, pack, tmp_path / "o.safetensors")


def test_another_prefix_is_another_model(tmp_path: Path, base: Path, pack: Pack) -> None:
    tensors = {name.removeprefix("model.diffusion_model."): entry for name, entry in makers.read(base).items()}
    bare = makers.write(tmp_path / "bare.safetensors", tensors)
    same_as_plain(bare, tmp_path / "out", ratios=RATIOS)
    with raises(PackError, "prefix"):
        from_pack(bare, pack, tmp_path / "o.safetensors")


TABLE = """
id = "tiny"
title = "Tiny model"
grid = 16

[transformer]
kinds = ["ff", "attn"]
default = ["ff"]
channels = 16

[transformer.diffusers]
first = "img_in.weight"
marks = [{ tensor = "txt_norm.weight" }]

[[target]]
kind = "ff"
diffusers = "transformer_blocks.{0..10}.img_mlp.net.0.proj.weight"

[[target]]
kind = "attn"
diffusers = "transformer_blocks.{0..10}.attn.to_q.weight"
"""


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A model of no family that is built in, and its table, own.toml."""
    tensors = {"img_in.weight": (16, 16), "txt_norm.weight": (8,)}
    for number in range(11):
        tensors |= {
            f"transformer_blocks.{number}.img_mlp.net.0.proj.weight": (20, 16),
            f"transformer_blocks.{number}.attn.to_q.weight": (16, 15),
        }
    made = {name: ("BF16", shape, makers.weights(name, "BF16", shape)) for name, shape in tensors.items()}
    (tmp_path / "own.toml").write_text(TABLE)
    return makers.write(tmp_path / "base.safetensors", made)


@pytest.mark.parametrize("criterion", ["magnitude", "random:compare=row"])
def test_a_family_by_its_own_table(foreign: Path, tmp_path: Path, criterion: str) -> None:
    """The pack holds the table and the native size, which only the user knows."""
    options: dict[str, Any] = {"family": tmp_path / "own.toml", "native": Size(512, 512), "ratio": 0.4}
    pack = same_as_plain(foreign, tmp_path / "out", OTHER, criterion=criterion, targets=("ff", "attn"), **options)
    assert pack.common.native == Size(512, 512)
    assert len(pack.identity.layers) == 22
    assert verify_pack(pack.path, str(foreign), Silent()).unranked == ()
    more = add_sizes(foreign, pack.path, SIZE, criterion=criterion, ratio=0.4)
    assert list(more.variants) == [OTHER, SIZE]
    assert more.kinds == ("ff", "attn")


def test_a_unet_of_no_known_family(tmp_path: Path) -> None:
    tensors = makers.tiny("demo.diffusers-unet")
    more = {
        f"{name}.extra.weight": tensors[name]
        for name in list(tensors)
        if name.endswith("attn1.to_q.weight") and "mid_block" in name
    }
    base = makers.write(tmp_path / "base.safetensors", {**tensors, **more})
    same_as_plain(base, tmp_path / "out", ratio=0.3, native=Size(64, 64))


def test_a_given_native_size_is_kept(base: Path, tmp_path: Path) -> None:
    pack = same_as_plain(base, tmp_path / "out", ratios=RATIOS, native=Size(256, 256))
    assert verify_pack(pack.path, str(base), Silent()).base == base


# --- criteria and numbers ---

CRITERIA = ("uniform", "random:seed=3", "wanda:compare=row", "taylor", "adverse:form=signed", "adverse:form=channel")


@pytest.mark.parametrize(
    ("table", "criterion"),
    [*(("sd15.original", each) for each in CRITERIA), *((FUSED, each) for each in ("uniform", "wanda", "taylor"))],
)
def test_criteria(criterion: str, table: str, masked: Callable[[str], Base], tmp_path: Path) -> None:
    base = masked(table)
    request = base.request(tmp_path / "unused", criterion)
    options = {key: getattr(request, key) for key in ("ratios", "targets", "criterion", "calibration")}
    pack = same_as_plain(base.path, tmp_path / "out", **options)
    assert bool(pack.masked_sizes) == (criterion != "uniform")
    checked = verify_pack(pack.path, str(base.path), Silent(), calibration=request.calibration)
    assert checked.unranked == ()


def test_masks_of_several_sizes(tmp_path: Path, base: Path) -> None:
    pack = same_as_plain(base, tmp_path / "out", SIZE, OTHER, Size(64, 64), ratios=RATIOS, criterion="random")
    more = add_sizes(base, pack.path, Size(96, 64), ratio=0.2)
    assert [bool(stamp.masked) for stamp in more.variants.values()] == [True, False, True, True]
    for size in pack.variants:
        again = from_pack(base, more, tmp_path / "again.safetensors", size, force=True)
        assert again.read_bytes() == (tmp_path / f"out/plain-{size}.safetensors").read_bytes()


def test_criteria_that_move_weights_are_refused(masked: Callable[[str], Base], tmp_path: Path) -> None:
    base = masked("sd15.original")
    for criterion in ("obs", "obs:compare=row"):
        request = base.request(tmp_path / "unused", criterion)
        with raises(OptionError, "obs"):
            new_pack(
                base.path, tmp_path / "o.crdiff", ratios=RATIOS, criterion=criterion, calibration=request.calibration
            )
    assert names(tmp_path) == []


def test_obs_that_moves_nothing(masked: Callable[[str], Base], tmp_path: Path) -> None:
    base = masked("sd15.original")
    request = base.request(tmp_path / "unused", "obs:compensate=off")
    same_as_plain(
        base.path, tmp_path / "out", ratios=RATIOS, criterion=request.criterion, calibration=request.calibration
    )


def test_a_calibration_of_another_size_is_refused(masked: Callable[[str], Base], tmp_path: Path) -> None:
    base = masked("sd15.original")
    with raises(OptionError, "384x640", "512x512"):
        new_pack(
            base.path, tmp_path / "o.crdiff", SIZE, OTHER, ratios=RATIOS, criterion="wanda",
            calibration=base.calibration,
        )  # fmt: skip
    assert names(tmp_path) == []


@pytest.mark.parametrize("targets", [("ff",), ("attn",), ("ff", "attn")], ids=",".join)
def test_targets(targets: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    for number, criterion in enumerate(("magnitude", "random")):
        pack = same_as_plain(base, tmp_path / str(number), ratios=RATIOS, targets=targets, criterion=criterion)
        assert set(pack.kinds) == set(targets)


@pytest.mark.parametrize("ratios", [{"down": 0, "mid": 0.5, "up": 0}, {"down": 0, "mid": 0, "up": 0}], ids=str)
@pytest.mark.parametrize("criterion", ["magnitude", "uniform", "random"])
def test_groups_that_are_left_alone(criterion: str, ratios: dict[str, float], base: Path, tmp_path: Path) -> None:
    pack = same_as_plain(base, tmp_path / "out", ratios=ratios, criterion=criterion)
    assert verify_pack(pack.path, str(base), Silent()).base == base


def test_a_recipes_numbers_with_their_evidence_and_prompt(tmp_path: Path) -> None:
    """The demo's own, searched and borrowed, and those for a prompt."""
    from crdiff_export.models import demo

    recipe = """
        [model]
        family = "demo"
        title = "demo"
        native = "64x64"
        [[variant]]
        resolution = "96x64"
        prompt = "{two} red circles"
        ratios = { down = 0.1, mid = 0.2, up = 0.4 }
        poa_weight = 1.25
        provenance = "searched"
        source = " {a search"
        evidence = { scorer = "x", pruned = 0.5, interval = [0.1, 0.2] }
    """
    (tmp_path / "own.toml").write_text(recipe)
    base = demo.path()
    pack = same_as_plain(base, tmp_path / "own", Size(96, 64), recipe=tmp_path / "own.toml", prompt="{two} red circles")
    assert pack.common.evidence["scorer"] == "x"
    pack = same_as_plain(base, tmp_path / "demo", Size(96, 64), Size(48, 48), Size(400, 64), poa_weight=1.5)
    assert pack.variants[Size(400, 64)].borrowed_from


# --- casts ---


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_cast_of_a_pack(dtype: str, criterion: str, tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", mixed_models.unet())
    pack = same_as_plain(base, tmp_path / "out", ratios=RATIOS, dtype=dtype, criterion=criterion)
    assert verify_pack(pack.path, str(base), Silent()).base == base
    again = from_pack(base, pack, tmp_path / "again.safetensors", dtype=dtype)
    assert again.read_bytes() == (tmp_path / f"out/plain-{SIZE}.safetensors").read_bytes()


@pytest.mark.parametrize(("dtype", "criterion"), [(None, "uniform"), ("fp16", "magnitude")])
def test_another_cast_than_the_packs_is_counted_anew(dtype: str | None, criterion: str, tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny("sd15.original", "F32"))
    pack = new_pack(base, tmp_path / "o.crdiff", SIZE, OTHER, ratios=RATIOS, dtype=dtype, criterion=criterion)
    for size in (SIZE, OTHER):
        request = ExportRequest(
            str(base), size, tmp_path / "plain.safetensors", ratios=RATIOS, dtype="bf16", criterion=criterion,
            force=True,
        )  # fmt: skip
        plain = export(request).written.path
        ours = from_pack(base, pack, tmp_path / "out.safetensors", size, dtype="bf16", force=True)
        assert ours.read_bytes() == plain.read_bytes()


def test_another_cast_of_layers(tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny(FUSED, "F32"))
    pack = new_pack(base, tmp_path / "o.crdiff", ratio=0.3)
    plain = export(ExportRequest(str(base), SIZE, tmp_path / "p.safetensors", ratio=0.3, dtype="fp16")).written.path
    assert from_pack(base, pack, tmp_path / "o.safetensors", dtype="fp16").read_bytes() == plain.read_bytes()


def test_sizes_of_several_casts(base: Path, tmp_path: Path) -> None:
    """They are written one after the other, or all with one more cast; each is verified by its own."""
    pack = new_pack(base, tmp_path / "o.crdiff", SIZE, ratios=RATIOS, dtype="bf16")
    pack = add_sizes(base, pack.path, OTHER, ratios=RATIOS)
    assert verify_pack(pack.path, str(base), Silent()).unranked == ()
    requests = [ExportRequest(str(base), size, tmp_path / f"{size}.safetensors", pack=pack) for size in pack.variants]
    with raises(OptionError, "384x640", "BF16"):
        prepare_all(requests)
    for request in requests:
        options = {"dtype": "bf16"} if request.size == SIZE else {}
        plain = bake(base, tmp_path / "plain.safetensors", request.size, ratios=RATIOS, force=True, **options)
        assert export(request).written.path.read_bytes() == plain.read_bytes()
    both = [replace(request, dtype="fp32", force=True) for request in requests]
    for request, baked in zip(both, run_together(prepare_all(both), Silent()), strict=True):
        assert isinstance(baked, Baked)
        plain = bake(base, tmp_path / "plain.safetensors", request.size, ratios=RATIOS, force=True, dtype="fp32")
        assert baked.written.path.read_bytes() == plain.read_bytes()


def test_masks_are_for_their_own_cast(base: Path, tmp_path: Path) -> None:
    pack = new_pack(base, tmp_path / "o.crdiff", ratios=RATIOS, criterion="random", dtype="bf16")
    with raises(OptionError, "fp16", "BF16"):
        from_pack(base, pack, tmp_path / "o.safetensors", dtype="fp16")
    plain = new_pack(base, tmp_path / "plain.crdiff", ratios=RATIOS, criterion="random")
    with raises(OptionError, "bf16"):
        from_pack(base, plain, tmp_path / "o.safetensors", dtype="bf16")
    assert names(tmp_path) == ["o.crdiff", "plain.crdiff"]


# --- what an export decides by itself ---


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
@pytest.mark.parametrize("way", ["none", "embed", "sidecar"])
def test_residuals(way: str, criterion: str, base: Path, tmp_path: Path) -> None:
    pack = same_as_plain(base, tmp_path / "out", ratios=RATIOS, residual=way, criterion=criterion)
    assert pack.common.residual == "none"


def test_several_sizes_from_one_reading(base: Path, pack: Pack, tmp_path: Path) -> None:
    requests = [ExportRequest(str(base), size, tmp_path / f"{size}.safetensors", pack=pack) for size in (OTHER, SIZE)]
    results = list(run_together(prepare_all(requests), Silent()))
    for request, baked in zip(requests, results, strict=True):
        assert isinstance(baked, Baked)
        plain = export(
            ExportRequest(str(base), request.size, tmp_path / "plain.safetensors", ratios=RATIOS, force=True)
        )
        assert baked.written.path.read_bytes() == plain.written.path.read_bytes()
        assert baked.stamp == plain.stamp


def test_nothing_is_counted(base: Path, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(magnitude.RankedMagnitudes, "_count", count)
    from_pack(base, pack, tmp_path / "o.safetensors")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    for table, kinds in (("demo.original-unet", None), (FUSED, ("attn", "ff"))):
        tensors = makers.tiny(table, "F16")
        for number, name in enumerate(name for name in tensors if "attn.qkv.weight" in name or "attn1.to_k" in name):
            dtype, shape, data = tensors[name]
            bad = struct.pack("<3H", 0x7C00, 0xFC00, 0x7E01)
            tensors[name] = dtype, shape, data[: 2 * number] + bad + data[2 * number + len(bad) :]
        folder = tmp_path / table
        folder.mkdir()
        base = makers.write(folder / "base.safetensors", tensors)
        options: dict[str, Any] = {"ratios": ratios_of(table), "targets": kinds}
        with raises(PlanError, "base.safetensors"):
            new_pack(base, folder / "o.crdiff", **options)
        assert names(folder) == ["base.safetensors"]
        pack = same_as_plain(base, folder / "out", allow_nonfinite=True, **options)
        assert sum(group.nonfinite for group in pack.common.groups.values()) > 3
        assert verify_pack(pack.path, str(base), Silent()).base == base
        plain = folder / f"out/plain-{SIZE}.safetensors"
        assert from_pack(base, pack, folder / "o.safetensors").read_bytes() == plain.read_bytes()
        same_as_plain(base, folder / "masks", allow_nonfinite=True, criterion="random", **options)


def test_without_hashes_nothing_tells_the_base(base: Path, pack: Pack, tmp_path: Path) -> None:
    with raises(OptionError, "--no-hash"):
        from_pack(base, pack, tmp_path / "o.safetensors", hashing=False)
    assert names(tmp_path) == []


def test_a_size_that_the_pack_does_not_have(base: Path, pack: Pack, tmp_path: Path) -> None:
    with raises(PackError, "64x64"):
        from_pack(base, pack, tmp_path / "o.safetensors", Size(64, 64))


# --- other bases ---


def target_of(base: Path, ending: str) -> str:
    return next(name for name in makers.entries_of(base) if name.endswith(ending))


def test_a_base_under_another_name(base: Path, pack: Pack, tmp_path: Path) -> None:
    """The output says the new name, as a plain export does."""
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(base.read_bytes())
    plain = export(ExportRequest(str(renamed), SIZE, tmp_path / "plain.safetensors", ratios=RATIOS)).written.path
    assert from_pack(renamed, pack, tmp_path / "o.safetensors").read_bytes() == plain.read_bytes()
    assert verify_pack(pack.path, str(renamed), Silent()).base == renamed


@pytest.mark.parametrize("name", [b"a\xff.safetensors", "ü {\n/".encode()[:-1] + b".safetensors"])
def test_a_base_whose_name_is_any_bytes(name: bytes, base: Path, tmp_path: Path) -> None:
    named = tmp_path / os.fsdecode(name)
    named.write_bytes(base.read_bytes())
    pack = same_as_plain(named, tmp_path / "out", ratios=RATIOS)
    assert len(pack.files) == 1
    assert verify_pack(pack.path, str(named), Silent()).base == named
    add_sizes(named, pack.path, Size(64, 64), ratios=RATIOS)


def test_a_header_may_have_changed(base: Path, pack: Pack, tmp_path: Path) -> None:
    titled = makers.write(tmp_path / "base.safetensors", makers.read(base), {"modelspec.title": "Mine"})
    plain = export(ExportRequest(str(titled), SIZE, tmp_path / "plain.safetensors", ratios=RATIOS)).written.path
    assert from_pack(titled, pack, tmp_path / "o.safetensors").read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("name", ["base.safetensors", "renamed.safetensors"])
@pytest.mark.parametrize(
    ("tensor", "place", "early"),
    [("attn1.to_q.weight", 0, True), ("ff.net.2.weight", 400, True), ("time_embed.0.weight", 3, False)],
)
def test_another_base(name: str, tensor: str, place: int, early: bool, base: Path, pack: Pack, tmp_path: Path) -> None:
    """Found in the first weights of a layer before anything is written, elsewhere by the hash."""
    other = makers.changed(base, target_of(base, tensor), {place: b"\x55"}, tmp_path / name)
    with raises(PackError, name) as caught:
        from_pack(other, pack, tmp_path / "o.safetensors")
    assert ("hashes to" in caught.value.message) == (not early)
    assert names(tmp_path) == [name]
    with raises(PackError, name):
        add_sizes(other, pack.path, Size(64, 64))
    with pytest.raises(VerifyError, match=name):
        verify_pack(pack.path, str(other), Silent())


def test_a_later_weight_of_a_layer(tmp_path: Path) -> None:
    """The first 16,384 of a layer are its identity; the hash is of all."""
    demo = makers.narrow("demo.original-unet", 1)
    tensors = {name: (dtype, shape, makers.weights(name, dtype, shape)) for name, (dtype, shape) in demo.items()}
    name = next(
        name for name, (_, shape) in demo.items() if ".ff.net.0.proj.w" in name and shape[0] * shape[1] > 16_384
    )
    base = makers.write(tmp_path / "base.safetensors", tensors)
    pack = new_pack(base, tmp_path / "o.crdiff", ratios=RATIOS)
    before = makers.changed(base, name, {2 * 16_383: b"\x55"}, tmp_path / "before.safetensors")
    with raises(PackError, "the weights of"):
        from_pack(before, pack, tmp_path / "o.safetensors")
    behind = makers.changed(base, name, {2 * 16_384: b"\x55"}, tmp_path / "behind.safetensors")
    with raises(PackError, "hashes to"):
        from_pack(behind, pack, tmp_path / "o.safetensors")
    assert "o.safetensors" not in names(tmp_path)


def test_one_shard_of_another_base(shelf: Path, tmp_path: Path) -> None:
    """Its bytes after the targets: nothing of the folder is left."""
    pack = new_pack(shelf / "shards", tmp_path / "o.crdiff", ratios=RATIOS)
    other = tmp_path / "other"
    other.mkdir()
    for file in (shelf / "shards").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    last = max(other.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1] + b"\x55")
    with raises(PackError, last.name):
        from_pack(other, pack, tmp_path / "out")
    assert names(tmp_path) == ["o.crdiff", "other"]


@pytest.mark.parametrize("table", ["demo.diffusers-unet", "sd15.original", FUSED])
def test_another_model(table: str, pack: Pack, tmp_path: Path) -> None:
    other = makers.write(tmp_path / "other.safetensors", makers.tiny(table))
    with raises(PackError, "other.safetensors"):
        from_pack(other, pack, tmp_path / "o.safetensors")
    with raises(PackError, "other.safetensors"):
        add_sizes(other, pack.path, Size(96, 64), ratio=0.2)


def test_another_number_of_files(base: Path, shelf: Path, tmp_path: Path) -> None:
    pack = new_pack(shelf / "shards", tmp_path / "o.crdiff", ratios=RATIOS)
    makers.write_shards(tmp_path / "two", makers.tiny("sd15.diffusers-unet"), 2)
    with raises(PackError, "2 files", "3"):
        from_pack(tmp_path / "two", pack, tmp_path / "out")


def test_a_baked_file_is_no_base(base: Path, pack: Pack, tmp_path: Path) -> None:
    baked = from_pack(base, pack, tmp_path / "baked.safetensors")
    with raises(PlanError, "baked.safetensors"):
        from_pack(baked, pack, tmp_path / "o.safetensors")
    with raises(PackError, "sizes.crdiff"):
        open_pack(baked.rename(tmp_path / "sizes.crdiff"))


def test_a_hash_that_is_remembered_wrongly_is_computed_on_request(
    base: Path, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_cache, "YOUNG_NS", -(10**18))
    hash_cache.store(FileState.of(base.stat()), "data", "ab" * 32, hash_cache.now_ns())
    with raises(PackError, "abababab"):
        from_pack(base, pack, tmp_path / "o.safetensors")
    assert from_pack(base, pack, tmp_path / "o.safetensors", rehash=True).exists()


# --- bases from the Hub ---

HUB_BASE = "hf://org/base/base.safetensors"


@pytest.fixture
def hub(loopback_hub: LoopbackHub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """A Hub that has the base, and a file of the same tensors with another header."""
    loopback_hub.lead_here(monkeypatch, tmp_path / "hub")
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    titled = makers.write(tmp_path / "titled.safetensors", makers.read(base), {"modelspec.title": "Mine"})
    other = makers.changed(base, target_of(base, "time_embed.0.weight"), {3: b"\x55"}, tmp_path / "other.safetensors")
    loopback_hub.add_repo(
        "org/base", {"base.safetensors": base, "titled.safetensors": titled, "other.safetensors": other}
    )
    return loopback_hub


def plain_of(base: str, folder: Path) -> bytes:
    return export(
        ExportRequest(base, SIZE, folder / "plain.safetensors", ratios=RATIOS, force=True)
    ).written.path.read_bytes()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("made_from", ["local", "hub"])
def test_the_hubs_base_and_a_copy_of_it(made_from: str, base: Path, tmp_path: Path) -> None:
    """The header has the hash that is known, as after a plain export, whatever the pack was made from."""
    pack = new_pack(base if made_from == "local" else HUB_BASE, tmp_path / "o.crdiff", ratios=RATIOS)
    assert (pack.files[0].file_hash is None) == (made_from == "local")
    for each in (str(base), HUB_BASE, "hf://org/base/titled.safetensors"):
        ours = from_pack(each, pack, tmp_path / "o.safetensors", force=True)
        assert ours.read_bytes() == plain_of(each, tmp_path)
        assert ("crdiff.source.file_sha256" in makers.metadata_of(ours)) == each.startswith("hf://")
    for each in (str(base), HUB_BASE):
        verify_pack(pack.path, each, Silent())


@pytest.mark.usefixtures("hub")
def test_another_base_of_the_hub(base: Path, tmp_path: Path) -> None:
    """Its hash is known without reading it, but is not that of the tensors."""
    for number, made_from in enumerate((base, HUB_BASE)):
        pack = new_pack(made_from, tmp_path / f"{number}.crdiff", ratios=RATIOS)
        with raises(PackError, "other.safetensors"):
            from_pack("hf://org/base/other.safetensors", pack, tmp_path / "o.safetensors")
    assert "o.safetensors" not in names(tmp_path)


@pytest.mark.usefixtures("hub")
def test_what_is_known_of_a_file_is_kept(base: Path, tmp_path: Path) -> None:
    """Adding from the Hub tells the whole file's hash, adding from a copy does not forget it."""
    path = tmp_path / "o.crdiff"
    new_pack(base, path, ratios=RATIOS)
    known = add_sizes(HUB_BASE, path, OTHER, ratios=RATIOS).files
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(base.read_bytes())
    again = add_sizes(renamed, path, Size(64, 64), ratios=RATIOS)
    assert again.files == known
    assert known[0].file_hash
    assert again.common.source_name == "base.safetensors"


def test_a_base_that_changes_meanwhile(base: Path, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crdiff_export.packs import use

    copy = tmp_path / "base.safetensors"
    copy.write_bytes(base.read_bytes())
    plan_size = use.plan_size

    def plan_and_change(*args: Any) -> Any:
        planned = plan_size(*args)
        makers.changed(copy, target_of(copy, "attn1.to_q.weight"), {0: b"\x55"}, copy)
        return planned

    monkeypatch.setattr(use, "plan_size", plan_and_change)
    with pytest.raises((PackError, CheckpointError)):
        from_pack(copy, pack, tmp_path / "o.safetensors")
    assert names(tmp_path) == ["base.safetensors"]
