"""From the names of diffusers and transformers to Stable Diffusion's original ones, and one file of all three models.

Each rule is the inverse of what diffusers does with a single file (`convert_ldm_unet_checkpoint` and its siblings);
the numbering of blocks is that of `families/unet.py`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from demo_training.model import POSITIONS, Geometry, Parts, scheduler

State = dict[str, torch.Tensor]
Rule = tuple[str, str]

_RESNET: tuple[Rule, ...] = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_OUTER: dict[str, str] = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_VAE: tuple[Rule, ...] = (
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d+)\.resnets\.", r"up.\1.block."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)


def unet_name(name: str, layers: int = 1) -> str:
    """A UNet's tensor in the original layout, where convolutions and samplers are numbered with the layers."""
    for start, original in _OUTER.items():
        if name.startswith(f"{start}."):
            return _inner(original + name.removeprefix(start))
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if not found:
        raise KeyError(name)
    way, kind, rest = found[1], found[3], found[5]
    level, layer = int(found[2]), int(found[4])
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{level * (layers + 1) + layers}.2.{rest}"
    block = f"input_blocks.{1 + level * (layers + 1) + layer}" if way == "down" else None
    block = block or f"output_blocks.{level * (layers + 1) + layer}"
    return _inner(f"{block}.{int(kind == 'attentions')}.{rest}")


def _inner(name: str) -> str:
    """A name whose block is in the original layout, with the layers of a residual block in it too."""
    head, _, end = name.rpartition(".")
    block, _, layer = head.rpartition(".")
    return f"{block}.{dict(_RESNET)[layer]}.{end}" if layer in dict(_RESNET) and "transformer" not in name else name


def vae_name(name: str, levels: int) -> str:
    """A VAE's tensor in the original layout, where the way up is numbered from the picture."""
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{levels - 1 - int(found[1])}", name)
    for pattern, original in _VAE:
        name = re.sub(pattern, original, name)
    return name


def original(parts: Parts, geometry: Geometry) -> State:
    """Every tensor of the original file: weights in float16, the schedule in float32."""
    state: State = {}
    for name, tensor in parts.unet.state_dict().items():
        state[f"model.diffusion_model.{unet_name(name)}"] = tensor.half()
    for name, tensor in parts.vae.state_dict().items():
        named = vae_name(name, len(geometry.vae_widths))
        attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", named)  # 1x1 convolutions in the original
        state[f"first_stage_model.{named}"] = (tensor[:, :, None, None] if attention else tensor).half()
    text = "cond_stage_model.transformer.text_model."
    for name, tensor in parts.text.state_dict().items():  # transformers before 5.6 has `text_model.` before each
        state[text + name.removeprefix("text_model.")] = tensor.half()
    state[f"{text}embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    schedule = scheduler(geometry)
    state["betas"], state["alphas_cumprod"] = schedule.betas.float(), schedule.alphas_cumprod.float()
    return state


def data_hash(state: State) -> str:
    """The hash that ModelSpec asks for, of all tensors as they lie in the file."""
    digest = hashlib.sha256()
    for _, tensor in _ordered(state):
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def write(file: Path, state: State, metadata: Mapping[str, str]) -> None:
    """A safetensors file whose bytes depend on nothing else: safetensors' own writer orders metadata by chance."""
    names = {torch.int64: "I64", torch.float32: "F32", torch.float16: "F16"}
    digest = {"modelspec.hash_sha256": f"0x{data_hash(state)}"}
    header: dict[str, object] = {"__metadata__": dict(sorted({**metadata, **digest}.items()))}
    end = 0
    for name, tensor in _ordered(state):
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = file.with_suffix(".part")
    with part.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.writelines(_bytes(tensor) for _, tensor in _ordered(state))
    part.replace(file)


def _ordered(state: State) -> Iterable[tuple[str, torch.Tensor]]:
    """Wide types first, so that each tensor is aligned."""
    return sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _bytes(tensor: torch.Tensor) -> bytes:
    array = tensor.detach().contiguous().numpy()
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()
