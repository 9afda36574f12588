"""How far a mean can be trusted: intervals of means, of paired differences, and of shares."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Grid = NDArray[np.float64]

LEVEL: Final = 0.95
RESAMPLES: Final = 10_000
# Ours: resamples of fewer say little about what else might have been drawn.
FEWEST: Final = 8
# Six that all go one way are what an exact sign test needs at 5 %.
CHANGED: Final = 6
# The standard normal distribution's quantile for a two-sided interval of that level.
_Z: Final = 1.959963984540054

Verdict = Literal["better", "worse", "no difference shown", "too few to say"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number that was measured, and the ends of its 95 % interval, infinite where there were too few for one."""

    value: float
    low: float
    high: float

    @property
    def bounded(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def verdict(self) -> Verdict:
        """What a difference shows: better or worse only where the interval does not reach 0."""
        if not self.bounded:
            return "too few to say"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no difference shown"


def mean(scores: Sequence[Sequence[float]]) -> Estimate:
    """The mean of scores [prompt][picture], as an estimate of that over all such prompts.

    The interval is an expanded percentile bootstrap (Hesterberg 2015, The American Statistician 69(4)) that draws
    prompts, each with all of its pictures, since pictures of one prompt are no independent evidence; of a single prompt
    it draws pictures. Of fewer than `FEWEST` of either there is none. Its resamples are the same each time.
    """
    import numpy as np

    grid = np.asarray(scores, np.float64)
    units = grid.mean(1) if len(grid) > 1 else grid[0]
    value = float(grid.mean())
    if len(units) < FEWEST:
        return Estimate(value, -math.inf, math.inf)
    rng, rows = np.random.default_rng(0), max(1, 10**6 // len(units))  # so many at once: memory does not grow
    means = [
        units[rng.integers(len(units), size=(min(rows, RESAMPLES - done), len(units)))].mean(1)
        for done in range(0, RESAMPLES, rows)
    ]
    tail = _tail(len(units))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Estimate(value, min(value, float(low)), max(value, float(high)))


def _tail(count: int) -> float:
    """The share of resamples beyond either end, less than of many: resamples of few vary less than new samples would.

    Student's quantile is the series of Abramowitz and Stegun, 26.7.5.
    """
    free = count - 1
    student = _Z + (_Z**3 + _Z) / (4 * free) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * free**2)
    return NormalDist().cdf(-student * math.sqrt(count / free))


def difference(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Estimate:
    """The mean of `one` less that of `other`, of the same prompts and noise picture by picture.

    Where fewer than `CHANGED` differ at all the interval reaches to 0, whatever resamples of them say.
    """
    import numpy as np

    grid = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    found = mean(grid.tolist())
    if np.count_nonzero(grid.mean(1) if len(grid) > 1 else grid) < CHANGED:
        return Estimate(found.value, min(found.low, 0.0), max(found.high, 0.0))
    return found


def share(hits: int, total: int) -> Estimate:
    """A share of pictures with its score interval (Wilson 1927), which is sound near 0 and 1 as well."""
    part = hits / total
    spread = _Z * math.sqrt(part * (1 - part) / total + _Z**2 / (4 * total**2))
    middle, scale = part + _Z**2 / (2 * total), 1 + _Z**2 / total
    return Estimate(part, max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale))
