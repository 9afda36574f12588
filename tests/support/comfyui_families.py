"""POA on small models of ComfyUI's own classes, with random weights, in a real ComfyUI on the CPU.

    python -m tests.support.comfyui_families COMFYUI WORK bases

writes a base of each into WORK/checkpoints, with the names that ComfyUI's classes have. Without the last word,
NAME.safetensors and baked-NAME.safetensors are read from there. Prints one JSON object: how far each result is from
what it should be.
"""

import asyncio
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.support.comfyui_start import WEIGHT, WORK, far, follow, mixed, poa

# isort: split
import comfy.model_management as management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models as supported
import folder_paths
import nodes
import safetensors.torch
import torch

BLOCKS = {"hidden_size": 24, "num_heads": 2, "axes_dim": [4, 4, 4], "mlp_ratio": 4.0, "theta": 10000}
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_heads": 4, "legacy": False,
    "use_spatial_transformer": True, "use_temporal_attention": False,
}  # fmt: skip
COSMOS = {
    "image_model": "cosmos_predict2", "max_img_h": 32, "max_img_w": 32, "max_frames": 4, "in_channels": 16,
    "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 32, "num_heads": 2,
    "concat_padding_mask": True, "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
    "use_adaln_lora": True, "adaln_lora_dim": 4, "num_blocks": 28, "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0,
}  # fmt: skip
FLOW, NOISE = (1.0, 0.6, 0.2, 0.0), (14.6, 5.0, 1.0, 0.0)


@dataclass(frozen=True)
class Small:
    """A model: ComfyUI's class for it, its configuration, the shape of its latents, and the width of its text."""

    kind: Any
    config: dict[str, Any]
    latents: tuple[int, ...]
    width: int
    sigmas: tuple[float, ...] = FLOW
    more: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def make(self, weights: dict[str, torch.Tensor] | None = None) -> Any:
        """The model as ComfyUI's loader gives it; with random weights where none are given."""
        config = self.kind(dict(self.config))
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "")
        if weights is None:
            generator = torch.Generator().manual_seed(self.seed)
            weights = {name: drawn(name, w, generator) for name, w in model.diffusion_model.state_dict().items()}
        model.load_model_weights(dict(weights), "")
        device = management.get_torch_device()
        return comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=device)

    def sample(self, model: Any) -> torch.Tensor:
        """Sample with ComfyUI's own sampler and guidance."""
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(self.latents, generator=generator)
        prompts = [[[torch.randn(1, 5, self.width, generator=generator), self.more]] for _ in range(2)]
        result: torch.Tensor = comfy.sample.sample_custom(
            model, noise, 2.0, comfy.samplers.sampler_object("euler"), torch.tensor(self.sigmas), *prompts,
            torch.zeros_like(noise), disable_pbar=True, seed=1,
        )  # fmt: skip
        assert result.isfinite().all()
        return result


