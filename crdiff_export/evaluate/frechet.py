"""The Fréchet distance of two sets of rows, each taken for a normal distribution: only numpy, and no row is kept."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Grid = NDArray[np.float64]


class Moments:
    """The mean and the covariance of rows that come some at a time, in memory that does not grow."""

    def __init__(self, width: int) -> None:
        import numpy as np

        self.count = 0
        self.mean: Grid = np.zeros(width)
        self._scatter: Grid = np.zeros((width, width))

    def add(self, rows: "Grid") -> None:
        """Count some more rows.

        src: Chan, Golub and LeVeque 1983, The American Statistician 37(3): the sums about each part's own mean are
        added, and a term for how far apart the two means are.
        """
        mean = rows.mean(0)
        centred, apart, total = rows - mean, mean - self.mean, self.count + len(rows)
        self._scatter += centred.T @ centred
        self._scatter += (self.count * len(rows) / total) * (apart[:, None] * apart)
        self.mean = self.mean + apart * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> "Grid":
        """The unbiased one, as `numpy.cov` has it; of two rows at least."""
        assert self.count > 1
        return self._scatter / (self.count - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What sets are compared with. Its covariance is R Rᵀ, where R is `root`, with as many columns as that has rank."""

    count: int
    mean: "Grid"
    root: "Grid"

    @classmethod
    def of(cls, moments: Moments) -> "Reference":
        """The set with these moments."""
        import numpy as np

        values, vectors = np.linalg.eigh(moments.covariance)
        # What rounding leaves of a value that is 0 is no direction; numpy.linalg.matrix_rank draws the line there, too.
        real = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return cls(moments.count, moments.mean, vectors[:, real] * np.sqrt(values[real]))

    def distance(self, other: Moments) -> float:
        """|m₁ - m₂|² + tr(C₁ + C₂ - 2 (C₁ C₂)^½), which is the square of a distance and is what an FID is.

        src: Dowson and Landau 1982, Journal of Multivariate Analysis 12(3), eq. 4; Heusel et al. 2017, NeurIPS, eq. 6.
        The trace of the root is the sum of the roots of C₁ C₂'s eigenvalues, and with C₁ = R Rᵀ those other than 0 are
        Rᵀ C₂ R's, which is symmetric: no root of a matrix is taken, and nothing turns complex.
        """
        import numpy as np

        covariance, apart = other.covariance, self.mean - other.mean
        shared = np.linalg.eigvalsh(self.root.T @ covariance @ self.root) if self.root.size else np.zeros(1)
        spread = np.square(self.root).sum() + np.trace(covariance) - 2 * np.sqrt(shared.clip(0)).sum()
        return max(0.0, float(apart @ apart + spread))
