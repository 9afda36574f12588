"""A search to test with: a smooth hill, and a noise of its own for each pair."""

import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from optuna.storages import RDBStorage

from crdiff_export.errors import PreviewError
from crdiff_export.search import METHODS, Candidate, FinishedTrial, RatioSpace, TrialEvent
from crdiff_export.search.methods import SearchMethod
from crdiff_export.search.setup import SearchBudget, SearchSetup
from crdiff_export.search.study import SearchStudy, open_study
from crdiff_export.search.worker import run_trials

NAME = "tiny"
PRINTS = {"base": "0123", "steps": "20", "size": "64x64"}
START = Candidate.of({"down": 0.3, "mid": 0.3, "up": 0.3})
SPACE = RatioSpace(("down", "mid", "up"))
# Seconds between two signs of life, and without one after which a worker is dead; SQLite's clock has whole seconds.
INTERVAL, GRACE = 1, 3


@dataclass
class Hill:
    """The higher the nearer to 0.45; `fail` names calls of `scores` that raise, `stop` one that is interrupted."""

    pairs: int = 8
    batch: int = 4
    delay: float = 0.0
    fail: Sequence[int] = ()
    stop: int = -1
    calls: int = 0

    def scores(self, candidate: Candidate, pairs: Sequence[int]) -> list[float]:
        self.calls += 1
        if self.calls - 1 == self.stop:
            raise KeyboardInterrupt
        if self.calls - 1 in self.fail:
            raise PreviewError("the machine is too small", "Take a larger one.")
        time.sleep(self.delay)
        weight = 0.0 if candidate.poa_weight is None else (candidate.poa_weight - 1.4) ** 2
        height = -4 * sum((ratio - 0.45) ** 2 for _, ratio in candidate.ratios) - weight
        return [height + random.Random(f"{pair}").gauss(0, 1) + self._noise(candidate, pair) for pair in pairs]

    def _noise(self, candidate: Candidate, pair: int) -> float:
        return random.Random(f"{candidate}:{pair}").gauss(0, 0.05)


class Flat(Hill):
    """Every candidate is as good as every other."""

    def scores(self, candidate: Candidate, pairs: Sequence[int]) -> list[float]:
        super().scores(candidate, pairs)
        return [float(pair) for pair in pairs]


def setup(name: str = "sobol", *, pairs: int = 8, space: RatioSpace = SPACE, early_stop: bool = True) -> SearchSetup:
    """A search with a method."""
    (method,) = (SearchMethod(known, seed=7, early_stop=early_stop) for known in METHODS if known == name)
    return SearchSetup(space, START, pairs, method)


@contextmanager
def opened(storage: object, search: SearchSetup, prints: Mapping[str, str] = PRINTS) -> Iterator[SearchStudy]:
    """A search in a storage."""
    with open_study(str(storage), NAME, search, prints, interval=INTERVAL, grace=GRACE) as study:
        yield study


@contextmanager
def plain_storage(path: Path) -> Iterator[RDBStorage]:
    """Optuna's own storage of a file, whose connections are closed at the end."""
    storage = RDBStorage(f"sqlite:///{path}")
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def trials_of(storage: object, search: SearchSetup) -> tuple[FinishedTrial, ...]:
    """The trials that are over."""
    with opened(storage, search) as study:
        return study.trials()


def attempts_of(storage: object, search: SearchSetup) -> dict[int, int]:
    """How often each trial was begun, by its number."""
    with opened(storage, search) as study:
        numbers = [trial.system_attrs.get("failed_trial", trial.number) for trial in study.optuna.trials]
    return {number: numbers.count(number) for number in numbers}


def run_hill(
    storage: object,
    search: SearchSetup,
    trials: int | None,
    objective: Hill | None = None,
    on_event: Callable[[TrialEvent], None] = lambda _: None,
    seconds: float | None = None,
) -> tuple[FinishedTrial, ...]:
    """Work on a search until it has so many trials, or for so many seconds."""
    with opened(storage, search) as study:
        run_trials(study, objective or Hill(search.pairs), SearchBudget(trials, seconds), on_event, poll=0.1)
        return study.trials()


def let_grace_pass(path: Path) -> None:
    """Set back all signs of life in a file, as if the grace period had passed."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE trial_heartbeats SET heartbeat = '2000-01-01 00:00:00.000000'")


def scores_of(trials: Sequence[FinishedTrial]) -> list[tuple[object, ...]]:
    """Trials apart from their numbers, of which a retry takes one, and from how long they took."""
    return [(trial.state, trial.candidate, trial.value, dict(trial.scores)) for trial in trials]


def check_scores(trials: Sequence[FinishedTrial]) -> None:
    """Assert that each score is that of the hill, and each value the mean of all pairs."""
    for trial in trials:
        exact = {pair: Hill().scores(trial.candidate, [pair])[0] for pair in trial.scores}
        assert dict(trial.scores) == exact
        whole = trial.state == "complete"
        assert len(exact) == (8 if whole else 4)
        assert (trial.value is not None) == whole
        assert trial.value is None or abs(trial.value - sum(exact.values()) / 8) < 1e-12
