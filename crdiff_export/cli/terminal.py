"""Progress bars on a terminal."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn
from rich.table import Column
from rich.text import Text

from crdiff_export.progress import SHORTEST


def _console(stream: IO[str]) -> Console:
    # Without colours there are no bold letters either: somebody who asks for none wants plain text.
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return Console(file=stream, force_terminal=True, color_system=colours, highlight=False, emoji=False, markup=False)


class Bars:
    """A bar with rate and time left for every stage, on stderr."""

    def __init__(self) -> None:
        whole = Column(no_wrap=True)
        self._bars = Progress(
            TextColumn("{task.description:<10}", table_column=whole), BarColumn(), _DoneColumn(table_column=whole),
            _RateColumn(table_column=whole), TimeRemainingColumn(elapsed_when_finished=True, table_column=whole),
            console=_console(sys.stderr),
        )  # fmt: skip
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        """Show the bars."""
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave them as they are, and give the cursor back."""
        self._bars.stop()

    def stage(self, title: str, size: int, unit: str = "bytes") -> None:
        """Complete the bar of the stage before, and begin one."""
        if self._task is not None:
            self._bars.update(self._task, completed=self._bars.tasks[self._task].total)
        self._task = self._bars.add_task(title, total=size, unit=unit) if size else None

    def advance(self, size: int) -> None:
        """Draw a longer bar."""
        if self._task is not None:
            self._bars.advance(self._task, size)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bars away for a while."""
        self._bars.stop()
        for task in self._bars.task_ids:  # what is done would be drawn once more
            self._bars.remove_task(task)
        self._task = None
        try:
            yield
        finally:
            self._bars.start()


class TrialsBar:
    """A bar of the trials of a search, on stderr; `close` leaves it as it is."""

    def __init__(self, trials: int) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<10}"), BarColumn(bar_width=16),
            TextColumn("{task.fields[info]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=_console(sys.stderr),
        )  # fmt: skip
        self._task = self._bars.add_task("", total=trials, info="")
        self._bars.start()

    def draw(self, title: str, done: float, info: str) -> None:
        """Draw how many trials are done, with a title before and a text behind."""
        self._bars.update(self._task, description=title, completed=done, info=info, refresh=True)

    def close(self) -> None:
        """Stop drawing, and give the cursor back."""
        self._bars.stop()


class _DoneColumn(DownloadColumn):
    """A column with the amount that is done, in the unit of the stage."""

    def render(self, task: Task) -> Text:
        if task.fields["unit"] == "bytes":
            return super().render(task)
        return Text(f"{task.completed:.0f}/{task.total or 0:.0f} {task.fields['unit']}", style="progress.download")


class _RateColumn(SpeedColumn):
    """A column with the rate, in the unit of the stage."""

    def render(self, task: Task) -> Text:
        if task.finished and (task.finished_time or 0) < SHORTEST:
            return Text("")
        speed = task.finished_speed or task.speed
        if speed is None or task.fields["unit"] == "bytes":
            return super().render(task)
        return Text(f"{speed:.1f}/s", style="progress.data.speed")
