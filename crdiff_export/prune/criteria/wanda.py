"""Rank by Wanda (Sun et al. 2023, arXiv 2306.11695)."""

from collections.abc import Mapping

from torch import Tensor

from crdiff_export.prune.criteria import Criterion, Layer


class Wanda:
    """Score |W_ij| * ||X_j||_2 (arXiv 2306.11695, equation 1); X_j is input j over all tokens of the calibration.

    Computed from `norm`, ||X_j||_2 squared, whose root is taken in float64. The paper compares within an output row
    (`compare=row`).
    """

    statistics: tuple[str, ...] = ("norm",)

    def score(self, layer: Layer) -> Tensor:
        return layer.weight.abs() * layer.statistics["norm"].sqrt().to(layer.weight.dtype)


def wanda(_options: Mapping[str, str]) -> Criterion:
    """Make the criterion, which has no options of its own."""
    return Wanda()
