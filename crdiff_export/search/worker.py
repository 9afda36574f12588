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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, TrialState, create_trial

from crdiff_export.errors import CrdiffError, SearchError
from crdiff_export.search import methods
from crdiff_export.search.setup import SearchBudget
from crdiff_export.search.storage import RETRIES, as_search_error, quiet_optuna, retry
from crdiff_export.search.study import (
    ORPHANED,
    STATES,
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
        CrdiffError: The objective failed three times at one candidate.
    """
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
        self._event = TrialEvent("started")  # its latest
        self._error: BaseException | None = None  # what the objective raised in it

    def run(self, poll: float) -> None:
        until = math.inf if self._budget.seconds is None else time.monotonic() + self._budget.seconds
        is_waiting = False
        while time.monotonic() < until:
            with quiet_optuna():
                fail_stale_trials(self._study.optuna)
            attempts = self._study.optuna.get_trials(deepcopy=False)
            running = [trial for trial in attempts if trial.state == TrialState.RUNNING]
            reason = self._no_more(attempts)
            if reason is None:
                is_waiting = False
                self._try_next()
                continue
            if not running:
                self._tell(TrialEvent("ended", note=reason))
                return
            if not is_waiting:
                self._tell(TrialEvent("waiting", note="others are at the last trials"))
                for trial in running:
                    # Optuna never looks at a trial whose worker died before its first sign of life; with this one it
                    # is found stale as well.
                    self._study.storage.record_heartbeat(trial._trial_id)  # noqa: SLF001 - the storage takes no number
            is_waiting = True
            time.sleep(min(poll, max(0.0, until - time.monotonic())))
        self._tell(TrialEvent("ended", note="the time is over"))

    def _no_more(self, attempts: list[FrozenTrial]) -> str | None:
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

    def _try_next(self) -> None:
        """Take one trial to its end; it is over, or queued again, whatever happens."""
        self._trial = self._error = None
        try:
            self._study.optuna.optimize(self._judge, n_trials=1, catch=(CrdiffError,), callbacks=[self._finish])
        except BaseException as error:
            is_optunas = isinstance(error, ValueError | UpdateFinishedTrialError) and error is not self._error
            if not (is_optunas and self._trial):
                self._put_back()
                raise
            # Optuna refuses to end a trial that another worker has failed.
            self._trial = None
            self._say("lost", note="another worker has taken the trial")

    def _judge(self, trial: optuna.Trial) -> float:
        """Return the mean score of a trial's candidate; Optuna's objective."""
        self._trial = trial
        try:
            return self._score(trial)
        except BaseException as error:
            self._error = error
            if isinstance(error, CrdiffError):
                trial.set_user_attr("reason", error.message)
            raise

    def _score(self, trial: optuna.Trial) -> float:
        setup, objective = self._study.setup, self._objective
        sides = distributions(setup.space).items()
        point = tuple(trial.suggest_float(name, side.low, side.high) for name, side in sides)
        attempt = self._study.optuna.get_trials(deepcopy=False)[trial.number]
        number, candidate = first_number(attempt), setup.space.candidate(point)
        self._event = TrialEvent("started", number, candidate, pairs=objective.pairs)
        if attempt.system_attrs.get("retry_history"):
            self._say("retried", note=attempt.user_attrs.get("reason", ORPHANED))
        self._say("started")
        pairs = list(range(objective.pairs))
        # Shuffled, so that a trial is not stopped for the first pairs alone; a retry takes them in the same order.
        random.Random(f"{setup.method.seed}:{number}").shuffle(pairs)  # noqa: S311 - not a secret
        may_stop = setup.method.stops_early and point not in (setup.space.dense, setup.start_point)
        scores: dict[int, float] = {}
        for start in range(0, len(pairs), objective.batch):
            batch = pairs[start : start + objective.batch]
            scores |= zip(batch, objective.scores(candidate, batch), strict=True)
            for pair in batch:
                trial.report(scores[pair], pair)
            self._event = replace(self._event, done=len(scores), value=mean(scores))
            self._say("scored")
            if may_stop and len(scores) < len(pairs) and trial.should_prune():
                raise optuna.TrialPruned
        return mean(scores)

    def _finish(self, study: optuna.Study, attempt: FrozenTrial) -> None:
        """Tell how a trial ended; queue a failed one again, and raise its error after the last retry."""
        is_last = len(attempt.system_attrs.get("retry_history", ())) >= RETRIES
        kind, note = STATES[attempt.state], None
        if kind == "failed":
            note = attempt.user_attrs["reason"]
            retry(study, attempt)
        self._trial = None
        self._say(kind, note=note)
        if kind == "failed" and is_last and self._error:
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

    def _say(self, kind: EventKind, *, note: str | None = None) -> None:
        self._tell(replace(self._event, kind=kind, note=note))
