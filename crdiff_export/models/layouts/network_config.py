"""Write the `config.json` with which diffusers opens a UNet or a transformer, from the shapes of its tensors.

What shapes do not tell, such as the number of heads, is `config` in the family's table. Keys that are left out have the
defaults of diffusers' classes.
"""

import math
from collections.abc import Mapping
from typing import Any

from crdiff_export.models.families import Family
from crdiff_export.models.layouts.rename import Shapes
from crdiff_export.models.layouts.unet_names import UNetBlocks


def unet_config(shapes: Shapes, blocks: UNetBlocks, family: Family, side: int) -> dict[str, Any]:
    """Describe a UNet for diffusers' `UNet2DConditionModel`.

    Args:
        shapes: The shape of every tensor by diffusers' name.
        blocks: Its blocks.
        family: Its family.
        side: The side of its latents at the native size, in numbers.

    Returns:
        The configuration.
    """
    channels = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(len(blocks.down))]
    layers = [len(level.attentions) for level in blocks.down]
    down = [any(level.attentions) for level in blocks.down]
    up = [any(level.attentions) for level in blocks.up]
    attention = next(name for name in shapes if name.endswith("attn2.to_k.weight"))
    projection = next(name for name in shapes if name.endswith(".proj_in.weight"))
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "block_out_channels": channels,
        "cross_attention_dim": shapes[attention][1],
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in down],
        "in_channels": shapes["conv_in.weight"][1],
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "out_channels": shapes["conv_out.weight"][0],
        "sample_size": side,
        "transformer_layers_per_block": _depths(shapes, blocks),
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in up],
        "use_linear_projection": len(shapes[projection]) == 2,
        **_vector(shapes),
        **(family.config or {}),
    }


def _depths(shapes: Shapes, blocks: UNetBlocks) -> int | list[int]:
    """Return the transformer blocks of each level's attentions; the last one's number is that of the middle, too."""

    def depth(path: str) -> int:
        start = f"{path}.transformer_blocks."
        return len({name[len(start) :].partition(".")[0] for name in shapes if name.startswith(start)})

    down = enumerate(blocks.down)
    depths = [depth(f"down_blocks.{i}.attentions.0") if any(level.attentions) else 0 for i, level in down]
    middle = depth("mid_block.attentions.0")
    depths[-1] = depths[-1] or middle
    present = {count for count in depths if count}
    return present.pop() if len(present) == 1 else [count or 1 for count in depths]


def _vector(shapes: Shapes) -> Mapping[str, Any]:
    """Describe what the UNet takes beside the text."""
    if pooled := shapes.get("add_embedding.linear_1.weight"):
        return {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": pooled[1]}
    if picture := shapes.get("class_embedding.linear_1.weight"):
        return {"class_embed_type": "projection", "projection_class_embeddings_input_dim": picture[1]}
    if classes := shapes.get("class_embedding.weight"):
        return {"num_class_embeds": classes[0]}
    return {}


def flux_config(shapes: Shapes, family: Family) -> dict[str, Any]:
    """Describe a transformer of FLUX.1 for diffusers' `FluxTransformer2DModel`.

    Args:
        shapes: The shape of every tensor by diffusers' name.
        family: Its family.

    Returns:
        The configuration.
    """
    config = family.config or {}
    width, channels = shapes["x_embedder.weight"]
    return {
        "_class_name": "FluxTransformer2DModel",
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "in_channels": channels,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "num_attention_heads": width // config["attention_head_dim"],
        "num_layers": _count(shapes, "transformer_blocks."),
        "num_single_layers": _count(shapes, "single_transformer_blocks."),
        "out_channels": shapes["proj_out.weight"][0],
        "patch_size": 1,
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        **config,
    }


def sd3_config(shapes: Shapes, family: Family, side: int) -> dict[str, Any]:
    """Describe a transformer of SD3 or SD3.5 for diffusers' `SD3Transformer2DModel`.

    Args:
        shapes: The shape of every tensor by diffusers' name.
        family: Its family.
        side: The side of its latents at the native size, in numbers.

    Returns:
        The configuration.
    """
    config = family.config or {}
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    blocks = range(_count(shapes, "transformer_blocks."))
    dual = [i for i in blocks if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes]
    normed = "transformer_blocks.0.attn.norm_q.weight" in shapes
    return {
        "_class_name": "SD3Transformer2DModel",
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "dual_attention_layers": dual,
        "in_channels": channels,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "num_attention_heads": width // config["attention_head_dim"],
        "num_layers": len(blocks),
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "patch_size": patch,
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed.pos_embed"][1]),
        "qk_norm": "rms_norm" if normed else None,
        "sample_size": side,
        **config,
    }


def _count(shapes: Shapes, stack: str) -> int:
    return len({name[len(stack) :].partition(".")[0] for name in shapes if name.startswith(stack)})
