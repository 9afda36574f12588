"""What people see: tables on stdout, progress and errors on stderr. The only module that imports rich."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from crdiff_export.errors import CrdiffError
from crdiff_export.progress import Progress

# Where nobody watches, a stage that takes long says how far it is this often, in seconds.
HEARTBEAT = 30.0


def out() -> Console:
    """Results."""
    return _console(stderr=False)


def err() -> Console:
    """Everything else."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # A log has no width: nothing in it is to be wrapped or cut.
    width = None if stream.isatty() else 1 << 16
    return Console(file=stream, width=width, soft_wrap=not stream.isatty(), highlight=False, emoji=False, markup=False)


def print_json(value: Mapping[str, Any]) -> None:
    """One object on one line."""
    print(json.dumps({"schema": 1, **value}, ensure_ascii=False))


def print_error(error: CrdiffError, *, as_json: bool) -> None:
    """What is wrong and what to do, on stderr."""
    if as_json:
        body = {"code": error.code, "message": error.message, "hint": error.hint}
        print(json.dumps({"schema": 1, "error": body}, ensure_ascii=False), file=sys.stderr)
        return
    console = err()
    console.print(f"crdiff: {error.message}", style="bold red" if console.is_terminal else None)
    console.print(f"  {error.hint}")


def note(text: str) -> None:
    """Something worth knowing, on stderr."""
    err().print(f"note: {text}")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[str] = ()) -> None:
    """A table on stdout: lined on a terminal, columns of plain text elsewhere."""
    console = out()
    drawn = Table(box=box.SIMPLE if console.is_terminal else None, pad_edge=False, show_edge=False)
    for column in columns:
        drawn.add_column(column, justify="right" if column in numeric else "left", no_wrap=column != columns[-1])
    for row in rows:
        drawn.add_row(*row)
    lines = console.options.update(width=console.width)
    if console.is_terminal:
        console.print(drawn)
        return
    with console.capture() as capture:
        console.print(drawn, width=lines.max_width)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def line(text: str) -> None:
    """One line of a result on stdout."""
    print(text)


def gigabytes(size: int) -> str:
    """A size as people read it."""
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= step:
            return f"{size / step:.2f} {unit}"
    return f"{size} bytes"


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress]:
    """Bars with rate and time left on a terminal, a line for every stage elsewhere, nothing if quiet."""
    if quiet:
        from crdiff_export.progress import Silent

        yield Silent()
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        bars = Bars(
            TextColumn("{task.description:<10}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(), console=err(),
        )  # fmt: skip
        with bars:
            yield _Drawn(bars)
    else:
        lines = _Lines()
        yield lines
        lines.close()


class _Drawn:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def stage(self, title: str, size: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=self._bars.tasks[self._task].total)
        self._task = self._bars.add_task(title, total=size)

    def advance(self, size: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, size)


class _Lines:
    """A line when a stage ends, and now and then within a long one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._title: str | None = None
        self._size = self._done = 0
        self._began = self._spoke = time.monotonic()

    def stage(self, title: str, size: int) -> None:
        self.close()
        with self._lock:
            self._title, self._size, self._done = title, size, 0
            self._began = self._spoke = time.monotonic()

    def advance(self, size: int) -> None:
        with self._lock:
            self._done += size
            if time.monotonic() - self._spoke >= HEARTBEAT:
                self._spoke = time.monotonic()
                self._say(f"{gigabytes(self._done)} of {gigabytes(self._size)}")

    def close(self) -> None:
        with self._lock:
            if self._title is not None:
                seconds = time.monotonic() - self._began
                rate = f", {gigabytes(int(self._done / seconds))}/s" if seconds > 0.1 else ""
                self._say(f"{gigabytes(self._done)} in {seconds:.1f} s{rate}")
                self._title = None

    def _say(self, text: str) -> None:
        print(f"{self._title}: {text}", file=sys.stderr, flush=True)
