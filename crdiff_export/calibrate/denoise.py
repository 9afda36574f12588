"""The loss that a model was trained by, of one picture, one prompt, one time and one noise, for each kind of pipeline.

Forward processes: x_t = sqrt(a_t) x + sqrt(1 - a_t) e, a_t the product of 1 - beta (Ho et al. 2020, eq. 4); for flows
x_s = (1 - s) x + s e (Liu et al. 2022; Esser et al. 2024, eq. 13). Targets by the scheduler's `prediction_type`: e
(epsilon), x (sample), v = sqrt(a_t) e - sqrt(1 - a_t) x (v_prediction; Salimans & Ho 2022), for flows e - x.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from crdiff_export.errors import CalibrationError
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from PIL.Image import Image

PREDICTIONS = ("epsilon", "v_prediction", "sample")
# FLUX's transformer takes two by two latent pixels for one token (diffusers, FluxPipeline._pack_latents).
_PATCH = 2


@dataclass(frozen=True, slots=True)
class Noised:
    """What the model is given and what it is to say: sample, time and target."""

    sample: Tensor
    time: float
    target: Tensor


@dataclass(frozen=True, slots=True)
class Diffusion:
    """The forward process of Stable Diffusion 1 to XL; `alphas` are a_t for every t of training."""

    alphas: Tensor
    prediction: str

    def at(self, place: float, latents: Tensor, noise: Tensor) -> Noised:
        """Noise for a place in [0, 1), which is t / T of training."""
        number = int(place * len(self.alphas))
        keep, add = self.alphas[number].sqrt(), (1 - self.alphas[number]).sqrt()
        targets = {"epsilon": noise, "sample": latents, "v_prediction": keep * noise - add * latents}
        return Noised(keep * latents + add * noise, float(number), targets[self.prediction])


@dataclass(frozen=True, slots=True)
class Flow:
    """That of SD3 and FLUX; `sigmas` are the noise's share for every step of training, as the scheduler shifts them."""

    sigmas: Tensor
    steps: int

    def at(self, place: float, latents: Tensor, noise: Tensor) -> Noised:
        """Noise for a place in [0, 1), from little to much."""
        sigma = float(self.sigmas[int(place * len(self.sigmas))])
        return Noised((1 - sigma) * latents + sigma * noise, sigma * self.steps, noise - latents)


class Denoising:
    """A pipeline's model as it is trained, at one size; `guidance` is what a distilled one is told."""

    def __init__(self, pipe: Any, size: Size, guidance: float) -> None:
        kind = _KINDS.get(type(pipe).__name__)
        if kind is None:
            raise CalibrationError(
                f"{type(pipe).__name__}: its training loss is not known here",
                f"Take a criterion without gradients (wanda, obs), or {', '.join(_KINDS)}.",
            )
        self._pipe, self._size, self._guidance, self._kind = pipe, size, guidance, kind
        self.model: Any = pipe.unet if kind.diffuses else pipe.transformer
        self._process = (_diffusion if kind.diffuses else _flow)(pipe.scheduler)
        if getattr(self.model.config, "time_cond_proj_dim", None) is not None:
            raise CalibrationError(
                "the model is told its guidance (LCM), which its training loss does not say how",
                "Take the model that it was distilled from, or a criterion without gradients (wanda, obs).",
            )
        if getattr(pipe.vae.config, "latents_mean", None) is not None:
            raise CalibrationError(
                "the VAE centres its latents, which is not known here",
                "Take a criterion without gradients (wanda, obs).",
            )

    @torch.no_grad()
    def encode(self, images: "Sequence[Image]") -> list[Tensor]:
        """Pictures' latents, float32 [1, C, h, w] on the CPU: resized to the size (bicubic), the posterior's mode.

        In float32 whatever the pipeline's dtype: SDXL's VAE overflows in fp16 (its `force_upcast`).
        """
        from PIL.Image import Resampling

        size = (self._size.width, self._size.height)
        vae, found = self._pipe.vae, []
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        with _in_float32(vae):
            for image in images:
                fitting = image if image.size == size else image.resize(size, Resampling.BICUBIC)
                pixels = self._pipe.image_processor.preprocess(fitting).to(vae.device, torch.float32)
                latents = vae.encode(pixels).latent_dist.mode()
                found.append(((latents - shift) * vae.config.scaling_factor).cpu())
        return found

    @torch.no_grad()
    def embed(self, prompt: str) -> dict[str, Any]:
        """What the model is told by a prompt, as keyword arguments of its forward, on the CPU."""
        return _moved(self._kind.embed(self._pipe, prompt, self._size), torch.device("cpu"))

    def loss(self, latents: Tensor, told: Mapping[str, Any], place: float, noise: Tensor) -> Tensor:
        """The mean squared error of the model's prediction, in float32 or wider; a scalar with a graph."""
        weight = next(self.model.parameters())
        noised = self._process.at(place, latents, noise)
        predicted = self._predict(noised.sample.to(weight), noised.time, _moved(told, weight.device))
        wide = torch.promote_types(predicted.dtype, torch.float32)
        return mse_loss(predicted.to(wide), noised.target.to(predicted.device, wide))

    def _predict(self, sample: Tensor, time: float, told: Mapping[str, Any]) -> Tensor:
        """The model's prediction, in the shape of the latents."""
        if self._kind.packs:
            return self._predict_packed(sample, time, told)
        dtype = torch.long if self._kind.diffuses else torch.float32  # as StableDiffusion3Pipeline gives it
        when = torch.tensor([time], device=sample.device).to(dtype)
        prediction: Tensor = self.model(sample, timestep=when, return_dict=False, **told)[0]
        return prediction

    def _predict_packed(self, sample: Tensor, time: float, told: Mapping[str, Any]) -> Tensor:
        """FLUX's: a token is two by two pixels, and says where it is."""
        _, channels, height, width = sample.shape
        rows, columns = height // _PATCH, width // _PATCH
        packed = sample.view(1, channels, rows, _PATCH, columns, _PATCH).permute(0, 2, 4, 1, 3, 5)
        packed = packed.reshape(1, rows * columns, channels * _PATCH * _PATCH)
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1] += torch.arange(rows)[:, None]
        ids[..., 2] += torch.arange(columns)[None, :]
        told = {**told, "img_ids": ids.reshape(-1, 3).to(sample)}
        if self.model.config.guidance_embeds:
            told["guidance"] = torch.full([1], self._guidance, device=sample.device, dtype=torch.float32)
        when = torch.tensor([time], device=sample.device).to(sample.dtype) / 1000  # as FluxPipeline gives it
        prediction = self.model(hidden_states=packed, timestep=when, return_dict=False, **told)[0]
        prediction = prediction.view(1, rows, columns, channels, _PATCH, _PATCH).permute(0, 3, 1, 4, 2, 5)
        unpacked: Tensor = prediction.reshape(1, channels, height, width)
        return unpacked


