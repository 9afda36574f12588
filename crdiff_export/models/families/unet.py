"""Describe a UNet by its geometry, from which the names of its layers follow, and a UNet that is of no known family.

The two layouts differ only in the path of a transformer block; inside a block the names are the same and no tensor is
reshaped (diffusers' `convert_ldm_unet_checkpoint`, ComfyUI's `TRANSFORMER_BLOCKS` in `comfy/utils.py`).
"""

from collections.abc import Iterator
from functools import partial
from typing import Final

from crdiff_export.models.families.model import (
    Block,
    BlockWeight,
    Family,
    Kind,
    Layout,
    LayoutName,
    Mark,
    layout_of,
)

# The weights that the method prunes in a transformer block; cross-attention (attn2) is never pruned.
_WEIGHTS = (
    *(BlockWeight(f"attn1.to_{name}.weight", "attn") for name in ("q", "k", "v", "out.0")),
    *(BlockWeight(f"ff.net.{name}.weight", "ff") for name in ("0.proj", "2")),
)
GROUPS: Final = ("down", "mid", "up")
KINDS: Final[tuple[Kind, ...]] = ("attn", "ff")


def any_unet() -> Family:
    """Return the family of UNets that are none of the others, without the layers, which each of them names itself."""
    return Family(
        "unet", "UNet", architecture="", implementation="sgm", native=None, grid=8, groups=GROUPS, scope="group",
        kinds=KINDS, default_kinds=KINDS, layouts=(),
    )  # fmt: skip


def tensors_of(layout: LayoutName) -> tuple[str, tuple[str, ...], str]:
    """Return the tensors that tell in-channels, the vector beside the text, and out-channels of a UNet."""
    if layout == "original":
        return "input_blocks.0.0.weight", ("label_emb.0.0.weight",), "out.2.weight"
    return "conv_in.weight", ("add_embedding.linear_1.weight", "class_embedding.linear_1.weight"), "conv_out.weight"


_Depths = tuple[int | tuple[int, ...], ...]


def unet_layouts(
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
