"""A study's trials in its storage: claim a place, write down scores, finish; each is one step that succeeds once.

Only what Optuna's storages promise is used: a trial is written with all its attributes at once, trials are numbered in
the order in which they were written, and a trial that is finished changes no more (`UpdateFinishedTrialError`).
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from crdiff_export.errors import SearchError
from crdiff_export.search.board import Attempt, Board, State
from crdiff_export.search.lease import Lost, Worker, expired
from crdiff_export.search.space import WEIGHT, Point, Space
from crdiff_export.search.storage import Storage, speaking

STATES: Final[dict[TrialState, State]] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
ORPHANED: Final = "its worker died"


@dataclass(frozen=True, slots=True)
class Claim:
    """A place that a worker wants, at a point; `retry_of` is the number of the try before."""

    place: int
    point: Point
    attempt: int = 0
    retry_of: int | None = None
    chain: int | None = None


@dataclass(frozen=True, slots=True)
class Ledger:
    """The trials of one study."""

    storage: Storage
    study_id: int
    name: str
    space: Space

    def board(self) -> Board:
        """What stands in the study now."""
        with speaking(self.storage.where):
            trials = self.storage.optuna.get_all_trials(self.study_id, deepcopy=False)
        return Board.of(self._attempt(trial) for trial in trials if trial.state in STATES)

    def claim(self, claim: Claim, worker: Worker, lease: float) -> Attempt | None:
        """Take a place, or a try of one, for this worker alone; None if another was first."""
        trial = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(zip(self._names(), claim.point, strict=True)),
            distributions=self._sides(),
            user_attrs={
                "place": claim.place,
                "attempt": claim.attempt,
                "worker": worker.name,
                "machine": worker.machine,
                "until": time.time() + lease,
                **({} if claim.retry_of is None else {"retry_of": claim.retry_of}),
                **({} if claim.chain is None else {"chain": claim.chain}),
            },
        )
        with speaking(self.storage.where):
            number = self.storage.optuna.create_new_trial(self.study_id, template_trial=trial)
            mine = self._attempt(self.storage.optuna.get_trial(number))
            if self.board().owns(mine):
                return mine
            with suppress(UpdateFinishedTrialError):
                self.storage.optuna.set_trial_state_values(mine.id, TrialState.FAIL)
        return None

    def renew(self, attempt: Attempt, until: float) -> None:
        """Have the lease end later; Lost if the trial is over."""
        with self._changing():
            self.storage.optuna.set_trial_user_attr(attempt.id, "until", until)

    def record(self, attempt: Attempt, scores: Mapping[int, float]) -> None:
        """Write down the scores of some pairs; Lost if the trial is over."""
        with self._changing():
            for pair, score in scores.items():
                self.storage.optuna.set_trial_intermediate_value(attempt.id, pair, score)

    def finish(self, attempt: Attempt, scores: Mapping[int, float], seconds: float, value: float | None) -> None:
        """End a trial with its score, or pruned if it has none; Lost if it was taken from us."""
        with self._changing():
            pairs = {str(pair): score for pair, score in sorted(scores.items())}
            self.storage.optuna.set_trial_user_attr(attempt.id, "scores", pairs)
            self.storage.optuna.set_trial_user_attr(attempt.id, "seconds", seconds)
            state, values = (TrialState.PRUNED, None) if value is None else (TrialState.COMPLETE, [value])
            self.storage.optuna.set_trial_state_values(attempt.id, state, values)

    def fail(self, attempt: Attempt, reason: str) -> None:
        """End a trial without a score; Lost if it was over already."""
        with self._changing():
            self.storage.optuna.set_trial_user_attr(attempt.id, "reason", reason)
            self.storage.optuna.set_trial_state_values(attempt.id, TrialState.FAIL)

    def reap(self, board: Board, worker: Worker) -> list[Attempt]:
        """Fail the trials whose workers are dead, so that someone may try their places again; those that we failed."""
        dead = []
        for place in board.places:
            if place.running and place.last.worker != worker.name and expired(place.last, worker, time.time()):
                with suppress(Lost):
                    self.fail(place.last, ORPHANED)
                    dead.append(place.last)
        return dead

    def hopeless(self, attempt: Attempt, threshold: float) -> bool:
        """Whether Optuna's Wilcoxon test, over the pairs so far, finds a trial worse than the best complete one."""
        from crdiff_export.search.pruning import pruner

        with speaking(self.storage.where):
            study = optuna.load_study(study_name=self.name, storage=self.storage.optuna)
            return pruner(threshold).prune(study, self.storage.optuna.get_trial(attempt.id))

    def _names(self) -> tuple[str, ...]:
        return tuple(name if name == WEIGHT else f"ratio.{name}" for name in self.space.names)

    def _sides(self) -> dict[str, FloatDistribution | optuna.distributions.BaseDistribution]:
        """What Optuna has to know of the coordinates: the box, and the dense model, which may be outside."""
        sides = zip(self._names(), self.space.bounds, self.space.dense, strict=True)
        return {name: FloatDistribution(min(low, dense), high) for name, (low, high), dense in sides}

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with speaking(self.storage.where):
            try:
                yield
            except UpdateFinishedTrialError as error:
                raise Lost from error

    def _attempt(self, trial: FrozenTrial) -> Attempt:
        attrs = trial.user_attrs
        try:
            return Attempt(
                id=trial._trial_id,  # noqa: SLF001 - what the storage's methods take, and its trials do not tell
                number=trial.number,
                place=int(attrs["place"]),
                attempt=int(attrs["attempt"]),
                state=STATES[trial.state],
                point=tuple(float(trial.params[name]) for name in self._names()),
                scores=dict(trial.intermediate_values),
                value=trial.value if trial.state == TrialState.COMPLETE else None,
                seconds=attrs.get("seconds"),
                worker=str(attrs["worker"]),
                machine=str(attrs["machine"]),
                until=float(attrs["until"]),
                chain=attrs.get("chain"),
                reason=attrs.get("reason"),
            )
        except (KeyError, TypeError, ValueError) as error:
            message = f"{self.storage.where}: trial {trial.number} of {self.name!r} is none of a crdiff search"
            raise SearchError(message, "Search in a study of its own: give it another name.") from error
