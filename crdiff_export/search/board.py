"""What stands in a study: which places are taken, by whom, which are to be done again, and what came out.

A search has places 0, 1, 2 and on: 0 is the dense model, 1 the recipe's variant. Whoever wants one writes a trial with
the number of the place and of the try, in one step. Storages number trials in the order in which they were written, so
of two with the same place and try the first stands, and the other is nothing: no place is ever done twice.
Nothing else is kept, so there is nothing that a killed worker could leave half done.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from crdiff_export.search.space import Candidate, Point

State = Literal["running", "complete", "pruned", "failed"]
RETRIES: Final = 2  # a place that failed three times stays failed
INTERRUPTED: Final = "interrupted"  # the reason of a try that someone stopped; it is no failure


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a place, as it stands in the storage; `until` is when its lease ends, in seconds since 1970."""

    id: int
    number: int
    place: int
    attempt: int
    state: State
    point: Point
    scores: Mapping[int, float]
    value: float | None
    seconds: float | None
    worker: str
    machine: str
    until: float
    chain: int | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Finished:
    """A place that is over: `value` is the mean over all pairs, and None unless it is complete."""

    place: int
    number: int
    state: Literal["complete", "pruned", "failed"]
    candidate: Candidate
    value: float | None
    scores: Mapping[int, float]
    seconds: float | None
    worker: str
    chain: int | None
    attempts: int
    reason: str | None


@dataclass(frozen=True, slots=True)
class Place:
    """All tries of a place, the last of which decides."""

    attempts: tuple[Attempt, ...]

    @property
    def last(self) -> Attempt:
        """The try that counts."""
        return self.attempts[-1]

    @property
    def open(self) -> bool:
        """Whether it failed and is to be tried again."""
        failures = sum(one.reason != INTERRUPTED for one in self.attempts)
        return self.last.state == "failed" and (self.last.reason == INTERRUPTED or failures <= RETRIES)

    @property
    def running(self) -> bool:
        """Whether someone is at it."""
        return self.last.state == "running"

    @property
    def over(self) -> bool:
        """Whether nothing more happens to it."""
        return not (self.open or self.running)


@dataclass(frozen=True, slots=True)
class Board:
    """The places that are taken, without a gap."""

    places: tuple[Place, ...]

    @classmethod
    def of(cls, attempts: Iterable[Attempt]) -> "Board":
        """The places of all attempts in a storage; those that came second are left out."""
        first: dict[tuple[int, int], Attempt] = {}
        for one in sorted(attempts, key=lambda one: one.number):
            first.setdefault((one.place, one.attempt), one)
        places: dict[int, list[Attempt]] = {}
        for key in sorted(first):
            places.setdefault(key[0], []).append(first[key])
        return cls(tuple(Place(tuple(places[place])) for place in sorted(places)))

    def owns(self, attempt: Attempt) -> bool:
        """Whether an attempt stands."""
        return attempt.place < len(self.places) and any(
            one.id == attempt.id for one in self.places[attempt.place].attempts
        )

    def chains(self) -> dict[int, list[Place]]:
        """The places of each chain of `anneal`, in order."""
        found: dict[int, list[Place]] = {}
        for place in self.places:
            if place.last.chain is not None:
                found.setdefault(place.last.chain, []).append(place)
        return found

    def estimates(self) -> list[tuple[Point, float]]:
        """Each place that is over, and its score: the mean over all pairs, or what a pruned one's would be.

        A pruned trial is as far from the dense model as on the pairs that it has; where the dense model has no scores
        yet, its own mean stands. Places that failed are left out.
        """
        dense = self.places[0].last.scores if self.places and self.places[0].last.state == "complete" else {}
        found = []
        for place in self.places:
            last = place.last
            if last.state == "complete" and last.value is not None:
                found.append((last.point, last.value))
            elif last.state == "pruned" and last.scores:
                found.append((last.point, estimate(last.scores, dense)))
        return found


def mean(scores: Mapping[int, float]) -> float:
    """The mean of the pairs' scores; their order is no matter."""
    return math.fsum(scores.values()) / len(scores)


def estimate(scores: Mapping[int, float], dense: Mapping[int, float]) -> float:
    """The mean over all pairs of a trial that has some: the pairs' own difficulty is taken out with the dense model."""
    if not scores.keys() <= dense.keys():
        return mean(scores)
    return mean(dense) + mean({pair: score - dense[pair] for pair, score in scores.items()})
