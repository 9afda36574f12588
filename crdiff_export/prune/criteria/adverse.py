"""Rank by the harm a weight does at the target size: our own criterion.

Taking weight w away changes the loss by L(0) - L(w), which is -g * w to first order (Taylor's theorem) with the
gradient g, and -g * w + w^2 * h / 2 to second order with the second derivative h. Below, D_t is that change at the
target size and D_n at the native one, g_t and g_n being means over time steps, prompts and seeds. The denoising loss is
that of images which the model itself made at its native size. A negative D_t says that the weight does harm there. All
forms prune the smallest scores first, which may be negative.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from crdiff_export.prune.criteria import Criterion, Layer
from crdiff_export.prune.criteria.random import Random


class Signed:
    """Score D_t - D_n = (-g_t * w) - (-g_n * w): what gets better at the target size by more than at the native."""

    statistics: tuple[str, ...] = ("gradient", "native_gradient")

    def score(self, layer: Layer) -> Tensor:
        return _first(layer, "gradient") - _first(layer, "native_gradient")


class Guarded:
    """Score D_t + max(0, D_n) = -g_t * w + max(0, -g_n * w): harm at the native size counts, a gain there does not."""

    statistics: tuple[str, ...] = ("gradient", "native_gradient")

    def score(self, layer: Layer) -> Tensor:
        return _first(layer, "gradient") + _first(layer, "native_gradient").clamp(min=0)


class Second:
    """Score D_t - D_n with D = -g * w + w^2 * mean(g^2) / 2.

    mean(g^2) is the diagonal of the empirical Fisher information, which stands in for h as in Fisher pruning (Theis et
    al. 2018, arXiv 1801.05787). Of a loss that is a mean of squares, as here, it is h times a small factor, some twice
    the loss over the number of outputs: this term is a ten thousandth of the first, and the form in effect `signed`.
    """

    statistics: tuple[str, ...] = ("gradient", "gradient_square", "native_gradient", "native_gradient_square")

    def score(self, layer: Layer) -> Tensor:
        curvature = layer.statistics["gradient_square"] - layer.statistics["native_gradient_square"]
        return Signed().score(layer) + layer.weight.square() * curvature / 2


class Channel:
    """Score the mean over outputs i of `Signed`'s score of w_ij, the same for every weight of input channel j.

    A mean has less noise than its parts. All weights of a channel tie, and so go together (`compare=block` and `row`).
    """

    statistics: tuple[str, ...] = Signed.statistics

    def score(self, layer: Layer) -> Tensor:
        scores = Signed().score(layer)
        return scores.mean(0, keepdim=True).expand_as(scores).contiguous()


class Small:
    """Score -1 / (|w| + 1e-8) where D_t < D_n, |w| elsewhere: by magnitude, what does harm before all that does none.

    The first order holds near w alone, so that it is trusted for the sign and for small weights, not for the amount.
    """

    statistics: tuple[str, ...] = Signed.statistics

    def score(self, layer: Layer) -> Tensor:
        size = layer.weight.abs()
        return torch.where(Signed().score(layer) < 0, -1 / (size + 1e-8), size)


class Steady:
    """Score |w| * (1 + (z_t - z_n) / 2) with z = -sign(w) * g / sqrt(mean(g^2)), from -1 to 1; 0 where no g is any.

    z is how steadily taking the weight away makes the loss larger: -1 or 1 where every sample agrees, near 0 where they
    do not. A magnitude counts up to twice where that harms at the target size alone, and not at all where it helps.
    """

    statistics: tuple[str, ...] = ("gradient", "gradient_square", "native_gradient", "native_gradient_square")

    def score(self, layer: Layer) -> Tensor:
        found = layer.statistics

        def steadiness(of: str) -> Tensor:
            most = found[f"{of}_square"].sqrt()
            return torch.where(most > 0, -layer.weight.sign() * found[of] / most, 0).clamp(-1, 1)

        return layer.weight.abs() * (1 + (steadiness("gradient") - steadiness("native_gradient")) / 2)


class Coin:
    """`Small`'s score with a coin in place of the sign: the control that tells what the gradient is worth in it."""

    statistics: tuple[str, ...] = ()

    def score(self, layer: Layer) -> Tensor:
        drawn = Random(0).score(layer)
        size = layer.weight.abs()
        return torch.where(drawn < drawn.median(), -1 / (size + 1e-8), size)


def _first(layer: Layer, gradient: str) -> Tensor:
    """-g * w."""
    return torch.neg(layer.statistics[gradient] * layer.weight)


_FORMS: Mapping[str, Callable[[], Criterion]] = {
    "signed": Signed,
    "guarded": Guarded,
    "second": Second,
    "channel": Channel,
    "small": Small,
    "steady": Steady,
    "coin": Coin,
}


def adverse(options: Mapping[str, str]) -> Criterion:
    """The criterion of the `form`."""
    return _FORMS[options["form"]]()
