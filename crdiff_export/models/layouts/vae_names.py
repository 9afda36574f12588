"""The names of an `AutoencoderKL` in both layouts.

Source: diffusers' `convert_ldm_vae_checkpoint`. The original layout counts the levels of the decoder from the outermost
one, and its attention is made of 1x1 convolutions.
"""

import re

from crdiff_export.models.layouts.rename import Rename, Shapes

_FIXED = ("conv_in", "conv_out")
# Names of the attention: today's, and those of diffusers before 0.17.
_ATTENTION = {
    "norm": ("group_norm", "group_norm"), "q": ("to_q", "query"), "k": ("to_k", "key"), "v": ("to_v", "value"),
    "proj_out": ("to_out.0", "proj_attn"),
}  # fmt: skip
_LEVEL = re.compile(r"(encoder\.down|decoder\.up)_blocks\.(\d{1,3})\.resnets\.(\d{1,3})\.")


def vae_renames(shapes: Shapes) -> list[Rename]:
    """List the names of a VAE in both layouts.

    Args:
        shapes: The shape of every tensor by diffusers' name.

    Returns:
        The names.
    """
    renames = [Rename(name, (name,)) for name in ("quant_conv", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        renames += [Rename(f"{side}.{name}", (f"{side}.{name}",)) for name in _FIXED]
        renames.append(Rename(f"{side}.norm_out", (f"{side}.conv_norm_out",)))
        for number in range(2):
            renames += _residual(f"{side}.mid.block_{number + 1}", f"{side}.mid_block.resnets.{number}")
        attention = f"{side}.mid_block.attentions.0"
        age = int(f"{attention}.query.weight" in shapes)
        renames += [
            Rename(f"{side}.mid.attn_1.{name}", (f"{attention}.{names[age]}",), squeezed=name != "norm")
            for name, names in _ATTENTION.items()
        ]
    for side, sampler in (("encoder.down", "downsample"), ("decoder.up", "upsample")):
        blocks = [(int(m[2]), int(m[3])) for name in shapes if (m := _LEVEL.match(name)) and m[1] == side]
        last, layers = max((level for level, _ in blocks), default=-1), {layer for _, layer in blocks}
        for level in range(last + 1):
            number = level if side == "encoder.down" else last - level
            for layer in range(max(layers) + 1):
                renames += _residual(f"{side}.{number}.block.{layer}", f"{side}_blocks.{level}.resnets.{layer}")
            if level < last:
                sampled = f"{side}_blocks.{level}.{sampler}rs.0.conv"
                renames.append(Rename(f"{side}.{number}.{sampler}.conv", (sampled,)))
    return renames


def _residual(original: str, diffusers: str) -> list[Rename]:
    return [
        Rename(f"{original}.nin_shortcut", (f"{diffusers}.conv_shortcut",), optional=True),
        *(Rename(f"{original}.{name}", (f"{diffusers}.{name}",)) for name in ("norm1", "conv1", "norm2", "conv2")),
    ]
