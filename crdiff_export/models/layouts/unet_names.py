"""The names of a UNet of Stable Diffusion in both layouts, which follow from its blocks.

Source: diffusers' `convert_ldm_unet_checkpoint`. The original layout numbers all blocks of a side one after another:
`input_blocks.0` is the first convolution, each residual block with its attention has a number, and so has each
downsampler; an upsampler is the last part of the block before it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

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
_BOTH, _WEIGHT = (".weight", ".bias"), (".weight",)
# What a transformer block has: the paths, how its tensors' names end, and whether a block may be without.
_IN_BLOCK = (
    *((f"norm{n}", _BOTH, n == 2) for n in (1, 2, 3)),
    *((f"{attention}.to_{part}", _WEIGHT, attention == "attn2") for attention in ("attn1", "attn2") for part in "qkv"),
    ("attn1.to_out.0", _BOTH, False), ("attn2.to_out.0", _BOTH, True),
    ("ff.net.0.proj", _BOTH, False), ("ff.net.2", _BOTH, False),
)  # fmt: skip
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
        middle: How many residual blocks are in the middle.
        middle_attention: Whether there is an attention after the first of them.
        depths: The transformer blocks of each attention, by its path.
    """

    down: tuple[UNetLevel, ...]
    up: tuple[UNetLevel, ...]
    middle: int
    middle_attention: bool
    depths: Mapping[str, int] = field(default_factory=dict)


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
        heads = {".".join(name.split(".")[:3]) for name in shapes}
        middle = sum(f"mid_block.resnets.{number}" in heads for number in range(2))
        return UNetBlocks(
            _levels(paths, "down"), _levels(paths, "up"), middle,
            any(path.startswith("mid_block.attentions.") for path in paths), _depths(shapes),
        )  # fmt: skip
    paths = {".".join(name.split(".")[:count]) for name in shapes for count in (2, 3, 4)}
    middle = ("middle_block.0" in paths) + ("middle_block.2" in paths)
    return UNetBlocks(
        tuple(_input_levels(paths)), tuple(_output_levels(paths)), middle,
        any(name.startswith("middle_block.1.transformer_blocks.") for name in shapes), _depths(shapes),
    )  # fmt: skip


def _depths(shapes: Shapes) -> dict[str, int]:
    """Return the number of transformer blocks of each attention, by its path."""
    depths: dict[str, int] = {}
    for name in shapes:
        path, inside, rest = name.partition(".transformer_blocks.")
        if inside and (number := rest.partition(".")[0]).isdecimal():
            depths[path] = max(depths.get(path, 0), int(number) + 1)
    return depths


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
    renames += [Rename(f"label_emb.0.{2 * i}", (f"{vector}.linear_{i + 1}",), optional=True) for i in range(2)]
    renames.append(Rename("label_emb", ("class_embedding",), kinds=(".weight",), optional=True))
    renames += _down(blocks)
    for number in range(blocks.middle):
        renames += _residual(f"middle_block.{2 * number}", f"mid_block.resnets.{number}")
    if blocks.middle_attention:
        renames += _attention("middle_block.1", "mid_block.attentions.0", blocks)
    return renames + list(_up(blocks))


def _down(blocks: UNetBlocks) -> Iterator[Rename]:
    number = 1
    for i, level in enumerate(blocks.down):
        for j, attention in enumerate(level.attentions):
            yield from _residual(f"input_blocks.{number}.0", f"down_blocks.{i}.resnets.{j}")
            if attention:
                yield from _attention(f"input_blocks.{number}.1", f"down_blocks.{i}.attentions.{j}", blocks)
            number += 1
        if level.sampler:
            yield Rename(f"input_blocks.{number}.0.op", (f"down_blocks.{i}.downsamplers.0.conv",))
            number += 1


def _up(blocks: UNetBlocks) -> Iterator[Rename]:
    number = 0
    for i, level in enumerate(blocks.up):
        for j, attention in enumerate(level.attentions):
            block = f"output_blocks.{number}"
            yield from _residual(f"{block}.0", f"up_blocks.{i}.resnets.{j}")
            if attention:
                yield from _attention(f"{block}.1", f"up_blocks.{i}.attentions.{j}", blocks)
            if level.sampler and j + 1 == len(level.attentions):
                sampler = f"{block}.{2 if attention else 1}.conv"
                yield Rename(sampler, (f"up_blocks.{i}.upsamplers.0.conv",))
            number += 1


def _attention(original: str, diffusers: str, blocks: UNetBlocks) -> list[Rename]:
    """List the names of an attention, which are the same in both layouts below its path."""
    paths = ["norm", "proj_in", "proj_out"]
    renames = [Rename(f"{original}.{path}", (f"{diffusers}.{path}",)) for path in paths]
    depth = blocks.depths.get(original, blocks.depths.get(diffusers, 0))
    for number in range(depth):
        block = f"transformer_blocks.{number}"
        renames += [
            Rename(f"{original}.{block}.{path}", (f"{diffusers}.{block}.{path}",), kinds=kinds, optional=optional)
            for path, kinds, optional in _IN_BLOCK
        ]
        # Whatever else a block has, such as GLIGEN's parts.
        renames.append(Rename(f"{original}.{block}", (f"{diffusers}.{block}",), kinds=()))
    return renames


def _residual(original: str, diffusers: str) -> list[Rename]:
    return [
        Rename(f"{original}.{first}", (f"{diffusers}.{second}",), optional=first == "skip_connection")
        for first, second in _RESIDUAL.items()
    ]
