"""The plot of an evaluation: the mean score of every model at every size, with its interval."""

from collections.abc import Sequence
from typing import Any, Final

from crdiff_export.evaluate.report import plots
from crdiff_export.evaluate.request import Subject
from crdiff_export.evaluate.results import Evaluation, Finding
from crdiff_export.formats.text import printable

COLOURS: Final = (plots.GREY, plots.BLUE, plots.ORANGE, plots.GREEN, plots.PINK, plots.YELLOW)


def render(evaluation: Evaluation, kind: str) -> bytes:
    """Return a PNG or SVG file; the same bytes for the same numbers."""
    return plots.render(lambda: _figure(evaluation), kind)


def _figure(evaluation: Evaluation) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    subjects = sorted(evaluation.subjects, key=_order)
    has_shares = any(finding.right for finding in evaluation.findings)
    size = (1.8 + 0.85 * max(3, len(subjects)), 3.2 * (1 + has_shares))
    figure: Any = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1 + has_shares, 1, sharex=True, squeeze=False)[:, 0]
    title = f"mean score ({printable(evaluation.scorer, 40)})"
    _draw_panel(panels[0], evaluation, subjects, title, share=False)
    if has_shares:
        _draw_panel(panels[1], evaluation, subjects, "fully right", share=True)
        panels[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[-1].set_xticks(range(len(subjects)), [_label(evaluation, subject) for subject in subjects], rotation=30)
    panels[0].legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _draw_panel(axes: Any, evaluation: Evaluation, subjects: Sequence[Subject], title: str, *, share: bool) -> None:
    columns: dict[str, list[tuple[int, Finding]]] = {}
    for index, subject in enumerate(subjects):
        for finding in evaluation.of(subject):
            columns.setdefault(finding.model.name, []).append((index, finding))
    for number, (name, points) in enumerate(columns.items()):
        shift = (number - (len(columns) - 1) / 2) * 0.14
        estimates = [e for e in (finding.right if share else finding.mean for _, finding in points) if e]
        ends = [(e.value - e.low, e.high - e.value) if e.bounded else (0.0, 0.0) for e in estimates]
        axes.errorbar(
            [index + shift for index, _ in points], [estimate.value for estimate in estimates],
            yerr=[[max(0.0, below) for below, _ in ends], [max(0.0, above) for _, above in ends]],
            fmt="o", markersize=4, capsize=2, color=COLOURS[number % len(COLOURS)], label=name,
        )  # fmt: skip
    axes.set_ylabel(title, parse_math=False)
    axes.set_xlim(-0.6, len(subjects) - 0.4)


def _order(subject: Subject) -> tuple[int, float, bool]:
    """Sort from small to large by area, wide before tall; a check of the native size comes last."""
    size = subject.size
    return size.width * size.height, -size.width / size.height, subject.is_native_check


def _label(evaluation: Evaluation, subject: Subject) -> str:
    native = "\nnative" if subject.size == evaluation.job.drawing.native else ""
    return f"{subject.size}{native}" + (f"\nratios for {subject.plan.size}" if subject.is_native_check else "")
