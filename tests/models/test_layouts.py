"""The names, shapes and configurations of models in their other layout, over tables of real models."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from crdiff_export.errors import PlanError
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.safetensors import BITS, TensorSpec
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.models import families
from crdiff_export.models.families import LayoutName, by_id
from crdiff_export.models.layouts import change_layout
from tests.support import geometry_tables
from tests.support.messages import raises

Table = dict[str, tuple[str, tuple[int, ...]]]
BOTH = ("demo", "sd15", "sd21", "sdxl", "sdxl-refiner", "sd3-medium", "sd35-medium", "sd35-large", "flux-dev",
        "flux-schnell", "flux-lite")  # fmt: skip
# Their number of heads is in no table, so diffusers' configuration cannot be written.
TO_ORIGINAL = ("ssd-1b", "vega", "koala-1b", "koala-700m", "sdxs-512")
# The rest of a bundle, which a folder has in other components.
BESIDE = ("cond_stage_model.", "first_stage_model.", "conditioner.", "alphas", "betas", "model_ema.")


def checkpoint(table: Table) -> Checkpoint:
    """A checkpoint whose file has the table's tensors and no bytes."""
    specs, position = [], 0
    for name, (dtype, shape) in table.items():
        size = torch.Size(shape).numel() * BITS[dtype] // 8
        specs.append(TensorSpec(name, dtype, shape, position, position + size))
        position += size
    path = Path("model.safetensors")
    return Checkpoint(path, "file", (SourceFile(path, path.name, tuple(specs), {}, 8, None),))


def tables(family: str) -> tuple[Table, Table]:
    """A family's tables in the original layout, without text encoders and VAE, and in diffusers."""
    names = geometry_tables.names()
    original = next(name for name in names if name.startswith(f"{family}.original"))
    other = next(name for name in names if name.startswith(f"{family}.diffusers"))
    whole = geometry_tables.load(original)
    return {k: v for k, v in whole.items() if not k.startswith(BESIDE)}, geometry_tables.load(other)


def changed(table: Table, to: LayoutName) -> Checkpoint:
    base = checkpoint(table)
    return change_layout(base, families.detect(base.shapes), to)


@pytest.mark.parametrize("family", [*BOTH, *TO_ORIGINAL])
def test_diffusers_becomes_the_original(family: str) -> None:
    original, other = tables(family)
    made = {t.name: (t.dtype, t.shape) for t in changed(other, "original").files[0].tensors}
    assert {k: shape for k, (_, shape) in made.items()} == {k: shape for k, (_, shape) in original.items()}
    assert {dtype for dtype, _ in made.values()} == {dtype for dtype, _ in other.values()}


@pytest.mark.parametrize("family", BOTH)
def test_original_becomes_diffusers(family: str) -> None:
    original, other = tables(family)
    after = changed(original, "diffusers")
    assert after.kind == "folder"
    assert after.shapes == {k: shape for k, (_, shape) in other.items()}


@pytest.mark.parametrize("family", BOTH)
def test_configuration_builds_the_model(family: str) -> None:
    original, other = tables(family)
    config = json.loads(changed(original, "diffusers").generated["config.json"])
    network: Any = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        model = network.from_config(config)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {k: shape for k, (_, shape) in other.items()}
    pipeline = by_id(family).pipelines[""]
    assert config["_class_name"] == pipeline.network


