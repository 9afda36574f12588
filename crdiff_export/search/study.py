"""A search in its storage: an Optuna study with our methods as its sampler, and the settings that all workers share."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from crdiff_export.errors import SearchError
from crdiff_export.search import methods
from crdiff_export.search.methods import PointScore, TrialHistory
from crdiff_export.search.setup import SearchBudget, SearchSetup
from crdiff_export.search.space import POA_WEIGHT, Point, RatioSpace
from crdiff_export.search.storage import (
    GRACE,
    INTERVAL,
    SearchStorage,
    check_file,
    is_address,
    open_storage,
    quiet_optuna,
)
from crdiff_export.search.trials import FinishedTrial, SearchProgress, best_trial, dense_trial, estimates

ATTRIBUTE: Final = "crdiff"
SCHEMA: Final = 1
ORPHANED: Final = "its worker died"
THRESHOLD: Final = 0.1  # WilcoxonPruner's p_threshold
STARTUP: Final = 4  # ours: pairs before the first test; with one-sided p < 0.1 three in a row cannot decide (2**-3)
STATES: Final[dict[TrialState, Literal["complete", "pruned", "failed"]]] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class RatioSampler(optuna.samplers.BaseSampler):
    """Lets a method of ours choose the point of a new trial; queued trials keep the point that they have."""

    def __init__(self, setup: SearchSetup) -> None:
        self._setup = setup

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(distributions(self._setup.space))

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        history = trial_history(self._setup, study.get_trials(deepcopy=False), trial.number)
        # An annealing that another worker has just ended leaves a trial without a point; the start is a point, too.
        point = methods.suggest(self._setup.method, history) or self._setup.start_point
        return dict(zip(search_space, point, strict=True))

    def sample_independent(self, *_: object) -> Any:
        raise AssertionError("a method chooses all coordinates together")


@dataclass(frozen=True, slots=True)
class SearchStudy:
    """An open search: Optuna's study and storage, the setup, and the storage's name without a password."""

    setup: SearchSetup
    where: str
    optuna: optuna.Study
    storage: SearchStorage

    def trials(self) -> tuple[FinishedTrial, ...]:
        """Return the trials that are over, by number."""
        return finished_trials(self.setup, self.optuna.get_trials(deepcopy=False))

    def progress(self, budget: SearchBudget, began: float) -> SearchProgress:
        """Return how far the search is, for a worker that began at this time of the monotonic clock."""
        attempts = self.optuna.get_trials(deepcopy=False)
        trials = finished_trials(self.setup, attempts)
        left = None if budget.seconds is None else max(0.0, began + budget.seconds - time.monotonic())
        seconds = [trial.seconds for trial in trials if trial.seconds is not None]
        if budget.trials is not None and seconds:
            workers = sum(trial.state == TrialState.RUNNING for trial in attempts)
            rest = sum(seconds) / len(seconds) * max(0, budget.trials - len(trials)) / max(1, workers)
            left = rest if left is None else min(left, rest)
        return SearchProgress(self.where, len(trials), budget.trials, best_trial(trials), dense_trial(trials), left)


@contextmanager
def open_study(
    storage: str | Path,
    name: str,
    setup: SearchSetup,
    fingerprint: Mapping[str, str],
    *,
    interval: int = INTERVAL,
    grace: int = GRACE,
) -> Iterator[SearchStudy]:
    """Begin a search, or join one that others work on or that was stopped; open until the block ends.

    Args:
        storage: A .db file, or the address of a PostgreSQL server.
        name: The search's name there.
        setup: What is searched.
        fingerprint: All else that the scores depend on.
        interval: Seconds between two signs of life of a worker.
        grace: Seconds without one after which its trial is tried again.

    Yields:
        The open search.

    Raises:
        SearchError: The storage cannot be used, or the search was begun with other settings, which are named.
    """
    settings = {**fingerprint, **setup.settings()}
    with quiet_optuna():
        pruner = optuna.pruners.WilcoxonPruner(p_threshold=THRESHOLD, n_startup_steps=STARTUP)
    with open_storage(storage, interval=interval, grace=grace) as (opened, address):
        with address.lock():
            study = optuna.create_study(
                storage=opened, study_name=name, direction="maximize", load_if_exists=True,
                sampler=RatioSampler(setup), pruner=pruner,
            )  # fmt: skip
            if ATTRIBUTE not in study.user_attrs and not study.trials:
                study.set_user_attr(ATTRIBUTE, {"schema": SCHEMA, "settings": settings})
            _compare(name, _settings(study, address.where), settings)
            _queue_first(study, setup)
        yield SearchStudy(setup, address.where, study, opened)


def check_settings(storage: str | Path, name: str, setup: SearchSetup) -> None:
    """Raise SearchError where `open_study` would refuse the storage or the setup; nothing is begun."""
    if not is_address(storage) and not Path(storage).exists():
        check_file(Path(storage))
        return
    with open_storage(storage) as (opened, address):
        if name in optuna.get_all_study_names(opened):
            study = optuna.load_study(study_name=name, storage=opened)
            began, settings = _settings(study, address.where), setup.settings()
            _compare(name, {key: value for key, value in began.items() if key in settings}, settings)


def distributions(space: RatioSpace) -> dict[str, FloatDistribution]:
    """Return Optuna's description of the coordinates: the box, and the dense model, which may be outside."""
    names = (name if name == POA_WEIGHT else f"ratio.{name}" for name in space.names)
    sides = zip(names, space.bounds, space.dense, strict=True)
    return {name: FloatDistribution(min(low, dense), high) for name, (low, high), dense in sides}


