"""UNets of no known family: their layers are read from their own names, as the public code's rule selects them."""

import random
import re
from typing import Any

import pytest

from crdiff_export.errors import FamilyError
from crdiff_export.models.families import Match, detect, is_built_in
from crdiff_export.models.families.model import LayoutName
from crdiff_export.models.families.structure import read_structure
from crdiff_export.models.families.table import parse_family
from crdiff_export.models.families.unet import unet_layouts
from tests.support import geometry_tables
from tests.support.messages import raises

Shapes = dict[str, tuple[int, ...]]
UNETS = [name for name in geometry_tables.names() if "unet" in name or name in ("sd15.original", "sdxl.original")]
BUNDLE = "model.diffusion_model."
SMALL: dict[str, Any] = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64), "cross_attention_dim": 24,
    "attention_head_dim": 8, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no mid block": {"mid_block_type": None},
    "a mid block without attention": {"mid_block_type": "UNetMidBlock2D"},
    "more layers": {"layers_per_block": 3},
    "layers by level": {"layers_per_block": (1, 2)},
    "deep": {"transformer_layers_per_block": (1, 11)},
    "depths by attention": {
        "layers_per_block": 2, "transformer_layers_per_block": [[1, 2], [3, 1]],
        "reverse_transformer_layers_per_block": [[1, 2, 3], [4, 1, 1]],
    },
    "a level without attention": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "three levels": {
        "block_out_channels": (32, 64, 64), "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
    "linear projections": {"use_linear_projection": True},
    "two texts": {"dual_cross_attention": True},
    "two self-attentions": {"only_cross_attention": False, "cross_attention_dim": 16},
    "only cross-attention": {"only_cross_attention": (True, False)},
    "boxes of GLIGEN": {"attention_type": "gated", "cross_attention_dim": 768},
    "classes": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 40},
    "sizes": {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 88
    },
    "text of another encoder": {"encoder_hid_dim": 48, "encoder_hid_dim_type": "text_proj"},
    "eight channels": {"in_channels": 8},
    "SD x4 upscaler": {"in_channels": 7, "only_cross_attention": (True, False), "num_class_embeds": 1000},
    "attention blocks without text": {
        "down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "AttnUpBlock2D"),
    },
    "resnets that resample": {"resnet_time_scale_shift": "scale_shift"},
}  # fmt: skip


def unet(**options: Any) -> Any:
    import diffusers
    import torch

    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**SMALL | options)


def reference(net: Any) -> dict[str, str]:
    """The public code's rule on the modules of a model: the group of each weight that it prunes."""
    import torch

    chosen = {}
    for path, module in net.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and ("attn" in path or "ff" in path):
            group = path.split("_")[0]
            if group in ("down", "mid", "up") and "attn2" not in path:
                chosen[f"{path}.weight"] = group
    return chosen


def shapes_of(net: Any) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def targets(match: Match) -> dict[str, str]:
    return {layer.tensor: layer.group for layer in match.layout.layers}


@pytest.mark.parametrize("name", OPTIONS)
def test_targets_are_those_of_the_reference(name: str) -> None:
    net = unet(**OPTIONS[name])
    match = detect(shapes_of(net))
    assert match.family.id == "unet"
    assert targets(match) == reference(net)
    assert detect(shapes_of(net), parse_family(match.family.table, "header", foreign=True)) == match
    assert set(match.family.groups) == set(reference(net).values())
    assert (match.family.architecture, match.family.native) == ("", None)


@pytest.mark.parametrize("table", UNETS)
def test_known_models_have_the_same_layers_by_their_structure(table: str) -> None:
    shapes = {name.removeprefix(BUNDLE): shape for name, (_, shape) in geometry_tables.load(table).items()}
    match, structure = detect(shapes), read_structure(shapes)
    assert structure
    assert sorted(map(repr, structure.layers)) == sorted(map(repr, match.layout.layers))
    assert structure.groups == match.family.groups


