"""Displays of progress: bars on a terminal, a line for every stage in a log, or nothing."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import click

from crdiff_export.formats.text import amount
from crdiff_export.progress import SHORTEST, Progress, Silent

# A stage that takes long says in a log how far it is this often, in seconds.
HEARTBEAT = 30.0


class ProgressDisplay(Progress, Protocol):
    """A progress that may leave the terminal to somebody else for a while."""

    def paused(self) -> AbstractContextManager[None]:
        """Show nothing until the context ends."""
        ...


@contextmanager
def choose(*, silent: bool) -> Iterator[ProgressDisplay]:
    """Show progress in the way that suits stderr."""
    if silent:
        yield _Nothing()
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        from crdiff_export.cli.terminal import Bars

        with Bars() as bars:
            yield bars
    else:
        log = LogLines()
        yield log
        log.close()


class _Nothing(Silent):
    @contextmanager
    def paused(self) -> Iterator[None]:
        yield


class LogLines:
    """A line on stderr when a stage ends, and now and then within a long one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._title: str | None = None
        self._unit = "bytes"
        self._size = self._done = 0
        self._began = self._printed = time.monotonic()

    def stage(self, title: str, size: int, unit: str = "bytes") -> None:
        """Print a line for the stage before, and begin one."""
        self.close()
        with self._lock:
            self._title, self._size, self._done, self._unit = title, size, 0, unit
            self._began = self._printed = time.monotonic()

    def advance(self, size: int) -> None:
        """Count, and print a line where none has been printed for long."""
        with self._lock:
            self._done += size
            if time.monotonic() - self._printed >= HEARTBEAT:
                self._printed = time.monotonic()
                self._print(f"{_with_unit(self._done, self._unit)} of {_with_unit(self._size, self._unit)}")

    def close(self) -> None:
        """End the stage, if there is one, with a line."""
        with self._lock:
            if self._title is not None and self._size:
                rate = rate_text(self._done, time.monotonic() - self._began, self._unit)
                self._print(f"{_with_unit(self._done, self._unit)} in {rate}")
            self._title = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """End the stage: what comes next begins another."""
        self.close()
        yield

    def _print(self, text: str) -> None:
        click.echo(f"{self._title}: {text}", err=True)


def rate_text(done: int, seconds: float, unit: str = "bytes") -> str:
    """Format a time and, where it can be told, the rate in it: `2.0 s, 2.00 MB/s`."""
    if seconds < SHORTEST:
        return f"{seconds:.1f} s"
    speed = amount(done / seconds) if unit == "bytes" else f"{done / seconds:.1f}"
    return f"{seconds:.1f} s, {speed}/s"


def _with_unit(number: int, unit: str) -> str:
    return amount(number) if unit == "bytes" else f"{number:,} {unit}"
