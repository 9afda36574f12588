"""Gradients of the loss with respect to the weights of a group of layers, one sample at a time."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crdiff_export.calibrate.denoise import Denoising, ModelCall
from crdiff_export.calibrate.setting import LayerSpec, Pass, Setting, noise_seed, times
from crdiff_export.progress import Progress

# In fp16 a gradient below 6e-8 is 0 and one above 65504 is not finite, so the loss is multiplied, by less if that is
# too much (Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, 3.2). Powers of two are exact.
SCALES = (2.0**14, 2.0**7, 1.0)


@dataclass(frozen=True, slots=True)
class Example:
    """A picture as the model receives it: latents, float32 [1, C, h, w], and the call of its prompt."""

    latents: Tensor
    call: ModelCall


def measure(
    denoising: Denoising,
    setting: Setting,
    step: Pass,
    examples: Sequence[Example],
    layers: Sequence[LayerSpec],
    modules: Mapping[str, nn.Linear],
    progress: Progress,
) -> dict[str, Tensor]:
    """Measure the gradients of a group of layers.

    With g = dL/dW of one sample's loss: `gradient` is the mean of g, `gradient_abs` of |g| and `gradient_square` of
    g ** 2 (Molchanov et al. 2019, eq. 5 to 8, have products of g and w); `native_…` are those at the native size.

    Args:
        denoising: Computes the loss.
        setting: The settings of the calibration.
        step: The pass.
        examples: One for each pair of the settings.
        layers: The group of layers.
        modules: The pipeline's module of each layer, by name.
        progress: Told of every sample.

    Returns:
        The tensors `<statistic>/<layer>`, float32 [out, in], means over all samples, which may not be finite.
    """
    weights: dict[str, Tensor] = {layer.name: modules[layer.name].weight for layer in layers}
    totals = {
        f"{name}/{layer.name}": torch.zeros(layer.shape(name), device=weights[layer.name].device)
        for layer in layers
        for name in step.statistics
    }
    with _learning(denoising.model, tuple(weights.values())):
        for (_, seed), example, sample_times in zip(setting.pairs, examples, times(setting), strict=True):
            for number, time in enumerate(sample_times):
                generator = torch.Generator("cpu").manual_seed(noise_seed(seed, number))
                noise = torch.randn(example.latents.shape, generator=generator)
                gradients = _gradients(denoising, example, time, noise, tuple(weights.values()))
                for name, gradient in zip(weights, gradients, strict=True):
                    for statistic in step.statistics:
                        totals[f"{statistic}/{name}"] += _part(statistic, gradient)
                progress.advance(1)
    count = len(setting.pairs) * setting.samples
    for total in totals.values():
        total.div_(count)  # in place, because a second copy may not fit into memory
    return totals


def _part(statistic: str, gradient: Tensor) -> Tensor:
    if statistic.endswith("_abs"):
        return gradient.abs()
    return gradient.square() if statistic.endswith("_square") else gradient


def _gradients(
    denoising: Denoising, example: Example, time: float, noise: Tensor, weights: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradient of every weight, float32 or wider; zeros for a weight that the loss does not depend on."""
    half = weights[0].dtype == torch.float16
    gradients: list[Tensor] = []
    for scale in SCALES if half else (1.0,):
        loss = denoising.loss(example.latents, example.call, time, noise) * scale
        raw = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        gradients = [gradient.detach().float() / scale for gradient in raw]
        if not half or all(bool(gradient.isfinite().all()) for gradient in gradients):
            break
    return gradients


@contextlib.contextmanager
def _learning(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Enable gradients for some weights only, and recompute activations if the model can; undo both at the end."""
    usual = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    able: Any = model if getattr(model, "_supports_gradient_checkpointing", False) else None
    checkpoints = able is not None and not able.is_gradient_checkpointing
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        if checkpoints:
            able.enable_gradient_checkpointing()
        with torch.enable_grad():
            yield
    finally:
        if checkpoints:
            able.disable_gradient_checkpointing()
        for parameter, learns in usual:
            parameter.requires_grad_(learns)
