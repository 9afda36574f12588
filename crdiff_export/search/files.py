"""The files of a search, written at its end: the recipe, a plot, a page, and a sheet of pictures on request."""

from dataclasses import replace

from crdiff_export.evaluate.report import outputs, sheet
from crdiff_export.evaluate.report import page as report_page
from crdiff_export.models import recipe_toml
from crdiff_export.search import page, plot
from crdiff_export.search.outputs import RECIPE
from crdiff_export.search.result import SearchResult


def write(result: SearchResult) -> SearchResult:
    """Write the outputs, without a recipe where there is nothing to recommend and pictures where none were drawn."""
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
    if request.sheet and result.subject:
        contact = page.contact_sheet(result, result.subject)
        makers = {
            ".png": lambda: sheet.render(contact),
            ".html": lambda: report_page.render_sheet(contact, request.command),
        }
        outputs.write([request.sheet], makers, replace=request.force)
        paths.append(request.sheet)
    return replace(result, files=tuple(paths))
