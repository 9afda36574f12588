"""The training loss of a model for one picture, prompt, time and noise, for any pipeline that calls its model plainly.

Forward processes: x_t = sqrt(a_t) x + sqrt(1 - a_t) e, a_t the product of 1 - beta (Ho et al. 2020, eq. 4); for flows
x_s = (1 - s) x + s e (Liu et al. 2022; Esser et al. 2024, eq. 13). Targets by the scheduler's `prediction_type`: e
(epsilon), x (sample), v = sqrt(a_t) e - sqrt(1 - a_t) x (v_prediction; Salimans & Ho 2022), for flows e - x.

What a model is called with besides noise and time (text, positions, sizes) is what the pipeline itself calls it with in
the first step of a picture. That step also shows how the pipeline tells the time, and what it makes of a prediction.
"""

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from crdiff_export.errors import CalibrationError
from crdiff_export.sampling.poa.handle import model_of
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from PIL.Image import Image

# Relative error of a time in half precision.
_ROUNDING = 2.0**-8
PREDICTIONS = ("epsilon", "v_prediction", "sample")


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
    """The forward process of flow matching; `sigmas` are the share of noise at every step of the training, shifted."""

    sigmas: Tensor
    steps: int

    def at(self, time: float, latents: Tensor, noise: Tensor) -> NoisySample:
        """Add noise for a time in [0, 1), from little to much noise."""
        sigma = float(self.sigmas[int(time * len(self.sigmas))])
        return NoisySample((1 - sigma) * latents + sigma * noise, sigma * self.steps, noise - latents)


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A call that a pipeline makes of its model for a prompt.

    Attributes:
        arguments: The keyword arguments besides the noisy latents and the time.
        shape: The shape of the noisy latents.
        fraction: Whether the time is a fraction of the training's steps.
        reverse: Whether the time is counted from noise to picture.
        negated: Whether the pipeline negates the prediction.
        dtype: The dtype of the time.
    """

    arguments: Mapping[str, Any]
    shape: tuple[int, ...]
    fraction: bool
    reverse: bool
    negated: bool
    dtype: torch.dtype


class Denoising:
    """Computes the training loss of a pipeline's model at one size; `guidance` is an input of distilled models."""

    def __init__(self, pipe: Any, size: Size, guidance: float, arguments: Mapping[str, Any] | None = None) -> None:
        self._pipe, self._size, self._guidance, self._arguments = pipe, size, guidance, arguments or {}
        self.model: Any = model_of(pipe)
        self._process = (_diffusion if hasattr(pipe, "unet") else _flow)(pipe.scheduler)
        if getattr(self.model.config, "time_cond_proj_dim", None) is not None:
            raise CalibrationError(
                "the guidance is an input of the model (LCM), and its training loss is unknown",
                "Use the model that it was distilled from, or a criterion without gradients (wanda, obs).",
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
        with _in_float32(vae):
            for image in images:
                fitting = image if image.size == size else image.resize(size, Resampling.BICUBIC)
                pixels = self._pipe.image_processor.preprocess(fitting).to(vae.device, torch.float32)
                encoded.append(_scaled(vae, _latents(vae, pixels)).cpu())
        return encoded

    @torch.no_grad()
    def embed(self, prompt: str) -> ModelCall:
        """Return how the pipeline calls the model for a prompt, with tensors on the CPU.

        Raises:
            CalibrationError: The pipeline makes something else of time and prediction than is known here.
        """
        return _model_call(self._pipe, prompt, self._size, self._guidance, self._arguments)

    def loss(self, latents: Tensor, call: ModelCall, time: float, noise: Tensor) -> Tensor:
        """Compute the mean squared error of the model's prediction.

        Args:
            latents: float32 [1, C, h, w].
            call: The call of the prompt.
            time: In [0, 1).
            noise: float32 [1, C, h, w].

        Returns:
            A scalar with a graph, in float32 or wider.
        """
        weight = next(self.model.parameters())
        noised = self._process.at(time, latents, noise)
        when = torch.tensor([noised.time], device=weight.device).to(call.dtype)
        if call.fraction:
            when = when / self._pipe.scheduler.config.num_train_timesteps
        when = 1 - when if call.reverse else when
        arguments = {**_to_device(call.arguments, weight.device), "timestep": when, "return_dict": False}
        predicted: Tensor = self.model(_packed(noised.sample, call.shape).to(weight), **arguments)[0]
        predicted = -predicted if call.negated else predicted
        wide = torch.promote_types(predicted.dtype, torch.float32)
        return mse_loss(predicted.to(wide), _packed(noised.target, call.shape).to(predicted.device, wide))


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
            f"{type(scheduler).__name__}: is not a flow-matching scheduler",
            "Use FlowMatchEulerDiscreteScheduler, or a criterion without gradients (wanda, obs).",
        )
    fresh = type(scheduler).from_config(scheduler.config)
    steps = fresh.config.num_train_timesteps
    return Flow(fresh.sigmas[:steps].flip(0).to("cpu", torch.float32), steps)


class _StepError(Exception):
    """Ends a pipeline at its first step, with the arguments of the scheduler's step."""


