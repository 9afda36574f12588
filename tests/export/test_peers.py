"""Judges that this project did not write: safetensors, diffusers, transformers and sd-mecha open what an export gives.

Narrow models of the real families are loaded by default, full-size ones by `pytest -m slow`. What a library complains
about in an output has to be what it complains about in the base. What loaders that are not here demand of a header
(A1111, Forge, SwarmUI, ComfyUI) is stated again and held against headers of full size.
"""

import importlib
import json
import logging
import math
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from crdiff_export import ExportRequest, Size, export
from crdiff_export.bake import metadata
from crdiff_export.bake.residual import tensor_specs
from crdiff_export.export import prepare
from crdiff_export.formats import dtypes
from crdiff_export.formats import safetensors as header
from crdiff_export.models import demo, families
from crdiff_export.prune import architecture
from crdiff_export.prune.criteria import Decision
from crdiff_export.prune.plan import Plan
from crdiff_export.prune.threshold import Threshold
from tests.support import geometry_tables, makers

SIZE = Size(512, 768)
RATIOS = {"down": 0.3, "mid": 0.4, "up": 0.2}
PREFIX = "model.diffusion_model."
State = dict[str, torch.Tensor]


def bake(base: Path, output: Path, **request: Any) -> Path:
    return export(ExportRequest(str(base), SIZE, output, **request)).written.path


# safetensors.


@pytest.mark.parametrize(
    "table",
    ["sd15.original", "sd21.diffusers-unet", "sd35-medium.original-transformer", "flux-dev.diffusers-transformer"],
)
def test_safetensors_opens_it(table: str, tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny(table), {"note": "kept"})
    output = bake(base, tmp_path / "out.safetensors", ratio=0.3)
    with safetensors.safe_open(base, "pt") as ours, safetensors.safe_open(output, "pt") as theirs:
        assert theirs.keys() == ours.keys()
        assert theirs.offset_keys() == ours.offset_keys()
        assert theirs.metadata()["note"] == "kept"
        assert theirs.metadata()["format"] == "pt"
    dense, pruned = safetensors.torch.load_file(base), safetensors.torch.load_file(output)
    zeros = 0
    for name, weights in pruned.items():
        assert (weights.shape, weights.dtype) == (dense[name].shape, dense[name].dtype)
        same = torch.eq(weights, dense[name])
        assert not weights[~same].any()
        zeros += int((~same).sum())
    assert zeros
    if "flux" not in table:  # NumPy has no bfloat16
        arrays = safetensors.numpy.load_file(output)
        assert {name: array.tobytes() for name, array in arrays.items()} == {
            name: weights.numpy().tobytes() for name, weights in pruned.items()
        }


def test_safetensors_opens_an_embedded_residual(tmp_path: Path) -> None:
    base = makers.write(tmp_path / "base.safetensors", makers.tiny("sd15.original"))
    output = bake(base, tmp_path / "out.safetensors", ratio=0.3, residual="embed")
    with safetensors.safe_open(base, "pt") as ours, safetensors.safe_open(output, "pt") as theirs:
        # The order of a dict that a loader makes: no name of the model comes after one of these.
        assert theirs.keys() == [*ours.keys(), "zz_crdiff.header", "zz_crdiff.residual"]
        assert theirs.offset_keys() == [*ours.offset_keys(), "zz_crdiff.residual", "zz_crdiff.header"]
        values = theirs.get_tensor("zz_crdiff.residual")
    assert (values.dtype, values.ndim) == (torch.uint8, 1)
    pruned = safetensors.torch.load_file(output)
    plain = safetensors.torch.load_file(bake(base, tmp_path / "plain.safetensors", ratio=0.3))
    assert_same({name: weights for name, weights in pruned.items() if not name.startswith("zz_")}, plain)