@pytest.mark.parametrize("prefix", ["", BUNDLE, "unet.", "model."])
def test_a_prefix_and_other_parts_do_not_matter(prefix: str) -> None:
    shapes = {f"{prefix}{name}": shape for name, shape in shapes_of(unet()).items()}
    match = detect(shapes | {"first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3)})
    assert (match.family.id, match.prefix, match.layout.name) == ("unet", prefix, "diffusers")


def others(layout: LayoutName, levels: int, layers: int) -> list[str]:
    """The names of a UNet's convolutions."""
    blocks = levels * (layers + 1)
    if layout == "original":
        names = ["input_blocks.0.0.weight", "out.2.weight"]
        names += [f"input_blocks.{i}.0.in_layers.2.weight" for i in range(1, blocks)]
        names += [f"output_blocks.{i}.0.in_layers.2.weight" for i in range(blocks)]
        names += [f"input_blocks.{i * (layers + 1)}.0.op.weight" for i in range(1, levels)]
        names += [f"output_blocks.{i * (layers + 1) - 1}.2.conv.weight" for i in range(1, levels)]
    else:
        names = ["conv_in.weight", "conv_out.weight"]
        names += [f"down_blocks.{i}.resnets.{j}.conv1.weight" for i in range(levels) for j in range(layers)]
        names += [f"up_blocks.{i}.resnets.{j}.conv1.weight" for i in range(levels) for j in range(layers + 1)]
        names += [f"down_blocks.{i}.downsamplers.0.conv.weight" for i in range(levels - 1)]
    return names


def random_unet(seed: int, layout: LayoutName) -> Shapes:
    """A UNet of any depths, with or without a middle and gated layers, its names in any order."""
    choose = random.Random(seed)
    layers = choose.randint(1, 3)
    levels = choose.randint(1, 4)

    def depths(attentions: int) -> tuple[tuple[int, ...], ...]:
        stacks = [tuple(choose.choice((1, 2, 11)) for _ in range(attentions)) for _ in range(levels)]
        return tuple(stack if choose.random() < 0.7 else (0,) * attentions for stack in stacks)

    first = choose.randint(1, 3)
    down = ((first,) * layers, *depths(layers)[1:])
    geometry = unet_layouts(down, mid=choose.choice((0, 1, 10)), context=8, layers=layers, up=depths(layers + 1))
    names = [layer.tensor for layer in next(each for each in geometry if each.name == layout).layers]
    gated = choose.choice(("", "attn1.to_q", "ff.net.2"))
    if gated:  # GLIGEN's layers, in some of the blocks
        ends = [name for name in names if name.endswith(f"{gated}.weight") and choose.random() < 0.5]
        names += [name.replace(gated, f"fuser.{gated.replace('attn1', 'attn')}") for name in ends]
    names += others(layout, levels, layers)
    choose.shuffle(names)
    shapes: Shapes = dict.fromkeys(names, (4, 4))
    if choose.random() < 0.5:
        shapes["label_emb.0.0.weight" if layout == "original" else "class_embedding.linear_1.weight"] = (8, 40)
    return shapes


@pytest.mark.parametrize("seed", range(40))
def test_its_table_gives_the_same_layers_again(seed: int) -> None:
    tables = {}
    for layout in ("original", "diffusers"):
        shapes = random_unet(seed, layout)
        structure = read_structure(shapes)
        assert structure
        assert {layer.tensor for layer in structure.layers} == {name for name in shapes if re.search("attn|ff", name)}
        family = parse_family(structure.table(40), "header", foreign=True)
        assert family.layouts[layout == "diffusers"].layers == structure.layers
        assert (family.groups, family.scope, family.vector) == (structure.groups, "group", 40)
        shuffled = read_structure(dict(sorted(shapes.items())))
        assert shuffled
        assert shuffled.table(40) == family.table, "the order of the names does not matter"
        match = detect({f"{BUNDLE}{name}": shape for name, shape in shapes.items()})
        if not is_built_in(match.family.id):
            assert match.layout.layers == structure.layers
            header = parse_family(match.family.table, "header", foreign=True)
            assert detect({f"{BUNDLE}{name}": shape for name, shape in shapes.items()}, header) == match
        tables[layout] = family.table
    assert tables["original"] == tables["diffusers"]


def test_other_parts_with_layers_of_such_names_are_no_targets() -> None:
    """As an image encoder of IP-Adapter that was saved with its UNet."""
    net = unet(layers_per_block=3)
    shapes = shapes_of(net) | {"encoder_hid_proj.image_projection_layers.0.ff.net.2.weight": (8, 8)}
    match = detect(shapes)
    assert targets(match) == reference(net)
    assert detect(shapes, parse_family(match.family.table, "header", foreign=True)) == match


def test_the_table_of_a_deep_unet_is_short() -> None:
    """Eleven attentions of 80 blocks."""
    layers = unet_layouts((80, 80), mid=80, context=8)[1].layers
    match = detect(dict.fromkeys([*(layer.tensor for layer in layers), *others("diffusers", 2, 2)], (4, 4)))
    assert len(match.layout.layers) == 11 * 80 * 6
    assert len(match.family.table) < 20_000


def test_channels_make_it_special_without_an_architecture() -> None:
    match = detect(shapes_of(unet(in_channels=9)))
    assert match.special
    assert (match.special.id, match.special.architecture) == ("9-channels", "")
    assert match.title == "UNet, with 9 input channels"


@pytest.mark.parametrize(
    "gone",
    [
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "up_blocks.1.attentions.1",
        "down_blocks.1.attentions.0.transformer_blocks.1",
        "up_blocks.0.attentions.0",
        "down_blocks.0",
        "up_blocks.1",
    ],
)
def test_a_part_that_is_missing_is_named(gone: str) -> None:
    """Never is a damaged model taken for another one with fewer layers."""
    levels = {"block_out_channels": (32, 64, 64), "down_block_types": ("CrossAttnDownBlock2D",) * 3}
    net = unet(transformer_layers_per_block=(1, 3, 1), up_block_types=("CrossAttnUpBlock2D",) * 3, **levels)
    shapes = {name: shape for name, shape in shapes_of(net).items() if not name.startswith(gone)}
    with raises(FamilyError, gone):
        detect(shapes)


@pytest.mark.parametrize("table", ["sd15.original", "sd15.diffusers-unet"])
def test_a_known_model_without_its_middle_is_another_one(table: str) -> None:
    shapes = {name.removeprefix(BUNDLE): shape for name, (_, shape) in geometry_tables.load(table).items()}
    match = detect({name: shape for name, shape in shapes.items() if not name.startswith("mid")})
    assert (match.family.id, match.family.groups, len(match.layout.layers)) == ("unet", ("down", "up"), 90)


def test_a_known_model_that_lacks_a_part_is_not_another_one() -> None:
    shapes = {name: shape for name, (_, shape) in geometry_tables.load("sdxl.diffusers-unet").items()}
    last = "mid_block.attentions.0.transformer_blocks.9."
    with raises(FamilyError, "nearest is SDXL", last):
        detect({name: shape for name, shape in shapes.items() if not name.startswith(last)})


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.weight",
        "down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q.weight",
        "up_blocks.0.temp_attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "input_blocks.1.1.time_stack.0.attn1.to_q.weight",
    ],
)
def test_layers_over_time_are_refused(name: str) -> None:
    with raises(FamilyError, name):
        detect(shapes_of(unet()) | {name: (32, 32)})


