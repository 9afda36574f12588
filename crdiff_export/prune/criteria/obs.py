"""Rank by Optimal Brain Surgeon and change the remaining weights: SparseGPT (arXiv 2301.00774), OBS-Diff's Hessian.

H = G + damping * mean(diag G) * I, where G is `gram`, the sum over sampling steps of alpha_t * X_t X_t^T (OBS-Diff,
arXiv 2510.06751, whose alpha_t fall from 1.2 to 0.8 with the logarithm of the step), with 1 on its diagonal for dead
inputs, whose diagonal is zero (as in SparseGPT). U is the upper Cholesky factor of H^-1 = U^T U. U_jj^2 is
[(H_S)^-1]_jj for S = {j, j+1, ...}, the inverse after the columns before j are done. Row j of U over U_jj is the update
of the columns after j.

No inverse is needed: U = R^-1 for the upper triangular R with H = R R^T, the Cholesky factor of H with rows and columns
reversed. So U_jj = 1 / R_jj, and W' = W - E U, where E has the errors w_j / U_jj of pruned weights, is (W - W') R = E.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from crdiff_export.errors import CalibrationError
from crdiff_export.prune.criteria import Criterion, Layer, selection

# Columns that are processed together before the columns after them are updated (SparseGPT's blocksize).
BLOCK = 128
# Attempts, each with ten times the damping of the one before.
TRIES = 4


# Chooses the weights to prune in the block from a column on, from their current values and U's diagonal.
_Choice = Callable[[int, Tensor, Tensor], Tensor]


class Obs:
    """Score w_ij^2 / U_jj^2, the error of the layer's output if w_ij is pruned and the columns after j compensate.

    Scores are those of the original weights, before any was changed. A dead input scores 0, so its weights are pruned
    first, as in SparseGPT. A common factor of all grams is a common factor of all scores and changes no order, unless
    inputs are dead: their 1 on the diagonal, which enters the mean, has no such factor. R is computed in float64 where
    the device has it. The damping is a share of the mean diagonal, 0.01 by default. If Cholesky's method fails, it
    is raised tenfold, up to 3 times, and reported by `notes`; then CalibrationError names the layer.
    """

    statistics: tuple[str, ...] = ("gram",)

    def __init__(self, damping: float) -> None:
        self._damping = damping
        self._last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
        self._diagonals: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._raised: dict[str, float] = {}  # the damping of layers that needed more than requested

    def score(self, layer: Layer) -> Tensor:
        diagonal, dead = self._diagonal(layer)
        return (layer.weight * diagonal).square().masked_fill(dead, 0.0)

    def notes(self, layers: Sequence[str]) -> tuple[str, ...]:
        """Report the layers whose damping was raised."""
        raised = [name for name in layers if name in self._raised]
        if not raised:
            return ()
        most = max(self._raised[name] for name in raised)
        more = f" and {len(raised) - 1} more" if len(raised) > 1 else ""
        return (
            f"damping was raised for {len(raised)} of {len(layers)} layers, to at most {most:g} ({raised[0]}{more})",
        )

    def _diagonal(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return R's diagonal, which is all that scores need, and the dead inputs; both are cached."""
        gram = layer.statistics["gram"]
        key = layer.name, hashlib.sha256(gram.cpu().contiguous().numpy().data).hexdigest()
        if key not in self._diagonals:
            factor, dead = self._factor(layer)
            self._diagonals[key] = factor.diagonal().clone(), dead
        return self._diagonals[key]

    def _factor(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return R and the dead inputs; those of the last layer are cached, because compensation follows the scores."""
        gram = layer.statistics["gram"]
        if self._last is None or self._last[0] is not gram:
            self._last = None  # free the other layer's factor first
            factor, dead, attempt = _factorise(layer.name, gram, self._damping)
            self._last = gram, (factor, dead)
            self._raised.pop(layer.name, None)
            if attempt:
                self._raised[layer.name] = self._damping * 10**attempt
        return self._last[1]


class Compensating(Obs):
    """Scores like `Obs`, and changes the remaining weights to compensate for the pruned ones."""

    def compensate(self, layer: Layer, mask: Tensor) -> Tensor:
        """Return the weights after those of the mask were pruned, float32 [out, in]; pruned weights are exactly 0.

        Column by column (SparseGPT, algorithm 1): a pruned weight w_j leaves the error w_j / U_jj, which times row j of
        U is subtracted from the columns after j. Columns beyond a block of 128 are updated when the block is done. Each
        step is optimal for the columns that follow it.
        """
        factor, _ = self._factor(layer)
        return _settle(layer.weight, factor, lambda start, _block, _diagonal: mask[:, start : start + BLOCK])[1]

    def choose(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Choose as SparseGPT does (`compare=layer`): the mask, and the weights after it.

        In each block of 128 columns the int(n * ratio) smallest w^2 / U_jj^2 of the updated weights are pruned, and all
        that tie with them (SparseGPT prunes one more). So the layer's ratio holds in every block, and the scope's up to
        rounding. Weights of dead inputs, and weights that were 0, are pruned whatever the ratio.
        """
        factor, dead = self._factor(layer)
        zeros = (layer.weight == 0) | dead

        def choice(start: int, block: Tensor, diagonal: Tensor) -> Tensor:
            settled = zeros[:, start : start + BLOCK]
            if not (k := int(block.numel() * layer.ratio)):
                return settled
            scores = (block / diagonal).square().masked_fill(settled, 0.0)
            return scores <= selection.kth(scores.flatten(), k)  # weights that are pruned already score 0

        return _settle(layer.weight, factor, choice)


def _settle(weight: Tensor, factor: Tensor, choice: _Choice) -> tuple[Tensor, Tensor]:
    """Process the columns in turn; return the mask and the changed weights.

    Block b is first updated to W_b - D_b with D_b R_bb = -D R_:b, where D = W - W' has the columns before it. Inside
    the block the rows of U give the updates, and U_bb is the inverse of R_bb.
    """
    columns = weight.t().contiguous()  # columns are contiguous in memory, as they are processed
    mask, moved = torch.zeros_like(weight, dtype=torch.bool), torch.empty_like(columns)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        block, before = columns[start:stop], columns[start:stop].clone()
        identity = torch.eye(stop - start).to(factor)
        inverse: Tensor = torch.linalg.solve_triangular(factor[start:stop, start:stop], identity, upper=True)
        block.addmm_(inverse.t(), factor[:start, start:stop].t() @ moved[:start])
        mask[:, start:stop] = choice(start, block.t(), inverse.diagonal())
        # With 1 on the diagonal, a pruned weight is subtracted from itself.
        inverse /= inverse.diagonal()[:, None].clone()
        for j, stays in enumerate(~mask[:, start:stop].t().contiguous()):
            block[j:].addr_(inverse[j, j:], block[j].masked_fill(stays, 0.0), alpha=-1)
        moved[start:stop] = before - block
    return mask, columns.t().contiguous()


def _factorise(name: str, gram: Tensor, damping: float) -> tuple[Tensor, Tensor, int]:
    """Return R in float32, the dead inputs, and how often the damping was raised.

    A dead input gets 1 on the diagonal, as in SparseGPT's code.
    """
    diagonal = gram.diagonal().to(torch.float32 if gram.device.type == "mps" else torch.float64)
    dead = diagonal == 0
    diagonal = diagonal.masked_fill(dead, 1.0)
    for attempt in range(TRIES):
        factor = _upper_factor(gram, diagonal + damping * 10**attempt * diagonal.mean())
        if factor is not None:
            return factor, dead, attempt
    raise CalibrationError(
        f"{name}: its Hessian cannot be inverted, with damping up to {damping * 10 ** (TRIES - 1):g}",
        "The gram in the calibration is damaged or of too few tokens; calibrate again, or try obs:damping=0.1.",
    )


def _upper_factor(gram: Tensor, diagonal: Tensor) -> Tensor | None:
    """Factorise the gram with this diagonal in its dtype; None if that fails.

    The Cholesky method starts with the first row and column, so both are reversed before and after it. On a CPU the
    factor takes the place of its matrix, in column order as LAPACK needs it.
    """
    matrix = _reversed(gram, diagonal.dtype).t()
    matrix.diagonal().copy_(diagonal.flip(0))
    if _in_place(matrix):
        failed = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
    else:
        matrix, failed = torch.linalg.cholesky_ex(matrix)
    factor = _reversed(matrix.t(), torch.float32).t()
    ends = torch.aminmax(factor.diagonal())  # no element is larger than the root of H's diagonal in its row
    return factor if not int(failed) and 0 < float(ends.min) <= float(ends.max) < torch.inf else None


def _reversed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Reverse the rows and columns of a matrix, some rows at a time, because torch reverses only copies."""
    result = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for start in range(0, len(matrix), BLOCK):
        rows = matrix[start : start + BLOCK]
        result[len(matrix) - start - len(rows) :][: len(rows)] = rows.flip(0, 1)
    return result


def _in_place(matrix: Tensor) -> bool:
    """Whether a factor may take the place of its matrix: torch does not document it, so only where it was tested."""
    return matrix.device.type == "cpu"


def obs(options: Mapping[str, str]) -> Criterion:
    """Make the criterion with `damping` (0.01) and `compensate` (on)."""
    kind = Compensating if options["compensate"] == "on" else Obs
    return kind(float(options["damping"]))