def test_safetensors_opens_flags_and_empty_tensors(tmp_path: Path) -> None:
    """ComfyUI tells an SDXL's prediction by tensors of no element."""
    flags: dict[str, tuple[str, makers.Shape, bytes]] = {
        "v_pred": ("F32", (0,), b""), "ztsnr": ("F16", (0,), b""), "edm_mean": ("F32", (), b"\x00\x00\x80\x3f"),
    }  # fmt: skip
    base = makers.write(tmp_path / "base.safetensors", {**makers.tiny("sdxl.original"), **flags})
    with safetensors.safe_open(bake(base, tmp_path / "out.safetensors", ratio=0.3), "pt") as file:
        assert (list(file.get_tensor("v_pred").shape), list(file.get_tensor("ztsnr").shape)) == ([0], [0])
        assert file.get_tensor("edm_mean").item() == 1.0


# diffusers, with the reference's own words for what is pruned.


def prune_unet(unet: torch.nn.Module, ratios: Mapping[str, float]) -> State:
    """The paper's code on a loaded UNet: names as words, one threshold per group, a mask (`prune_by_ratio`)."""
    for group, ratio in ratios.items():
        weights = [
            module.weight.data
            for name, module in unet.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
            and name.startswith(group)
            and ("attn" in name or "ff" in name)
            and "attn2" not in name
        ]
        everything = torch.cat([some.abs().flatten() for some in weights])
        threshold = torch.kthvalue(everything, max(1, int(everything.numel() * ratio))).values
        for some in weights:
            some.mul_(some.abs() > threshold)
    return unet.state_dict()


