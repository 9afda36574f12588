"""The heat map of `crdiff inspect --layers`: the share of zero weights of every layer, by block and projection."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from crdiff_export.evaluate.report import colours, outputs, plots
from crdiff_export.evaluate.report.page import PageSection, PageTable
from crdiff_export.evaluate.report.page import render as render_page
from crdiff_export.formats.text import amount, printable
from crdiff_export.verify.inspect import Inspection
from crdiff_export.verify.layers import LayerZeros, group_zeros

SUFFIXES: Final = (".png", ".html")
# From light to dark on any paper. The numbers stand on the cells, so their colours are not of the palette, which a page
# changes on dark screens.
_COLOURS: Final = "YlGnBu"
_DARK, _LIGHT, _TURN = "#222222", "#ffffff", 0.56
_CELL_HEIGHT, _CELL_WIDTH = 0.17, 0.62  # inches


@dataclass(frozen=True, slots=True)
class LayerMap:
    """What a heat map shows: the headers of a checkpoint, and its layers by group and block."""

    inspection: Inspection
    layers: Sequence[LayerZeros]

    @property
    def title(self) -> str:
        """The name of the checkpoint, and the size of its tensors."""
        return f"{printable(self.inspection.path.name, 60)} ({amount(self.inspection.size)})"


def check(paths: Sequence[Path], *, force: bool) -> tuple[Path, ...]:
    """Check that the files of a heat map may and can be written.

    Args:
        paths: The files.
        force: Whether files that exist may be replaced.

    Returns:
        Each file once.

    Raises:
        OptionError: A name has another ending, or matplotlib is not installed.
        PlanError: A file must not or cannot be written.
    """
    files = outputs.check(paths, SUFFIXES, "neither a plot (PNG) nor a page (HTML)", force=force)
    plots.check_matplotlib(files)
    return files


def write(paths: Sequence[Path], layer_map: LayerMap, command: str, *, replace: bool) -> None:
    """Write a heat map to files, all or none.

    Args:
        paths: The files, as `check` returned them.
        layer_map: What it shows.
        command: The command line, for a page.
        replace: Whether files that exist are replaced.

    Raises:
        BakeError: A file could not be written.
    """
    makers: outputs.Makers = {
        ".png": lambda: render(layer_map, "png"),
        ".html": lambda: page(layer_map, command),
    }
    outputs.write(paths, makers, replace=replace)


def page(layer_map: LayerMap, command: str = "") -> str:
    """Render a page with the heat map and a table of all layers.

    Args:
        layer_map: What it shows.
        command: The command line that made it.

    Returns:
        The HTML document.
    """
    columns = ("share", "layer", "kind", "weights", "zeros")  # a narrow screen shows the first
    rows: list[Sequence[str]] = []
    for group, layers in groupby(layer_map.layers, key=lambda layer: layer.group):
        rows.append((group, "", "", "", ""))
        rows += [
            (f"{layer.share:.4f}", printable(layer.name), layer.kind, f"{layer.weights:,}", f"{layer.zeros:,}")
            for layer in layers
        ]
    totals = [
        (group.group, f"{group.layers}", f"{group.weights:,}", f"{group.zeros:,}", f"{group.share:.4f}")
        for group in group_zeros(layer_map.layers)
    ]
    total_columns = ("group", "layers", "weights", "zeros", "share")
    return render_page(
        layer_map.title,
        [
            PageSection("Groups", table=PageTable(total_columns, totals, total_columns[1:])),
            plots.section("Share of zero weights", lambda kind: render(layer_map, kind)),
            PageSection("Layers", table=PageTable(columns, rows, ("share", "weights", "zeros"))),
        ],
        facts=list(layer_map.inspection.facts()),
        command=command,
    )


def render(layer_map: LayerMap, kind: str) -> bytes:
    """Render the heat map.

    Args:
        layer_map: What it shows.
        kind: "png" or "svg".

    Returns:
        The content of the file; the same bytes for the same numbers.
    """
    return plots.render(lambda: _figure(layer_map), kind)


def grid(layers: Sequence[LayerZeros]) -> tuple[list[str], list[str], dict[tuple[int, int], float]]:
    """Arrange layers in rows and columns.

    Args:
        layers: The layers, by group and block.

    Returns:
        The blocks, the projections with attention first, and the share of each cell that has a layer.
    """
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    by_kind = sorted(layers, key=lambda layer: layer.kind)
    projections = list(dict.fromkeys(layer.projection for layer in by_kind))
    row = {block: number for number, block in enumerate(blocks)}
    column = {projection: number for number, projection in enumerate(projections)}
    return blocks, projections, {(row[layer.block], column[layer.projection]): layer.share for layer in layers}


def _figure(layer_map: LayerMap) -> Any:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    blocks, projections, cells = grid(layer_map.layers)
    shares = np.full((len(blocks), len(projections)), np.nan)
    for cell, share in cells.items():
        shares[cell] = share
    height = max(_CELL_HEIGHT * len(blocks) + 1.3, 2.6)
    figure: Any = Figure(figsize=(_CELL_WIDTH * len(projections) + 4.4, height), layout="constrained")
    figure.suptitle(layer_map.title, fontsize=10, parse_math=False)
    axes = figure.subplots()
    axes.grid(visible=False)
    mesh = axes.pcolormesh(np.ma.masked_invalid(shares), cmap=colormaps[_COLOURS], vmin=0, vmax=1)
    for (row, column), share in cells.items():
        colour = _LIGHT if share > _TURN else _DARK
        axes.text(column + 0.5, row + 0.5, f"{share:.2f}", color=colour, fontsize=7, ha="center", va="center_baseline")
    axes.set_xticks([number + 0.5 for number in range(len(projections))], projections, rotation=35, ha="left")
    axes.set_yticks([number + 0.5 for number in range(len(blocks))], _labels(blocks), fontsize=7.5, parse_math=False)
    axes.xaxis.tick_top()
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    groups = {layer.block: layer.group for layer in layer_map.layers}
    for row in range(1, len(blocks)):
        if groups[blocks[row]] != groups[blocks[row - 1]]:
            axes.axhline(row, color=colours.INK, linewidth=1)
    bar = figure.colorbar(mesh, ax=axes, shrink=min(1, 3 / height), anchor=(0, 1), aspect=18)
    bar.set_label("share of zero weights")
    bar.outline.set_visible(False)
    return figure


def _labels(blocks: Sequence[str]) -> list[str]:
    """Label every block by its number, and the first one of a list by the list's name, too."""
    labels, before = [], ""
    for block in blocks:
        name, _, number = block.rpartition(".")
        labels.append(number if name == before else f"{name}  {number}".strip())
        before = name
    return labels
