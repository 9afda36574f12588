"""The UNet families: Stable Diffusion 1.5, 2.1, XL, the XL refiner, distilled ones, a demo, and any other UNet.

The two layouts differ only in the path of a transformer block; inside a block the names are the same and no tensor is
reshaped (diffusers' `convert_ldm_unet_checkpoint`, ComfyUI's `TRANSFORMER_BLOCKS` in `comfy/utils.py`).
"""

from collections.abc import Iterator
from functools import partial

from crdiff_export.models.families.model import (
    ANY,
    Block,
    BlockWeight,
    Family,
    Kind,
    Layout,
    LayoutName,
    Mark,
    Special,
    Twin,
    layout_of,
)


def _weight(name: str, kind: Kind) -> BlockWeight:
    return BlockWeight(name, None, name, kind)


# The weights that the method prunes in a transformer block; cross-attention (attn2) is never pruned.
_WEIGHTS = (
    *(_weight(f"attn1.to_{name}.weight", "attn") for name in ("q", "k", "v", "out.0")),
    *(_weight(f"ff.net.{name}.weight", "ff") for name in ("0.proj", "2")),
)
# SD2.1 for 512 (epsilon) and for 768 (v-prediction). The rule and its limit are ComfyUI's, which calls it a guess
# (`comfy/supported_models.py`, `SD20.model_type`).
_SD2_BASE = Twin(
    "stable-diffusion-v2-512",
    (512, 512),
    {
        "original": "output_blocks.11.1.transformer_blocks.0.norm1.bias",
        "diffusers": "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
    },
    limit=0.09,
)
# Input channels: 4 of the noisy picture, then those of a masked picture and its mask (9), of another picture (8, as
# instruct-pix2pix has), or of a depth map (5). A vector beside the text: SDXL's sizes and pooled text (Kolors has the
# text of ChatGLM in its place), or a picture (unCLIP), where the first model of the family has none.
_INPAINTING = partial(Special, "inpainting", "inpainting", channels=9)
_EDIT = partial(Special, "edit", "with a picture beside the noise, as instruct-pix2pix", channels=8)
_NO_MID = ("down", "up")
_unet = partial(
    Family,
    implementation="sgm",
    grid=8,
    groups=("down", "mid", "up"),
    scope="group",
    kinds=("attn", "ff"),
    default_kinds=("attn", "ff"),
)


def unet_families() -> tuple[Family, ...]:
    """Return every UNet family, in order of appearance.

    Depths: `transformer_depth` and `attention_resolutions` of the original configs (v1-inference.yaml,
    sd_xl_base.yaml). Architecture ids: ModelSpec; of special models: SwarmUI (`T2IModelClassSorter.cs`) and ComfyUI
    (`nodes_model_merging.py`, `save_checkpoint`); where neither has one, ours, in the same spelling.
    """
    return (
        _unet(
            id="sd15", title="SD1.5", architecture="stable-diffusion-v1", native=(512, 512),
            layouts=_layouts((1, 1, 1, 0), mid=1, context=768),
            specials=(_INPAINTING("stable-diffusion-v1-inpainting"), _EDIT("stable-diffusion-v1-edit")),
        ),
        _unet(
            id="sd21", title="SD2.1", architecture="stable-diffusion-v2-768-v", native=(768, 768),
            layouts=_layouts((1, 1, 1, 0), mid=1, context=1024), twin=_SD2_BASE,
            specials=(
                _INPAINTING("stable-diffusion-v2-inpainting"),
                Special("depth", "with a depth map", "stable-diffusion-v2-depth", channels=5),
                Special("unclip", "with a picture's embedding (unCLIP)", "stable-diffusion-v2-unclip", vector=ANY),
            ),
        ),
        _unet(
            id="sdxl", title="SDXL", architecture="stable-diffusion-xl-v1-base", native=(1024, 1024), vector=2816,
            layouts=_layouts((0, 2, 10), mid=10, context=2048), buckets=True,
            specials=(
                _INPAINTING("stable-diffusion-xl-v1-inpainting"), _EDIT("stable-diffusion-xl-v1-edit"),
                Special("kolors", "with the text encoder of Kolors", "kolors-v1", vector=5632),
            ),
        ),
        _unet(
            id="sdxl-refiner", title="SDXL refiner", architecture="stable-diffusion-xl-v1-refiner",
            native=(1024, 1024), vector=2560, layouts=_layouts((0, 4, 4, 0), mid=4, context=1280),
            buckets=True,
        ),
        # Depths of distilled models: their configurations in diffusers, and ComfyUI's (`comfy/model_detection.py`,
        # `unet_config_from_diffusers_unet`).
        _unet(
            id="ssd-1b", title="SSD-1B", architecture="segmind-stable-diffusion-1b", native=(1024, 1024), vector=2816,
            layouts=_layouts((0, 2, 4), mid=0, context=2048, up=((4, 4, 10), (2, 1, 1), 0)), groups=_NO_MID,
            buckets=True,
        ),
        _unet(
            id="vega", title="Segmind Vega", architecture="segmind-vega", native=(1024, 1024), vector=2816,
            layouts=_layouts((0, 1, 2), mid=0, context=2048), groups=_NO_MID, buckets=True,
        ),
        _unet(
            id="koala-700m", title="KOALA 700M", architecture="koala-700m", native=(1024, 1024), vector=2816,
            layouts=_layouts((0, 2, 5), mid=0, context=2048, layers=1), groups=_NO_MID, buckets=True,
        ),
        _unet(
            id="koala-1b", title="KOALA 1B", architecture="koala-1b", native=(1024, 1024), vector=2816,
            layouts=_layouts((0, 2, 6), mid=6, context=2048, layers=1), buckets=True,
        ),
        _unet(
            id="sdxs-512", title="SDXS-512", architecture="sdxs-512", native=(512, 512),
            layouts=_layouts((0, 1, 1), mid=0, context=768, layers=1), groups=_NO_MID,
        ),
        _unet(
            id="demo", title="demo", architecture="stable-diffusion-v1", native=(64, 64),
            layouts=_layouts((1, 1), mid=1, context=64, layers=1),
        ),
    )  # fmt: skip


