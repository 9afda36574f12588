"""Rank by the harm that a weight does at the target size: our own criterion.

Removing weight w changes the loss by L(0) - L(w), which is -g * w to first order (Taylor's theorem) with the
gradient g, and -g * w + w^2 * h / 2 to second order with the second derivative h. Below, D_t is that change at the
target size and D_n the one at the native size; g_t and g_n are means over time steps, prompts and seeds. The denoising
loss is that of images which the model itself drew at its native size. A negative D_t means that the weight does harm
there. All forms prune the smallest scores first; scores may be negative.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from crdiff_export.prune.criteria import Criterion, Formula, Layer
from crdiff_export.prune.criteria.random import Random

_GRADIENTS = ("gradient", "native_gradient")
_SQUARES = ("gradient", "gradient_square", "native_gradient", "native_gradient_square")


def _signed(layer: Layer) -> Tensor:
    """Score D_t - D_n = (-g_t * w) - (-g_n * w): prune what improves the target size more than the native size."""
    return _first(layer, "gradient") - _first(layer, "native_gradient")


def _guarded(layer: Layer) -> Tensor:
    """Score D_t + max(0, D_n) = -g_t * w + max(0, -g_n * w): harm at the native size counts, improvement does not."""
    return _first(layer, "gradient") + _first(layer, "native_gradient").clamp(min=0)


def _second(layer: Layer) -> Tensor:
    """Score D_t - D_n with D = -g * w + w^2 * mean(g^2) / 2.

    mean(g^2) is the diagonal of the empirical Fisher information, which replaces h as in Fisher pruning (Theis et
    al. 2018, arXiv 1801.05787). For a loss that is a mean of squares, as here, it is h times a small factor, about
    twice the loss over the number of outputs: this term is a ten thousandth of the first,
    so the form acts like `signed`.
    """
    curvature = layer.statistics["gradient_square"] - layer.statistics["native_gradient_square"]
    return _signed(layer) + layer.weight.square() * curvature / 2


def _channel(layer: Layer) -> Tensor:
    """Score the mean over outputs i of `signed`'s score of w_ij, the same for every weight of input channel j.

    A mean has less noise than its parts. All weights of a channel tie, so they are pruned together.
    """
    scores = _signed(layer)
    return scores.mean(0, keepdim=True).expand_as(scores).contiguous()


def _small(layer: Layer) -> Tensor:
    """Score -1 / (|w| + 1e-8) where D_t < D_n, |w| elsewhere: harmful weights first, then others, each by magnitude.

    The first-order term holds only near w, so it is used for its sign and for small weights, not for its amount.
    """
    return _first_by_magnitude(layer, _signed(layer) < 0)


def _steady(layer: Layer) -> Tensor:
    """Score |w| * (1 + (z_t - z_n) / 2) with z = -sign(w) * g / sqrt(mean(g^2)), from -1 to 1; 0 where g is always 0.

    z is how consistently the removal of the weight increases the loss: -1 or 1 where all samples agree, near 0 where
    they do not. The magnitude counts up to twice if removal harms only at the target size, and not at all if it
    helps there.
    """

    def steadiness(of: str) -> Tensor:
        most = layer.statistics[f"{of}_square"].sqrt()
        return torch.where(most > 0, -layer.weight.sign() * layer.statistics[of] / most, 0).clamp(-1, 1)

    return layer.weight.abs() * (1 + (steadiness("gradient") - steadiness("native_gradient")) / 2)


def _coin(layer: Layer) -> Tensor:
    """Score as `small` with a random sign, as a control that shows the value of the gradient."""
    drawn = Random(0).score(layer)
    return _first_by_magnitude(layer, drawn < drawn.median())


def _first(layer: Layer, gradient: str) -> Tensor:
    """Return -g * w."""
    return torch.neg(layer.statistics[gradient] * layer.weight)


def _first_by_magnitude(layer: Layer, first: Tensor) -> Tensor:
    """Rank some weights before all others, and both by magnitude."""
    size = layer.weight.abs()
    return torch.where(first, -1 / (size + 1e-8), size)


_FORMS: Mapping[str, Criterion] = {
    "signed": Formula(_GRADIENTS, _signed),
    "guarded": Formula(_GRADIENTS, _guarded),
    "second": Formula(_SQUARES, _second),
    "channel": Formula(_GRADIENTS, _channel),
    "small": Formula(_GRADIENTS, _small),
    "steady": Formula(_SQUARES, _steady),
    "coin": Formula((), _coin),
}


def adverse(options: Mapping[str, str]) -> Criterion:
    """Make the criterion with its `form`."""
    return _FORMS[options["form"]]
