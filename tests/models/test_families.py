"""Families: each is recognised in every layout and behind every prefix, its targets follow the method's rule."""

import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

import pytest

from crdiff_export.errors import FamilyError
from crdiff_export.models.families import Match, all_families, by_id, detect, quantisation
from crdiff_export.models.families.model import Layout
from tests.support import geometry_tables, oracle
from tests.support.family_rows import ROWS
from tests.support.messages import raises

Shapes = dict[str, tuple[int, ...]]

BUNDLE = "model.diffusion_model."
QUERY = "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
PREFIXES = ("model.diffusion_model.", "model.model.", "net.", "model.", "diffusion_model.", "unet.", "transformer.", "")
TABLES = geometry_tables.names()


def load(table: str) -> Shapes:
    return {name: shape for name, (_, shape) in geometry_tables.load(table).items()}


def model(table: str) -> Shapes:
    """The UNet or transformer alone, without prefix."""
    shapes = load(table)
    bundled = {name.removeprefix(BUNDLE): shape for name, shape in shapes.items() if name.startswith(BUNDLE)}
    return bundled or shapes


def prefixed(shapes: Shapes, prefix: str) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def family_of(table: str) -> str:
    return table.partition(".")[0]


def layout_of(table: str) -> Layout:
    kind = table.partition(".")[2]
    return next(layout for layout in by_id(family_of(table)).layouts if kind.startswith(layout.name))


def summary(match: Match) -> tuple[str, str, str, str, int]:
    special = match.special.id if match.special else ""
    return match.family.id, match.layout.name, match.prefix, special, match.ema_tensors


def check_refusal(shapes: Mapping[str, tuple[int, ...]], *keys: object) -> None:
    with raises(FamilyError, *keys) as caught:
        detect(shapes)
    assert "\n" not in caught.value.message