def _diffusion(scheduler: Any) -> Diffusion:
    """The forward process of a scheduler that has betas; CalibrationError for another."""
    prediction, alphas = scheduler.config.get("prediction_type"), getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or prediction not in PREDICTIONS or scheduler.config.get("use_flow_sigmas"):
        raise CalibrationError(
            f"{type(scheduler).__name__}: its noise is not known here ({prediction})",
            f"Take a scheduler with betas that predicts {', '.join(PREDICTIONS)}, such as DDIM.",
        )
    return Diffusion(alphas.to("cpu", torch.float32), prediction)


def _flow(scheduler: Any) -> Flow:
    """That of a flow-matching scheduler, before any steps were set: its whole table, from little noise to much."""
    if not hasattr(scheduler, "scale_noise"):
        raise CalibrationError(
            f"{type(scheduler).__name__}: does not match flows", "Take FlowMatchEulerDiscreteScheduler."
        )
    fresh = type(scheduler).from_config(scheduler.config)
    steps = fresh.config.num_train_timesteps
    return Flow(fresh.sigmas[:steps].flip(0).to("cpu", torch.float32), steps)


@contextlib.contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    usual = model.dtype
    if usual == torch.float32:
        yield
        return
    model.to(torch.float32)
    try:
        yield
    finally:
        model.to(usual)


def _moved(told: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: _moved(value, device) if isinstance(value, dict) else value.to(device) for name, value in told.items()
    }


def _sd(pipe: Any, prompt: str, _size: Size) -> dict[str, Any]:
    embeds, _ = pipe.encode_prompt(prompt, pipe.device, 1, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds}


def _sdxl(pipe: Any, prompt: str, size: Size) -> dict[str, Any]:
    embeds, _, pooled, _ = pipe.encode_prompt(prompt, device=pipe.device, do_classifier_free_guidance=False)
    # Original size, crop, target size, as the pipeline says them of a picture that it draws (arXiv 2307.01952, 2.2).
    ids = torch.tensor([[size.height, size.width, 0, 0, size.height, size.width]]).to(pooled)
    return {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}


def _sd3(pipe: Any, prompt: str, _size: Size) -> dict[str, Any]:
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompt, prompt_2=None, prompt_3=None, device=pipe.device, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _flux(pipe: Any, prompt: str, _size: Size) -> dict[str, Any]:
    embeds, pooled, ids = pipe.encode_prompt(prompt, prompt_2=None, device=pipe.device)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": ids}


@dataclass(frozen=True, slots=True)
class _Kind:
    embed: Callable[[Any, str, Size], dict[str, Any]]
    diffuses: bool = True
    packs: bool = False


_KINDS = {
    "StableDiffusionPipeline": _Kind(_sd),
    "StableDiffusionXLPipeline": _Kind(_sdxl),
    "StableDiffusion3Pipeline": _Kind(_sd3, diffuses=False),
    "FluxPipeline": _Kind(_flux, diffuses=False, packs=True),
}
