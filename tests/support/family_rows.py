"""What independent sources say of every family; a new family needs a row here, and its tables in `geometry/`.

Classes and configurations are those of diffusers, with which its own modules and converters judge our tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FamilyRow:
    """One family.

    Attributes:
        network: Its class in diffusers.
        config: The arguments of that class, where they are not its defaults.
        architecture: ModelSpec's id of it; None where that depends on the weights.
        kinds: What is pruned by default.
        stream: The targets that are pruned by default, as a pattern, where the reference's names select none.
        left_out: How layers begin that are named as in other families and are no targets.
        converter: The function of diffusers that converts the original layout; empty for UNets, which share one,
            and for families that diffusers does not convert.
        wide: Whether narrow copies divide its widths by 128; else by 64.
    """

    network: str
    config: Mapping[str, Any]
    architecture: str | None
    kinds: tuple[str, ...] = ("ff",)
    stream: str = ""
    left_out: tuple[str, ...] = ()
    converter: str = ""
    wide: bool = False


SD = {"sample_size": 64, "layers_per_block": 2}
CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def unet_config(levels: str, widths: tuple[int, ...], depths: int | tuple[int, ...], context: int, **more: Any) -> Any:
    """The config of a UNet; `levels` has an x for a level with attention and a dot for one without."""
    kinds = [CROSS if level == "x" else PLAIN for level in levels]
    return SD | {
        "down_block_types": tuple(kind[0] for kind in kinds),
        "up_block_types": tuple(kind[1] for kind in reversed(kinds)),
        "block_out_channels": widths,
        "transformer_layers_per_block": depths,
        "cross_attention_dim": context,
        **more,
    }


LINEAR = {"use_linear_projection": True}
CLASSES = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
SDXL = unet_config(
    ".xx", (320, 640, 1280), (1, 2, 10), 2048, **LINEAR, **CLASSES, projection_class_embeddings_input_dim=2816
)
REFINER = unet_config(
    ".xx.", (384, 768, 1536, 1536), 4, 1280, **LINEAR, **CLASSES, projection_class_embeddings_input_dim=2560
)
SSD = SDXL | {
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "mid_block_type": "UNetMidBlock2D",
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
VEGA = SDXL | {"transformer_layers_per_block": (1, 1, 2), "mid_block_type": "UNetMidBlock2D"}
KOALA = SDXL | {"layers_per_block": 1}

DEMO_XL = unet_config(
    ".xx", (48, 80, 96), (1, 1, 3), 96, **LINEAR, addition_embed_type="text_time", addition_time_embed_dim=32,
    projection_class_embeddings_input_dim=256, layers_per_block=1, norm_num_groups=16,
)  # fmt: skip


def unet(architecture: str | None, config: Mapping[str, Any]) -> FamilyRow:
    return FamilyRow("UNet2DConditionModel", config, architecture, ("attn", "ff"))


def sd3(architecture: str, blocks: int, norm: str | None, dual: int) -> FamilyRow:
    sizes = {"num_layers": blocks, "num_attention_heads": blocks, "caption_projection_dim": 64 * blocks}
    config = sizes | {"qk_norm": norm, "dual_attention_layers": tuple(range(dual)), "pooled_projection_dim": 2048}
    return FamilyRow(
        "SD3Transformer2DModel", config, architecture, ("ff", "attn2") if dual else ("ff",),
        converter="convert_sd3_transformer_checkpoint_to_diffusers",
    )  # fmt: skip


def flux(architecture: str, **config: Any) -> FamilyRow:
    converter = "convert_flux_transformer_checkpoint_to_diffusers"
    return FamilyRow("FluxTransformer2DModel", config, architecture, converter=converter)


def flux2(architecture: str, **config: Any) -> FamilyRow:
    return FamilyRow(
        "Flux2Transformer2DModel", config, architecture,
        stream=r"transformer_blocks\.\d+\.ff\.linear_(in|out)",
        left_out=("single_blocks.", "single_transformer_blocks."),
        converter="convert_flux2_transformer_checkpoint_to_diffusers",
        wide=True,
    )  # fmt: skip


def klein(size: str, double: int, single: int, heads: int, text: int) -> FamilyRow:
    return flux2(
        f"Flux.2-klein-{size}", guidance_embeds=False, num_layers=double, num_single_layers=single,
        num_attention_heads=heads, joint_attention_dim=text,
    )  # fmt: skip


def sana(size: int, blocks: int, heads: int, cross: int, norm: str | None = None) -> FamilyRow:
    config = {
        "num_layers": blocks, "num_attention_heads": heads, "num_cross_attention_heads": cross,
        "cross_attention_head_dim": 32 * heads // cross, "cross_attention_dim": 32 * heads, "qk_norm": norm,
    }  # fmt: skip
    return FamilyRow(
        "SanaTransformer2DModel", config, f"nvidia-sana-{size}", ("attn", "attn2"),
        converter="convert_sana_transformer_to_diffusers",
    )  # fmt: skip


def cosmos(size: str, blocks: int, heads: int, *, wide: bool) -> FamilyRow:
    config = {"num_layers": blocks, "num_attention_heads": heads, "extra_pos_embed_type": None}
    return FamilyRow(
        "CosmosTransformer3DModel", config, f"nvidia-cosmos-predict2-t2i-{size}", ("attn", "attn2", "ff"),
        converter="convert_cosmos_transformer_checkpoint_to_diffusers", wide=wide,
    )  # fmt: skip


ROWS: dict[str, FamilyRow] = {
    "sd15": unet("stable-diffusion-v1", unet_config("xxx.", (320, 640, 1280, 1280), 1, 768)),
    "sd21": unet(None, unet_config("xxx.", (320, 640, 1280, 1280), 1, 1024, **LINEAR)),
    "sdxl": unet("stable-diffusion-xl-v1-base", SDXL),
    "sdxl-refiner": unet("stable-diffusion-xl-v1-refiner", REFINER),
    "ssd-1b": unet("segmind-stable-diffusion-1b", SSD),
    "vega": unet("segmind-vega", VEGA),
    "koala-700m": unet("koala-700m", KOALA | {"transformer_layers_per_block": (1, 2, 5), "mid_block_type": None}),
    "koala-1b": unet("koala-1b", KOALA | {"transformer_layers_per_block": (1, 2, 6)}),
    "sdxs-512": unet(
        "sdxs-512", unet_config(".xx", (320, 640, 1280), 1, 768, layers_per_block=1, mid_block_type=None)
    ),
    "demo": unet("stable-diffusion-v1", unet_config("xx", (64, 128), 1, 64, layers_per_block=1)),
    "demo-xl": unet("stable-diffusion-xl-v1-base", DEMO_XL),
    "sd3-medium": sd3("stable-diffusion-v3-medium", 24, None, 0),
    "sd35-medium": sd3("stable-diffusion-v3.5-medium", 24, "rms_norm", 13),
    "sd35-large": sd3("stable-diffusion-v3.5-large", 38, "rms_norm", 0),
    "flux-dev": flux("flux-1-dev", guidance_embeds=True),
    "flux-schnell": flux("flux-1-schnell", guidance_embeds=False),
    "flux-lite": flux("flux-1-lite", guidance_embeds=True, num_layers=8),
    "chroma": FamilyRow(
        "ChromaTransformer2DModel", {}, "chroma", converter="convert_chroma_transformer_checkpoint_to_diffusers"
    ),
    "qwen-image": FamilyRow(
        "QwenImageTransformer2DModel", {}, "qwen-image", stream=r"transformer_blocks\.\d+\.img_mlp\.net\.(0\.proj|2)"
    ),
    "flux-2-dev": flux2("Flux.2-dev"),
    "flux-2-klein-4b": klein("4b", 5, 20, 24, 7680),
    "flux-2-klein-9b": klein("9b", 8, 24, 32, 12288),
    "z-image": FamilyRow(
        "ZImageTransformer2DModel", {}, "z-image", ("ff-shared",),
        stream=r"layers\.\d+\.feed_forward\.w[123]",
        left_out=("noise_refiner.", "context_refiner."),
        converter="convert_z_image_transformer_checkpoint_to_diffusers",
    ),
    "lumina-2": FamilyRow(
        "Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, "lumina-2", ("ff-shared",),
        stream=r"layers\.\d+\.feed_forward\.linear_[123]",
        left_out=("noise_refiner.", "context_refiner."),
        converter="convert_lumina2_to_diffusers",
    ),
    "auraflow": FamilyRow(
        "AuraFlowTransformer2DModel", {"pos_embed_max_size": 9216}, "auraflow-v1",
        stream=r"joint_transformer_blocks\.\d+\.ff\.(linear_1|linear_2|out_projection)",
        converter="convert_auraflow_transformer_checkpoint_to_diffusers",
        wide=True,
    ),
    "pixart-sigma": FamilyRow(
        "PixArtTransformer2DModel", {"caption_channels": 4096, "use_additional_conditions": False},
        "pixart-ms-sigma-xl-2", ("attn", "attn2", "ff"),
    ),
    "sana-600m": sana(600, 28, 36, 16),
    "sana-1600m": sana(1600, 20, 70, 20),
    "sana-4800m": sana(4800, 60, 70, 20, "rms_norm_across_heads"),
    "hidream-i1": FamilyRow(
        "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 16, "num_single_layers": 32,
         "attention_head_dim": 128, "num_attention_heads": 20, "caption_channels": [4096, 4096], "text_emb_dim": 2048,
         "num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": (64, 32, 32),
         "max_resolution": (128, 128), "llama_layers": list(range(48))},
        "hidream-i1", ("attn",), wide=True,
    ),
    "cogview4": FamilyRow(
        "CogView4Transformer2DModel", {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32},
        "cogview4", ("attn", "ff-shared"), wide=True,
    ),
    "cosmos2-2b": cosmos("2b", 28, 16, wide=False),
    "cosmos2-14b": cosmos("14b", 36, 40, wide=True),
}  # fmt: skip
