"""A search as one picture: every trial and the best so far, and the score over each coordinate."""

from collections.abc import Sequence
from typing import Any, Final

from crdiff_export.evaluate import scorers
from crdiff_export.evaluate.report import colours, plots
from crdiff_export.formats.text import printable
from crdiff_export.search.result import SearchResult
from crdiff_export.search.space import POA_WEIGHT
from crdiff_export.search.trials import FinishedTrial, estimates

COLOURS: Final = {"complete": colours.BLUE, "pruned": colours.FAINT, "best": colours.ORANGE, "dense": colours.GREY}


def draw(result: SearchResult, kind: str) -> bytes:
    """Return a PNG or SVG file; the same bytes for the same trials."""
    return plots.render(lambda: _figure(result), kind)


def _figure(result: SearchResult) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = result.job.setup.space.names
    figure: Any = Figure(figsize=(7.5, 5.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    course = above.subplots()
    _course(course, result)
    course.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels = below.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for index, (panel, name) in enumerate(zip(panels, names, strict=True)):
        _coordinate(panel, result, index, name)
    return figure


def _course(axes: Any, result: SearchResult) -> None:
    """Draw the trials in their order, and the best until then."""
    for state, marker, label in (("complete", "o", "trial"), ("pruned", "x", "stopped early, estimated")):
        some = [(trial.number, score) for trial, score in scores(result) if trial.state == state]
        if some:
            axes.plot(*zip(*some, strict=True), marker, markersize=4, color=COLOURS[state], label=label)
    axes.step(*zip(*best_so_far(result.trials), strict=True), where="post", color=COLOURS["best"], label="best so far")
    axes.axhline(result.dense.value, color=COLOURS["dense"], linestyle="--", linewidth=1, label="dense")
    axes.set_xlabel("trial")
    axes.set_ylabel(f"mean score ({printable(scorers.public(result.job.scorer), 40)})", parse_math=False)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _coordinate(axes: Any, result: SearchResult, index: int, name: str) -> None:
    """Draw the scores of all trials over one of their coordinates."""
    space = result.job.setup.space
    some = [
        (space.point(trial.candidate)[index], score) for trial, score in scores(result) if not trial.candidate.dense
    ]
    if some:
        axes.plot(*zip(*some, strict=True), "o", markersize=3, color=COLOURS["complete"], alpha=0.7)
    if not result.best.candidate.dense:
        axes.plot(space.point(result.best.candidate)[index], result.best.value, "o", color=COLOURS["best"])
    axes.axhline(result.dense.value, color=COLOURS["dense"], linestyle="--", linewidth=1)
    low, high = space.bounds[index]
    axes.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    axes.set_xlabel("POA weight" if name == POA_WEIGHT else f"ratio of {name}")
    if index == 0:
        axes.set_ylabel("mean score")


def scores(result: SearchResult) -> list[tuple[FinishedTrial, float]]:
    """Return the trials that have scores, with the mean or its estimate."""
    pairs = zip(result.trials, estimates(result.trials), strict=True)
    return [(trial, score) for trial, score in pairs if score is not None]


def best_so_far(trials: Sequence[FinishedTrial]) -> list[tuple[int, float]]:
    """Return the highest mean of the complete trials up to each trial, by its number."""
    course: list[tuple[int, float]] = []
    for trial in trials:
        values = [value for value in (trial.value, course[-1][1] if course else None) if value is not None]
        if values:
            course.append((trial.number, max(values)))
    return course
