"""The plot of an evaluation: what every pruned model scores above or below the dense one, and the mean scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Final

from crdiff_export.evaluate.comparison import DENSE, PRUNED
from crdiff_export.evaluate.report import colours, plots
from crdiff_export.evaluate.request import Subject
from crdiff_export.evaluate.results import Evaluation, Finding
from crdiff_export.evaluate.statistics import Estimate
from crdiff_export.formats.text import printable, shortened

# The dense model and the pruned one, POA by the order of its weights at a size, and what was drawn beside them.
DENSE_MARK, PRUNED_MARK = (colours.GREY, "s"), (colours.BLUE, "o")
POA_MARKS: Final = tuple((colours.ORANGE, marker) for marker in "Dd*Xph")
RIVAL_MARKS: Final = tuple(
    (colour, marker) for marker in "^vP<>" for colour in (colours.GREEN, colours.PINK, colours.YELLOW)
)
_LEGEND_COLUMNS: Final = 4
_ROW_HEIGHT: Final = 0.2  # of one model, in inches


@dataclass(frozen=True, slots=True)
class PlotPoint:
    """A model at a size: its colour and marker, its mean score, and its difference to the dense model."""

    mark: tuple[str, str]
    name: str
    mean: float
    difference: Estimate | None


# What stands at the left of the models at one size, and those models.
PlotRow = tuple[str, Sequence[PlotPoint]]


def render(evaluation: Evaluation, kind: str) -> bytes:
    """Render the plot of an evaluation.

    Args:
        evaluation: The evaluation.
        kind: "png" or "svg".

    Returns:
        The content of the file; the same bytes for the same numbers.
    """
    return plots.render(lambda: figure(rows(evaluation), evaluation.scorer), kind)


def rows(evaluation: Evaluation) -> list[PlotRow]:
    """Return the models of every size, from small to large; checks of the native size come last."""
    subjects = sorted(evaluation.subjects, key=_order)
    return [(_label(evaluation, subject), _points(evaluation.of(subject))) for subject in subjects]


def figure(plot_rows: Sequence[PlotRow], scorer: str) -> Any:
    """Draw differences to the dense model with a line at zero, and beside them the mean scores.

    Args:
        plot_rows: The models of every size, from top to bottom.
        scorer: What gave the scores.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    most = max((len(points) for _, points in plot_rows), default=1)
    height = (
        1.3 + 0.2 * (most // _LEGEND_COLUMNS) + sum(_ROW_HEIGHT * max(2, len(points)) + 0.15 for _, points in plot_rows)
    )
    drawn: Any = Figure(figsize=(6.4, height), layout="constrained")
    differences, means = drawn.subplots(1, 2, sharey=True, width_ratios=(1.6, 1))
    differences.axvline(0, color=colours.INK, linewidth=1)
    labels: dict[tuple[str, str], str] = {}
    for row, (_, points) in enumerate(plot_rows):
        for index, point in enumerate(points):
            name = labels.setdefault(point.mark, point.name)
            # A weight of its own at each size: the mark stands for POA.
            labels[point.mark] = "POA" if name != point.name and point.mark in POA_MARKS else name
            y = row + (index - (len(points) - 1) / 2) * 0.75 / most
            _draw_point(differences, means, point, y)
    handles = [
        means.plot([], [], marker, linestyle="", markersize=5, color=colour, label=shortened(name, 28))[0]
        for (colour, marker), name in labels.items()
    ]
    differences.set_yticks(range(len(plot_rows)), [label for label, _ in plot_rows])
    differences.set_ylim(len(plot_rows) - 0.5, -0.5)
    differences.set_xlabel("score - dense, 95 % intervals\n(right of the line: higher than dense)")
    means.set_xlabel(f"mean score\n({printable(scorer, 40)})", parse_math=False)
    for axes in (differences, means):
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        for row in range(1, len(plot_rows)):
            axes.axhline(row - 0.5, color=colours.RULE, linewidth=0.8, zorder=0)
    columns = min(len(handles), _LEGEND_COLUMNS)
    legend = drawn.legend(handles=handles, frameon=False, ncols=columns, loc="outside upper center")
    for text in legend.get_texts():
        text.set_parse_math(False)
    return drawn


def _draw_point(differences: Any, means: Any, point: PlotPoint, y: float) -> None:
    """Draw one model in both panels; a hollow point has too few samples for an interval."""
    colour, marker = point.mark
    means.plot(point.mean, y, marker, markersize=5, color=colour)
    if not point.difference:
        return
    change = point.difference
    if change.bounded:
        differences.plot([change.low, change.high], [y, y], "-", color=colour, linewidth=1.6)
    fill = colour if change.bounded else colours.PAPER
    differences.plot(change.value, y, marker, markersize=5, color=colour, markerfacecolor=fill)


def _points(findings: Sequence[Finding]) -> list[PlotPoint]:
    """Give each model and each rival of a size a mark of its own, the same at every size."""
    points = []
    poa, rivals = cycle(POA_MARKS), cycle(RIVAL_MARKS)
    for finding in findings:
        model = finding.model
        model_mark = {DENSE: DENSE_MARK, PRUNED: PRUNED_MARK}.get(model.weight)
        mark = next(rivals) if model.beside else model_mark or next(poa)
        points.append(PlotPoint(mark, model.name, finding.mean.value, finding.difference))
    return points


def _order(subject: Subject) -> tuple[bool, int, float]:
    """Sort from small to large by area, wide before tall; a check of the native size comes last."""
    size = subject.size
    return subject.is_native_check, size.pixels, -size.width / size.height


def _label(evaluation: Evaluation, subject: Subject) -> str:
    native = " (native)" if subject.size == evaluation.job.drawing.native else ""
    return f"{subject.size}{native}" + (f"\nratios for {subject.plan.size}" if subject.is_native_check else "")
