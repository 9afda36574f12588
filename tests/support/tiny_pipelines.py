"""Pipelines of every kind that POA is for, with the layers of real families and next to no width; no text encoders."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

PIXELS = 64
POOLED = 16
T5 = 4096  # the width of text that SD3 and FLUX are recognised by
# The family of each kind of model that a calibration is made of.
FAMILIES = {
    "sd15": "sd15", "sdxl": "sdxl", "sd3": "sd3-medium", "flux": "flux-dev", "chroma": "chroma", "qwen": "qwen-image",
    "flux2": "flux-2-dev",
}  # fmt: skip


def unet(context: int, **config: Any) -> Any:
    sizes: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "attention_head_dim": 2, "norm_num_groups": 4}
    return diffusers.UNet2DConditionModel(sample_size=8, cross_attention_dim=context, **{**sizes, **config})


def sdxl_unet() -> Any:
    return unet(
        2048, block_out_channels=(8, 8, 8), transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time",
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), addition_time_embed_dim=8,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        projection_class_embeddings_input_dim=6 * 8 + POOLED,
    )  # fmt: skip


def refiner_unet() -> Any:
    return unet(
        1280, transformer_layers_per_block=4, addition_embed_type="text_time", addition_time_embed_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        projection_class_embeddings_input_dim=5 * 8 + POOLED,
    )  # fmt: skip


def vae(channels: int = 4) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=channels,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2, shift_factor=0.0,
    )  # fmt: skip


def sd_pipe(cls: Any, model: Any, **parts: Any) -> Any:
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return cls(
        vae=vae(), text_encoder=None, tokenizer=None, unet=model, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts,
    )  # fmt: skip


def xl_pipe(cls: Any, model: Any, **parts: Any) -> Any:
    return cls(
        vae=vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=model,
        scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False, **parts,
    )  # fmt: skip


def controlled(model: Any) -> Any:
    net = diffusers.ControlNetModel.from_unet(model, conditioning_channels=3)
    with torch.no_grad():
        for parameter in net.parameters():  # its last layers are zeros, which would control nothing
            parameter.add_(0.02 * torch.randn_like(parameter))
    return sd_pipe(diffusers.StableDiffusionControlNetPipeline, model, controlnet=net)


def with_ip_adapter(model: Any) -> Any:
    pipe = sd_pipe(diffusers.StableDiffusionPipeline, model, image_encoder=None)
    adapter: dict[str, torch.Tensor] = {}
    for i in range(sum("attn2" in name for name in model.attn_processors)):
        for part in ("k", "v"):
            adapter[f"{2 * i + 1}.to_{part}_ip.weight"] = 0.1 * torch.randn(8, 768)
    image_proj = {"proj.weight": torch.randn(4 * 768, 32) / 6, "proj.bias": torch.zeros(4 * 768),
                  "norm.weight": torch.ones(768), "norm.bias": torch.zeros(768)}  # fmt: skip
    pipe.load_ip_adapter(
        {"image_proj": image_proj, "ip_adapter": adapter}, subfolder="", weight_name="", image_encoder_folder=None
    )
    return pipe


def sd3_pipe(model: Any) -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=model, vae=vae(16), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def sd3_transformer() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=24, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=T5,
        caption_projection_dim=8, pooled_projection_dim=POOLED, out_channels=16, pos_embed_max_size=8,
    )  # fmt: skip


def flux_pipe(model: Any) -> Any:
    return diffusers.FluxPipeline(
        transformer=model, vae=vae(16), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip


def flux_transformer() -> Any:
    return diffusers.FluxTransformer2DModel(
        num_layers=19, num_single_layers=38, attention_head_dim=6, num_attention_heads=2, joint_attention_dim=T5,
        pooled_projection_dim=POOLED, guidance_embeds=True, axes_dims_rope=(2, 2, 2),
    )  # fmt: skip


def chroma_pipe(model: Any) -> Any:
    return diffusers.ChromaPipeline(
        transformer=model, vae=vae(16), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=None,
        tokenizer=None,
    )  # fmt: skip


def chroma_transformer() -> Any:
    return diffusers.ChromaTransformer2DModel(
        num_layers=19, num_single_layers=38, attention_head_dim=6, num_attention_heads=2, joint_attention_dim=T5,
        axes_dims_rope=(2, 2, 2), approximator_num_channels=8, approximator_hidden_dim=8, approximator_layers=1,
    )  # fmt: skip


def chroma_inputs(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 5, dtype=torch.bool)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return {**sd_inputs(T5, batch), **masks, "height": PIXELS, "width": PIXELS}


QWEN = 3584  # the width of text that Qwen-Image is recognised by


def qwen_pipe(model: Any) -> Any:
    channels = {"latents_mean": [i / 8 - 1 for i in range(16)], "latents_std": [1 + i / 16 for i in range(16)]}
    small = diffusers.AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **channels)
    return diffusers.QwenImagePipeline(
        transformer=model, vae=small, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=None,
        tokenizer=None,
    )  # fmt: skip


def qwen_transformer() -> Any:
    return diffusers.QwenImageTransformer2DModel(
        num_layers=60, attention_head_dim=6, num_attention_heads=2, joint_attention_dim=QWEN, axes_dims_rope=(2, 2, 2)
    )


def qwen_inputs(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 5, dtype=torch.bool)
    masks = {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    return {**sd_inputs(QWEN, batch), **masks, "height": PIXELS, "width": PIXELS, "true_cfg_scale": 2.0}


MISTRAL = 15360  # the width of text that FLUX.2 dev is recognised by


def flux2_pipe(model: Any) -> Any:
    small = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2,
    )  # fmt: skip
    with torch.no_grad():  # what it has learnt of its latents
        small.bn.running_mean.normal_()
        small.bn.running_var.uniform_(0.5, 2)
    return diffusers.Flux2Pipeline(
        transformer=model, vae=small, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=None,
        tokenizer=None,
    )  # fmt: skip


def flux2_transformer() -> Any:
    return diffusers.Flux2Transformer2DModel(
        num_layers=8, num_single_layers=48, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=MISTRAL,
        axes_dims_rope=(2, 2, 2, 2), timestep_guidance_channels=8,
    )  # fmt: skip


def embeds(width: int, batch: int, tokens: int = 5) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(width))


def picture(batch: int) -> list[Image.Image]:
    noise = torch.randint(0, 256, (PIXELS, PIXELS, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    return [Image.fromarray(noise.numpy())] * batch


def sd_inputs(context: int, batch: int) -> dict[str, Any]:
    return {"prompt_embeds": embeds(context, batch), "negative_prompt_embeds": -embeds(context, batch)}


def pooled_inputs(context: int, batch: int) -> dict[str, Any]:
    pooled = embeds(POOLED, batch, 1)[:, 0]
    return {**sd_inputs(context, batch), "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled}


def sd(batch: int, **more: Any) -> dict[str, Any]:
    return {**sd_inputs(768, batch), "height": PIXELS, "width": PIXELS, **more}


def ip_inputs(batch: int, *, guided: bool = True) -> dict[str, Any]:
    return sd(batch, ip_adapter_image_embeds=[embeds(32, 2 if guided else 1, 1)])


@dataclass(frozen=True)
class Kind:
    """A kind of pipeline: its model, what wraps it, what it is called with, and what its folder of weights is named."""

    model: Callable[[], Any]
    pipe: Callable[[Any], Any]
    inputs: Callable[[int], dict[str, Any]]
    part: str = "unet"
    unguided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})

    def make(self) -> Any:
        """The pipeline, with the same random weights every time."""
        torch.manual_seed(0)
        pipe = self.pipe(self.model())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def save(self, pipe: Any, folder: Path) -> Path:
        """The base that its model is: one file of weights in diffusers' layout."""
        getattr(pipe, self.part).save_pretrained(folder)
        return folder / "diffusion_pytorch_model.safetensors"

    def run(self, pipe: Any, batch: int = 1, **options: Any) -> torch.Tensor:
        """Latents after one step, or as many as `num_inference_steps` says."""
        torch.manual_seed(3)  # for schedulers that add noise
        arguments = {**self.inputs(batch), "num_inference_steps": 1, "output_type": "latent", **options}
        output: torch.Tensor = pipe(**arguments, generator=torch.Generator().manual_seed(1)).images
        assert output.isfinite().all()
        return output


