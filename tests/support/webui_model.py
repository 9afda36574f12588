"""A whole SD1.5 checkpoint that the web UIs' own loaders take: its UNet with few channels, everything else in full."""

import math
import re
from pathlib import Path

import safetensors.torch
import torch

from tests.support import geometry_tables

PREFIX = "model.diffusion_model."
# Channels of every level; the UIs tell the family from those of the first one and from the text's width.
WIDTH = 320


def write(path: Path, seed: int = 0) -> Path:
    """Write the checkpoint with random weights in fp16."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (dtype, full) in geometry_tables.load("sd15.original").items():
        shape = _narrow(name.removeprefix(PREFIX), full) if name.startswith(PREFIX) else full
        if shape is None:
            continue
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(full[-1])[None]
        elif name == "alphas_cumprod":
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, full[0], dtype=torch.float64) ** 2
            tensors[name] = (1 - betas).cumprod(0).float()
        elif dtype in ("F16", "F32"):
            tensors[name] = _values(name, shape, generator)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return path


def write_lora(path: Path, seed: int = 1) -> Path:
    """Write a LoRA of the kohya form, on layers that are pruned and on others."""
    generator = torch.Generator().manual_seed(seed)
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_"
    sides = {
        "attn1_to_q": (WIDTH, WIDTH), "attn1_to_out_0": (WIDTH, WIDTH), "attn2_to_q": (WIDTH, WIDTH),
        "ff_net_0_proj": (8 * WIDTH, WIDTH), "ff_net_2": (WIDTH, 4 * WIDTH),
    }  # fmt: skip
    tensors = {}
    for name, (rows, columns) in sides.items():
        tensors[f"{stem}{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / 8
        tensors[f"{stem}{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 8
        tensors[f"{stem}{name}.alpha"] = torch.tensor(4.0)
    safetensors.torch.save_file(tensors, path, {"format": "pt", "ss_base_model_version": "sd_v1"})
    return path


def _narrow(name: str, full: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of a UNet's tensor if all levels have WIDTH channels; None for one that is not there then."""
    if "skip_connection" in name and name.startswith("input_blocks"):
        return None
    joined = 2 * WIDTH if name.startswith("output_blocks") else WIDTH  # with what comes from the other half
    shapes = {
        r"time_embed|input_blocks\.0|out\.": full,
        r".*\.0\.in_layers\.0\.": (joined,),
        r".*\.0\.(in_layers\.2|skip_connection)\.weight": (WIDTH, joined, *full[2:]),
        r".*(emb_layers\.1|attn2\.to_k|attn2\.to_v)\.weight": (WIDTH, *full[1:]),
        r".*\.ff\.net\.0\.proj\.": (8 * WIDTH, WIDTH)[: len(full)],
        r".*\.ff\.net\.2\.weight": (WIDTH, 4 * WIDTH),
    }
    usual = (WIDTH, WIDTH, *full[2:])[: len(full)]
    return next((shape for pattern, shape in shapes.items() if re.match(pattern, name)), usual)


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return weights of a size that neither fades nor grows from layer to layer."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return (noise / 50 + (0 if name.endswith("bias") else 1)).half()
    scale = 50 if "embedding" in name else math.prod(shape[1:]) ** 0.5
    return (noise / scale).half()