def drawn(name: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if weight.ndim < 2:
        return float(not name.endswith("bias")) + 0.1 * torch.randn(weight.shape, generator=generator)
    return torch.randn(weight.shape, generator=generator) / math.sqrt(weight[0].numel())


SMALL = {
    "flux-lite": Small(
        supported.Flux,
        {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 16, "context_in_dim": 4096,
            "depth": 8, "depth_single_blocks": 38, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
            "txt_ids_dims": [], **BLOCKS,
        },
        (1, 16, 8, 8), 4096, more={"pooled_output": torch.ones(1, 16)},
    ),
    "chroma": Small(
        supported.Chroma,
        {
            "image_model": "chroma", "in_channels": 64, "out_channels": 64, "vec_in_dim": None, "context_in_dim": 4096,
            "depth": 19, "depth_single_blocks": 38, "patch_size": 2, "qkv_bias": True, "txt_ids_dims": [], "in_dim": 64,
            "out_dim": 24, "hidden_dim": 8, "n_layers": 1, **BLOCKS,
        },
        (1, 16, 8, 8), 4096, seed=1,
    ),
    "qwen-image": Small(
        supported.QwenImage,
        {
            "image_model": "qwen_image", "in_channels": 64, "num_layers": 60, "attention_head_dim": 12,
            "num_attention_heads": 2, "axes_dims_rope": (4, 4, 4),
        },
        (1, 16, 1, 8, 8), 3584,
    ),
    "flux-2-dev": Small(
        supported.Flux2,
        {
            "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None,
            "context_in_dim": 15360, "depth": 8, "depth_single_blocks": 48, "patch_size": 1, "qkv_bias": False,
            "guidance_embed": True, "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True,
            "ops_bias": False, **BLOCKS,
            "axes_dim": [4, 4, 4, 4], "hidden_size": 32, "mlp_ratio": 3.0,
        },
        (1, 128, 4, 4), 15360,
    ),
    "z-image": Small(
        supported.ZImage,
        {
            "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256, "cap_feat_dim": 2560,
            "n_layers": 30, "qk_norm": True, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [8, 12, 12],
            "axes_lens": [64, 32, 32], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "multiple_of": 8,
            "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
        },
        (1, 16, 8, 8), 2560,
    ),
    "lumina-2": Small(
        supported.Lumina2,
        {
            "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 48, "cap_feat_dim": 2304,
            "n_layers": 26, "qk_norm": True, "n_heads": 6, "n_kv_heads": 2, "axes_dims": [4, 2, 2],
            "axes_lens": [64, 32, 32], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0, "multiple_of": 8,
        },
        (1, 16, 8, 8), 2304,
    ),
    "auraflow": Small(
        supported.AuraFlow,
        {
            "dim": 24, "n_layers": 36, "n_double_layers": 4, "n_heads": 2, "global_conddim": 24,
            "cond_seq_dim": 2048, "max_seq": 64,
        },
        (1, 4, 8, 8), 2048,
    ),
    "pixart-sigma": Small(
        supported.PixArtSigma,
        {
            "image_model": "pixart_sigma", "num_heads": 2, "patch_size": 2, "hidden_size": 24, "in_channels": 4,
            "depth": 28, "model_max_length": 5, "input_size": 8, "pe_interpolation": 1, "micro_condition": False,
        },
        (1, 4, 40, 40), 4096, NOISE,
    ),
    "hidream-i1": Small(
        supported.HiDream,
        {
            "image_model": "hidream", "attention_head_dim": 8, "axes_dims_rope": [4, 2, 2],
            "caption_channels": [16, 4096], "max_resolution": [8, 8], "in_channels": 16, "out_channels": 16,
            "llama_layers": [0] * 48, "num_attention_heads": 4, "num_routed_experts": 4, "num_activated_experts": 2,
            "num_layers": 16, "num_single_layers": 32, "patch_size": 2, "text_emb_dim": 16,
        },
        (1, 16, 8, 8), 16,
        more={"pooled_output": torch.ones(1, 16), "conditioning_llama3": torch.ones(1, 1, 5, 4096)},
    ),
    "cosmos2-2b": Small(supported.CosmosT2IPredict2, COSMOS, (1, 16, 1, 8, 8), 1024, (80.0, 5.0, 1.0, 0.0)),
    "anima": Small(supported.Anima, {**COSMOS, "image_model": "anima"}, (1, 16, 1, 8, 8), 1024, seed=1),
    # A UNet of no known family.
    "unet": Small(
        supported.SD15,
        {
            "num_res_blocks": [1, 2, 1], "channel_mult": (1, 2, 2), "transformer_depth": [0, 1, 2, 3],
            "transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 1, 2, 2, 3, 1], "context_dim": 24,
            "use_linear_in_transformer": False, "adm_in_channels": None, **UNET,
        },
        (1, 4, 8, 8), 24, NOISE,
    ),
    "sdxl": Small(
        supported.SDXL,
        {
            "num_res_blocks": [2, 2, 2], "channel_mult": (1, 2, 4), "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "context_dim": 2048, "use_linear_in_transformer": True, "adm_in_channels": 2816,
            "num_classes": "sequential",
            **UNET,
        },
        (1, 4, 8, 8), 2048, NOISE, {"pooled_output": torch.ones(1, 1280)},
    ),
}  # fmt: skip


def write_bases() -> None:
    for name, small in SMALL.items():
        weights = small.make().model.diffusion_model.state_dict()
        plain = {key: weight.contiguous() for key, weight in weights.items()}
        safetensors.torch.save_file(plain, WORK / "checkpoints" / f"{name}.safetensors")


def against_two_models(name: str, small: Small) -> Iterator[tuple[str, float]]:
    files = {file: WORK / "checkpoints" / file for file in (f"{name}.safetensors", f"baked-{name}.safetensors")}
    dense, pruned = (small.make(safetensors.torch.load_file(path)) for path in files.values())
    baked = list(files)[1]
    expected = small.sample(mixed(dense, pruned, lambda _: WEIGHT))
    yield f"{name}, mixed", far(small.sample(poa(dense, baked)), expected)
    yield f"{name}, w=1", far(small.sample(poa(dense, baked, 1)), small.sample(pruned))
    pack = f"{name}.crdiff"
    yield f"{name}, pack, mixed", far(small.sample(follow(dense, pack)), expected)
    yield f"{name}, pack, w=1", far(small.sample(follow(dense, pack, 1.0)), small.sample(pruned))
    yield f"{name}, found", far(small.sample(poa(dense, "(loaded model)")), expected)
    yield (
        f"{name}, off again",
        far(small.sample(dense), small.sample(small.make(safetensors.torch.load_file(files[f"{name}.safetensors"])))),
    )
    yield f"{name} moves the result", far(expected, small.sample(dense))
    yield f"{name}, pruned moves the result", far(small.sample(pruned), small.sample(dense))


def main() -> None:
    torch.set_num_threads(1)
    folder_paths.add_model_folder_path("checkpoints", str(WORK / "checkpoints"))
    with torch.inference_mode():
        if sys.argv[1:] == ["bases"]:
            write_bases()
            return
        results: dict[str, Any] = {"loaded": asyncio.run(nodes.load_custom_node(str(WORK / "custom_nodes" / "crdiff")))}
        for name, small in SMALL.items():
            results |= against_two_models(name, small)
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
