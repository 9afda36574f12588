"""Write a diffusers folder of SDXL's geometry: `python benchmarks/random_sdxl.py FOLDER [--device cuda]`.

UNet, VAE and scheduler are those of stabilityai/stable-diffusion-xl-base-1.0 (their config.json), the text encoders are
CLIP-L and OpenCLIP bigG in size, fp16. The tokenizer knows single letters, which is all that a timing needs. What is
timed with it is the machinery; its pictures are noise, and `random_sdxl:brightness` is a scorer for them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

UNET = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 4, "sample_size": 1024,
    "scaling_factor": 0.13025, "force_upcast": False,
}  # fmt: skip
SCHEDULER = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
    "timestep_spacing": "leading",
}  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def encoder(width: int, layers: int, heads: int, projection: int | None) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, projection_dim=projection or width, bos_token_id=52, eos_token_id=53,
        pad_token_id=53, hidden_act="gelu" if projection else "quick_gelu",
    )  # fmt: skip
    made = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    model: nn.Module = made(config)
    return model


def brightness(images: list[Any], _prompts: list[str]) -> list[float]:
    """A scorer that costs nothing."""
    return [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 for image in images]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu", help="where the random numbers are drawn")
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.device(args.device):
        torch.set_default_dtype(torch.float16)
        parts = {
            "unet": diffusers.UNet2DConditionModel(**UNET), "vae": diffusers.AutoencoderKL(**VAE),
            "text_encoder": encoder(768, 12, 12, None), "text_encoder_2": encoder(1280, 32, 20, 1280),
        }  # fmt: skip
        torch.set_default_dtype(torch.float32)
    known = tokenizer(args.folder / "tokenizer")
    pipe = diffusers.StableDiffusionXLPipeline(
        **{name: part.half() for name, part in parts.items()}, tokenizer=known, tokenizer_2=known,
        scheduler=diffusers.EulerDiscreteScheduler(**SCHEDULER),
    )  # fmt: skip
    pipe.save_pretrained(args.folder, max_shard_size="20GB")


if __name__ == "__main__":
    main()
