"""The demo model for diffusers: a pipeline's folder without weights, which is the `config` of `from_single_file`."""

import json
from pathlib import Path

from crdiff_export import demo, staging
from crdiff_export.errors import BakeError

NAME = "demo-pipeline"
UNET = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,  # the number of heads, in spite of its name
    "block_out_channels": list(demo.WIDTHS),
    "cross_attention_dim": demo.TEXT_WIDTH,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "in_channels": demo.LATENT,
    "layers_per_block": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_num_groups": 32,
    "out_channels": demo.LATENT,
    "sample_size": 8,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": list(demo.VAE_WIDTHS),
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": demo.LATENT,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT_ENCODER = {
    "architectures": ["CLIPTextModel"],
    "bos_token_id": demo.TOKENS - 2,
    "eos_token_id": demo.TOKENS - 1,
    "hidden_act": "quick_gelu",
    "hidden_size": demo.TEXT_WIDTH,
    "intermediate_size": 4 * demo.TEXT_WIDTH,
    "max_position_embeddings": demo.POSITIONS,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": demo.TEXT_LAYERS,
    "pad_token_id": demo.TOKENS - 1,
    "vocab_size": demo.TOKENS,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": demo.STEPS,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
MODEL_INDEX = {
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
MARKERS = ["<|startoftext|>", "<|endoftext|>"]
TOKENIZER = {
    "bos_token": MARKERS[0],
    "eos_token": MARKERS[1],
    "model_max_length": demo.POSITIONS,
    "pad_token": MARKERS[1],
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": MARKERS[1],
}


def path() -> Path:
    """The folder beside the demo checkpoint, as it should be. Any number of processes may call this at once."""
    return write(demo.path().parent / NAME)


def write(folder: Path) -> Path:
    """Write what is missing or different in the folder, and return it."""
    for name, content in _files().items():
        file = folder / name
        try:
            if not file.is_file() or file.read_bytes() != content:
                file.parent.mkdir(parents=True, exist_ok=True)
                with staging.staged(file, folder=False) as part:
                    part.write_bytes(content)
                    staging.publish(part, file)
        except OSError as error:
            raise BakeError(
                f"{file}: {error.strerror}", "Set CRDIFF_CACHE to a folder that can be written to."
            ) from error
    return folder


def _files() -> dict[str, bytes]:
    tables: dict[str, object] = {
        "model_index.json": MODEL_INDEX,
        "unet/config.json": UNET,
        "vae/config.json": VAE,
        "text_encoder/config.json": TEXT_ENCODER,
        "scheduler/scheduler_config.json": SCHEDULER,
        "tokenizer/tokenizer_config.json": TOKENIZER,
        "tokenizer/vocab.json": _vocabulary(),
    }
    files = {name: json.dumps(table, indent=2).encode() for name, table in tables.items()}
    return {**files, "tokenizer/merges.txt": b"#version: 0.2\n"}


def _vocabulary() -> dict[str, int]:
    """CLIP's first 512 tokens, the bytes in CLIP's writing, and the two markers."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    return {token: i for i, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters), *MARKERS])}