@pytest.mark.parametrize("end", ["to_q.lora_A.weight", "to_q.base_layer.weight", "processor.to_q_lora.down.weight"])
def test_an_adapter_that_is_not_fused_is_refused(end: str) -> None:
    name = f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.{end}"
    with raises(FamilyError, name):
        detect(shapes_of(unet(layers_per_block=3)) | {name: (4, 32)})


def test_a_convolution_that_the_rule_selects_is_not_left_out_silently() -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.conv.weight"
    with raises(FamilyError, name):
        detect(shapes_of(unet(layers_per_block=3)) | {name: (4, 4, 3, 3)})


@pytest.mark.parametrize("part", ["{0..3}", 'q"', "to_q\n", "00", "9" * 5000])
def test_a_name_that_no_table_can_hold_is_refused(part: str) -> None:
    name = f"down_blocks.0.attentions.0.transformer_blocks.{part}.attn1.to_q.weight"
    with pytest.raises(FamilyError) as caught:
        detect(shapes_of(unet(layers_per_block=3)) | {name: (32, 32)})
    assert caught.value.message.startswith("down_blocks.0.attentions.0.transformer_blocks.")
    assert caught.value.message.isprintable()


def test_a_controlnet_alone_is_no_unet() -> None:
    shapes = {re.sub("^conv_out", "controlnet_mid_block", name): shape for name, shape in shapes_of(unet()).items()}
    with pytest.raises(FamilyError):
        detect(shapes)


def test_a_layer_outside_of_the_blocks_is_refused() -> None:
    with raises(FamilyError, "down_blocks.0.extra.attn1.to_q.weight"):
        detect(shapes_of(unet(layers_per_block=3)) | {"down_blocks.0.extra.attn1.to_q.weight": (32, 32)})
