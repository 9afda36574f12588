"""What people see: results on stdout, progress, notes and errors on stderr. The only module that imports rich."""

import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import IO, Any, Literal, Protocol

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from crdiff_export.errors import CrdiffError
from crdiff_export.formats.text import amount, printable
from crdiff_export.progress import Progress, Silent

SCHEMA = 1
# Where nobody watches, a stage that takes long says how far it is this often, in seconds.
HEARTBEAT = 30.0
# A log has no width: nothing in it is to be wrapped or cut.
ENDLESS = 1 << 16


def line(text: str) -> None:
    """One line of a result on stdout."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CrdiffError(
            f"standard output: {error.strerror}", "Free some space, or send the output elsewhere."
        ) from error


def facts(named: Mapping[str, str] | Sequence[tuple[str, str]]) -> None:
    """Lines of a result, each with a name; the texts begin below each other."""
    pairs = list(named.items() if isinstance(named, Mapping) else named)
    width = max((len(name) for name, _ in pairs), default=0) + 2
    for name, text in pairs:
        line(f"{name + ':':<{width}}{text}")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[str] = ()) -> None:
    """A table on stdout: lined on a terminal, columns of plain text elsewhere.

    No cell is cut; if the terminal is too narrow, only the last column is wrapped, unless it is numeric.
    """
    terminal = sys.stdout.isatty()
    drawn = Table(box=box.SIMPLE if terminal else None, pad_edge=False, show_edge=False)
    for place, column in enumerate(columns):
        rigid = column in numeric or column != columns[-1]
        width = max(cell_len(text) for text in (column, *(row[place] for row in rows))) if rigid else None
        justify: Literal["right", "left"] = "right" if column in numeric else "left"
        drawn.add_column(column, justify=justify, no_wrap=rigid, min_width=width)
    for row in rows:
        drawn.add_row(*row)
    text = io.StringIO()
    console = _console(text, like=sys.stdout)
    needed = Measurement.get(console, console.options.update(width=ENDLESS), drawn).minimum
    console.print(drawn, width=max(console.width, needed) if terminal else ENDLESS, crop=False)
    for row_text in text.getvalue().splitlines():
        line(row_text.rstrip())


def print_json(value: Mapping[str, Any]) -> None:
    """One object on one line, in ASCII: a file's name may be any bytes."""
    line(json.dumps({"schema": SCHEMA, **value}, allow_nan=False))


def print_error(code: str, message: str, hint: str, *, as_json: bool) -> None:
    """What is wrong and what to do, on stderr."""
    if as_json:
        error = {"code": code, "message": message, "hint": hint}
        print(json.dumps({"schema": SCHEMA, "error": error}), file=sys.stderr)
        return
    console = _console(sys.stderr)
    console.print(f"crdiff: {printable(message, limit=None)}", style="bold red", soft_wrap=True)
    if hint:
        console.print(f"  {printable(hint, limit=None)}", soft_wrap=True)


def print_problems(code: str, message: str, hint: str, problems: Sequence[CrdiffError], *, as_json: bool) -> None:
    """Everything that is wrong at once, each with what to do, on stderr."""
    if as_json:
        found = [{"message": problem.message, "hint": problem.hint} for problem in problems]
        error = {"code": code, "message": message, "hint": hint, "problems": found}
        print(json.dumps({"schema": SCHEMA, "error": error}), file=sys.stderr)
        return
    for problem in problems:
        print_error(code, problem.message, problem.hint, as_json=False)
    print_error(code, message, hint, as_json=False)


def note(text: str) -> None:
    """Something worth knowing, on stderr."""
    _console(sys.stderr).print(f"note: {printable(text, limit=None)}", soft_wrap=True)