def check_short_refusal(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Assert that names from a hostile file are refused in one short printable line."""
    with pytest.raises(FamilyError) as caught:
        detect(shapes)
    assert caught.value.message.isprintable()
    assert caught.value.message.replace("…", "").isascii()  # a name that was cut ends with an ellipsis
    assert len(caught.value.message) < 1500
    assert caught.value.hint


# --- every family, layout and prefix is recognised


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda prefix: prefix or "none")
@pytest.mark.parametrize("table", TABLES)
def test_detects_behind_prefix(table: str, prefix: str) -> None:
    """The model alone, and with the rest of its bundle."""
    expected = (family_of(table), layout_of(table).name, prefix, "", 0)
    alone = prefixed(model(table), prefix)
    rest = {name: shape for name, shape in load(table).items() if not name.startswith(BUNDLE)}
    assert summary(detect(alone)) == expected
    if len(rest) < len(load(table)):
        assert summary(detect(rest | alone)) == expected


def test_every_family_has_a_row_and_every_layout_a_table() -> None:
    assert set(ROWS) == {family.id for family in all_families()}
    tables = {(family_of(table), layout_of(table).name) for table in TABLES}
    assert tables == {(family.id, layout.name) for family in all_families() for layout in family.layouts}


def test_order_of_names_is_irrelevant() -> None:
    assert summary(detect(dict(reversed(load("sdxl.original").items())))) == ("sdxl", "original", BUNDLE, "", 0)


# --- targets: that they follow the method's rule is proved on the bytes of an export, in tests/prune/test_exact.py


@pytest.mark.parametrize("table", ["sdxl.original", "sdxl.diffusers-unet"])
def test_sdxl_has_the_published_counts(table: str) -> None:
    shapes, layers = model(table), layout_of(table).layers
    weights = Counter[str]()
    for layer in layers:
        weights[layer.group] += prod(shapes[layer.tensor])
    assert len(layers) == 420
    assert {group: round(number / 1e6, 1) for group, number in weights.items()} == {
        "down": 550.5,
        "mid": 262.1,
        "up": 825.8,
    }


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.id)
def test_records_are_consistent(family: Any) -> None:
    assert set(family.default_kinds) <= set(family.kinds)
    assert [layout.name for layout in family.layouts] in (["original", "diffusers"], ["diffusers"])
    assert all(side % family.grid == 0 for side in family.native)
    for layout in family.layouts:
        assert {layer.group for layer in layout.layers} == set(family.groups)
        assert {layer.kind for layer in layout.layers} == set(family.kinds)
        assert all(layer.tensor.endswith(".weight") for layer in layout.layers)
        assert len({(layer.tensor, layer.part) for layer in layout.layers}) == len(layout.layers)
        for layer in layout.layers:
            place = layer.original if layout.name == "original" else (layer.diffusers, None)
            assert place == (layer.tensor, layer.part)


# --- and so says diffusers: its modules, and its converters from the original layout

REFERENCE_ENDINGS = tuple(
    f"{attn}.{leaf}" for attn in ("attn1", "attn2") for leaf in ("to_q", "to_k", "to_v", "to_out.0")
)
REFERENCE_ENDINGS += ("ff.net.0.proj", "ff.net.2")


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
@pytest.mark.parametrize("family", ROWS)
def test_default_targets_are_those_of_the_reference(family: str) -> None:
    """The public code's `prune_by_ratio` (UNets) and `prune_magnitude` (transformers), on diffusers modules."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    row = ROWS[family]
    with torch.device("meta"):
        net = getattr(diffusers, row.network)(**row.config)
    expected = {}
    for path, module in net.named_modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        if row.network.startswith("UNet"):
            group = path.split("_")[0]
            chosen = group in {"down", "mid", "up"} and ("attn" in path or "ff" in path) and "attn2" not in path
        else:
            named = path.endswith(REFERENCE_ENDINGS)
            group, chosen = "blocks", re.fullmatch(row.stream, path) is not None if row.stream else named
            assert not (row.stream and named)
        if chosen:
            expected[f"{path}.weight"] = group, tuple(module.weight.shape)
    match = detect({name: tuple(tensor.shape) for name, tensor in net.state_dict().items()})
    shapes = model(next(table for table in TABLES if table.startswith(f"{family}.diffusers")))
    layers = [layer for layer in match.layout.layers if layer.kind in match.family.default_kinds]
    assert summary(match) == (family, "diffusers", "", "", 0)
    assert match.family.default_kinds == row.kinds
    assert {layer.tensor: (layer.group, shapes[layer.tensor]) for layer in layers} == expected


CONVERTED = [  # diffusers has none for PixArt
    family for family in ROWS if len(by_id(family).layouts) == 2 and not family.startswith("pixart")
]


@pytest.mark.parametrize("family", CONVERTED)
def test_diffusers_converts_each_layer_to_its_twin(family: str) -> None:
    """Every row of the original carries the number of its tensor and part; the converter carries the numbers over."""
    torch = pytest.importorskip("torch")
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    original, twin = by_id(family).layouts
    shapes = model(next(table for table in TABLES if table.startswith(f"{family}.original")))
    number = {name: 10 * i for i, name in enumerate(shapes)}
    tensors = {name: torch.full((shape[0],), number[name]) for name, shape in shapes.items()}
    for layer in original.layers:
        if layer.part:
            start, stop = layer.rows(shapes[layer.tensor])
            tensors[layer.tensor][start:stop] += 1 + layer.part.first
    row = ROWS[family]
    if row.converter:
        converted = getattr(single_file, row.converter)(tensors)
    else:
        config = {"class_embed_type": None, "addition_embed_type": None, **row.config}
        bundle = {BUNDLE + name: tensor for name, tensor in tensors.items()}
        converted = single_file.convert_ldm_unet_checkpoint(bundle, config)
    for ours, theirs in zip(original.layers, twin.layers, strict=True):
        assert converted[theirs.tensor].unique().tolist() == [
            number[ours.tensor] + (1 + ours.part.first if ours.part else 0)
        ]


@pytest.mark.parametrize("table", [table for table in TABLES if "transformer" in table])
def test_every_kind_of_a_transformer_is_what_the_oracle_calls_one(table: str) -> None:
    """Also those that are pruned on request only."""
    left_out = ROWS[family_of(table)].left_out
    shapes = {name: shape for name, shape in model(table).items() if not name.startswith(left_out)}
    for kind in by_id(family_of(table)).kinds:
        expected = {
            (piece.tensor, piece.start, piece.stop)
            for name, shape in shapes.items()
            for piece in oracle.slices(0, name, shape, [kind], dit=True)
        }
        layers = [layer for layer in layout_of(table).layers if layer.kind == kind]
        width = {layer.tensor: shapes[layer.tensor][1] for layer in layers}
        places = [(layer.tensor, *layer.rows(shapes[layer.tensor])) for layer in layers]
        assert {(name, start * width[name], stop * width[name]) for name, start, stop in places} == expected, kind


# --- what else is noticed


@pytest.mark.parametrize(
    ("table", "first", "channels"),
    [
        ("sd15.original", "input_blocks.0.0.weight", 9),
        ("sd15.diffusers-unet", "conv_in.weight", 9),
        ("sdxl.original", "input_blocks.0.0.weight", 9),
        ("sdxl.diffusers-unet", "conv_in.weight", 9),
        ("flux-dev.original-transformer", "img_in.weight", 384),
        ("flux-dev.diffusers-transformer", "x_embedder.weight", 384),
    ],
)
def test_inpainting_is_noticed(table: str, first: str, channels: int) -> None:
    shapes = model(table)
    rows, _, *kernel = shapes[first]
    shapes[first] = (rows, channels, *kernel)
    assert summary(detect(shapes)) == (family_of(table), layout_of(table).name, "", "inpainting", 0)


@pytest.mark.parametrize("prefix", ["net.", BUNDLE, ""], ids=lambda prefix: prefix or "none")
def test_anima_is_told_by_its_adapter_whose_layers_are_no_targets(prefix: str) -> None:
    """ComfyUI's names (comfy/ldm/anima/model.py)."""
    shapes = model("cosmos2-2b.original-transformer")
    adapter = {
        f"llm_adapter.blocks.{i}.{attention}.{layer}.weight": (1024, 1024)
        for i in range(6) for attention in ("self_attn", "cross_attn") for layer in ("q_proj", "k_proj", "v_proj")
    }  # fmt: skip
    match = detect(prefixed(shapes | adapter | {"llm_adapter.embed.weight": (32128, 1024)}, prefix))
    assert summary(match) == ("cosmos2-2b", "original", prefix, "anima", 0)
    assert match.special
    assert match.special.architecture == "anima"
    assert not any(layer.tensor.startswith("llm_adapter.") for layer in match.layout.layers)


@pytest.mark.parametrize("shape", [(), (9,)], ids=str)
def test_odd_first_convolution_is_no_inpainting(shape: tuple[int, ...]) -> None:
    assert detect(model("sd15.original") | {"input_blocks.0.0.weight": shape}).special is None


def ema_copy(dots: str) -> Shapes:
    """LDM's `LitEma` takes the dots out of the names; some trainers leave them in."""
    return {
        f"model_ema.{name.replace('.', dots)}": shape
        for name, shape in prefixed(model("sd15.original"), "diffusion_model.").items()
    }


@pytest.mark.parametrize("dots", ["", "."], ids=["without-dots", "with-dots"])
def test_ema_copy_is_counted_and_never_a_target(dots: str) -> None:
    copy = ema_copy(dots)
    assert summary(detect(load("sd15.original") | copy)) == ("sd15", "original", BUNDLE, "", len(copy))
    assert summary(detect(model("sd15.original") | copy)) == ("sd15", "original", "", "", len(copy))
    check_refusal(copy, "named like one of theirs")


def test_widths_are_free() -> None:
    narrow = {name: tuple(max(1, side // 16) for side in shape) for name, shape in model("sdxl.original").items()}
    narrow["input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"] = (40, 2048)
    assert detect(narrow).family.id == "sdxl"


# --- what is refused, and in which words


def test_a_controlnet_in_the_same_file_is_noticed() -> None:
    shapes = model("sd15.original") | {"control_model.zero_convs.0.0.weight": (320, 320, 1, 1)}
    assert summary(detect(shapes))[-2] == "controlnet"


def unlabelled() -> Shapes:
    """SD1.5 without attention in the middle."""
    return {name: shape for name, shape in model("sd15.diffusers-unet").items() if not name.startswith("mid_block.att")}


TWO = {
    "known UNets": lambda: prefixed(model("sd15.original"), BUNDLE) | prefixed(model("sdxl.diffusers-unet"), "unet."),
    "other UNets": lambda: prefixed(unlabelled(), BUNDLE) | prefixed(unlabelled(), "unet."),
    "a known one and another": lambda: prefixed(unlabelled(), BUNDLE) | prefixed(model("sd15.original"), "unet."),
    "a transformer and a UNet": lambda: (
        prefixed(model("flux-dev.original-transformer"), "transformer.") | prefixed(unlabelled(), "unet.")
    ),
    "both layouts": lambda: prefixed(model("sd15.original"), BUNDLE) | prefixed(model("sd15.diffusers-unet"), BUNDLE),
    "both layouts of a transformer": lambda: (
        model("flux-dev.original-transformer") | model("flux-dev.diffusers-transformer")
    ),
    "with and without prefix": lambda: model("sdxl.original") | prefixed(model("sdxl.original"), BUNDLE),
    "a transformer with and without prefix": lambda: (
        model("qwen-image.diffusers-transformer") | prefixed(model("qwen-image.diffusers-transformer"), "transformer.")
    ),
    "one that lacks a layer": lambda: (
        model("sd15.original")
        | {f"unet.{name}": shape for name, shape in model("sd15.original").items() if name != QUERY}
    ),
}
FIRST = {
    "known UNets": (f"{BUNDLE}input_blocks.0.0.weight", "unet.conv_in.weight"),
    "other UNets": (f"{BUNDLE}conv_in.weight", "unet.conv_in.weight"),
    "a known one and another": (f"{BUNDLE}conv_in.weight", "unet.input_blocks.0.0.weight"),
    "a transformer and a UNet": ("unet.conv_in.weight", "transformer.double_blocks.0."),
    "both layouts": (f"{BUNDLE}input_blocks.0.0.weight", f"{BUNDLE}conv_in.weight"),
    "both layouts of a transformer": (" double_blocks.0.", " transformer_blocks.0."),
    "with and without prefix": (f"{BUNDLE}input_blocks.0.0.weight", " input_blocks.0.0.weight"),
    "a transformer with and without prefix": ("transformer.transformer_blocks.0.", " transformer_blocks.0."),
    "one that lacks a layer": (" input_blocks.0.0.weight", "unet.input_blocks.0.0.weight"),
}


@pytest.mark.parametrize("case", TWO)
def test_two_networks_in_one_file_are_refused(case: str) -> None:
    """Only one of them would be pruned, and a loader may take the other."""
    check_refusal(TWO[case](), "2 networks", *FIRST[case])


def test_two_networks_are_refused_when_the_family_is_given() -> None:
    both = prefixed(model("sd15.original"), BUNDLE) | model("flux-schnell.diffusers-transformer")
    with raises(FamilyError, "2 networks"):
        detect(both, by_id("flux-schnell"))


@pytest.mark.parametrize("prefix", ["", BUNDLE])
def test_copies_and_other_parts_are_no_second_network(prefix: str) -> None:
    sd15 = model("sd15.original")
    encoder = {name: shape for name, shape in sd15.items() if not name.startswith(("output_blocks.", "out."))}
    bundle = prefixed(sd15, prefix)
    for beside, special, ema in (
        (prefixed(encoder, "control_model."), "controlnet", 0),
        (prefixed(model("sd15.diffusers-unet"), "controlnet."), "controlnet", 0),
        (prefixed(sd15, "model_ema.diffusion_model."), "", len(sd15)),
        ({name: shape for name, shape in load("sd15.original").items() if not name.startswith(BUNDLE)}, "", 0),
        (dict.fromkeys(those("sd15.original", "first_stage_model.encoder."), (8, 8)), "", 0),
    ):
        assert summary(detect(bundle | beside)) == ("sd15", "original", prefix, special, ema)
    small = prefixed(unlabelled(), prefix) | prefixed(encoder, "control_model.") | prefixed(sd15, "model_ema.")
    assert summary(detect(small)) == ("unet", "diffusers", prefix, "controlnet", len(sd15))


def test_no_model_is_called_nearest_to_a_small_one() -> None:
    """Most of the demo, and much of SDXS-512, is found in many models."""
    shapes = model("demo.original-unet")
    del shapes[QUERY]
    check_refusal(shapes, f"{QUERY} is missing")


@pytest.mark.parametrize(
    ("layout", "gone"),
    [("original", "input_blocks.0.0.weight"), ("original", "out.2.weight"), ("diffusers", "conv_out.")],
)
def test_a_part_of_a_unet_is_called_so(layout: str, gone: str) -> None:
    shapes = model(f"vega.{layout}-unet")
    part = {name: shape for name, shape in shapes.items() if "up_" not in name and "output_" not in name}
    check_refusal({name: shape for name, shape in part.items() if not name.startswith(gone)}, "of a UNet", gone)


@pytest.mark.parametrize(
    ("half", "reason"), [(".attn.", "another model"), (".ff.", "another model"), (".9", "nearest is FLUX")]
)
def test_a_model_of_another_design_has_no_nearest(half: str, reason: str) -> None:
    """Transformers share some names: those with layers of every kind are called similar."""
    shapes = model("flux-dev.diffusers-transformer")
    check_refusal({name: shape for name, shape in shapes.items() if half not in name}, reason)


def test_one_missing_tensor_is_named() -> None:
    shapes = model("flux-dev.diffusers-transformer")
    del shapes["transformer_blocks.18.ff.net.2.weight"]
    key = "FLUX.1 dev (diffusers layout, prefix 'transformer.'): 227 of 228"
    check_refusal(prefixed(shapes, "transformer."), key, "transformer_blocks.18.ff.net.2.weight")


@pytest.mark.parametrize(
    ("table", "missing"),
    [
        ("flux-2-dev.original-transformer", "double_blocks.3.img_attn.qkv.weight"),
        ("chroma.original-transformer", "double_blocks.3.img_mlp.0.weight"),
        ("qwen-image.diffusers-transformer", "transformer_blocks.3.attn.to_q.weight"),
    ],
)
def test_a_damaged_model_is_none_of_another_kind(table: str, missing: str) -> None:
    """Other models of the design are known by a few tensors, which this one has as well."""
    shapes = model(table)
    del shapes[missing]
    check_refusal(shapes, "nearest is", f"missing {missing}")


@pytest.mark.parametrize(
    ("table", "last", "nearest", "extra"),
    [
        ("sd35-large.original-transformer", "joint_blocks.37.", "SD3.5-large", "x_block.attn.qkv.weight"),
        ("sd35-large.diffusers-transformer", "transformer_blocks.37.", "SD3.5-large", "attn.to_q.weight"),
        ("flux-dev.original-transformer", "single_blocks.37.", "FLUX.1 dev", "linear1.weight"),
        ("sdxl.original", "output_blocks.5.1.transformer_blocks.1.", "SDXL", "attn1.to_q.weight"),
    ],
)
def test_one_block_too_many_is_named(table: str, last: str, nearest: str, extra: str) -> None:
    shapes = model(table)
    further = re.sub(r"\d+\.$", "38.", last)
    shapes |= {name.replace(last, further): shape for name, shape in shapes.items() if name.startswith(last)}
    check_refusal(shapes, f"{nearest} (", f"{nearest} has no {further}{extra}")


def test_video_models_built_on_sd21_are_refused() -> None:
    """Stable Video Diffusion has the layers of SD2.1 and as many again over time, which the rule would prune too."""
    shapes = model("sd21.original")
    again = {name.replace("transformer_blocks", "time_stack"): shape for name, shape in shapes.items()}
    check_refusal(shapes | again, "time_stack.0.", "over time")


def test_chroma_is_not_flux() -> None:
    shapes = model("flux-schnell.original-transformer") | {"distilled_guidance_layer.in_proj.weight": (5120, 64)}
    check_refusal(shapes, "of the kind Chroma", "distilled_guidance_layer.in_proj.weight")
    renamed = model("flux-schnell.original-transformer")
    del renamed["vector_in.in_layer.weight"]  # under other names of its own, Chroma has no pooled text
    check_refusal(renamed, "vector_in.in_layer.weight is missing", "FLUX.1 schnell")


def test_second_attention_that_stops_early_is_no_sd3() -> None:
    shapes = model("sd35-medium.original-transformer")
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("joint_blocks.12.x_block.attn2.")}
    check_refusal(shapes, "joint_blocks.0.x_block.attn2.qkv.weight", "SD3-medium")


QKV, LINEAR1 = "joint_blocks.3.x_block.attn.qkv.weight", "single_blocks.3.linear1.weight"


@pytest.mark.parametrize(
    ("table", "key", "shape", "rows"),
    [
        ("sdxl.original", QUERY, (1280,), "rows"),
        ("sdxl.original", QUERY, (1280, 1280, 1), "rows"),
        ("sdxl.original", QUERY, (), "rows"),
        ("sd3-medium.original-transformer", QKV, (0, 0), "rows"),
        ("sd3-medium.original-transformer", QKV, (4700, 1536), "1536 rows"),
        ("flux-dev.original-transformer", LINEAR1, (6144, 3072), "3072 rows"),
    ],
)
def test_target_of_odd_shape_is_named(table: str, key: str, shape: tuple[int, ...], rows: str) -> None:
    check_refusal(model(table) | {key: shape}, f"{key} has shape {list(shape)}", rows)


BLOCK = {
    "unlabelled": "down_blocks.0.attentions.0.transformer_blocks.0.",
    "sd15.original": "input_blocks.1.1.transformer_blocks.0.",
    "flux-dev.diffusers-transformer": "transformer_blocks.0.",
}


@pytest.mark.parametrize(
    ("table", "layer", "shape", "sibling"),
    [
        ("unlabelled", "attn1.to_q", (320, 640), "attn1.to_out.0"),
        ("unlabelled", "attn1.to_q", (300, 320), "attn1.to_out.0"),
        ("unlabelled", "attn1.to_k", (320, 640), "attn1.to_v"),
        ("unlabelled", "attn1.to_v", (640, 320), "attn1.to_k"),
        ("unlabelled", "ff.net.2", (320, 1000), "ff.net.0.proj"),
        ("unlabelled", "ff.net.2", (640, 1280), "ff.net.0.proj"),
        ("unlabelled", "ff.net.0.proj", (3 * 1280, 320), "ff.net.2"),
        ("sd15.original", "attn1.to_out.0", (320, 640), "attn1.to_q"),
        ("flux-dev.diffusers-transformer", "attn.to_v", (3072, 100), "attn.to_k"),
        ("flux-dev.diffusers-transformer", "ff.net.2", (3072, 12000), "ff.net.0.proj"),
    ],
)
def test_shapes_that_contradict_each_other_are_refused(
    table: str, layer: str, shape: tuple[int, ...], sibling: str
) -> None:
    shapes = prefixed(unlabelled() if table == "unlabelled" else model(table), "unet.")
    block = f"unet.{BLOCK[table]}"
    check_refusal(shapes | {f"{block}{layer}.weight": shape}, f"{block}{layer}.weight", f"{block}{sibling}.weight")


@pytest.mark.parametrize(
    "changes",
    [
        {"attn1.to_k": (40, 320), "attn1.to_v": (40, 320)},
        {"attn1.to_k": (320, 768), "attn1.to_v": (320, 768)},
        {"ff.net.0.proj": (1280, 320)},
        {"attn1.to_q": (160, 320), "attn1.to_k": (160, 320), "attn1.to_v": (160, 320), "attn1.to_out.0": (320, 160)},
    ],
    ids=["grouped queries", "keys of the text", "without a gate", "narrower inside"],
)
def test_shapes_of_other_blocks_are_taken(changes: Shapes) -> None:
    for table in ("unlabelled", "sd15.original"):
        shapes = unlabelled() if table == "unlabelled" else model(table)
        detect(shapes | {f"{BLOCK[table]}{layer}.weight": shape for layer, shape in changes.items()})


@pytest.mark.parametrize("shape", [(320,), (0, 320), (320, 320, 1, 1), (320, 320, 3, 3), ()], ids=str)
def test_a_target_that_is_no_matrix_is_named(shape: tuple[int, ...]) -> None:
    for table in ("unlabelled", "sd15.original"):
        shapes = prefixed(unlabelled() if table == "unlabelled" else model(table), BUNDLE)
        key = f"{BUNDLE}{BLOCK[table]}attn1.to_q.weight"
        check_refusal(shapes | {key: shape}, f"{key} has shape {list(shape)}")


def those(table: str, start: str) -> list[str]:
    return [name.removeprefix(start) for name in load(table) if name.startswith(start)]


LORA = "LoRA"
OTHERS = {
    "kohya-lora": ([f"lora_unet_down_blocks_{i}_attentions_0.lora_up.weight" for i in range(9)], LORA),
    "peft-lora": ([f"transformer.transformer_blocks.{i}.attn.to_q.lora_A.weight" for i in range(9)], LORA),
    "diffusers-lora": ([f"unet.down_blocks.{i}.attn1.processor.to_q_lora.up.weight" for i in range(9)], LORA),
    "lycoris": ([f"lycoris_x_{i}.lokr_w1" for i in range(9)], LORA),
    "vae-original": (those("sd15.original", "first_stage_model."), "VAE"),
    "vae-in-bundle": (
        [f"first_stage_model.{name}" for name in those("sd15.original", "first_stage_model.")],
        "VAE",
    ),
    "vae-diffusers": ([f"decoder.up_blocks.{i}.resnets.0.conv1.weight" for i in range(4)], "VAE"),
    "clip": (those("sd15.original", "cond_stage_model.transformer."), "text encoder"),
    "two-encoders": (those("sdxl.original", "conditioner.embedders."), "text encoder"),
    "t5": ([f"encoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(24)], "text encoder"),
    "llama": ([f"model.layers.{i}.self_attn.q_proj.weight" for i in range(9)], "language model"),
    "controlnet": ([f"control_model.input_blocks.{i}.0.bias" for i in range(9)], "ControlNet"),
    "embedding": (["emb_params"], "emb_params"),
    "nothing": ([], "no tensors"),
}


@pytest.mark.parametrize(("names", "key"), OTHERS.values(), ids=OTHERS)
def test_other_files_are_called_what_they_are(names: list[str], key: str) -> None:
    check_refusal(dict.fromkeys(names, (1, 1)), key)


HOSTILE = {
    "empty": "",
    "escape": "\x1b[31mred\x07",
    "newline": "two\nlines",
    "bidi": "\u202egnp.exe",
    "surrogate": "\ud800",
    "long": "x" * 100_000,
    "zeros": "\x00" * 100_000,
}


@pytest.mark.parametrize("pattern", ["{}", "input_blocks.{}.attn1.to_q.weight"], ids=["unlike", "alike"])
@pytest.mark.parametrize("key", HOSTILE.values(), ids=HOSTILE)
def test_hostile_names_are_harmless(key: str, pattern: str) -> None:
    alone = {pattern.format(key): (1, 1)}
    beside = {name: shape for name, shape in model("sd15.original").items() if name != QUERY} | alone
    check_short_refusal(alone)
    check_short_refusal(beside)
    assert detect(model("sd15.original") | {key: ()}).family.id == "sd15"


@pytest.mark.parametrize(
    "pattern",
    [
        "{}",
        "model.diffusion_model.{}.attn1.to_q.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.{}.ff.net.2.weight",
    ],
    ids=["garbage", "alike", "blocks"],
)
def test_a_hundred_thousand_names_are_refused(pattern: str) -> None:
    check_short_refusal({pattern.format(i): (1, 1) for i in range(100_000)})


def test_hint_says_where_the_supported_families_are_listed() -> None:
    with pytest.raises(FamilyError) as caught:
        detect({"x": (1,)})
    assert "`crdiff families`" in caught.value.hint


# --- looking a family up


def test_by_id_finds_each() -> None:
    assert [by_id(family.id) for family in all_families()] == list(all_families())


@pytest.mark.parametrize(
    ("family_id", "nearest"), [("sd-xl", "sdxl?"), ("flux_dev", "flux-dev?"), ("", "`crdiff families`")]
)
def test_by_id_suggests(family_id: str, nearest: str) -> None:
    with raises(FamilyError, repr(family_id)) as caught:
        by_id(family_id)
    assert nearest in caught.value.hint


# --- quantised checkpoints


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["scaled_fp8"], "scaled fp8 (scaled_fp8)"),
        (["model.diffusion_model.scaled_fp8"], "scaled fp8 (model.diffusion_model.scaled_fp8)"),
        (["a.weight", "a.scale_weight"], "scaled fp8 (a.scale_weight)"),
        (["a.weight", "a.weight_scale"], "scaled fp8 (a.weight_scale)"),
        (["a.weight", "a.comfy_quant"], "a ComfyUI quantisation (a.comfy_quant)"),
        (
            ["a.weight", "a.weight.quant_state.bitsandbytes__nf4"],
            "bitsandbytes nf4 (a.weight.quant_state.bitsandbytes__nf4)",
        ),
        (
            ["a.weight", "a.weight.quant_state.bitsandbytes__fp4"],
            "bitsandbytes fp4 (a.weight.quant_state.bitsandbytes__fp4)",
        ),
        (["a.weight", "a.weight.quant_map"], "bitsandbytes (a.weight.quant_map)"),
        (["a.weight", "a.weight.absmax"], "bitsandbytes (a.weight.absmax)"),
        (["a.weight", "a.SCB"], "bitsandbytes int8 (a.SCB)"),
        (["a.scale", "a.weight"], "SDNQ (a.scale)"),
        (["a.weight", "a.scale", "a.zero_point"], "SDNQ (a.scale)"),
        (["a.qweight", "a.qzeros", "a.scales"], "GPTQ or AWQ (a.qweight)"),
        (["b.qweight", "a.qweight"], "GPTQ or AWQ (a.qweight)"),
        (["\x1b.qweight"], r"GPTQ or AWQ (\x1b.qweight)"),
        (["double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_attn.qkv.weight"], None),
        (["logit_scale", "a.scale_shift_table", "a.layer_scale", "weight"], None),
        ([], None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_quantisation(names: list[str], expected: str | None) -> None:
    found = quantisation(iter(names), {"format": "pt"})
    assert (found and found.kind) == expected
    assert (found and found.obstacle) is None


@pytest.mark.parametrize("name", ["a.wcscales", "a.smooth_factor", "a.proj_down", "a.wtscale"])
def test_a_low_rank_branch_is_an_obstacle(name: str) -> None:
    """Whatever else is there: nunchaku's files have codes like others, too."""
    found = quantisation(["a.qweight", "a.weight_scale", name], {})
    assert found
    assert (found.kind, "low-rank" in str(found.obstacle)) == (f"SVDQuant ({name})", True)


def test_quantisation_in_the_metadata() -> None:
    metadata = {"_quantization_metadata": "{}"}
    scaled = quantisation([], metadata)
    assert scaled
    assert (scaled.kind, scaled.scaled) == ("a ComfyUI quantisation (metadata _quantization_metadata)", True)
    rotated = quantisation([], {"_quantization_metadata": '{"layers": {"a": {"format": "int8_convrot"}}}'})
    assert rotated
    assert "rotated" in str(rotated.obstacle)


@pytest.mark.parametrize("table", TABLES)
def test_plain_checkpoints_are_not_quantised(table: str) -> None:
    assert quantisation(load(table), {}) is None


OTHER_MODELS = {
    "Qwen-Image": (
        "transformer_blocks.0.img_mlp.net.0.proj.weight", "txt_norm.weight", "transformer_blocks.0.attn.to_q.weight"
    ),
    "Wan": ("blocks.0.ffn.0.weight", "blocks.0.cross_attn.k.weight", "patch_embedding.weight"),
    "Krea 2": ("txtfusion.projector.weight", "blocks.0.attn.wq.weight"),
    "Qwen-Image 2.1": ("txt_in.text_norm.weight", "img_in.weight"),
    "FLUX.3": ("early_stream_modulations.image.lin.weight", "img_in.weight"),
    "Chroma": ("distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight"),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", BUNDLE, "model."])
@pytest.mark.parametrize("title", OTHER_MODELS)
def test_other_models_are_called_by_their_name(title: str, prefix: str) -> None:
    check_refusal({prefix + name: (8, 8) for name in OTHER_MODELS[title]}, f"of the kind {title}")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("WanTransformer3DModel", "of the kind Wan"),
        ("Krea2Transformer2DModel", "of the kind Krea 2"),
        ("QwenImage21Transformer2DModel", "of the kind Qwen-Image 2.1"),
        ("Flux3Transformer2DModel", "of the kind FLUX.3"),
        ("AutoencoderKL", "this is a VAE"),
    ],
)
def test_models_of_diffusers_are_called_by_their_name(name: str, key: str) -> None:
    import diffusers
    import torch

    found = getattr(diffusers, name, None)
    if found is None:
        pytest.skip("this diffusers has no such model")
    with torch.device("meta"):
        shapes = {key: tuple(weight.shape) for key, weight in found().state_dict().items()}
    check_refusal(shapes, key)


@pytest.mark.parametrize("names", [("emb_params",), ("clip_l", "clip_g")])
def test_a_textual_inversion_is_called_one(names: tuple[str, ...]) -> None:
    check_refusal(dict.fromkeys(names, (2, 768)), "a textual inversion")
