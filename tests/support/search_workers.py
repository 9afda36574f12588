"""Workers as processes of their own, to be killed: forks of a process that has loaded Optuna once."""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from crdiff_export.search import Candidate, TrialEvent
from tests.support import ROOT
from tests.support.search_objective import Hill, attempts_of, check_scores, run_hill, setup, trials_of

PATIENCE = 60.0


@cache
def context() -> ForkServerContext:
    """A way to start processes from one that has loaded what a search needs."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        multiprocessing.forkserver.ensure_running()
    return made


@dataclass
class Held(Hill):
    """A hill that waits before one of its calls, until the file `hold` is gone from a folder."""

    folder: Path = Path()
    call: int | None = None

    def scores(self, candidate: Candidate, pairs: Sequence[int]) -> list[float]:
        if self.calls == self.call:
            hold = self.folder / "hold"
            hold.touch()
            while hold.exists():
                time.sleep(0.01)
        return super().scores(candidate, pairs)


def work(
    storage: str, method: str, trials: int, delay: float, hold: int | None, events: Connection, folder: Path
) -> None:
    """Work on a search, send each event, and write what is said to a file; no warning passes."""
    os.dup2(os.open(folder / "errors", os.O_WRONLY | os.O_CREAT), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter("error")
    run_hill(storage, setup(method), trials, Held(delay=delay, folder=folder, call=hold), events.send)


class WorkerProcess:
    """A worker, and the events that it has told so far."""

    def __init__(self, process: ForkServerProcess, connection: Connection, folder: Path) -> None:
        self.process = process
        self.events: list[TrialEvent] = []
        self._connection, self._hold, self._errors = connection, folder / "hold", folder / "errors"

    def until(self, kind: str, after: int = -1, **wanted: object) -> int:
        """The number of the first trial beyond another one that has an event of a kind, with these fields."""
        for event in self._further():
            matches = all(getattr(event, key) == value for key, value in {"kind": kind, **wanted}.items())
            if matches and event.number is not None and event.number > after:
                return event.number
        raise AssertionError(f"the worker ended after {self.events[-3:]}: {self._said()}")

    def wait(self) -> int:
        """Wait until it is held; the number of the trial that it is at."""
        until = time.monotonic() + PATIENCE
        while not self._hold.exists():
            assert time.monotonic() < until, self._said()
            time.sleep(0.01)
        while self._connection.poll():
            self.events.append(self._connection.recv())
        (*_, number) = (event.number for event in self.events if event.kind == "started")
        assert number is not None
        return number

    def release(self) -> None:
        self._hold.unlink()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()

    def end(self) -> list[str]:
        """The kinds of all events, once the worker has ended well and without another word."""
        list(self._further())
        self.process.join(PATIENCE)
        assert (self.process.exitcode, self._said()) == (0, "")
        return [event.kind for event in self.events]

    def finished(self) -> list[int]:
        """The trials that it finished."""
        kinds = ("complete", "pruned")
        return [event.number for event in self.events if event.kind in kinds and event.number is not None]

    def _said(self) -> str:
        return self._errors.read_text()

    def _further(self) -> Iterator[TrialEvent]:
        while True:
            try:
                self.events.append(self._connection.recv())
            except EOFError:
                return
            yield self.events[-1]


@contextmanager
def worker(storage: object, method: str, trials: int, delay: float, hold: int | None = None) -> Iterator[WorkerProcess]:
    """A worker that runs, and is held before a call of its objective; it is killed at the end, unless it has ended."""
    reader, writer = context().Pipe(duplex=False)
    with TemporaryDirectory() as name, reader:
        folder = Path(name)
        process = context().Process(target=work, args=(str(storage), method, trials, delay, hold, writer, folder))
        process.start()
        writer.close()
        try:
            yield WorkerProcess(process, reader, folder)
        finally:
            process.kill()
            process.join()


def check_that_nothing_is_lost(storage: object, method: str, trials: int, workers: int) -> None:
    """Start several workers at once, kill the first in a trial, and check what the others make of the search."""
    with ExitStack() as stack:
        # The first has finished a trial and is in another when all are at work.
        holds = [3] + [0] * (workers - 1)
        first, *others = [stack.enter_context(worker(storage, method, trials, 0.05, hold)) for hold in holds]
        lost, *_ = [each.wait() for each in (first, *others)]
        first.kill()
        for other in others:
            other.release()
        for other in others:
            other.end()
    results = trials_of(storage, setup(method))
    assert trials <= len(results) <= trials + workers - 1  # all may begin the last trial at once
    assert {trial.state for trial in results} <= {"complete", "pruned"}
    assert attempts_of(storage, setup(method))[lost] == 2
    finished = [number for each in (first, *others) for number in each.finished()]
    assert sorted(finished) == [trial.number for trial in results]
    assert all(each.finished() for each in (first, *others))
    check_scores(results)
