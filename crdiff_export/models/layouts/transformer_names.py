"""The names of the transformers of SD3 and FLUX.1 in both layouts.

Sources: diffusers' `convert_sd3_transformer_checkpoint_to_diffusers` and
`convert_flux_transformer_checkpoint_to_diffusers`. The original layouts fuse q, k and v, FLUX also the MLP of a single
block; the last modulation has shift before scale where diffusers has scale before shift.
"""

import re
from collections.abc import Collection, Mapping

from crdiff_export.models.families import LayoutName
from crdiff_export.models.layouts.rename import Rename, Shapes

_FLUX_FIXED = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    **{
        f"{original}.{first}": f"time_text_embed.{diffusers}.{second}"
        for original, diffusers in (
            ("time_in", "timestep_embedder"), ("vector_in", "text_embedder"), ("guidance_in", "guidance_embedder"),
        )
        for first, second in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    },
}  # fmt: skip
_FLUX_DOUBLE = {
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight", "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
}  # fmt: skip
_FLUX_SINGLE = {
    "modulation.lin": "norm.linear", "linear2": "proj_out",
    "norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight",
}  # fmt: skip
_SD3_FIXED = {
    "pos_embed": "pos_embed.pos_embed", "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}  # fmt: skip
_SD3_BLOCK = {
    "x_block.attn.proj": "attn.to_out.0", "context_block.attn.proj": "attn.to_add_out",
    "x_block.attn.ln_q": "attn.norm_q", "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q", "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.attn2.proj": "attn2.to_out.0", "x_block.attn2.ln_q": "attn2.norm_q", "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2",
}  # fmt: skip
_QKV, _ADDED_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
# The last modulation: shift and scale in the original layout, scale and shift in diffusers.
_LAST = Rename("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True)


def flux_renames(shapes: Shapes, layout: LayoutName) -> list[Rename]:
    """List the names of a transformer of FLUX.1 in both layouts.

    Args:
        shapes: The shape of every tensor, by name, without prefix.
        layout: Their layout.

    Returns:
        The names.
    """
    guidance = [name for name in _FLUX_FIXED if name.startswith("guidance_in.")]
    renames = [*_fixed("", "", _FLUX_FIXED, guidance), _LAST]
    stacks = {
        "original": ("double_blocks", "single_blocks"),
        "diffusers": ("transformer_blocks", "single_transformer_blocks"),
    }
    double, single = stacks[layout]
    for number in range(_count(shapes, double)):
        original, diffusers = f"double_blocks.{number}.", f"transformer_blocks.{number}."
        renames += _fixed(original, diffusers, _FLUX_DOUBLE)
        renames.append(Rename(f"{original}img_attn.qkv", tuple(f"{diffusers}attn.{part}" for part in _QKV)))
        renames.append(Rename(f"{original}txt_attn.qkv", tuple(f"{diffusers}attn.{part}" for part in _ADDED_QKV)))
    for number in range(_count(shapes, single)):
        original, diffusers = f"single_blocks.{number}.", f"single_transformer_blocks.{number}."
        renames += _fixed(original, diffusers, _FLUX_SINGLE)
        rows, width = shapes.get(f"{original}linear1.weight", (0, 0))
        heights = (width, width, width, rows - 3 * width) if rows else ()
        parts = (*(f"{diffusers}attn.{part}" for part in _QKV), f"{diffusers}proj_mlp")
        renames.append(Rename(f"{original}linear1", parts, heights))
    return renames


def sd3_renames(shapes: Shapes, layout: LayoutName) -> list[Rename]:
    """List the names of a transformer of SD3 or SD3.5 in both layouts.

    Args:
        shapes: The shape of every tensor, by name, without prefix.
        layout: Their layout.

    Returns:
        The names.
    """
    renames = [*_fixed("", "", _SD3_FIXED), _LAST]
    count = _count(shapes, "joint_blocks" if layout == "original" else "transformer_blocks")
    normed = any(".ln_q." in name or ".norm_q." in name for name in shapes)
    for number in range(count):
        original, diffusers = f"joint_blocks.{number}.", f"transformer_blocks.{number}."
        is_last = number == count - 1
        dual = f"{original}x_block.attn2.qkv.weight" in shapes or f"{diffusers}attn2.to_q.weight" in shapes
        optional = [
            name
            for name in _SD3_BLOCK
            if ("ln_" in name and not normed) or ("attn2" in name and not dual)
            or (is_last and name.startswith("context_block.") and "ln_" not in name)
        ]  # fmt: skip
        renames += _fixed(original, diffusers, _SD3_BLOCK, optional)
        for part, attention, names in (
            ("x_block.attn", "attn", _QKV), ("context_block.attn", "attn", _ADDED_QKV),
            ("x_block.attn2", "attn2", _QKV),
        ):  # fmt: skip
            parts = tuple(f"{diffusers}{attention}.{name}" for name in names)
            renames.append(Rename(f"{original}{part}.qkv", parts, optional=attention == "attn2" and not dual))
        # Of the text the last block has a shift and a scale alone, in the order of the last modulation.
        context = f"{original}context_block.adaLN_modulation.1", (f"{diffusers}norm1_context.linear",)
        renames.append(Rename(*context, swapped=is_last))
    return renames


def _fixed(original: str, diffusers: str, names: Mapping[str, str], optional: Collection[str] = ()) -> list[Rename]:
    """List names that stand for one tensor each, or for a layer; those in `optional` may be missing."""
    alone = (".scale", "pos_embed")
    return [
        Rename(
            f"{original}{first}", (f"{diffusers}{second}",), optional=first in optional,
            kinds=("",) if first.endswith(alone) else (".weight",) if "ln_" in first else (".weight", ".bias"),
        )
        for first, second in names.items()
    ]  # fmt: skip


def _count(shapes: Shapes, stack: str) -> int:
    """Return the number of blocks in a stack."""
    numbers = [int(match[1]) for name in shapes if (match := re.match(rf"{stack}\.(\d{{1,4}})\.", name))]
    return max(numbers, default=-1) + 1
