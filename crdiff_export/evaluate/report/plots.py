"""Plots with matplotlib: the same bytes for the same numbers, whatever the user's own settings are."""

import io
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from crdiff_export.errors import OptionError
from crdiff_export.evaluate.report.colours import INK, PAPER, RULE
from crdiff_export.evaluate.report.page import PageSection

# Suffixes of files that are a plot; a page only has one.
SUFFIXES: Final = (".png", ".svg")
_HINT: Final = "`python -m pip install matplotlib`."
_SETTINGS: Final[Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "crdiff",
    "svg.fonttype": "none", "axes.grid": True, "axes.grid.axis": "y", "grid.color": RULE, "axes.axisbelow": True,
    "figure.facecolor": PAPER, "savefig.facecolor": PAPER, "axes.facecolor": PAPER, "legend.facecolor": PAPER,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip


def check_matplotlib(paths: Sequence[Path]) -> None:
    """Check that matplotlib is installed if one of the files is a plot.

    Raises:
        OptionError: It is not.
    """
    if any(path.suffix.lower() in SUFFIXES for path in paths) and find_spec("matplotlib") is None:
        raise OptionError("matplotlib is not installed, which plots need", _HINT)


def section(title: str, draw: Callable[[str], bytes]) -> PageSection:
    """Make the page section of a plot; without matplotlib its text says that the plot is missing.

    Args:
        title: Its heading.
        draw: Makes the plot as a file of a kind, here "svg".

    Returns:
        The section.

    """
    if find_spec("matplotlib") is None:
        return PageSection(title, f"No plot: matplotlib is not installed. {_HINT}")
    return PageSection(title, plot=draw("svg"))


def render(draw: Callable[[], Any], kind: str) -> bytes:
    """Render a figure.

    Args:
        draw: Makes the matplotlib figure.
        kind: "png" or "svg".

    Returns:
        The content of the file.
    """
    import matplotlib as mpl

    stream = io.BytesIO()
    with mpl.rc_context(), warnings.catch_warnings():
        # A name in letters that matplotlib's font lacks has boxes for them in a PNG; a browser has other fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        undated: dict[str, None] = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
        draw().savefig(stream, format=kind, dpi=150, metadata=undated)
    return stream.getvalue()
