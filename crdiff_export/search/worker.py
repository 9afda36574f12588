"""A worker: it takes a trial, judges its candidate pair by pair, and reports the scores, until the budget is spent.

Optuna's `Study.optimize` runs each trial, with a thread that records a sign of life. With any number of workers,
whenever any of them is killed:
- what is finished stays, and a trial whose worker died is tried again, up to twice;
- a worker that was only thought dead finds its trial failed when it ends it, and goes on with another one;
- an interruption gives the trial back to the queue.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Final

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, TrialState, create_trial

from crdiff_export.errors import CrdiffError, SearchError
from crdiff_export.search import methods
from crdiff_export.search.setup import SearchBudget
from crdiff_export.search.space import Candidate
from crdiff_export.search.storage import RETRIES, as_search_error, quiet_optuna, retry
from crdiff_export.search.study import (
    ORPHANED,
    SearchStudy,
    distributions,
    first_number,
    latest_attempts,
    trial_history,
)
from crdiff_export.search.trials import EventKind, Objective, TrialEvent, mean

POLL: Final = 1.0  # seconds between two looks at the trials of other workers


def run_trials(
    study: SearchStudy,
    objective: Objective,
    budget: SearchBudget,
    on_event: Callable[[TrialEvent], None] = lambda _: None,
    *,
    poll: float = POLL,
) -> None:
    """Work on a search until its budget is spent and no other worker is at a trial that might yet be lost.

    Args:
        study: The open search.
        objective: Judges the candidates.
        budget: When to stop.
        on_event: Called at each event; what it raises stops the search.
        poll: Seconds between two looks at the trials of other workers, while nothing else is to do.

    Raises:
        SearchError: The objective has another number of pairs than the search.
        CrdiffError: The objective failed three times at one candidate.
    """
    if objective.pairs != study.setup.pairs:
        raise SearchError("the search was opened for another number of pairs", "Open it for those of the objective.")
    _Worker(study, objective, budget, on_event).run(poll)


class _Worker:
    """The state of one call of `run_trials`."""

    def __init__(
        self,
        study: SearchStudy,
        objective: Objective,
        budget: SearchBudget,
        on_event: Callable[[TrialEvent], None],
    ) -> None:
        self._study, self._objective, self._budget, self._tell = study, objective, budget, on_event
        self._trial: optuna.Trial | None = None  # the attempt at hand, until it is over or queued again
        self._number: int | None = None  # of its first attempt
        self._candidate: Candidate | None = None
        self._scores: dict[int, float] = {}
        self._error: BaseException | None = None  # what the objective raised in it

    def run(self, poll: float) -> None:
        until = math.inf if self._budget.seconds is None else time.monotonic() + self._budget.seconds
        waiting = False
        while time.monotonic() < until:
            reason = self._no_more(self._study.optuna.get_trials(deepcopy=False))
            if reason is None:
                waiting = False
                self._try_next()
                continue
            with quiet_optuna():
                fail_stale_trials(self._study.optuna)  # `optimize` does so before each trial
            attempts = self._study.optuna.get_trials(deepcopy=False)
            states = {attempt.state for attempt in attempts}
            if TrialState.WAITING in states:
                continue
            if TrialState.RUNNING not in states:
                self._tell(TrialEvent("ended", note=reason))
                return
            if not waiting:
                self._tell(TrialEvent("waiting", note="others are at the last trials"))
                self._give_signs(attempts)
            waiting = True
            time.sleep(min(poll, max(0.0, until - time.monotonic())))
        self._tell(TrialEvent("ended", note="the time is over"))

    def _no_more(self, attempts: Sequence[FrozenTrial]) -> str | None:
        """Return why no trial is left to begin; None if there is one."""
        if any(trial.state == TrialState.WAITING for trial in attempts):
            return None
        if self._budget.trials is not None and len(latest_attempts(attempts)) >= self._budget.trials:
            return "all trials are over"
        setup = self._study.setup
        if setup.method.name == "anneal":
            history = trial_history(setup, attempts, len(attempts))
            if methods.suggest(setup.method, history) is None:
                return "the annealing has come to its end"
        return None

    def _give_signs(self, attempts: Sequence[FrozenTrial]) -> None:
        """Record a sign of life for all running trials, once.

        Optuna never looks at a trial whose worker died before its first sign; with this one it is found stale as well.
        """
        for trial in attempts:
            if trial.state == TrialState.RUNNING:
                self._study.storage.record_heartbeat(trial._trial_id)  # noqa: SLF001 - the storage takes no number

    def _try_next(self) -> None:
        """Take one trial to its end; it is over, or queued again, whatever happens."""
        self._trial, self._number, self._candidate, self._error = None, None, None, None
        self._scores = {}
        try:
            self._finish(self._optimize())
        except BaseException:
            self._put_back()
            raise

    def _optimize(self) -> EventKind:
        """Have Optuna run one trial, and return how it ended."""
        try:
            self._study.optuna.optimize(self._judge, n_trials=1, catch=(CrdiffError,))
        except (ValueError, UpdateFinishedTrialError) as error:
            if error is self._error or self._trial is None:
                raise
            return "lost"  # Optuna refuses to end a trial that another worker has failed
        if self._error is None:
            return "complete"
        return "pruned" if isinstance(self._error, optuna.TrialPruned) else "failed"

    def _judge(self, trial: optuna.Trial) -> float:
        """Return the mean score of a trial's candidate; Optuna's objective."""
        self._trial = trial
        try:
            return self._score(trial)
        except BaseException as error:
            self._error = error
            raise

    def _score(self, trial: optuna.Trial) -> float:
        setup = self._study.setup
        sides = distributions(setup.space).items()
        point = tuple(trial.suggest_float(name, side.low, side.high) for name, side in sides)
        attempt = self._study.optuna.get_trials(deepcopy=False)[trial.number]
        self._number = first_number(attempt)
        self._candidate = setup.space.candidate(point)
        if attempt.system_attrs.get("retry_history"):
            self._say("retried", attempt.user_attrs.get("reason", ORPHANED))
        self._say("started")
        pairs = list(range(self._objective.pairs))
        # Shuffled, so that a trial is not stopped for the first pairs alone; a retry takes them in the same order.
        random.Random(f"{setup.method.seed}:{self._number}").shuffle(pairs)  # noqa: S311 - not a secret
        may_stop = setup.method.stops_early and point not in (setup.space.dense, setup.start_point)
        for batch in _batches(pairs, self._objective.batch):
            for pair, score in self._score_batch(trial, self._candidate, batch).items():
                trial.report(score, pair)
                self._scores[pair] = score
            self._say("scored")
            if may_stop and len(self._scores) < len(pairs) and trial.should_prune():
                raise optuna.TrialPruned
        return mean(self._scores)

    def _score_batch(self, trial: optuna.Trial, candidate: Candidate, batch: Sequence[int]) -> dict[int, float]:
        try:
            scores = self._objective.scores(candidate, batch)
        except CrdiffError as error:
            trial.set_user_attr("reason", error.message)
            raise
        by_pair = dict(zip(batch, map(float, scores), strict=True))
        if not all(map(math.isfinite, by_pair.values())):
            raise ValueError(f"an objective gave {by_pair}")
        return by_pair

    def _finish(self, kind: EventKind) -> None:
        """Tell how the trial ended; queue a failed one again, and raise its error after the last retry."""
        trial, note, last = self._trial, None, False
        if kind == "lost":
            self._trial, note = None, "another worker has taken the trial"
        elif kind == "failed" and trial and self._error:
            attempt = self._study.optuna.trials[trial.number]
            note, last = attempt.user_attrs["reason"], len(attempt.system_attrs.get("retry_history", ())) >= RETRIES
            retry(self._study.optuna, attempt)
            self._trial = None
        self._say(kind, note)
        if last and self._error:
            raise self._error

    def _put_back(self) -> None:
        """Queue the trial at hand again if it was interrupted, which does not count as a failure."""
        if self._trial is None:
            return
        with suppress(SearchError), as_search_error(self._study.where):
            attempt = self._study.optuna.tell(self._trial, state=TrialState.FAIL, skip_if_finished=True)
            if attempt.state == TrialState.FAIL:
                self._study.optuna.add_trial(
                    create_trial(
                        state=TrialState.WAITING, params=attempt.params, distributions=attempt.distributions,
                        user_attrs=attempt.user_attrs,
                        system_attrs={**attempt.system_attrs, "failed_trial": first_number(attempt)},
                    )
                )  # fmt: skip

    def _say(self, kind: EventKind, note: str | None = None) -> None:
        value = mean(self._scores) if self._scores else None
        done, pairs = len(self._scores), self._objective.pairs
        self._tell(TrialEvent(kind, self._number, self._candidate, done, pairs, value, note))


def _batches(pairs: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    step = max(1, size)
    for start in range(0, len(pairs), step):
        yield pairs[start : start + step]
