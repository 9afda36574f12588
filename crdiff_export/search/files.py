"""What a search leaves: its journal, the recipe it found, a plot, a page, and a sheet of pictures on request."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from crdiff_export.errors import OptionError
from crdiff_export.evaluate.report import outputs, plots
from crdiff_export.models import recipe_toml
from crdiff_export.search.found import Found

if TYPE_CHECKING:
    from crdiff_export.search.tuning import SearchRequest

RECIPE: Final = ".toml"
KINDS: Final = (RECIPE, ".html", ".png", ".svg")
SHEETS: Final = (".png", ".html")
JOURNAL: Final = ".journal"
_LONGEST: Final = 40


def stem(base: str, request: "SearchRequest") -> str:
    """What everything is called that nobody gave a name: the base, the size, and the prompt if there is one."""
    words = [base, str(request.size)]
    if request.prompt is not None:
        words.append(re.sub(r"[^\w]+", "-", request.prompt.lower())[:_LONGEST].strip("-"))
    return "-".join(filter(None, words))


def journal(request: "SearchRequest", name: str) -> Path:
    """Where the trials are kept if nothing else is said: beside the first output."""
    return request.outputs[0].with_suffix(JOURNAL) if request.outputs else Path(name + JOURNAL)


def check(request: "SearchRequest", name: str) -> tuple[Path, ...]:
    """The files to write, a recipe if none is named; PlanError or OptionError where one must not or cannot be."""
    asked = request.outputs or (Path(name + RECIPE),)
    if request.worker:
        return ()
    what = "neither a recipe (TOML), a page (HTML) nor a plot (PNG, SVG)"
    found = outputs.check(asked, KINDS, what, force=request.force)
    if sum(path.suffix.lower() == RECIPE for path in found) > 1:
        raise OptionError("a search makes one recipe", "Give -o one .toml file.")
    plots.check_matplotlib(found)
    if request.sheet:
        sheet = outputs.check((request.sheet,), SHEETS, "neither a PNG nor an HTML file", force=request.force)
        if set(sheet) & set(found):
            raise OptionError(f"{request.sheet}: named twice", "Give the pictures another name than the plot.")
    return found


def write(found: Found) -> Found:
    """Write all that there is: no recipe where there is nothing to recommend, no pictures where none were drawn."""
    request = found.job.request
    recipe = found.recipe
    paths = [path for path in found.job.outputs if recipe or path.suffix.lower() != RECIPE]

    from crdiff_export.search import page, plot

    makers: outputs.Makers = {
        ".html": lambda: page.render(found),
        ".png": lambda: plot.draw(found, "png"),
        ".svg": lambda: plot.draw(found, "svg"),
    }
    if recipe:
        makers = {RECIPE: lambda: recipe_toml.dump(recipe), **makers}
    outputs.write(paths, makers, replace=request.force)
    if request.sheet and found.evaluation and not request.worker:
        _write_sheet(found, [request.sheet], replace=request.force)
        paths.append(request.sheet)
    return replace(found, files=tuple(paths))


def _write_sheet(found: Found, paths: Sequence[Path], *, replace: bool) -> None:
    from crdiff_export.evaluate.report import page, sheet
    from crdiff_export.search import pictures

    contact = pictures.contact(found, found.job.request.size)
    makers: outputs.Makers = {".png": lambda: sheet.render(contact), ".html": lambda: page.render_sheet(contact)}
    outputs.write(paths, makers, replace=replace)
