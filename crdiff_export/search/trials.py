"""The trials of a search: what judges them, what came out of them, and how far the search is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from crdiff_export.search.space import Candidate

EventKind = Literal["started", "scored", "complete", "pruned", "failed", "lost", "retried", "waiting", "ended"]


class Objective(Protocol):
    """Judges candidates; the score of a pair of prompt and seed is the same number whenever it is asked for."""

    @property
    def pairs(self) -> int:
        """The number of pairs; all candidates are judged on the same."""
        ...

    @property
    def batch(self) -> int:
        """How many pairs are best judged at once."""
        ...

    def scores(self, candidate: Candidate, pairs: Sequence[int]) -> list[float]:
        """Return a finite score for each of the pairs, in their order, higher is better; or raise a CrdiffError."""
        ...


@dataclass(frozen=True, slots=True)
class FinishedTrial:
    """A trial that is over; retries have the number of the first attempt.

    `value` is the mean score over all pairs, and None unless the trial is complete.
    """

    number: int
    state: Literal["complete", "pruned", "failed"]
    candidate: Candidate
    value: float | None
    scores: Mapping[int, float]
    seconds: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class TrialEvent:
    """What happened to a trial (`scored` after every batch), or to a worker (`waiting`, `ended`, with a `note`)."""

    kind: EventKind
    number: int | None = None
    candidate: Candidate | None = None
    done: int = 0
    pairs: int = 0
    value: float | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class SearchProgress:
    """How far a search is: trials that are over, of how many, the best and the dense one, and seconds left."""

    where: str
    over: int
    trials: int | None
    best: FinishedTrial | None
    dense: FinishedTrial | None
    left: float | None


def mean(scores: Mapping[int, float]) -> float:
    """Return the mean of the pairs' scores."""
    return math.fsum(scores.values()) / len(scores)


def estimate(scores: Mapping[int, float], dense: Mapping[int, float]) -> float:
    """Estimate the mean over all pairs of a trial that has some of them.

    The trial is taken to be as far from the dense model on the other pairs as on those that it has, so that the
    pairs' own difficulty does not count. Where the dense model has no scores yet, it is the mean of those pairs.
    """
    if not scores.keys() <= dense.keys():
        return mean(scores)
    return mean(dense) + mean({pair: score - dense[pair] for pair, score in scores.items()})


def estimates(trials: Sequence[FinishedTrial]) -> list[float | None]:
    """Return the score of each trial: the mean, the estimate for one that was stopped early, None for a failed one."""
    dense = dense_trial(trials)
    base = dense.scores if dense else {}
    return [
        trial.value if trial.state == "complete" else estimate(trial.scores, base) if trial.state == "pruned" else None
        for trial in trials
    ]


def best_trial(trials: Sequence[FinishedTrial]) -> FinishedTrial | None:
    """Return the complete trial with the highest mean, the earliest of several; None before the first."""
    complete = [trial for trial in trials if trial.value is not None]
    return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)


def dense_trial(trials: Sequence[FinishedTrial]) -> FinishedTrial | None:
    """Return the dense model's trial, once it is complete."""
    return next((trial for trial in trials if trial.candidate.dense and trial.value is not None), None)
