"""Rank by Optimal Brain Surgeon, and move the weights that stay: SparseGPT (arXiv 2301.00774) on OBS-Diff's Hessian.

H = G + damping * mean(diag G) * I, where G is `gram`, the sum over sampling steps of alpha_t * X_t X_t^T (OBS-Diff,
arXiv 2510.06751, whose alpha_t fall from 1.2 to 0.8 with the logarithm of the step), with 1 on its diagonal for dead
inputs, those that are zero there (as in SparseGPT). U is the upper Cholesky factor of H^-1 = U^T U. U_jj^2 is
[(H_R)^-1]_jj for R = {j, j+1, ...}: what is left of the inverse once the columns before j are settled. Row j of U over
U_jj is the update that the columns after j get.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from crdiff_export.criteria import Criterion, Layer, selection
from crdiff_export.errors import CalibrationError

# Columns that are settled together before the others hear of it (SparseGPT's blocksize).
BLOCK = 128
# How often the damping is tried, tenfold each time.
TRIES = 4


class _Choice(Protocol):
    """Which weights of a block go, which begins at column `start`, by what they have become and U's diagonal there."""

    def __call__(self, start: int, block: Tensor, diagonal: Tensor, /) -> Tensor: ...


class Obs:
    """Score w_ij^2 / U_jj^2, the error of the layer's output when w_ij goes and the columns after j make up for it.

    Compared across the scope or a row, the scores are those of the weights as they are, before any has moved. A dead
    input scores 0, so its weights go first, as in SparseGPT. A common factor of all grams is one of all scores too, and
    changes no order unless inputs are dead: their 1 on the diagonal, which enters the mean, has no such factor.
    Computed in float64 where the device has it: H's inverse amplifies what float32 leaves out. The damping is a share
    of the mean diagonal, 0.01 by default; where Cholesky's method fails it is tried tenfold, up to 4 times, then
    CalibrationError names the layer.
    """

    statistics: tuple[str, ...] = ("gram",)

    def __init__(self, damping: float) -> None:
        self._damping = damping
        self._last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def score(self, layer: Layer) -> Tensor:
        factor, dead = self._factor(layer)
        return (layer.weight / factor.diagonal()).square().masked_fill(dead, 0.0)

    def _factor(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """U and which inputs are dead; that of the last layer is kept, as its compensation follows its scores."""
        gram = layer.statistics["gram"]
        if self._last is None or self._last[0] is not gram:
            self._last = gram, _factorise(layer.name, gram, self._damping)
        return self._last[1]


class Compensating(Obs):
    """The same, and the weights that stay move to make up for those that go."""

    def compensate(self, layer: Layer, mask: Tensor) -> Tensor:
        """The weights after those of the mask are gone, float32 [out, in]; what goes is exactly 0.

        Column by column (SparseGPT, algorithm 1): a weight w_j that goes leaves the error w_j / U_jj, which times row j
        of U is taken from the columns after j of its row. Those beyond a block of 128 get theirs when it is done. Each
        step is the best for the columns that are left; all steps together are where what goes comes before what stays.
        """
        factor, _ = self._factor(layer)
        return _settle(layer.weight, factor, lambda start, _block, _diagonal: mask[:, start : start + BLOCK])[1]

    def choose(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """SparseGPT's own choice (`compare=layer`): the mask, and the weights after it.

        In each block of 128 columns the int(n * ratio) smallest w^2 / U_jj^2 go, of the weights as the blocks before
        have left them, and with them what ties (SparseGPT takes one more). So the layer's ratio holds in every block,
        and the scope's to within the rounding. Weights of dead inputs, and those that were 0, go whatever the ratio.
        """
        factor, dead = self._factor(layer)
        gone = (layer.weight == 0) | dead

        def choice(start: int, block: Tensor, diagonal: Tensor) -> Tensor:
            settled = gone[:, start : start + BLOCK]
            if not (k := int(block.numel() * layer.ratio)):
                return settled
            scores = (block / diagonal).square().masked_fill(settled, 0.0)
            return scores <= selection.kth(scores.flatten(), k)  # what is settled among them: it scores 0

        return _settle(layer.weight, factor, choice)


def _settle(weight: Tensor, factor: Tensor, choice: _Choice) -> tuple[Tensor, Tensor]:
    """Every column in turn; the mask and the weights that stay."""
    columns = weight.t().contiguous()  # one column after another in memory, as they are gone through
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        block, own = columns[start:stop], factor[start:stop, start:stop]
        mask[:, start:stop] = choice(start, block.t().contiguous(), own.diagonal())
        errors = block.new_zeros(block.shape)
        for j, stays in enumerate(~mask[:, start:stop].t().contiguous()):
            errors[j] = (block[j] / own[j, j]).masked_fill_(stays, 0.0)
            block[j + 1 :].addr_(own[j, j + 1 :], errors[j], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return mask, columns.t().masked_fill(mask, 0.0).contiguous()


def _factorise(name: str, gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """U in float32 and which inputs are dead. A dead input gets 1 on the diagonal, as in SparseGPT's code."""
    hessian = gram.to(torch.float32 if gram.device.type == "mps" else torch.float64)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal = diagonal.masked_fill(dead, 1.0)
    for attempt in range(TRIES):
        damped = hessian.clone()
        damped.diagonal().copy_(diagonal + damping * 10**attempt * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            factor = upper.float()
            if not int(failed) and bool(torch.isfinite(factor).all()) and bool((factor.diagonal() > 0).all()):
                return factor, dead
    raise CalibrationError(
        f"{name}: its Hessian cannot be inverted, with damping up to {damping * 10 ** (TRIES - 1):g}",
        "The gram in the calibration is damaged or of too few tokens; calibrate again, or try obs:damping=0.1.",
    )


def obs(options: Mapping[str, str]) -> Criterion:
    """The criterion with `damping` (0.01) and `compensate` (on)."""
    kind = Compensating if options["compensate"] == "on" else Obs
    return kind(float(options["damping"]))
