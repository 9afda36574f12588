"""Rank by a weight's first-order effect on the loss (Molchanov et al., CVPR 2019, arXiv 1906.10771)."""

from collections.abc import Mapping

from torch import Tensor

from crdiff_export.prune.criteria import Criterion, Formula, Layer


def _square(layer: Layer) -> Tensor:
    """Score (g * w)^2, the mean over samples (Molchanov et al. 2019, "Taylor-FO"): w^2 * mean(g^2).

    g is the gradient of one sample's denoising loss at the target size.
    """
    return layer.weight.square() * layer.statistics["gradient_square"]


def _absolute(layer: Layer) -> Tensor:
    """Score |g * w|, the mean over samples: |w| * mean(|g|). A common variant of the same first-order term."""
    return layer.weight.abs() * layer.statistics["gradient_abs"]


def taylor(options: Mapping[str, str]) -> Criterion:
    """Make the criterion; `form` is `square` or `abs`."""
    if options["form"] == "abs":
        return Formula(("gradient_abs",), _absolute)
    return Formula(("gradient_square",), _square)
