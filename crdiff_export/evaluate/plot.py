"""The mean score of every model at every size, with its interval, as one picture."""

import io
from typing import Any, Final

from crdiff_export.evaluate.findings import Evaluation, Finding, Subject
from crdiff_export.formats.text import printable

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS: Final = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_SETTINGS: Final[Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "crdiff",
    "svg.fonttype": "none", "axes.grid": True, "axes.grid.axis": "y", "grid.alpha": 0.3,
}  # fmt: skip


def draw(found: Evaluation, kind: str) -> bytes:
    """A PNG or SVG file; the same bytes for the same numbers."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    subjects = sorted(found.subjects, key=_order(found))
    shares = any(finding.right for finding in found.findings)
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's own settings are
        mpl.rcParams.update(_SETTINGS)
        figure = Figure(figsize=(1.8 + 0.85 * max(3, len(subjects)), 3.2 * (1 + shares)), layout="constrained")
        panels = figure.subplots(1 + shares, 1, sharex=True, squeeze=False)[:, 0]
        _panel(panels[0], found, subjects, f"mean score ({printable(found.scorer, 40)})", share=False)
        if shares:
            _panel(panels[1], found, subjects, "fully right", share=True)
            panels[1].yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
        panels[-1].set_xticks(range(len(subjects)), [_label(found, subject) for subject in subjects], rotation=30)
        panels[0].legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        stream = io.BytesIO()
        empty = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
        figure.savefig(stream, format=kind, dpi=150, metadata=empty)
    return stream.getvalue()


def _panel(axes: Any, found: Evaluation, subjects: list[Subject], title: str, *, share: bool) -> None:
    columns: dict[str, list[tuple[int, Finding]]] = {}
    for place, subject in enumerate(subjects):
        for finding in found.of(subject):
            columns.setdefault(finding.drawn.name, []).append((place, finding))
    for number, (name, points) in enumerate(columns.items()):
        shift = (number - (len(columns) - 1) / 2) * 0.14
        estimates = [e for e in (finding.right if share else finding.mean for _, finding in points) if e]
        heights = [estimate.value for estimate in estimates]
        ends = [(e.value - e.low, e.high - e.value) if e.bounded else (0.0, 0.0) for e in estimates]
        spread = [[max(0.0, below) for below, _ in ends], [max(0.0, above) for _, above in ends]]
        axes.errorbar(
            [place + shift for place, _ in points], heights, yerr=spread, fmt="o", markersize=4, capsize=2,
            color=COLOURS[number % len(COLOURS)], label=name,
        )  # fmt: skip
    axes.set_ylabel(title, parse_math=False)
    axes.set_xlim(-0.6, len(subjects) - 0.4)


def _order(found: Evaluation) -> Any:
    """From small to large by area, wide before tall; a look at the native size beside it."""

    def key(subject: Subject) -> tuple[int, float, bool, int]:
        size = subject.size
        return size.width * size.height, -size.width / size.height, subject.is_look, found.subjects.index(subject)

    return key


def _label(found: Evaluation, subject: Subject) -> str:
    native = "\nnative" if subject.size == found.native else ""
    return f"{subject.size}{native}" + (f"\nratios for {subject.of}" if subject.is_look else "")
