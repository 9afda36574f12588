"""The demo model's parts, and the folder without weights that is the `config` of diffusers' `from_single_file`."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo_training import words

LATENT = 4
POSITIONS = 32  # the longest prompt has 12 tokens with its markers
SCALE = 0.18215  # Stable Diffusion's: latents times this have a deviation of 1 in each channel (`vae.settle`)
Config = dict[str, Any]


@dataclass(frozen=True)
class Geometry:
    """How large the model is. The family `demo` demands two levels, one layer each, and a text of 64 features."""

    vocabulary: tuple[str, ...]
    native: int = 64
    widths: tuple[int, ...] = (64, 128)
    heads: int = 4
    vae_widths: tuple[int, ...] = (16, 32, 64)  # two halvings: a factor of 4
    groups: int = 16
    vae_groups: int = 4
    text_width: int = 64
    text_layers: int = 2

    @cached_property
    def merges(self) -> list[words.Merge]:
        """The tokenizer's."""
        return words.merges(self.vocabulary)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """The tokenizer's vocabulary."""
        return words.vocabulary(self.merges)

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent."""
        return int(2 ** (len(self.vae_widths) - 1))


@dataclass(frozen=True, slots=True)
class Parts:
    """The three models."""

    text: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL


def configs(geometry: Geometry) -> dict[str, Config]:
    """Every table of the folder, by its file's name."""
    levels = len(geometry.vae_widths)
    last = len(geometry.tokens) - 1
    unet = {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": geometry.heads,  # the number of heads, in spite of its name
        "block_out_channels": list(geometry.widths),
        "cross_attention_dim": geometry.text_width,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "in_channels": LATENT,
        "layers_per_block": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_num_groups": geometry.groups,
        "out_channels": LATENT,
        "sample_size": geometry.native // geometry.factor,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    }
    vae = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(geometry.vae_widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "latent_channels": LATENT,
        "layers_per_block": 1,
        "norm_num_groups": geometry.vae_groups,
        "sample_size": geometry.native,
        "scaling_factor": SCALE,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    text = {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": last - 1,
        "eos_token_id": last,
        "hidden_act": "quick_gelu",
        "hidden_size": geometry.text_width,
        "intermediate_size": 4 * geometry.text_width,
        "max_position_embeddings": POSITIONS,
        "model_type": "clip_text_model",
        "num_attention_heads": 4,
        "num_hidden_layers": geometry.text_layers,
        "pad_token_id": last,
        "vocab_size": last + 1,
    }
    # Noise without any signal at the last step, and sampling that starts there: Lin et al., arXiv 2305.08891.
    scheduler = {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "steps_offset": 1,  # without effect on trailing steps; the pipeline insists on it
        "timestep_spacing": "trailing",
    }
    tokenizer = {
        "bos_token": words.MARKERS[0],
        "eos_token": words.MARKERS[1],
        "model_max_length": POSITIONS,
        "pad_token": words.MARKERS[1],
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": words.MARKERS[1],
    }
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return {
        "model_index.json": index,
        "unet/config.json": unet,
        "vae/config.json": vae,
        "text_encoder/config.json": text,
        "scheduler/scheduler_config.json": scheduler,
        "tokenizer/tokenizer_config.json": tokenizer,
        "tokenizer/vocab.json": geometry.tokens,
    }


def write_folder(tables: dict[str, Config], geometry: Geometry, folder: Path) -> Path:
    """Write the pipeline's folder without weights, of its tables by the names of their files."""
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in geometry.merges)]) + "\n"
    files = {name: json.dumps(table, indent=2) + "\n" for name, table in tables.items()}
    vocabularies = [name for name in tables if name.endswith("/vocab.json")]
    files |= {name.replace("vocab.json", "merges.txt"): merges for name in vocabularies}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def build(geometry: Geometry, seed: int) -> Parts:
    """The three models with random weights, the same ones for the same seed."""
    tables = configs(geometry)
    torch.manual_seed(seed)
    return Parts(
        text=CLIPTextModel(CLIPTextConfig(**tables["text_encoder/config.json"])),
        unet=UNet2DConditionModel.from_config(tables["unet/config.json"]),
        vae=AutoencoderKL.from_config(tables["vae/config.json"]),
    )


def scheduler(geometry: Geometry) -> DDIMScheduler:
    """The noise schedule, for training and for sampling."""
    return DDIMScheduler.from_config(configs(geometry)["scheduler/scheduler_config.json"])


def pipeline(parts: Parts, geometry: Geometry, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The models as diffusers runs them."""
    pipe = StableDiffusionPipeline(
        parts.vae, parts.text, tokenizer, parts.unet, scheduler(geometry), None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
