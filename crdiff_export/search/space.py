"""What is searched: the ratios of a family's groups and, where asked for, the POA weight; pure numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from crdiff_export.errors import SearchError

WEIGHT: Final = "poa_weight"
LOW: Final = 0.0  # ours: the public code's 0.1 cannot leave a group alone
HIGH: Final = 0.9  # ours: the public code's 0.8, and some room

Point = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """What one trial tries: a ratio for each group, and the POA weight; None is the pruned model alone, w = 1."""

    ratios: tuple[tuple[str, float], ...]
    poa_weight: float | None = None

    @classmethod
    def of(cls, ratios: Mapping[str, float], poa_weight: float | None = None) -> "Candidate":
        """The candidate with the ratios of a mapping."""
        return cls(tuple((group, float(ratio)) for group, ratio in ratios.items()), poa_weight)

    @property
    def by_group(self) -> dict[str, float]:
        """The ratio of each group."""
        return dict(self.ratios)

    @property
    def dense(self) -> bool:
        """Whether nothing is pruned."""
        return not any(ratio for _, ratio in self.ratios)


class Objective(Protocol):
    """What judges candidates: the score of a pair of prompt and seed is the same number whenever it is asked for."""

    @property
    def pairs(self) -> int:
        """How many pairs there are; all candidates are judged on the same."""
        ...

    @property
    def batch(self) -> int:
        """How many pairs are best asked for at once."""
        ...

    def scores(self, candidate: Candidate, pairs: Sequence[int]) -> list[float]:
        """A finite score for each of the pairs, in their order, higher is better; or a CrdiffError."""
        ...

    def fingerprint(self) -> Mapping[str, str]:
        """Everything the scores depend on."""
        ...


@dataclass(frozen=True, slots=True)
class Space:
    """A box: `low` to `high` for each group, both included, and the POA weight's range where it is searched too.

    The public code's box is 0.1 to 0.8 (PARAM_RANGES of BWP_strategy.py).
    """

    groups: tuple[str, ...]
    low: float = LOW
    high: float = HIGH
    weights: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.groups or len(set(self.groups)) < len(self.groups) or WEIGHT in self.groups:
            raise SearchError(f"{self.groups!r} are no groups to search", "Give each group of the family once.")
        if not 0 <= self.low < self.high < 1:
            hint = "Give 0 <= low < high < 1, as in 0 to 0.9."
            raise SearchError(f"ratios from {self.low} to {self.high} cannot be searched", hint)
        if self.weights and not (0 <= self.weights[0] < self.weights[1] and math.isfinite(self.weights[1])):
            hint = "Give two numbers, the smaller first, as in 1 to 2.5."
            raise SearchError("POA weights from {} to {} cannot be searched".format(*self.weights), hint)

    @property
    def names(self) -> tuple[str, ...]:
        """The coordinates' names in the order of a point."""
        return (*self.groups, *((WEIGHT,) if self.weights else ()))

    @property
    def bounds(self) -> tuple[tuple[float, float], ...]:
        """What each coordinate ranges over."""
        return (*((self.low, self.high) for _ in self.groups), *((self.weights,) if self.weights else ()))

    @property
    def dense(self) -> Point:
        """The point where nothing is pruned; it may lie outside the box. No POA weight changes anything there."""
        return (*(0.0 for _ in self.groups), *((self.weights[0],) if self.weights else ()))

    def contains(self, point: Point) -> bool:
        """Whether the point is in the box."""
        return all(low <= at <= high for at, (low, high) in zip(point, self.bounds, strict=True))

    def clip(self, point: Point) -> Point:
        """The nearest point of the box."""
        return tuple(min(max(at, low), high) for at, (low, high) in zip(point, self.bounds, strict=True))

    def scale(self, unit: Sequence[float]) -> Point:
        """The point of the box at these fractions of its sides."""
        sides = zip(unit, self.bounds, strict=True)
        return self.clip(tuple(low + float(at) * (high - low) for at, (low, high) in sides))

    def unit(self, point: Point) -> Point:
        """The fractions of the box's sides at which a point lies."""
        return tuple((at - low) / (high - low) for at, (low, high) in zip(point, self.bounds, strict=True))

    def candidate(self, point: Point) -> Candidate:
        """What a point stands for; where nothing is pruned there is nothing to amplify."""
        made = Candidate(tuple(zip(self.groups, point, strict=False)), point[-1] if self.weights else None)
        return Candidate(made.ratios) if made.dense else made

    def point(self, candidate: Candidate) -> Point:
        """Where a candidate lies; SearchError for one that has other coordinates."""
        ratios = candidate.by_group
        if set(ratios) != set(self.groups) or (candidate.poa_weight is not None and self.weights is None):
            asked = ", ".join(self.names)
            raise SearchError(f"{_spell(candidate)} is no candidate of this search", f"Give {asked}, and no more.")
        if candidate.dense:
            return self.dense
        weight = 1.0 if candidate.poa_weight is None else candidate.poa_weight
        return (*(ratios[group] for group in self.groups), *((weight,) if self.weights else ()))

    def require(self, candidate: Candidate) -> Point:
        """Where a candidate lies; SearchError if that is not in the box."""
        point = self.point(candidate)
        if not self.contains(point):
            sides = zip(self.names, self.bounds, strict=True)
            box = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in sides)
            hint = f"The search goes over {box}; begin within, or widen it."
            raise SearchError(f"the search cannot begin at {_spell(candidate)}", hint)
        return point


def _spell(candidate: Candidate) -> str:
    weight = [] if candidate.poa_weight is None else [f"POA weight {candidate.poa_weight:g}"]
    return ", ".join([*(f"{group} {ratio:g}" for group, ratio in candidate.ratios), *weight])
