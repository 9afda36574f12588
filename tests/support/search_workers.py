"""Workers as processes of their own, to be killed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("search_objective.py")
ROOT = SCRIPT.parents[2]
PATIENCE = 60.0


class WorkerProcess:
    """A worker, and the events that it has told so far."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []

    def until(self, kind: str, after: int = -1, **wanted: object) -> int:
        """The number of the first trial beyond another one that has an event of a kind, with these fields."""
        for event in self._lines():
            matches = all(event[key] == value for key, value in {"kind": kind, **wanted}.items())
            if matches and event["number"] is not None and event["number"] > after:
                return int(event["number"])
        raise AssertionError(f"the worker ended after {self.events[-3:]}: {self._errors()}")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def end(self) -> list[str]:
        """The kinds of all events, once the worker has ended well and without another word."""
        list(self._lines())
        assert self.process.wait(PATIENCE) == 0
        assert self._errors() == ""
        return [event["kind"] for event in self.events]

    def finished(self) -> list[int]:
        """The trials that it finished."""
        return [event["number"] for event in self.events if event["kind"] in ("complete", "pruned")]

    def _lines(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            yield self.events[-1]

    def _errors(self) -> str:
        assert self.process.stderr
        return self.process.stderr.read()


@contextmanager
def worker(storage: object, method: str, trials: int, delay: float) -> Iterator[WorkerProcess]:
    """A worker that runs; it is killed at the end, unless it has ended."""
    command = [sys.executable, "-W", "error", str(SCRIPT), str(storage), method, str(trials), str(delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield WorkerProcess(process)
        finally:
            process.kill()
