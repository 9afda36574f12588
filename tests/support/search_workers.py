"""Workers as processes of their own, to be killed: forks of a process that has loaded Optuna once."""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from crdiff_export.search import TrialEvent
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


def work(storage: str, method: str, trials: int, delay: float, events: Connection, errors: Path) -> None:
    """Work on a search, send each event, and write what is said to a file; no warning passes."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter("error")
    run_hill(storage, setup(method), trials, Hill(delay=delay), events.send)


class WorkerProcess:
    """A worker, and the events that it has told so far."""

    def __init__(self, process: ForkServerProcess, connection: Connection, errors: Path) -> None:
        self.process = process
        self.events: list[TrialEvent] = []
        self._connection, self._errors = connection, errors

    def until(self, kind: str, after: int = -1, **wanted: object) -> int:
        """The number of the first trial beyond another one that has an event of a kind, with these fields."""
        for event in self._further():
            matches = all(getattr(event, key) == value for key, value in {"kind": kind, **wanted}.items())
            if matches and event.number is not None and event.number > after:
                return event.number
        raise AssertionError(f"the worker ended after {self.events[-3:]}: {self._errors.read_text()}")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()

    def end(self) -> list[str]:
        """The kinds of all events, once the worker has ended well and without another word."""
        list(self._further())
        self.process.join(PATIENCE)
        assert (self.process.exitcode, self._errors.read_text()) == (0, "")
        return [event.kind for event in self.events]

    def finished(self) -> list[int]:
        """The trials that it finished."""
        kinds = ("complete", "pruned")
        return [event.number for event in self.events if event.kind in kinds and event.number is not None]

    def _further(self) -> Iterator[TrialEvent]:
        while True:
            try:
                self.events.append(self._connection.recv())
            except EOFError:
                return
            yield self.events[-1]


@contextmanager
def worker(storage: object, method: str, trials: int, delay: float) -> Iterator[WorkerProcess]:
    """A worker that runs; it is killed at the end, unless it has ended."""
    reader, writer = context().Pipe(duplex=False)
    with TemporaryDirectory() as folder, reader:
        errors = Path(folder) / "errors"
        process = context().Process(target=work, args=(str(storage), method, trials, delay, writer, errors))
        process.start()
        writer.close()
        try:
            yield WorkerProcess(process, reader, errors)
        finally:
            process.kill()
            process.join()


def check_that_nothing_is_lost(storage: object, method: str, trials: int, workers: int) -> None:
    """Start several workers at once, kill the first at a trial, and check what the others make of the search."""
    with ExitStack() as stack:
        first, *others = [stack.enter_context(worker(storage, method, trials, 0.1)) for _ in range(workers)]
        begun = max(other.until("started", after=1) for other in others)  # all are at work
        lost = first.until("scored", after=begun, done=4)
        first.kill()
        for other in others:
            other.end()
    results = trials_of(storage, setup(method))
    assert trials <= len(results) <= trials + workers - 1  # all may begin the last trial at once
    assert {trial.state for trial in results} <= {"complete", "pruned"}
    assert attempts_of(storage, setup(method))[lost] == 2
    finished = [number for each in (first, *others) for number in each.finished()]
    assert sorted(finished) == [trial.number for trial in results]
    assert all(other.finished() for other in others)
    check_scores(results)