SMALLER: dict[str, Any] = {
    "block_out_channels": (8, 8, 8), "layers_per_block": 1, "mid_block_type": None,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
sd15 = partial(unet, 768)
KINDS = {
    "sd15": Kind(sd15, partial(sd_pipe, diffusers.StableDiffusionPipeline), sd),
    "sd21": Kind(
        partial(unet, 1024, use_linear_projection=True), partial(sd_pipe, diffusers.StableDiffusionPipeline),
        lambda batch: {**sd_inputs(1024, batch), "height": PIXELS, "width": PIXELS},
    ),
    "img2img": Kind(
        sd15, partial(sd_pipe, diffusers.StableDiffusionImg2ImgPipeline),
        lambda batch: {**sd_inputs(768, batch), "image": picture(batch), "strength": 1.0},
    ),
    "inpaint": Kind(
        partial(unet, 768, in_channels=9), partial(sd_pipe, diffusers.StableDiffusionInpaintPipeline),
        lambda batch: sd(batch, image=picture(batch), mask_image=Image.new("L", (PIXELS, PIXELS), 255)),
    ),
    "controlnet": Kind(sd15, controlled, lambda batch: sd(batch, image=picture(batch))),
    "ip-adapter": Kind(sd15, with_ip_adapter, ip_inputs),
    "sdxl": Kind(
        sdxl_unet, partial(xl_pipe, diffusers.StableDiffusionXLPipeline),
        lambda batch: {**pooled_inputs(2048, batch), "height": PIXELS, "width": PIXELS},
    ),
    "refiner": Kind(
        refiner_unet, partial(xl_pipe, diffusers.StableDiffusionXLImg2ImgPipeline, requires_aesthetics_score=True),
        lambda batch: {**pooled_inputs(1280, batch), "image": picture(batch), "strength": 1.0},
    ),
    "sdxs": Kind(partial(unet, 768, **SMALLER), partial(sd_pipe, diffusers.StableDiffusionPipeline), sd),
    # A UNet of no known family.
    "unet": Kind(
        partial(unet, 24, transformer_layers_per_block=(1, 2, 3), **SMALLER),
        partial(sd_pipe, diffusers.StableDiffusionPipeline),
        lambda batch: {**sd_inputs(24, batch), "height": PIXELS, "width": PIXELS},
    ),
    "sd3": Kind(
        sd3_transformer, sd3_pipe,
        lambda batch: {**pooled_inputs(T5, batch), "height": PIXELS, "width": PIXELS}, "transformer",
    ),
    "flux": Kind(
        flux_transformer, flux_pipe,
        lambda batch: {**pooled_inputs(T5, batch), "height": PIXELS, "width": PIXELS, "true_cfg_scale": 2.0},
        "transformer", {"true_cfg_scale": 1.0},
    ),
    "chroma": Kind(chroma_transformer, chroma_pipe, chroma_inputs, "transformer"),
    "qwen": Kind(qwen_transformer, qwen_pipe, qwen_inputs, "transformer", {"true_cfg_scale": 1.0}),
    "flux2": Kind(
        flux2_transformer, flux2_pipe,
        lambda batch: {"prompt_embeds": embeds(MISTRAL, batch), "height": PIXELS, "width": PIXELS}, "transformer",
    ),
}  # fmt: skip
