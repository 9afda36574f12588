"""The Fréchet distance of two sets of rows, each taken for a normal distribution: with numpy alone, and no row kept."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Grid = NDArray[np.float64]


class Moments:
    """The mean [width] and the covariance [width, width] of rows that come in parts, in memory that does not grow."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0  # until the first rows say how wide they are
        self._scatter: Any = 0.0

    def add(self, rows: "Grid") -> None:
        """Add rows.

        src: Chan, Golub and LeVeque 1983, The American Statistician 37(3): the sums about each part's own mean are
        added, and a term for how far apart the two means are.

        Args:
            rows: [count, width], float64.
        """
        mean = rows.mean(0)
        centred, apart, total = rows - mean, mean - self.mean, self.count + len(rows)
        self._scatter = self._scatter + centred.T @ centred
        self._scatter += (self.count * len(rows) / total) * (apart[:, None] * apart)
        self.mean = self.mean + apart * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> "Grid":
        """The unbiased covariance, as `numpy.cov` has it; there must be two rows at least."""
        assert self.count > 1
        covariance: Grid = self._scatter / (self.count - 1)
        return covariance

    @cached_property
    def root(self) -> "Grid":
        """R [width, rank] where the covariance is R Rᵀ; no row may be added afterwards."""
        import numpy as np

        values, vectors = np.linalg.eigh(self.covariance)
        # Smaller values are what rounding leaves of 0; numpy.linalg.matrix_rank draws the line there, too.
        real = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return np.asarray(vectors[:, real] * np.sqrt(values[real]))

    def distance(self, other: "Moments") -> float:
        """Return |m₁ - m₂|² + tr(C₁ + C₂ - 2 (C₁ C₂)^½), which is the square of a distance and is called the FID.

        src: Dowson and Landau 1982, Journal of Multivariate Analysis 12(3), eq. 4; Heusel et al. 2017, NeurIPS, eq. 6.
        The trace of the root is the sum of the roots of C₁ C₂'s eigenvalues, and with C₁ = R Rᵀ those other than 0 are
        Rᵀ C₂ R's, which is symmetric: no root of a matrix is taken, and nothing turns complex.
        """
        import numpy as np

        covariance, apart = other.covariance, self.mean - other.mean
        shared = np.linalg.eigvalsh(self.root.T @ covariance @ self.root) if self.root.size else np.zeros(1)
        spread = np.square(self.root).sum() + np.trace(covariance) - 2 * np.sqrt(shared.clip(0)).sum()
        return max(0.0, float(apart @ apart + spread))
