"""The space of a search: the ratio of each group of a family and, on request, the POA weight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from crdiff_export.errors import OptionError

POA_WEIGHT: Final = "poa_weight"
# Ours: the public code's 0.1 cannot leave a group alone, and 0.9 gives some room above its 0.8.
LOW: Final = 0.0
HIGH: Final = 0.9

# Coordinates in the order of `RatioSpace.names`.
Point = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """The numbers that one trial tries; without a POA weight it is the pruned model alone (w = 1)."""

    ratios: tuple[tuple[str, float], ...]
    poa_weight: float | None = None

    @classmethod
    def of(cls, ratios: Mapping[str, float], poa_weight: float | None = None) -> "Candidate":
        """Make a candidate from a mapping.

        Args:
            ratios: The ratio of each group, 0 to 1.
            poa_weight: The POA weight; None for the pruned model alone.

        Returns:
            The candidate.

        """
        return cls(tuple((group, float(ratio)) for group, ratio in ratios.items()), poa_weight)

    @property
    def by_group(self) -> dict[str, float]:
        """The ratio of each group."""
        return dict(self.ratios)

    @property
    def dense(self) -> bool:
        """Whether nothing is pruned."""
        return not any(ratio for _, ratio in self.ratios)


@dataclass(frozen=True, slots=True)
class RatioSpace:
    """A box: from `low` to `high` for each group, and `poa_weights` where the POA weight is searched as well.

    Both ends are included. The public code's box is 0.1 to 0.8 (PARAM_RANGES of BWP_strategy.py).
    """

    groups: tuple[str, ...]
    low: float = LOW
    high: float = HIGH
    poa_weights: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high < 1:
            hint = "Give 0 <= low < high < 1, as in 0 to 0.9."
            raise OptionError(f"ratios from {self.low} to {self.high} cannot be searched", hint)
        if self.poa_weights and not (0 <= self.poa_weights[0] < self.poa_weights[1] < math.inf):
            hint = "Give two numbers, the smaller first, as in 1 to 2.5."
            raise OptionError("POA weights from {} to {} cannot be searched".format(*self.poa_weights), hint)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the coordinates, in the order of a point."""
        return (*self.groups, *((POA_WEIGHT,) if self.poa_weights else ()))

    @property
    def bounds(self) -> tuple[tuple[float, float], ...]:
        """The range of each coordinate."""
        return (*((self.low, self.high) for _ in self.groups), *((self.poa_weights,) if self.poa_weights else ()))

    @property
    def dense(self) -> Point:
        """The point where nothing is pruned, which may lie outside the box; a POA weight changes nothing there."""
        return (*(0.0 for _ in self.groups), *((self.poa_weights[0],) if self.poa_weights else ()))

    def contains(self, point: Point) -> bool:
        """Return whether a point is in the box."""
        return all(low <= at <= high for at, (low, high) in zip(point, self.bounds, strict=True))

    def clip(self, point: Point) -> Point:
        """Return the nearest point of the box."""
        return tuple(min(max(at, low), high) for at, (low, high) in zip(point, self.bounds, strict=True))

    def scale(self, unit: Sequence[float]) -> Point:
        """Return the point of the box at these fractions (0 to 1) of its sides."""
        sides = zip(unit, self.bounds, strict=True)
        return self.clip(tuple(low + float(at) * (high - low) for at, (low, high) in sides))

    def unit(self, point: Point) -> Point:
        """Return the fractions of the box's sides at which a point lies; the reverse of `scale`."""
        return tuple((at - low) / (high - low) for at, (low, high) in zip(point, self.bounds, strict=True))

    def candidate(self, point: Point) -> Candidate:
        """Return the candidate at a point; the dense model has no POA weight, as nothing is there to amplify."""
        candidate = Candidate(tuple(zip(self.groups, point, strict=False)), point[-1] if self.poa_weights else None)
        return Candidate(candidate.ratios) if candidate.dense else candidate

    def point(self, candidate: Candidate) -> Point:
        """Return where a candidate lies, in the order of `names`."""
        if candidate.dense:
            return self.dense
        weight = 1.0 if candidate.poa_weight is None else candidate.poa_weight
        ratios = candidate.by_group
        return (*(ratios[group] for group in self.groups), *((weight,) if self.poa_weights else ()))
