"""The names of a UNet of Stable Diffusion in both layouts, which follow from its blocks.

Source: diffusers' `convert_ldm_unet_checkpoint`. The original layout numbers all blocks of a side one after another:
`input_blocks.0` is the first convolution, each residual block with its attention has a number, and so has each
downsampler; an upsampler is the last part of the block before it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from crdiff_export.models.families import LayoutName
from crdiff_export.models.layouts.rename import Rename, Shapes

_RESIDUAL = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_FIXED = {
    "input_blocks.0.0": "conv_in", "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
# The vector beside the text: pooled text and sizes (SDXL), or a picture's embedding (unCLIP).
POOLED, CLASS = "add_embedding", "class_embedding"


@dataclass(frozen=True, slots=True)
class UNetLevel:
    """The residual blocks of one level of a side: whether each has an attention, and whether a sampler follows."""

    attentions: tuple[bool, ...]
    sampler: bool


@dataclass(frozen=True, slots=True)
class UNetBlocks:
    """The blocks of a UNet.

    Attributes:
        down: The levels on the way down, outermost first.
        up: The levels on the way up, innermost first.
        middle: Whether there is a block in the middle.
        middle_attention: Whether that block has an attention.
    """

    down: tuple[UNetLevel, ...]
    up: tuple[UNetLevel, ...]
    middle: bool
    middle_attention: bool


def read_blocks(shapes: Shapes, layout: LayoutName) -> UNetBlocks:
    """Read the blocks of a UNet from its tensors.

    Args:
        shapes: The shape of every tensor, by name, without prefix.
        layout: Their layout.

    Returns:
        The blocks.
    """
    if layout == "diffusers":
        paths = {".".join(name.split(".")[:4]) for name in shapes}
        return UNetBlocks(
            _levels(paths, "down"), _levels(paths, "up"), any(path.startswith("mid_block.resnets.") for path in paths),
            any(path.startswith("mid_block.attentions.") for path in paths),
        )  # fmt: skip
    paths = {".".join(name.split(".")[:count]) for name in shapes for count in (2, 3, 4)}
    return UNetBlocks(
        tuple(_input_levels(paths)), tuple(_output_levels(paths)), "middle_block.0" in paths,
        any(name.startswith("middle_block.1.transformer_blocks.") for name in shapes),
    )  # fmt: skip


def _levels(paths: set[str], side: str) -> tuple[UNetLevel, ...]:
    """Read the levels of a side in diffusers' layout."""
    sampler = {"down": "downsamplers", "up": "upsamplers"}[side]
    levels: list[UNetLevel] = []
    while any(path.startswith(f"{side}_blocks.{len(levels)}.resnets.") for path in paths):
        block = f"{side}_blocks.{len(levels)}"
        count = len({path for path in paths if re.fullmatch(rf"{block}\.resnets\.\d+", path)})
        attentions = tuple(f"{block}.attentions.{number}" in paths for number in range(count))
        levels.append(UNetLevel(attentions, any(path.startswith(f"{block}.{sampler}.") for path in paths)))
    return tuple(levels)


def _input_levels(paths: set[str]) -> Iterator[UNetLevel]:
    attentions: list[bool] = []
    number = 1
    while (block := f"input_blocks.{number}") in paths:
        if f"{block}.0.op" in paths:
            yield UNetLevel(tuple(attentions), sampler=True)
            attentions = []
        else:
            attentions.append(f"{block}.1" in paths)
        number += 1
    if attentions:
        yield UNetLevel(tuple(attentions), sampler=False)


def _output_levels(paths: set[str]) -> Iterator[UNetLevel]:
    attentions: list[bool] = []
    number = 0
    while (block := f"output_blocks.{number}") in paths:
        alone = f"{block}.1.conv" in paths
        attentions.append(f"{block}.1" in paths and not alone)
        if alone or f"{block}.2.conv" in paths:
            yield UNetLevel(tuple(attentions), sampler=True)
            attentions = []
        number += 1
    if attentions:
        yield UNetLevel(tuple(attentions), sampler=False)


def unet_renames(blocks: UNetBlocks, vector: str) -> list[Rename]:
    """List the names of a UNet in both layouts.

    Args:
        blocks: Its blocks.
        vector: What diffusers calls the embedding of the vector beside the text: POOLED or CLASS.

    Returns:
        The names.
    """
    renames = [Rename(original, (diffusers,)) for original, diffusers in _FIXED.items()]
    renames += [Rename(f"label_emb.0.{2 * i}", (f"{vector}.linear_{i + 1}",)) for i in range(2)]
    renames.append(Rename("label_emb.weight", ("class_embedding.weight",)))
    number = 1
    for i, level in enumerate(blocks.down):
        for j, attention in enumerate(level.attentions):
            renames += _block(f"input_blocks.{number}", f"down_blocks.{i}", j, attention=attention)
            number += 1
        if level.sampler:
            renames.append(Rename(f"input_blocks.{number}.0.op", (f"down_blocks.{i}.downsamplers.0.conv",)))
            number += 1
    if blocks.middle:
        renames += _residual("middle_block.0", "mid_block.resnets.0")
        renames += _residual("middle_block.2", "mid_block.resnets.1")
        renames += [Rename("middle_block.1", ("mid_block.attentions.0",))] if blocks.middle_attention else []
    number = 0
    for i, level in enumerate(blocks.up):
        for j, attention in enumerate(level.attentions):
            block = f"output_blocks.{number}"
            renames += _block(block, f"up_blocks.{i}", j, attention=attention)
            if level.sampler and j + 1 == len(level.attentions):
                sampler = f"{block}.{2 if attention else 1}.conv"
                renames.append(Rename(sampler, (f"up_blocks.{i}.upsamplers.0.conv",)))
            number += 1
    return renames


def _block(original: str, diffusers: str, layer: int, *, attention: bool) -> list[Rename]:
    renames = _residual(f"{original}.0", f"{diffusers}.resnets.{layer}")
    return [*renames, Rename(f"{original}.1", (f"{diffusers}.attentions.{layer}",))] if attention else renames


def _residual(original: str, diffusers: str) -> list[Rename]:
    return [Rename(f"{original}.{first}", (f"{diffusers}.{second}",)) for first, second in _RESIDUAL.items()]