def _model_call(pipe: Any, prompt: str, size: Size, guidance: float, more: Mapping[str, Any]) -> ModelCall:
    """Run a pipeline up to the first step of its scheduler, without classifier-free guidance, and look at its call."""
    model, scheduler = model_of(pipe), pipe.scheduler
    first, *others = inspect.signature(model.forward).parameters
    calls: list[tuple[dict[str, Any], Any]] = []
    reached: tuple[Any, ...] = ()

    def note(_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((dict(zip((first, *others), args, strict=False)) | kwargs, output[0]))

    def step(prediction: Any, time: Any, sample: Any, **_: Any) -> NoReturn:
        raise _StepError(prediction, time, sample)

    hook = model.register_forward_hook(note, with_kwargs=True)
    scheduler.step = step
    try:
        pipe(
            prompt=[prompt], width=size.width, height=size.height, num_inference_steps=2, guidance_scale=1.0,
            generator=torch.Generator("cpu").manual_seed(0), **more,
        )  # fmt: skip
    except _StepError as stop:
        reached = stop.args
    finally:
        hook.remove()
        del scheduler.step
    unknown = CalibrationError(
        f"{type(pipe).__name__}: its training loss is unknown", "Choose a criterion without gradients (wanda, obs)."
    )
    if len(calls) != 1 or not reached:
        raise unknown
    ((arguments, output),), (prediction, time, sample) = calls, reached
    timestep = arguments.pop("timestep", None)
    tensors = (timestep, prediction, sample, arguments.pop(first), output)
    if not all(isinstance(tensor, Tensor) for tensor in tensors) or len({tensor.shape for tensor in tensors[1:]}) > 1:
        raise unknown
    if hasattr(scheduler, "scale_noise") and not _tells_its_noise(scheduler):
        raise unknown
    number, part = float(timestep.reshape(-1)[0]), float(time) / scheduler.config.num_train_timesteps
    error, fraction, reverse = min(
        (abs(number - float(time)), False, False),
        (abs(number - part), True, False),
        (abs(number - 1 + part), True, True),
    )
    negated = not _equal(prediction, output)
    if error > _ROUNDING * max(1, number) or (negated and not _equal(prediction, -output)):
        raise unknown
    if isinstance(arguments.get("guidance"), Tensor):
        arguments["guidance"] = torch.full_like(arguments["guidance"], guidance)
    inputs = {name: value for name, value in arguments.items() if value is not None and name != "return_dict"}
    moved, shape = _to_device(inputs, torch.device("cpu")), tuple(sample.shape)
    return ModelCall(moved, shape, fraction, reverse, negated, timestep.dtype)


def _tells_its_noise(scheduler: Any) -> bool:
    """Whether the times of a flow's steps are the shares of noise in them; CogView4's are shifted alone."""
    steps = len(scheduler.timesteps)
    told = scheduler.timesteps.cpu().double() / scheduler.config.num_train_timesteps
    return bool((told - scheduler.sigmas[:steps].cpu().double()).abs().max() < _ROUNDING)


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same numbers; what is not a number counts as the same."""
    return first.shape == second.shape and bool(((first == second) | (first.isnan() & second.isnan())).all())


def _packed(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return latents in the form of the model's input: as they are, or as tokens of square patches (FLUX)."""
    if len(shape) != 3:
        return latents
    side = math.isqrt(shape[2] // latents.shape[1])
    return _patches(latents, side).flatten(2).transpose(1, 2)


def _patches(latents: Tensor, side: int) -> Tensor:
    """Turn square patches into channels: [1, C, h, w] becomes [1, C * side * side, h / side, w / side]."""
    return torch.nn.functional.pixel_unshuffle(latents, side)


def _latents(vae: Any, pixels: Tensor) -> Tensor:
    """Encode pixels; a VAE for videos takes them as a video of one picture."""
    is_video = next(vae.encoder.parameters()).ndim == 5
    encoded = vae.encode(pixels.unsqueeze(2) if is_video else pixels)
    latents: Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent  # SANA's
    return latents.squeeze(2) if is_video else latents


def _scaled(vae: Any, latents: Tensor) -> Tensor:
    """Shift and scale a VAE's latents to those that the model was trained with, as its configuration says."""
    config = vae.config
    if hasattr(vae, "bn"):  # FLUX.2: each channel of each patch
        patches = _patches(latents, config.patch_size[0])
        return (patches - _column(vae.bn.running_mean)) / _column(vae.bn.running_var + config.batch_norm_eps).sqrt()
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None:
        latents = (latents - _column(mean).to(latents)) / _column(deviation).to(latents)
    shift, scale = getattr(config, "shift_factor", None) or 0.0, getattr(config, "scaling_factor", None) or 1.0
    return (latents - shift) * scale


def _column(values: Any) -> Tensor:
    return torch.as_tensor(values).view(1, -1, 1, 1)


@contextlib.contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    usual = model.dtype
    model.to(torch.float32)
    try:
        yield
    finally:
        model.to(usual)


def _to_device(arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: _moved(value, device) for name, value in arguments.items()}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return _to_device(value, device)
    return value.to(device) if isinstance(value, Tensor) else value
