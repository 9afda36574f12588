"""Workers as processes of their own, to be killed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("search_objective.py")
PATIENCE = 60.0


class Working:
    """A worker, and what it has said so far."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []

    def until(self, kind: str, after: int = -1, **wanted: object) -> dict[str, Any]:
        """The first event from now on of a kind, with these fields, and of a place after another."""
        for event in self._lines():
            found = event["kind"] == kind and event["place"] is not None and event["place"] > after
            if found and all(event[key] == value for key, value in wanted.items()):
                return event
        raise AssertionError(f"the worker ended after {self.events[-3:]}: {self._errors()}")

    def end(self) -> list[dict[str, Any]]:
        """Everything that it said, once it has ended well and without another word."""
        list(self._lines())
        assert self.process.wait(PATIENCE) == 0
        assert self._errors() == ""
        return self.events

    def finished(self) -> list[int]:
        """The places that it finished."""
        return [event["place"] for event in self.events if event["kind"] in ("complete", "pruned")]

    def _lines(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            yield self.events[-1]

    def _errors(self) -> str:
        assert self.process.stderr
        return self.process.stderr.read()


@contextmanager
def worker(storage: object, method: str, trials: int, delay: float, lease: float = 120.0) -> Iterator[Working]:
    """A worker that runs; it is killed at the end, unless it has ended."""
    command = [sys.executable, "-W", "error", str(SCRIPT), str(storage), method, str(trials), str(delay), str(lease)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Working(process)
        finally:
            process.kill()
