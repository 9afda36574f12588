"""A worker: take a place, judge its candidate pair by pair, write down what came out; until the budget is spent.

Guarantees, with any number of workers on any machines, whenever any of them is killed:
- no more than `Budget.trials` places are ever taken, and each has one result;
- a trial whose worker died is tried again by another, up to twice; what is finished stays;
- one worker alone, killed and started again on its machine (or after the lease), tries the same points with the same
  outcome as if it had not been killed: every method is a function of the seed, the place and the finished trials. With
  several workers the points of `anneal` and `sobol` are still those of their chains and of their places; those of
  the other methods depend on who finished first.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

from crdiff_export.errors import CrdiffError, SearchError
from crdiff_export.search import anneal, methods
from crdiff_export.search.board import INTERRUPTED, Attempt, Board, Place, mean
from crdiff_export.search.lease import LEASE, Lost, Worker, held
from crdiff_export.search.ledger import Claim
from crdiff_export.search.methods import Known, Method, Question
from crdiff_export.search.pruning import THRESHOLD
from crdiff_export.search.space import Candidate, Objective
from crdiff_export.search.study import DENSE, START, Study

POLL: Final = 1.0  # seconds between two looks at what other workers do
Kind = Literal["started", "scored", "complete", "pruned", "failed", "lost", "orphaned", "waiting", "ended"]


@dataclass(frozen=True, slots=True)
class Budget:
    """When to stop: after so many trials of all workers, the dense model's and retries included only once, or when
    this worker has been at it for so many seconds; it finishes the trial that it is at."""

    trials: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [amount for amount in (self.trials, self.seconds) if amount is not None]
        if not given or not all(amount > 0 for amount in given):
            raise SearchError("this search would have no end, or no beginning", "Give a number of trials or a time.")


@dataclass(frozen=True, slots=True)
class Event:
    """What happened: to a trial (`scored` after every batch), or to the worker (`waiting`, `ended`, with a `note`)."""

    kind: Kind
    place: int | None = None
    candidate: Candidate | None = None
    done: int = 0
    pairs: int = 0
    value: float | None = None
    note: str | None = None


OnEvent = Callable[[Event], None]


def run(
    study: Study,
    objective: Objective,
    method: Method,
    *,
    budget: Budget,
    on_event: OnEvent | None = None,
    lease: float = LEASE,
    poll: float = POLL,
) -> None:
    """Work on a study until its budget is spent; return when no other worker is at a trial that might yet be lost.

    An interruption leaves what is finished, and gives the trial at hand back. What the objective raises fails the
    trial; it is raised once one candidate has failed for good. SearchError where the storage fails.
    """
    if method != study.setup.method or objective.pairs != study.setup.pairs:
        message = f"the search {study.name!r} was opened with another method, or for other pairs"
        raise SearchError(message, "Open it with those that it is to be run with.")
    _Run(study, objective, budget, on_event or (lambda _: None), lease, poll, Worker.here()).all()


class _Failed(Exception):
    """The objective has no score; an error of the storage is another matter."""

    def __init__(self, error: CrdiffError) -> None:
        super().__init__(str(error))
        self.error = error


class _Run:
    """What one call of `run` holds."""

    def __init__(
        self, study: Study, objective: Objective, budget: Budget, on_event: OnEvent, lease: float, poll: float,
        worker: Worker,
    ) -> None:  # fmt: skip
        self.study, self.objective, self.budget, self.tell = study, objective, budget, on_event
        self.lease, self.poll, self.worker = lease, poll, worker
        self.until = math.inf if budget.seconds is None else time.monotonic() + budget.seconds
        self.chain: int | None = None  # of `anneal`, which we keep to
        self.annealed = False  # whether it has ended: we begin no other

    def all(self) -> None:
        """Take places until there is none."""
        waiting = False
        while time.monotonic() < self.until:
            board = self.study.ledger.board()
            dead = self.study.ledger.reap(board, self.worker)
            for attempt in dead:
                self._say("orphaned", attempt, note=attempt.worker)
            if dead:
                continue
            if claim := self._choose(board):
                waiting = False
                claimed = self.study.ledger.claim(claim, self.worker, self.lease)
                if claimed:
                    self._do(claimed)
            elif any(place.running for place in board.places):
                if not waiting:
                    self.tell(Event("waiting", note="others are at the last trials"))
                waiting = True
                time.sleep(min(self.poll, max(0.0, self.until - time.monotonic())))
            else:
                self.tell(Event("ended", note=self._why(board)))
                return
        self.tell(Event("ended", note="the time is over"))

    def _why(self, board: Board) -> str:
        full = self.budget.trials is not None and len(board.places) >= self.budget.trials
        return "all trials are over" if full else "the annealing has come to its end"

    def _choose(self, board: Board) -> Claim | None:
        """A place to try again, else the next one; None if there is none."""
        for taken in board.places:
            if taken.open:
                last = taken.last
                return Claim(last.place, last.point, last.attempt + 1, retry_of=last.number, chain=last.chain)
        place = len(board.places)
        if self.budget.trials is not None and place >= self.budget.trials:
            return None
        setup = self.study.setup
        if place == DENSE:
            return Claim(place, setup.space.dense)
        if setup.method.name == "anneal":
            return self._anneal(board, place)
        if place == START:
            return Claim(place, setup.point)
        known = [Known(point, score) for point, score in board.estimates()]
        running = [one.last.point for one in board.places if one.running]
        question = Question(setup.space, setup.point, setup.method.seed, place, known, running)
        return Claim(place, methods.suggest(setup.method.name, question))

    def _anneal(self, board: Board, place: int) -> Claim | None:
        """The next point of a chain that nobody is at: ours, the first one, or a new one where others are at all."""
        setup, chains = self.study.setup, board.chains()
        idle = [chain for chain, places in chains.items() if all(one.over for one in places)]
        mine = [self.chain] if self.chain in idle else []
        new = [len(chains)] if not chains or len(idle) < len(chains) else []
        for chain in (*mine, *sorted(idle), *new):
            if chain in new and self.annealed:
                break
            told = [(one.last.point, self._told(one)) for one in chains.get(chain, [])]
            constants = setup.method.constants
            point = anneal.following(setup.space, setup.point, setup.method.seed, chain, told, constants)
            if point is not None:
                self.chain = chain
                return Claim(place, point, chain=chain)
            self.annealed = self.annealed or chain == self.chain
        return None

    def _told(self, place: Place) -> float:
        return self.study.setup.method.constants.failed if place.last.value is None else place.last.value

    def _do(self, attempt: Attempt) -> None:
        """Judge a candidate; whatever happens, the trial is over or can be taken by others afterwards."""
        ledger = self.study.ledger
        storage = ledger.storage.optuna
        try:
            self._say("started", attempt)
            with held(lambda until: ledger.renew(attempt, until), storage.remove_session, self.lease) as check:
                self._judge(attempt, check)
        except Lost:
            self._say("lost", attempt, note="another worker has taken the trial")
        except _Failed as failed:
            message = failed.error.message
            with suppress(Lost):
                ledger.fail(attempt, message)
            self._say("failed", attempt, note=message)
            if not ledger.board().places[attempt.place].open:
                raise failed.error from None
        except BaseException:
            with suppress(Lost, SearchError):
                ledger.fail(attempt, INTERRUPTED)
            raise

    def _judge(self, attempt: Attempt, check: Callable[[], None]) -> None:
        began = time.monotonic()
        ledger, method = self.study.ledger, self.study.setup.method
        candidate = self.study.setup.space.candidate(attempt.point)
        pairs = list(range(self.objective.pairs))
        # Shuffled, so that a trial is not stopped for the first pairs alone; a retry takes them in the same order.
        random.Random(f"{method.seed}:{attempt.place}").shuffle(pairs)  # noqa: S311 - not a secret
        scores: dict[int, float] = {}
        prunable = method.prunes and attempt.place > START
        for batch in _batches(pairs, self.objective.batch):
            found = self._scores(candidate, batch)
            check()
            ledger.record(attempt, found)
            scores.update(found)
            self._say("scored", attempt, scores)
            if prunable and len(scores) < len(pairs) and ledger.hopeless(attempt, THRESHOLD):
                ledger.finish(attempt, scores, time.monotonic() - began, None)
                self._say("pruned", attempt, scores)
                return
        ledger.finish(attempt, scores, time.monotonic() - began, mean(scores))
        self._say("complete", attempt, scores)

    def _scores(self, candidate: Candidate, batch: Sequence[int]) -> dict[int, float]:
        try:
            return _checked(batch, self.objective.scores(candidate, batch))
        except CrdiffError as error:
            raise _Failed(error) from error

    def _say(
        self, kind: Kind, attempt: Attempt, scores: Mapping[int, float] | None = None, note: str | None = None
    ) -> None:
        candidate = self.study.setup.space.candidate(attempt.point)
        value = mean(scores) if scores else None
        self.tell(Event(kind, attempt.place, candidate, len(scores or ()), self.objective.pairs, value, note))


def _batches(pairs: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    step = max(1, size)
    for start in range(0, len(pairs), step):
        yield pairs[start : start + step]


def _checked(pairs: Sequence[int], scores: Sequence[float]) -> dict[int, float]:
    """The score of each pair; an objective that breaks its promise has a bug."""
    found = dict(zip(pairs, map(float, scores), strict=True))
    if not all(map(math.isfinite, found.values())):
        raise ValueError(f"an objective gave {found}")
    return found
