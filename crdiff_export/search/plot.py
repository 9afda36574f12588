"""A search as one picture: every trial and the best so far, and the score against each coordinate."""

from collections.abc import Sequence
from typing import Any, Final

from crdiff_export.evaluate import scorers
from crdiff_export.evaluate.report import plots
from crdiff_export.formats.text import printable
from crdiff_export.search.board import Finished, estimate
from crdiff_export.search.found import Found
from crdiff_export.search.space import WEIGHT

COLOURS: Final = {"complete": plots.BLUE, "pruned": "#999999", "best": plots.ORANGE, "dense": plots.GREY}


def draw(found: Found, kind: str) -> bytes:
    """A PNG or SVG file; the same bytes for the same trials."""
    return plots.render(lambda: _figure(found), kind)


def _figure(found: Found) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = found.job.setup.space.names
    figure: Any = Figure(figsize=(7.5, 5.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    course = above.subplots()
    _course(course, found)
    course.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels = below.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for place, (panel, name) in enumerate(zip(panels, names, strict=True)):
        _against(panel, found, place, name)
    return figure


def _course(axes: Any, found: Found) -> None:
    """Trials in their order, and the best until then."""
    for state, marker, label in (("complete", "o", "trial"), ("pruned", "x", "stopped early, estimated")):
        some = [(one.place, value) for one, value in scored(found) if one.state == state]
        if some:
            places, values = zip(*some, strict=True)
            axes.plot(places, values, marker, markersize=4, color=COLOURS[state], label=label)
    places, values = zip(*best_so_far(found.trials), strict=True)
    axes.step(places, values, where="post", color=COLOURS["best"], label="best so far")
    axes.axhline(found.dense.value, color=COLOURS["dense"], linestyle="--", linewidth=1, label="dense")
    axes.set_xlabel("trial")
    axes.set_ylabel(f"mean score ({printable(scorers.public(found.job.scorer), 40)})", parse_math=False)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _against(axes: Any, found: Found, place: int, name: str) -> None:
    """The scores of all trials against one of their coordinates."""
    space = found.job.setup.space
    some = [(space.point(one.candidate)[place], value) for one, value in scored(found) if not one.candidate.dense]
    if some:
        axes.plot(*zip(*some, strict=True), "o", markersize=3, color=COLOURS["complete"], alpha=0.7)
    if not found.best.candidate.dense:
        axes.plot(space.point(found.best.candidate)[place], found.best.value, "o", color=COLOURS["best"])
    axes.axhline(found.dense.value, color=COLOURS["dense"], linestyle="--", linewidth=1)
    low, high = space.bounds[place]
    axes.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    axes.set_xlabel("POA weight" if name == WEIGHT else f"ratio of {name}")
    if place == 0:
        axes.set_ylabel("mean score")


def scored(found: Found) -> list[tuple[Finished, float]]:
    """Every trial that has scores with its mean, or with what that of a stopped one would be."""
    dense = found.dense.scores
    values = [one.value if one.value is not None else estimate(one.scores, dense) if one.scores else None
              for one in found.trials]  # fmt: skip
    return [(one, value) for one, value in zip(found.trials, values, strict=True) if value is not None]


def best_so_far(trials: Sequence[Finished]) -> list[tuple[int, float]]:
    """The highest mean of the complete trials up to each place."""
    found: list[tuple[int, float]] = []
    for one in trials:
        values = [value for value in (one.value, found[-1][1] if found else None) if value is not None]
        if values:
            found.append((one.place, max(values)))
    return found
