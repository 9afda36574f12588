"""The heat map of a checkpoint's layers: a cell for every layer, readable letters, the same bytes each time."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from crdiff_export.evaluate import layer_map
from crdiff_export.evaluate.layer_map import LayerMap
from crdiff_export.evaluate.report.colours import PALETTE
from crdiff_export.progress import Silent
from crdiff_export.verify.inspect import inspect
from crdiff_export.verify.layers import count_zeros
from tests.support import makers
from tests.support.browser import Browser, check_looks
from tests.support.pages import ParsedPage

TABLES = ("sdxl.original", "flux-dev.original-transformer", "cosmos2-2b.diffusers-transformer")


@pytest.fixture(scope="module", params=TABLES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LayerMap:
    path = tmp_path_factory.mktemp("map") / "a $model$_<b>_模型.safetensors"
    inspection = inspect(makers.write(path, makers.tiny(request.param)))
    return LayerMap(inspection, count_zeros(inspection, Silent()))


def test_every_layer_has_its_share_in_a_cell(made: LayerMap) -> None:
    blocks, projections, cells = layer_map.grid(made.layers)
    assert len(cells) == len(made.layers)
    for layer in made.layers:
        assert cells[blocks.index(layer.block), projections.index(layer.projection)] == layer.share
    kinds = {layer.projection: layer.kind for layer in made.layers}
    assert [kinds[projection] for projection in projections] == sorted(kinds[name] for name in projections)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_nothing_lies_over_its_neighbours(made: LayerMap) -> None:
    """The labels of rows and columns, and the numbers, at the size of the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = layer_map._figure(made)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    rows = [label.get_window_extent() for label in axes.get_yticklabels()]
    tops = sorted(box.y0 for box in rows)
    height = max(box.height for box in rows)
    assert min(b - a for a, b in pairwise(tops)) >= height
    page = figure.bbox
    for box in (*rows, *(label.get_window_extent() for label in axes.get_xticklabels())):
        assert page.x0 <= box.x0 <= box.x1 <= page.x1
        assert page.y0 <= box.y0 <= box.y1 <= page.y1
    width = axes.bbox.width / len(axes.get_xticks())
    assert all(text.get_window_extent().width < width for text in axes.texts)


def test_the_numbers_of_cells_do_not_follow_the_page(made: LayerMap) -> None:
    """They stand on cells, whose colour is the same on dark screens."""
    svg = layer_map.render(made, "svg").decode()
    ours = {"#222222", "#ffffff"}
    assert not ours & {colour.lower() for colour in PALETTE.values()}
    assert ours & set(re.findall(r"#[0-9a-f]{6}", svg))


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_numbers_give_the_same_bytes(made: LayerMap, kind: str) -> None:
    assert layer_map.render(made, kind) == layer_map.render(made, kind)


def test_a_page_has_a_row_for_every_layer(made: LayerMap) -> None:
    html = layer_map.page(made, "crdiff inspect x --layers")
    text = ParsedPage(html).text
    assert all(layer.name in text for layer in made.layers)
    assert made.inspection.path.name in text
    assert "crdiff inspect x --layers" in text


def test_the_page_looks_as_it_should(made: LayerMap, chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "layers.html").write_text(layer_map.page(made))
    check_looks(chromium, tmp_path / "layers.html", "layers")
