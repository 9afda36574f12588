"""The files of a search: its trials, the recipe, a plot, a page, and a sheet of pictures on request."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from crdiff_export.errors import OptionError
from crdiff_export.evaluate.report import outputs, plots
from crdiff_export.models import recipe_toml
from crdiff_export.search.request import SearchRequest

if TYPE_CHECKING:
    from crdiff_export.search.result import SearchResult

RECIPE: Final = ".toml"
KINDS: Final = (RECIPE, ".html", ".png", ".svg")
SHEETS: Final = (".png", ".html")
STORAGE: Final = ".db"
_LONGEST: Final = 40


def name_stem(base: str, request: SearchRequest) -> str:
    """Return the name of whatever the request does not name: the base, the size, and the prompt if there is one."""
    words = [base, str(request.size)]
    if request.prompt is not None:
        words.append(re.sub(r"[^\w]+", "-", request.prompt.lower())[:_LONGEST].strip("-"))
    return "-".join(filter(None, words))


def storage_path(request: SearchRequest, name: str) -> Path:
    """Return where the trials are kept by default: beside the first output."""
    return request.outputs[0].with_suffix(STORAGE) if request.outputs else Path(name + STORAGE)


def check_outputs(request: SearchRequest, name: str) -> tuple[Path, ...]:
    """Return the files to write, a recipe if none is named; PlanError or OptionError where one cannot be written."""
    if request.worker:
        return ()
    what = "neither a recipe (TOML), a page (HTML) nor a plot (PNG, SVG)"
    paths = outputs.check(request.outputs or (Path(name + RECIPE),), KINDS, what, force=request.force)
    if sum(path.suffix.lower() == RECIPE for path in paths) > 1:
        raise OptionError("a search makes one recipe", "Give -o one .toml file.")
    plots.check_matplotlib(paths)
    if request.sheet:
        sheet = outputs.check((request.sheet,), SHEETS, "neither a PNG nor an HTML file", force=request.force)
        if set(sheet) & set(paths):
            raise OptionError(f"{request.sheet}: named twice", "Give the pictures another name than the plot.")
    return paths


def write(result: "SearchResult") -> "SearchResult":
    """Write the outputs, without a recipe where there is nothing to recommend and pictures where none were drawn."""
    from crdiff_export.evaluate.report import page as report_page
    from crdiff_export.evaluate.report import sheet
    from crdiff_export.search import page, plot

    request, recipe = result.job.request, result.recipe
    paths = [path for path in result.job.outputs if recipe or path.suffix.lower() != RECIPE]
    makers: outputs.Makers = {
        ".html": lambda: page.render(result),
        ".png": lambda: plot.draw(result, "png"),
        ".svg": lambda: plot.draw(result, "svg"),
    }
    if recipe:
        makers = {RECIPE: lambda: recipe_toml.dump(recipe), **makers}
    outputs.write(paths, makers, replace=request.force)
    if request.sheet and result.evaluation and not request.worker:
        contact = page.contact_sheet(result, request.size)
        makers = {".png": lambda: sheet.render(contact), ".html": lambda: report_page.render_sheet(contact)}
        outputs.write([request.sheet], makers, replace=request.force)
        paths.append(request.sheet)
    return replace(result, files=tuple(paths))