def any_unet(groups: tuple[str, ...], vector: int | None) -> Family:
    """Return the family of a UNet that is none of the others: its layers are read from its own names.

    Args:
        groups: The groups that have layers.
        vector: The width of the vector beside its text; None if it has none.

    Returns:
        The family, without layouts, an architecture, or a native size.
    """
    return _unet(id="unet", title="UNet", architecture="", native=None, layouts=(), groups=groups, vector=vector)


def tensors_of(layout: LayoutName) -> tuple[str, tuple[str, ...], str]:
    """Return the tensors that tell in-channels, the vector beside the text, and out-channels of a UNet."""
    if layout == "original":
        return "input_blocks.0.0.weight", ("label_emb.0.0.weight",), "out.2.weight"
    return "conv_in.weight", ("add_embedding.linear_1.weight", "class_embedding.linear_1.weight"), "conv_out.weight"


_Depths = tuple[int | tuple[int, ...], ...]


def _layouts(
    depths: _Depths, *, mid: int, context: int, layers: int = 2, up: _Depths | None = None
) -> tuple[Layout, ...]:
    """Describe a UNet by its geometry, down to the number of transformer blocks in each attention.

    Args:
        depths: Transformer blocks per attention of each resolution level, outermost first; 0 for a level without, a
            tuple where the attentions of a level differ.
        mid: Transformer blocks of the attention in the middle; 0 without one.
        context: Width of the text embedding, axis 1 of `attn2.to_k.weight`: the only difference in shapes of SD1.5 and
            SD2.1.
        layers: diffusers' `layers_per_block`; a level of the up blocks has one attention more.
        up: The same for the up blocks, innermost first; None where they mirror the down blocks.

    Returns:
        Both layouts.
    """
    blocks = list(_blocks(depths, mid, layers, tuple(reversed(depths)) if up is None else up))
    width = partial(Mark, axis=1, sizes=(context,), what="context size")
    return (
        layout_of(
            "original", blocks, (width(f"{blocks[0].original}.attn2.to_k.weight"),), *tensors_of("original")
        ),
        layout_of(
            "diffusers", blocks, (width(f"{blocks[0].diffusers}.attn2.to_k.weight"),), *tensors_of("diffusers")
        ),
    )  # fmt: skip


def _blocks(depths: _Depths, mid: int, layers: int, up: _Depths) -> Iterator[Block]:
    """Yield every transformer block. The original layout also numbers layers without attention."""
    for level, depth in enumerate(depths):
        for layer in range(layers):
            original = f"input_blocks.{1 + level * (layers + 1) + layer}.1"
            yield from _stack("down", original, f"down_blocks.{level}.attentions.{layer}", _of_layer(depth, layer))
    yield from _stack("mid", "middle_block.1", "mid_block.attentions.0", mid)
    for level, depth in enumerate(up):
        for layer in range(layers + 1):
            original = f"output_blocks.{level * (layers + 1) + layer}.1"
            yield from _stack("up", original, f"up_blocks.{level}.attentions.{layer}", _of_layer(depth, layer))


def _of_layer(depth: int | tuple[int, ...], layer: int) -> int:
    return depth if isinstance(depth, int) else depth[layer]


def _stack(group: str, original: str, diffusers: str, depth: int) -> Iterator[Block]:
    for i in range(depth):
        yield Block(group, f"{original}.transformer_blocks.{i}", f"{diffusers}.transformer_blocks.{i}", _WEIGHTS)