def _console(stream: IO[str], like: IO[str] | None = None) -> Console:
    """A console that writes to `stream` and takes it for a terminal where `like` is one."""
    terminal = (like or stream).isatty()
    # Without colours there are no bold letters either: somebody who asks for none wants plain text.
    plain = bool(os.environ.get("NO_COLOR")) or not (terminal or os.environ.get("FORCE_COLOR"))
    return Console(
        file=stream, force_terminal=terminal or None, width=None if terminal else ENDLESS,
        color_system=None if plain else "auto", highlight=False, emoji=False, markup=False,
    )  # fmt: skip


class Shown(Progress, Protocol):
    """A progress that somebody sees."""

    def paused(self) -> AbstractContextManager[None]:
        """Leave the terminal to somebody else for a while."""
        ...


class _Unseen(Silent):
    def paused(self) -> AbstractContextManager[None]:
        return nullcontext()


@contextmanager
def progress(*, quiet: bool) -> Iterator[Shown]:
    """Bars with rate and time left on a terminal, a line for every stage elsewhere, nothing if quiet."""
    if quiet:
        yield _Unseen()
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        whole = Column(no_wrap=True)
        bars = Bars(
            TextColumn("{task.description:<10}", table_column=whole), BarColumn(), _Done(table_column=whole),
            _Rate(table_column=whole), TimeRemainingColumn(table_column=whole),
            console=_console(sys.stderr),
        )  # fmt: skip
        with bars:
            yield _Drawn(bars)
    else:
        lines = _Lines()
        yield lines
        lines.close()


def sent(size: int, where: str, seconds: float) -> None:
    """An upload is over. On a terminal the Hub's client has drawn bars of its own."""
    rate = f", {amount(size / seconds)}/s" if seconds > 0.1 else ""
    print(f"sending: {amount(size)} to {where} in {seconds:.1f} s{rate}", file=sys.stderr, flush=True)


class _Done(DownloadColumn):
    """How much of a stage is done, in its unit."""

    def render(self, task: Task) -> Text:
        if task.fields["unit"] == "bytes":
            return super().render(task)
        return Text(f"{task.completed:.0f}/{task.total or 0:.0f} {task.fields['unit']}", style="progress.download")


class _Rate(TransferSpeedColumn):
    """How fast it goes, in its unit."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None or task.fields["unit"] == "bytes":
            return super().render(task)
        return Text(f"{speed:.1f}/s", style="progress.data.speed")


class _Drawn:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def stage(self, title: str, size: int, unit: str = "bytes") -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=self._bars.tasks[self._task].total)
        self._task = self._bars.add_task(title, total=size, unit=unit) if size else None

    def advance(self, size: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, size)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._bars.stop()
        for task in self._bars.task_ids:  # what is done would be drawn once more
            self._bars.remove_task(task)
        self._task = None
        try:
            yield
        finally:
            self._bars.start()


class _Lines:
    """A line when a stage ends, and now and then within a long one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._title: str | None = None
        self._unit = "bytes"
        self._size = self._done = 0
        self._began = self._spoke = time.monotonic()

    def stage(self, title: str, size: int, unit: str = "bytes") -> None:
        self.close()
        with self._lock:
            self._title, self._size, self._done, self._unit = title, size, 0, unit
            self._began = self._spoke = time.monotonic()

    def advance(self, size: int) -> None:
        with self._lock:
            self._done += size
            if time.monotonic() - self._spoke >= HEARTBEAT:
                self._spoke = time.monotonic()
                self._say(f"{_counted(self._done, self._unit)} of {_counted(self._size, self._unit)}")

    def close(self) -> None:
        with self._lock:
            if self._title is not None and self._size:
                seconds = time.monotonic() - self._began
                speed = self._done / max(seconds, 0.1)
                rate = f", {amount(speed) if self._unit == 'bytes' else f'{speed:.1f}'}/s" if seconds > 0.1 else ""
                self._say(f"{_counted(self._done, self._unit)} in {seconds:.1f} s{rate}")
            self._title = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.close()
        yield

    def _say(self, text: str) -> None:
        print(f"{self._title}: {text}", file=sys.stderr, flush=True)


def _counted(number: int, unit: str) -> str:
    return amount(number) if unit == "bytes" else f"{number:,} {unit}"
