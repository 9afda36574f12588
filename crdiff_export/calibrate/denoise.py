"""The training loss of a model for one picture, prompt, time and noise, for each kind of pipeline.

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
# A token of FLUX's transformer is two by two latent pixels (diffusers, FluxPipeline._pack_latents).
_PATCH = 2


@dataclass(frozen=True, slots=True)
class NoisySample:
    """The model's input (sample and time) and the target of its prediction."""

    sample: Tensor
    time: float
    target: Tensor


@dataclass(frozen=True, slots=True)
class Diffusion:
    """The forward process of Stable Diffusion 1 to XL; `alphas` are a_t for every t of the training."""

    alphas: Tensor
    prediction: str

    def at(self, time: float, latents: Tensor, noise: Tensor) -> NoisySample:
        """Add noise for a time in [0, 1), which is t / T of the training."""
        number = int(time * len(self.alphas))
        keep, add = self.alphas[number].sqrt(), (1 - self.alphas[number]).sqrt()
        targets = {"epsilon": noise, "sample": latents, "v_prediction": keep * noise - add * latents}
        return NoisySample(keep * latents + add * noise, float(number), targets[self.prediction])


@dataclass(frozen=True, slots=True)
class Flow:
    """The forward process of SD3 and FLUX; `sigmas` are the share of noise at every step of the training, shifted."""

    sigmas: Tensor
    steps: int

    def at(self, time: float, latents: Tensor, noise: Tensor) -> NoisySample:
        """Add noise for a time in [0, 1), from little to much noise."""
        sigma = float(self.sigmas[int(time * len(self.sigmas))])
        return NoisySample((1 - sigma) * latents + sigma * noise, sigma * self.steps, noise - latents)


class Denoising:
    """Computes the training loss of a pipeline's model at one size; `guidance` is an input of distilled models."""

    def __init__(self, pipe: Any, size: Size, guidance: float) -> None:
        kind = _KINDS.get(type(pipe).__name__)
        if kind is None:
            raise CalibrationError(
                f"{type(pipe).__name__}: its training loss is unknown",
                f"Choose a criterion without gradients (wanda, obs), or {', '.join(_KINDS)}.",
            )
        self._pipe, self._size, self._guidance, self._kind = pipe, size, guidance, kind
        self.model: Any = pipe.unet if kind.diffuses else pipe.transformer
        self._process = (_diffusion if kind.diffuses else _flow)(pipe.scheduler)
        if getattr(self.model.config, "time_cond_proj_dim", None) is not None:
            raise CalibrationError(
                "the guidance is an input of the model (LCM), and its training loss is unknown",
                "Use the model that it was distilled from, or a criterion without gradients (wanda, obs).",
            )
        if getattr(pipe.vae.config, "latents_mean", None) is not None:
            raise CalibrationError(
                "the VAE centres its latents, which is not supported",
                "Choose a criterion without gradients (wanda, obs).",
            )

    @torch.no_grad()
    def encode(self, images: "Sequence[Image]") -> list[Tensor]:
        """Encode pictures, resized to the size (bicubic), with the mode of the posterior.

        The VAE runs in float32 because SDXL's overflows in fp16 (its `force_upcast`).

        Args:
            images: RGB pictures.

        Returns:
            Latents of each picture, float32 [1, C, h, w] on the CPU.
        """
        from PIL.Image import Resampling

        size = (self._size.width, self._size.height)
        vae, encoded = self._pipe.vae, []
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        with _in_float32(vae):
            for image in images:
                fitting = image if image.size == size else image.resize(size, Resampling.BICUBIC)
                pixels = self._pipe.image_processor.preprocess(fitting).to(vae.device, torch.float32)
                latents = vae.encode(pixels).latent_dist.mode()
                encoded.append(((latents - shift) * vae.config.scaling_factor).cpu())
        return encoded

    @torch.no_grad()
    def embed(self, prompt: str) -> dict[str, Any]:
        """Return the keyword arguments of the model for a prompt, on the CPU."""
        return _to_device(self._kind.embed(self._pipe, prompt, self._size), torch.device("cpu"))

    def loss(self, latents: Tensor, arguments: Mapping[str, Any], time: float, noise: Tensor) -> Tensor:
        """Compute the mean squared error of the model's prediction.

        Args:
            latents: float32 [1, C, h, w].
            arguments: The keyword arguments of the prompt.
            time: In [0, 1).
            noise: float32 [1, C, h, w].

        Returns:
            A scalar with a graph, in float32 or wider.
        """
        weight = next(self.model.parameters())
        noised = self._process.at(time, latents, noise)
        predicted = self._predict(noised.sample.to(weight), noised.time, _to_device(arguments, weight.device))
        wide = torch.promote_types(predicted.dtype, torch.float32)
        return mse_loss(predicted.to(wide), noised.target.to(predicted.device, wide))

    def _predict(self, sample: Tensor, time: float, arguments: Mapping[str, Any]) -> Tensor:
        """Return the model's prediction, in the shape of the latents."""
        if self._kind.packs:
            return self._predict_packed(sample, time, arguments)
        dtype = torch.long if self._kind.diffuses else torch.float32  # as in StableDiffusion3Pipeline
        when = torch.tensor([time], device=sample.device).to(dtype)
        prediction: Tensor = self.model(sample, timestep=when, return_dict=False, **arguments)[0]
        return prediction

    def _predict_packed(self, sample: Tensor, time: float, arguments: Mapping[str, Any]) -> Tensor:
        """Return FLUX's prediction: a token is two by two latent pixels with a position."""
        _, channels, height, width = sample.shape
        rows, columns = height // _PATCH, width // _PATCH
        packed = sample.view(1, channels, rows, _PATCH, columns, _PATCH).permute(0, 2, 4, 1, 3, 5)
        packed = packed.reshape(1, rows * columns, channels * _PATCH * _PATCH)
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1] += torch.arange(rows)[:, None]
        ids[..., 2] += torch.arange(columns)[None, :]
        arguments = {**arguments, "img_ids": ids.reshape(-1, 3).to(sample)}
        if self.model.config.guidance_embeds:
            arguments["guidance"] = torch.full([1], self._guidance, device=sample.device, dtype=torch.float32)
        when = torch.tensor([time], device=sample.device).to(sample.dtype) / 1000  # as in FluxPipeline
        prediction = self.model(hidden_states=packed, timestep=when, return_dict=False, **arguments)[0]
        prediction = prediction.view(1, rows, columns, channels, _PATCH, _PATCH).permute(0, 3, 1, 4, 2, 5)
        unpacked: Tensor = prediction.reshape(1, channels, height, width)
        return unpacked


