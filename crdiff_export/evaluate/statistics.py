"""How far a mean can be trusted: intervals of means, of paired differences, and of shares."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, Literal

RESAMPLES: Final = 10_000
# Our choice: resamples of fewer say little about what else might have been drawn.
FEWEST: Final = 8
# Our choice: an exact sign test needs six changes that all go one way to show anything at 5 %.
CHANGED: Final = 6
# The standard normal distribution's quantile for a two-sided interval of 95 %.
_Z: Final = 1.959963984540054

Verdict = Literal["better", "worse", "no difference shown", "too few to say"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured number and the ends of its 95 % interval, which are infinite where there were too few samples."""

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
    """Estimate the mean score over all prompts of a kind.

    The interval is an expanded percentile bootstrap (Hesterberg 2015, The American Statistician 69(4)). It draws
    prompts, each with all of its pictures, since pictures of one prompt are no independent evidence; of a single prompt
    it draws pictures. The resamples are the same each time.

    Args:
        scores: [prompt][picture], with the same number of pictures for each prompt.

    Returns:
        The mean; it has no interval for fewer than `FEWEST` prompts, or pictures of a single prompt.
    """
    import numpy as np

    grid = np.asarray(scores, np.float64)
    units = grid.mean(1) if len(grid) > 1 else grid[0]
    value = float(grid.mean())
    if len(units) < FEWEST:
        return Estimate(value, -math.inf, math.inf)
    rng, rows = np.random.default_rng(0), max(1, 10**6 // len(units))  # in parts, so that memory does not grow
    means = [
        units[rng.integers(len(units), size=(min(rows, RESAMPLES - done), len(units)))].mean(1)
        for done in range(0, RESAMPLES, rows)
    ]
    tail = _tail(len(units))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Estimate(value, min(value, float(low)), max(value, float(high)))


def _tail(count: int) -> float:
    """Return the share of resamples beyond either end.

    It is smaller for few samples, whose resamples vary less than new samples would. Student's quantile is the series of
    Abramowitz and Stegun, 26.7.5.
    """
    free = count - 1
    student = _Z + (_Z**3 + _Z) / (4 * free) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * free**2)
    return NormalDist().cdf(-student * math.sqrt(count / free))


def difference(scores: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> Estimate:
    """Estimate the mean of `scores` less that of `others`.

    Args:
        scores: [prompt][picture].
        others: The same prompts and noise, picture by picture.

    Returns:
        The mean difference. Where fewer than `CHANGED` differ at all its interval reaches to 0, whatever the resamples
        say.
    """
    import numpy as np

    grid = np.asarray(scores, np.float64) - np.asarray(others, np.float64)
    estimate = mean(grid.tolist())
    if np.count_nonzero(grid.mean(1) if len(grid) > 1 else grid) < CHANGED:
        return Estimate(estimate.value, min(estimate.low, 0.0), max(estimate.high, 0.0))
    return estimate


def share(grades: Sequence[Sequence[float]]) -> Estimate:
    """Estimate a share of pictures.

    Args:
        grades: [prompt][picture], each 0 or 1, with the same number of pictures for each prompt.

    Returns:
        The share. Of one picture for each prompt it has a score interval (Wilson 1927), which is sound near 0 and 1,
        too; of more it is estimated as a mean.
    """
    if len(grades[0]) > 1:
        return mean(grades)
    total = len(grades)
    part = sum(grade for (grade,) in grades) / total
    spread = _Z * math.sqrt(part * (1 - part) / total + _Z**2 / (4 * total**2))
    middle, scale = part + _Z**2 / (2 * total), 1 + _Z**2 / total
    return Estimate(part, max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale))