def prune_transformer(model: torch.nn.Module, ratio: float) -> State:
    """The paper's code on a loaded transformer: one threshold per layer, by the ends of names (`prune_magnitude`)."""
    ends = tuple(f"{attn}.{layer}" for attn in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0"))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith((*ends, "ff.net.0.proj", "ff.net.2")):
            weights = module.weight.data
            threshold = torch.kthvalue(weights.abs().flatten(), int(weights.numel() * ratio)).values
            weights.mul_(weights.abs() > threshold)
    return model.state_dict()


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Equal but for the sign of zeros: the reference multiplies by its mask."""
    assert set(found) == set(expected)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@contextmanager
def complaints() -> Iterator[list[str]]:
    """What diffusers and transformers log as a warning or worse."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    listener = Listener(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(listener)
    try:
        yield heard
    finally:
        for logger in loggers:
            logger.removeHandler(listener)


def loaded(load: Callable[[Path], Any], base: Path, output: Path) -> tuple[Any, Any]:
    """What a library makes of the base and of the output, with the same complaints about both."""
    with complaints() as about_base:
        dense = load(base)
    with complaints() as about_output:
        pruned = load(output)
    assert [text.replace(str(output), str(base)) for text in about_output] == about_base
    return dense, pruned


# Narrow as makers.narrow makes them: every width a 64th, those of the text as they are.
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "block_out_channels": [5, 10, 20, 20],
        "cross_attention_dim": 768,
        "attention_head_dim": 5,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "sd21": {
        "block_out_channels": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "sdxl": {
        "block_out_channels": [5, 10, 20],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    },
}
FULL: dict[str, dict[str, Any]] = {
    "sd15": {**UNETS["sd15"], "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8},
    "sdxl": {**UNETS["sdxl"], "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20]},
}


def unet_config(folder: Path, config: Mapping[str, Any], groups: int) -> Path:
    """A pipeline's folder with nothing but its UNet's config."""
    common = {
        "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "sample_size": 64,
        "layers_per_block": 2, "norm_num_groups": groups, "mid_block_type": "UNetMidBlock2DCrossAttn",
    }  # fmt: skip
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps({**common, **config}))
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


@pytest.mark.parametrize(
    ("family", "residual"), [("sd15", "none"), ("sd15", "embed"), ("sd21", "none"), ("sdxl", "embed")]
)
def test_diffusers_loads_the_unet_of_a_single_file(family: str, residual: str, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    config = unet_config(tmp_path / "config", UNETS[family], groups=5)
    base = makers.write(tmp_path / "base.safetensors", makers.tiny(f"{family}.original"))
    output = bake(base, tmp_path / "out.safetensors", ratios=RATIOS, residual=residual)

    def load(path: Path) -> Any:
        return UNet2DConditionModel.from_single_file(
            str(path), config=str(config), subfolder="unet", local_files_only=True, torch_dtype=torch.float16
        )

    dense, pruned = loaded(load, base, output)
    assert_loaded_whole(dense, base)
    assert_same(pruned.state_dict(), prune_unet(dense, RATIOS))


def assert_loaded_whole(unet: torch.nn.Module, path: Path) -> None:
    """Every tensor of the file's UNet is in the model, and every tensor of the model is from there."""
    file = safetensors.torch.load_file(path)
    content = sorted(weights.numpy().tobytes() for name, weights in file.items() if name.startswith(PREFIX))
    assert sorted(weights.numpy().tobytes() for weights in unet.state_dict().values()) == content


@pytest.mark.parametrize("table", ["sd3-medium", "sd35-medium", "sd35-large", "flux-dev", "flux-schnell"])
def test_diffusers_converts_a_transformer_beside_a_residual(table: str) -> None:
    """Its converters look for parts of names in all of the file; at full size, without weights."""
    from diffusers.loaders import single_file_utils

    kind = "flux" if table.startswith("flux") else "sd3"
    convert = getattr(single_file_utils, f"convert_{kind}_transformer_checkpoint_to_diffusers")
    plain = {
        PREFIX + name.removeprefix(PREFIX): torch.empty(shape, device="meta")
        for name, (_, shape) in geometry_tables.load(f"{table}.original-transformer").items()
    }
    residual = {
        spec.name: torch.empty(spec.shape, device="meta", dtype=torch.uint8) for spec in tensor_specs(0, 100, 10)
    }
    assert set(residual) == {"zz_crdiff.residual", "zz_crdiff.header"}
    assert set(convert({**plain, **residual})) == set(convert(dict(plain)))


def test_diffusers_loads_a_whole_pipeline(tmp_path: Path) -> None:
    """Beside a residual, of which it must make nothing."""
    from diffusers import StableDiffusionPipeline

    config = demo.config()
    request = ExportRequest("demo", Size(96, 64), tmp_path / "out.safetensors", ratios=RATIOS, residual="embed")
    output = export(request).written.path

    def load(path: Path) -> Any:
        return StableDiffusionPipeline.from_single_file(str(path), config=str(config), local_files_only=True)

    dense, pruned = loaded(load, demo.path(), output)
    assert_same(pruned.vae.state_dict(), dense.vae.state_dict())
    assert_same(pruned.text_encoder.state_dict(), dense.text_encoder.state_dict())
    images = []
    for pipe in (dense, pruned):
        pipe.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        image = pipe("a cat", num_inference_steps=2, height=64, width=96, generator=seed, output_type="np").images[0]
        assert image.shape == (64, 96, 3)
        assert np.isfinite(image).all()
        images.append(image)
    assert not np.array_equal(*images)
    assert_same(pruned.unet.state_dict(), prune_unet(dense.unet, RATIOS))


@pytest.mark.parametrize(("variant", "shards"), [(None, False), ("fp16", True)], ids=["plain", "fp16 shards"])
def test_diffusers_loads_a_folder(shards: bool, variant: str | None, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(demo.config() / "unet")).half()
    base = shutil.copytree(demo.config(), tmp_path / "base")
    unet.save_pretrained(base / "unet", variant=variant, max_shard_size="300KB" if shards else "1GB")
    output = bake(base, tmp_path / "out", ratios=RATIOS)
    weights = sorted(path.name for path in (output / "unet").glob("*.safetensors"))
    assert weights == sorted(path.name for path in (base / "unet").glob("*.safetensors"))
    assert (len(weights) > 1) == shards

    def load(path: Path) -> Any:
        return UNet2DConditionModel.from_pretrained(
            path, subfolder="unet", variant=variant, local_files_only=True, torch_dtype=torch.float16
        )

    dense, pruned = loaded(load, base, output)
    assert_same(dense.state_dict(), unet.state_dict())
    assert_same(pruned.state_dict(), prune_unet(unet, RATIOS))


SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 4096, "caption_projection_dim": 16, "pooled_projection_dim": 8,
    "pos_embed_max_size": 8,
}  # fmt: skip
FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 4096, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
# As deep as the real ones, which is what tells families apart, and no wider than it takes.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3-medium": ("SD3Transformer2DModel", {**SD3, "num_layers": 24}),
    "sd35-medium": (
        "SD3Transformer2DModel",
        {**SD3, "num_layers": 24, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
    ),
    "sd35-large": ("SD3Transformer2DModel", {**SD3, "num_layers": 38, "qk_norm": "rms_norm"}),
    "flux-dev": ("FluxTransformer2DModel", {**FLUX, "guidance_embeds": True}),
    "flux-schnell": ("FluxTransformer2DModel", {**FLUX, "guidance_embeds": False}),
}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_diffusers_loads_a_transformer(family: str, tmp_path: Path) -> None:
    import diffusers

    name, config = TRANSFORMERS[family]
    model_class = getattr(diffusers, name)
    torch.manual_seed(0)
    model = model_class(**config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base" / "transformer", max_shard_size="200KB")
    output = bake(tmp_path / "base", tmp_path / "out", ratio=0.3)
    assert architecture_of(output) == family

    def load(path: Path) -> Any:
        return model_class.from_pretrained(
            path, subfolder="transformer", local_files_only=True, torch_dtype=torch.bfloat16
        )

    dense, pruned = loaded(load, tmp_path / "base", output)
    assert_same(dense.state_dict(), model.state_dict())
    assert_same(pruned.state_dict(), prune_transformer(model, 0.3))


def architecture_of(folder: Path) -> str:
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    (family,) = {makers.metadata_of(shard)["crdiff.family"] for shard in shards}
    return family


# sd-mecha, a merger with tables of its own of what a checkpoint has to hold.


@pytest.mark.parametrize(
    ("residual", "without"), [pytest.param("none", None, marks=pytest.mark.slow), ("embed", "zz_crdiff.")]
)
def test_sd_mecha_merges_it(
    residual: str, without: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It leaves out what it does not know: a merged file has no residual that would not be its own."""
    base = makers.write(tmp_path / "base.safetensors", makers.tiny("sd15.original"))
    assert_merged(bake(base, tmp_path / "out.safetensors", ratio=0.3, residual=residual), without)
    assert residual != "none" or not caplog.records


def assert_merged(path: Path, without: str | None = None) -> None:
    """A merge of nothing but this file gives all of it, or all but what begins `without`."""
    import sd_mecha

    silent = partial(importlib.import_module("tqdm").tqdm, disable=True)
    merged = sd_mecha.merge(
        sd_mecha.model(path),
        merge_dtype=None, output_dtype=None, threads=0, omit_non_finite_inputs=False, tqdm=silent,
    )  # fmt: skip
    merged.pop("__metadata__")
    file = safetensors.torch.load_file(path)
    assert_same(merged, {name: some for name, some in file.items() if not (without and name.startswith(without))})


def inferred(path: Path) -> str:
    """The name of the configuration that a file fits, without a key missing or left over."""
    import sd_mecha
    from sd_mecha.graph_finalization import open_graph

    with open_graph(sd_mecha.model(path), solve_merge_space=False) as graph:
        return str(graph.finalize_root(check_extra_keys=True, check_mandatory_keys=True).model_config.identifier)


# Loaders that are not here, by what their code demands of a header, at full size.


def planned(table: str, folder: Path, kinds: Sequence[str] | None = None) -> Plan:
    base = makers.write_sparse(folder / "base.safetensors", table)
    targets = None if kinds is None else tuple(kinds)
    return prepare(ExportRequest(str(base), SIZE, folder / "out.safetensors", targets=targets)).plan


def full_header(plan: Plan) -> bytes:
    """The header that a full-size export gets, with thresholds as long as they come."""
    longest = tuple(
        Threshold(dtypes.value(0x3DCCCCCD + i), scope.count, scope.count, 1) for i, scope in enumerate(plan.scopes)
    )
    model = architecture.find(plan)
    stamp = metadata.stamp(plan, Decision(longest), "magnitude", "base.safetensors", model)
    (output,) = plan.outputs
    hashes = metadata.Hashes("0x" + "0" * 64, None, "0x" + "0" * 64)
    return header.serialise(output.tensors, metadata.header(plan, stamp, model, output.source.metadata, hashes))


@pytest.mark.parametrize("table", geometry_tables.names())
def test_full_size_headers_are_for_every_loader(table: str, tmp_path: Path) -> None:
    family = families.by_id(table.partition(".")[0])
    plan = planned(table, tmp_path, family.kinds)
    raw = full_header(plan)
    (length,) = struct.unpack("<Q", raw[:8])
    assert length == len(raw) - 8
    assert length < 1 << 20  # ComfyUI answers /view_metadata with 404 beyond
    assert raw[8:].startswith(b'{"')  # A1111 asserts it
    entries = json.loads(raw[8:])
    said = entries.pop("__metadata__")
    for text in said.values():
        assert isinstance(text, str)
        assert not text.startswith("{")  # A1111 would read it as an object, and not be able to save it again
    width, _, height = said["modelspec.resolution"].partition("x")  # SwarmUI: BeforeAndAfter('x'), int.Parse
    assert (int(width), int(height)) == (512, 768)
    assert ("crdiff.thresholds" in said) == (family.scope == "layer")
    position = 0
    for entry in sorted(entries.values(), key=lambda entry: entry["data_offsets"]):
        start, end = entry["data_offsets"]
        size = makers.SIZES[entry["dtype"]]
        assert start == position
        assert end - start == math.prod(entry["shape"]) * size
        assert (len(raw) + start) % size == 0  # torch.frombuffer wants it aligned (ComfyUI)
        position = end


@pytest.mark.parametrize(("table", "config"), [("sd15.original", "sd1-ldm"), ("sdxl.original", "sdxl-sgm")])
def test_sd_mecha_knows_full_size_headers(table: str, config: str, tmp_path: Path) -> None:
    plan = planned(table, tmp_path)
    raw = full_header(plan)
    with (tmp_path / "out.safetensors").open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + plan.data_size)
    assert inferred(tmp_path / "out.safetensors") == inferred(tmp_path / "base.safetensors") == config


def test_no_cast_leaves_tensors_where_they_were(tmp_path: Path) -> None:
    plan = planned("sdxl.original", tmp_path)
    assert plan.outputs[0].tensors == plan.checkpoint.files[0].tensors


# Full size, by `pytest -m slow`.


def full_base(folder: Path, table: str) -> Path:
    """A full-size checkpoint whose tensors have a few hundred weights each, and zeros in a hole for the rest."""
    path = makers.write_sparse(folder / "base.safetensors", table)
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
        entries.pop("__metadata__")
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            size = makers.SIZES[entry["dtype"]]
            file.seek(8 + length + start)
            file.write(makers.weights(name, entry["dtype"], (min((end - start) // size, 512),)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("family", FULL)
def test_full_size_files_load(family: str, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    config = unet_config(tmp_path / "config", FULL[family], groups=32)
    base = full_base(tmp_path, f"{family}.original")
    output = bake(base, tmp_path / "out.safetensors", ratio=0.9999)
    assert inferred(output) == inferred(base)

    def load(path: Path) -> Any:
        return UNet2DConditionModel.from_single_file(
            str(path), config=str(config), subfolder="unet", local_files_only=True, torch_dtype=torch.float16
        )

    expected = prune_unet(load(base), dict.fromkeys(RATIOS, 0.9999))
    assert_same(load(output).state_dict(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", FULL)
def test_sd_mecha_merges_full_size(family: str, tmp_path: Path) -> None:
    assert_merged(bake(full_base(tmp_path, f"{family}.original"), tmp_path / "out.safetensors", ratio=0.9999))