def test_what_shapes_do_not_tell_of_published_configurations() -> None:
    # The published unet/config.json and transformer/config.json of these models.
    published: dict[str, dict[str, Any]] = {
        "sd15": {"attention_head_dim": 8, "sample_size": 64, "use_linear_projection": False},
        "sd21": {"attention_head_dim": [5, 10, 20, 20], "sample_size": 96, "use_linear_projection": True},
        "sdxl": {"attention_head_dim": [5, 10, 20], "sample_size": 128, "transformer_layers_per_block": [1, 2, 10],
                 "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                 "projection_class_embeddings_input_dim": 2816},
        "sdxl-refiner": {"attention_head_dim": [6, 12, 24, 24], "transformer_layers_per_block": 4,
                         "projection_class_embeddings_input_dim": 2560, "addition_time_embed_dim": 256},
        "sd3-medium": {"num_attention_heads": 24, "attention_head_dim": 64, "pos_embed_max_size": 192,
                       "sample_size": 128, "qk_norm": None, "dual_attention_layers": []},
        "sd35-medium": {"num_attention_heads": 24, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
                        "dual_attention_layers": list(range(13))},
        "sd35-large": {"num_attention_heads": 38, "num_layers": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
        "flux-dev": {"num_attention_heads": 24, "attention_head_dim": 128, "guidance_embeds": True, "num_layers": 19,
                     "num_single_layers": 38, "joint_attention_dim": 4096, "pooled_projection_dim": 768},
        "flux-schnell": {"guidance_embeds": False},
    }  # fmt: skip
    for family, values in published.items():
        config = json.loads(changed(tables(family)[0], "diffusers").generated["config.json"])
        assert {key: config[key] for key in values} == values, family


@pytest.mark.parametrize("family", BOTH)
def test_there_and_back_is_the_same(family: str) -> None:
    original, _ = tables(family)
    there = changed(original, "diffusers")
    back = change_layout(there, families.detect(there.shapes), "original")
    assert back.shapes == {k: shape for k, (_, shape) in original.items()}


def test_the_same_layout_is_the_checkpoint_itself() -> None:
    base = checkpoint(tables("sd15")[1])
    assert change_layout(base, families.detect(base.shapes), "diffusers") is base


def refuse(table: Table, to: LayoutName, *keys: object) -> None:
    with raises(PlanError, *keys):
        changed(table, to)


def test_a_tensor_without_counterpart_is_refused() -> None:
    table = tables("sd15")[1]
    key = "up_blocks.0.adapter.weight"
    refuse({**table, key: ("F16", (4, 4))}, "original", key)


def test_a_missing_part_of_a_fused_tensor_is_refused() -> None:
    table = tables("flux-dev")[1]
    key = "single_transformer_blocks.7.proj_mlp.weight"
    refuse({k: v for k, v in table.items() if k != key}, "original", key)


def test_parts_of_two_dtypes_are_refused() -> None:
    table = tables("sd3-medium")[1]
    key = "transformer_blocks.3.attn.add_k_proj.weight"
    refuse({**table, key: ("F32", table[key][1])}, "original", key, "F32")


def test_rows_that_are_not_those_of_the_parts_are_refused() -> None:
    table = tables("sd3-medium")[0]
    key = "model.diffusion_model.joint_blocks.3.context_block.attn.qkv.bias"
    refuse({**table, key: ("F16", (3 * 1536 + 1,))}, "diffusers", "joint_blocks.3.context_block.attn.qkv.bias")


@pytest.mark.parametrize("family", ["chroma", "qwen-image", "lumina-2", "z-image"])
def test_families_whose_layouts_are_not_changed_are_refused(family: str) -> None:
    refuse(geometry_tables.load(f"{family}.diffusers-transformer"), "original", by_id(family).title)


@pytest.mark.parametrize("family", TO_ORIGINAL)
def test_unknown_numbers_of_heads_are_refused(family: str) -> None:
    refuse(tables(family)[0], "diffusers", by_id(family).title)


def test_pooled_text_and_a_picture_have_other_names_in_diffusers() -> None:
    names = {name for name in changed(tables("sdxl")[0], "diffusers").shapes if "embedding" in name}
    assert "add_embedding.linear_1.weight" in names
    layers = [f"model.diffusion_model.label_emb.0.{i}" for i in (0, 2)]
    vector: Table = {f"{name}.weight": ("F16", (1280, 1280)) for name in layers}
    unclip = {**tables("sd21")[0], **vector, **{f"{name}.bias": ("F16", (1280,)) for name in layers}}
    config = json.loads(changed(unclip, "diffusers").generated["config.json"])
    assert config["class_embed_type"] == "projection"
