"""The names of a search's outputs: chosen and checked before the search begins."""

import re
from pathlib import Path
from typing import Final

from crdiff_export.errors import OptionError
from crdiff_export.evaluate.report import outputs, plots
from crdiff_export.search.request import SearchRequest

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