def _diffusion(scheduler: Any) -> Diffusion:
    """Return the forward process of a scheduler with betas; CalibrationError for another scheduler."""
    prediction, alphas = scheduler.config.get("prediction_type"), getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or prediction not in PREDICTIONS or scheduler.config.get("use_flow_sigmas"):
        raise CalibrationError(
            f"{type(scheduler).__name__}: its forward process is unknown ({prediction})",
            f"Use a scheduler with betas that predicts {', '.join(PREDICTIONS)}, such as DDIM.",
        )
    return Diffusion(alphas.to("cpu", torch.float32), prediction)


def _flow(scheduler: Any) -> Flow:
    """Return the forward process of a flow-matching scheduler: its table of the training, from little noise to much."""
    if not hasattr(scheduler, "scale_noise"):
        raise CalibrationError(
            f"{type(scheduler).__name__}: is not a flow-matching scheduler", "Use FlowMatchEulerDiscreteScheduler."
        )
    fresh = type(scheduler).from_config(scheduler.config)
    steps = fresh.config.num_train_timesteps
    return Flow(fresh.sigmas[:steps].flip(0).to("cpu", torch.float32), steps)


@contextlib.contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    usual = model.dtype
    model.to(torch.float32)
    try:
        yield
    finally:
        model.to(usual)


def _to_device(arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: _to_device(value, device) if isinstance(value, dict) else value.to(device)
        for name, value in arguments.items()
    }


def _sd(pipe: Any, prompt: str, _size: Size) -> dict[str, Any]:
    embeds, _ = pipe.encode_prompt(prompt, pipe.device, 1, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds}


def _sdxl(pipe: Any, prompt: str, size: Size) -> dict[str, Any]:
    embeds, _, pooled, _ = pipe.encode_prompt(prompt, device=pipe.device, do_classifier_free_guidance=False)
    # Original size, crop and target size, as in the pipeline (arXiv 2307.01952, 2.2).
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