def first_number(attempt: FrozenTrial) -> int:
    """Return the number of a trial's first attempt, which Optuna's retries carry."""
    return int(attempt.system_attrs.get("failed_trial", attempt.number))


def latest_attempts(attempts: Iterable[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Return the latest attempt of each trial, by the number of the first."""
    return dict(sorted({first_number(attempt): attempt for attempt in attempts}.items()))


def finished_trials(setup: SearchSetup, attempts: Iterable[FrozenTrial]) -> tuple[FinishedTrial, ...]:
    """Return the trials whose latest attempt is over."""
    trials = []
    for number, trial in latest_attempts(attempts).items():
        point = _point(setup.space, trial)
        if trial.state not in STATES or point is None:
            continue
        complete, failed = trial.state == TrialState.COMPLETE, trial.state == TrialState.FAIL
        trials.append(
            FinishedTrial(
                number, STATES[trial.state], setup.space.candidate(point),
                value=trial.value if complete else None,
                scores=dict(trial.intermediate_values),
                seconds=trial.duration.total_seconds() if trial.duration else None,
                reason=trial.user_attrs.get("reason", ORPHANED) if failed else None,
            )
        )  # fmt: skip
    return tuple(trials)


def trial_history(setup: SearchSetup, attempts: Sequence[FrozenTrial], number: int) -> TrialHistory:
    """Return what a method knows when it chooses the point of the trial with this number."""
    trials = finished_trials(setup, attempts)
    running = [
        point
        for trial in attempts
        if not trial.state.is_finished() and (point := _point(setup.space, trial)) is not None
    ]
    points = (setup.space.point(trial.candidate) for trial in trials)
    finished = [PointScore(*pair) for pair in zip(points, estimates(trials), strict=True)]
    return TrialHistory(setup.space, setup.start_point, number, finished, running)


def _point(space: RatioSpace, trial: FrozenTrial) -> Point | None:
    """Return where a trial lies; None if it began this moment and has no point yet."""
    params = trial.params or trial.system_attrs.get("fixed_params", {})
    names = distributions(space)
    return tuple(float(params[name]) for name in names) if params.keys() >= names.keys() else None


def _queue_first(study: optuna.Study, setup: SearchSetup) -> None:
    """Queue the dense model and the start, unless they are over or at work."""
    present = {_point(setup.space, trial) for trial in study.trials if trial.state != TrialState.FAIL}
    for point in (setup.space.dense, setup.start_point):
        if point not in present:
            study.enqueue_trial(dict(zip(distributions(setup.space), point, strict=True)))


def _settings(study: optuna.Study, where: str) -> dict[str, str]:
    """Return what a study was begun with; SearchError for a study of something else."""
    entry = study.user_attrs.get(ATTRIBUTE)
    if not isinstance(entry, dict) or not isinstance(entry.get("settings"), dict):
        raise SearchError(f"{where}: {study.study_name!r} is no search of crdiff", "Give the search another name.")
    if entry.get("schema") != SCHEMA:
        message = f"{where}: {study.study_name!r} was begun by another version of crdiff"
        raise SearchError(message, "Go on with that version, or begin a new search under another name.")
    return {str(key): str(value) for key, value in entry["settings"].items()}


def _compare(name: str, began: Mapping[str, str], now: Mapping[str, str]) -> None:
    keys = sorted(key for key in {*began, *now} if began.get(key) != now.get(key))
    if keys:
        changes = "; ".join(f"{key} was {began.get(key, 'not set')}, now {now.get(key, 'not set')}" for key in keys)
        hint = "Repeat what it was begun with, or give the new search another name."
        raise SearchError(f"the search {name!r} cannot go on with other settings: {changes}", hint)
