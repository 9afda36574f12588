"""The UNet families: Stable Diffusion 1.5, 2.1, XL, the XL refiner, and a demo small enough for a test.

The two layouts differ only in the path of a transformer block; inside a block the names are the same and no tensor is
reshaped (diffusers' `convert_ldm_unet_checkpoint`, ComfyUI's `TRANSFORMER_BLOCKS` in `comfy/utils.py`).
"""

from collections.abc import Iterator
from typing import NamedTuple

from crdiff_export.models.families.model import (
    Family,
    FamilyLayer,
    Kind,
    Layout,
    Mark,
    Twin,
)

# The weights that the method prunes in a transformer block; cross-attention (attn2) is never pruned.
_WEIGHTS: tuple[tuple[str, Kind], ...] = (
    ("attn1.to_q.weight", "attn"),
    ("attn1.to_k.weight", "attn"),
    ("attn1.to_v.weight", "attn"),
    ("attn1.to_out.0.weight", "attn"),
    ("ff.net.0.proj.weight", "ff"),
    ("ff.net.2.weight", "ff"),
)


class _UNet(NamedTuple):
    """A UNet's geometry, down to the number of transformer blocks in each attention."""

    id: str
    title: str
    architecture: str
    native: int
    depths: tuple[int, ...]
    """Transformer blocks per attention of each resolution level, outermost first; 0 is a level without attention."""
    mid: int
    context: int
    """Width of the text embedding, axis 1 of `attn2.to_k.weight`: the only difference in shapes of SD1.5 and SD2.1."""
    layers: int = 2
    """diffusers' `layers_per_block`; a level of the up blocks has one attention more."""
    inpainting: str | None = None
    twin: Twin | None = None


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
# Depths: `transformer_depth` and `attention_resolutions` of the original configs (v1-inference.yaml, sd_xl_base.yaml).
# Architecture ids: ModelSpec; of the inpainting models: SwarmUI (`T2IModelClassSorter.cs`), which has none for SDXL.
_UNETS = (
    _UNet(
        "sd15", "SD1.5", "stable-diffusion-v1", 512, depths=(1, 1, 1, 0), mid=1, context=768,
        inpainting="stable-diffusion-v1-inpainting",
    ),
    _UNet(
        "sd21", "SD2.1", "stable-diffusion-v2-768-v", 768, depths=(1, 1, 1, 0), mid=1, context=1024,
        inpainting="stable-diffusion-v2-inpainting", twin=_SD2_BASE,
    ),
    _UNet("sdxl", "SDXL", "stable-diffusion-xl-v1-base", 1024, depths=(0, 2, 10), mid=10, context=2048),
    _UNet("sdxl-refiner", "SDXL refiner", "stable-diffusion-xl-v1-refiner", 1024, (0, 4, 4, 0), mid=4, context=1280),
    _UNet("demo", "demo", "stable-diffusion-v1", 64, depths=(1, 1), mid=1, context=64, layers=1),
)  # fmt: skip


class _Block(NamedTuple):
    """One transformer block: its group and its path in both layouts."""

    group: str
    original: str
    diffusers: str


def unet_families() -> tuple[Family, ...]:
    """Return every UNet family, in order of appearance."""
    return tuple(map(_family, _UNETS))


def _family(unet: _UNet) -> Family:
    blocks = tuple(_blocks(unet))
    return Family(
        id=unet.id,
        title=unet.title,
        architecture=unet.architecture,
        implementation="sgm",
        native=(unet.native, unet.native),
        grid=8,
        groups=("down", "mid", "up"),
        scope="group",
        kinds=("attn", "ff"),
        default_kinds=("attn", "ff"),
        layouts=(
            Layout(
                "original",
                layers=_layers((block.group, block.original) for block in blocks),
                marks=(_context(blocks[0].original, unet.context),),
                inpainting=Mark("input_blocks.0.0.weight", axis=1, size=9, what="in-channels"),
            ),
            Layout(
                "diffusers",
                layers=_layers((block.group, block.diffusers) for block in blocks),
                marks=(_context(blocks[0].diffusers, unet.context),),
                inpainting=Mark("conv_in.weight", axis=1, size=9, what="in-channels"),
            ),
        ),
        inpainting=unet.inpainting,
        twin=unet.twin,
    )


def _blocks(unet: _UNet) -> Iterator[_Block]:
    """Yield every transformer block. The original layout also numbers layers without attention."""
    for level, depth in enumerate(unet.depths):
        for layer in range(unet.layers):
            original = f"input_blocks.{1 + level * (unet.layers + 1) + layer}.1"
            yield from _stack("down", original, f"down_blocks.{level}.attentions.{layer}", depth)
    yield from _stack("mid", "middle_block.1", "mid_block.attentions.0", unet.mid)
    for level, depth in enumerate(reversed(unet.depths)):
        for layer in range(unet.layers + 1):
            original = f"output_blocks.{level * (unet.layers + 1) + layer}.1"
            yield from _stack("up", original, f"up_blocks.{level}.attentions.{layer}", depth)


def _stack(group: str, original: str, diffusers: str, depth: int) -> Iterator[_Block]:
    for i in range(depth):
        yield _Block(group, f"{original}.transformer_blocks.{i}", f"{diffusers}.transformer_blocks.{i}")


def _layers(blocks: Iterator[tuple[str, str]]) -> tuple[FamilyLayer, ...]:
    return tuple(FamilyLayer(f"{path}.{weight}", group, kind) for group, path in blocks for weight, kind in _WEIGHTS)


def _context(block: str, size: int) -> Mark:
    return Mark(f"{block}.attn2.to_k.weight", axis=1, size=size, what="context size")
