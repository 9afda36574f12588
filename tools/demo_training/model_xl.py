"""The parts of `demo-xl`, SDXL in miniature, and the folder without weights that opens its file in diffusers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from demo_training import model
from demo_training.model import Config, Geometry

SCALE = 0.13025  # SDXL's


@dataclass(frozen=True)
class GeometryXL(Geometry):
    """How large the model is. The levels have no, shallow and deep attention, in heads of 16 features."""

    native: int = 128
    widths: tuple[int, ...] = (48, 80, 96)
    depths: tuple[int, ...] = (0, 1, 3)
    head: int = 16
    vae_widths: tuple[int, ...] = (8, 16, 32, 64)  # three halvings: a factor of 8
    text_width: int = 32
    text_2_width: int = 64
    text_2_layers: int = 3
    time_width: int = 32
    """Features of each of the six numbers that say the picture's size."""


@dataclass(frozen=True, slots=True)
class PartsXL:
    """The four models."""

    text: CLIPTextModel
    text_2: CLIPTextModelWithProjection
    unet: UNet2DConditionModel
    vae: AutoencoderKL

    @property
    def by_folder(self) -> dict[str, Any]:
        """The models by the names of their folders in a pipeline's."""
        return {"text_encoder": self.text, "text_encoder_2": self.text_2, "unet": self.unet, "vae": self.vae}


def configs(geometry: GeometryXL) -> dict[str, Config]:
    """Every table of the folder, by its file's name."""
    tables = model.configs(geometry)
    text, widths = tables["text_encoder/config.json"], list(geometry.widths)
    text_2 = {
        **text,
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": geometry.text_2_width,
        "intermediate_size": 4 * geometry.text_2_width,
        "num_attention_heads": geometry.text_2_width // geometry.head,
        "num_hidden_layers": geometry.text_2_layers,
        "projection_dim": geometry.text_2_width,
    }
    text = {**text, "num_attention_heads": geometry.text_width // geometry.head}
    downs = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in geometry.depths]
    unet = {
        **tables["unet/config.json"],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": geometry.time_width,
        "attention_head_dim": [width // geometry.head for width in widths],  # the numbers of heads
        "block_out_channels": widths,
        "cross_attention_dim": geometry.text_width + geometry.text_2_width,
        "down_block_types": downs,
        "projection_class_embeddings_input_dim": geometry.text_2_width + 6 * geometry.time_width,
        "transformer_layers_per_block": [max(1, depth) for depth in geometry.depths],
        "up_block_types": [name.replace("Down", "Up") for name in reversed(downs)],
        "use_linear_projection": True,
    }
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": True,
        "image_encoder": [None, None],
        **{name: value for name, value in tables["model_index.json"].items() if "_" not in name},
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    tokenizer = {name.replace("tokenizer/", "tokenizer_2/"): table for name, table in tables.items()}
    return {
        **tables,
        **{name: table for name, table in tokenizer.items() if name.startswith("tokenizer_2/")},
        "model_index.json": index,
        "text_encoder/config.json": text,
        "text_encoder_2/config.json": text_2,
        "unet/config.json": unet,
        "vae/config.json": {**tables["vae/config.json"], "scaling_factor": SCALE},
    }


def build(geometry: GeometryXL, seed: int) -> PartsXL:
    """The four models with random weights, the same ones for the same seed."""
    tables = configs(geometry)
    torch.manual_seed(seed)
    return PartsXL(
        text=CLIPTextModel(CLIPTextConfig(**tables["text_encoder/config.json"])),
        text_2=CLIPTextModelWithProjection(CLIPTextConfig(**tables["text_encoder_2/config.json"])),
        unet=UNet2DConditionModel.from_config(tables["unet/config.json"]),
        vae=AutoencoderKL.from_config(tables["vae/config.json"]),
    )


def opened(file: Path, config: Path) -> PartsXL:
    """The four models of a file, in float32, with the pipeline's folder without weights."""
    pipe = StableDiffusionXLPipeline.from_single_file(
        str(file), config=str(config), local_files_only=True, torch_dtype=torch.float32
    )
    pipe.vae.eval().requires_grad_(requires_grad=False)
    return PartsXL(text=pipe.text_encoder, text_2=pipe.text_encoder_2, unet=pipe.unet, vae=pipe.vae)


def pipeline(parts: PartsXL, geometry: GeometryXL, tokenizer: CLIPTokenizer) -> Any:
    """The models as diffusers runs them."""
    pipe = StableDiffusionXLPipeline(
        parts.vae, parts.text, parts.text_2, tokenizer, tokenizer, parts.unet, model.scheduler(geometry),
        add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
