"""Tables and progress bars on a terminal. The only module that imports rich."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Literal, Self

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, DownloadColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from crdiff_export.cli.blocks import Table

# Wider than any table: how wide one would like to be is measured with it.
ENDLESS = 1 << 16


def table_lines(table: Table) -> list[str]:
    """Lay a table out for stdout, a terminal; no cell is cut, and only the last column is wrapped, unless numeric."""
    grid = RichTable(box=box.SIMPLE, pad_edge=False, show_edge=False)
    for number, column in enumerate(table.columns):
        numeric = column in table.numeric
        rigid = numeric or column != table.columns[-1]
        width = max(cell_len(text) for text in (column, *(row[number] for row in table.rows))) if rigid else None
        grid.add_column(column, justify="right" if numeric else "left", no_wrap=rigid, min_width=width)
    for row in table.rows:
        grid.add_row(*row)
    text = io.StringIO()
    console = _console(text)
    needed = Measurement.get(console, console.options.update(width=ENDLESS), grid).minimum
    console.print(grid, width=max(console.width, needed), crop=False)
    return [line.rstrip() for line in text.getvalue().splitlines()]


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
            _RateColumn(table_column=whole), TimeRemainingColumn(table_column=whole), console=_console(sys.stderr),
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


class _DoneColumn(DownloadColumn):
    """A column with the amount that is done, in the unit of the stage."""

    def render(self, task: Task) -> Text:
        if task.fields["unit"] == "bytes":
            return super().render(task)
        return Text(f"{task.completed:.0f}/{task.total or 0:.0f} {task.fields['unit']}", style="progress.download")


class _RateColumn(SpeedColumn):
    """A column with the rate, in the unit of the stage."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None or task.fields["unit"] == "bytes":
            return super().render(task)
        return Text(f"{speed:.1f}/s", style="progress.data.speed")
