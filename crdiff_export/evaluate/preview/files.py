"""The files of a preview: a sheet of the pictures as a PNG, and the same as an HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from crdiff_export.errors import PlanError
from crdiff_export.evaluate.preview import report_text
from crdiff_export.evaluate.preview.request import Preview
from crdiff_export.evaluate.report import outputs
from crdiff_export.sizes import Size

SUFFIXES: Final = (".png", ".html")
# Pillow opens no picture of more pixels (twice its MAX_IMAGE_PIXELS); other programs give up before.
MOST_PIXELS: Final = 178_956_970


def choose(paths: Sequence[Path], stem: str, *, force: bool) -> tuple[Path, ...]:
    """Return the files to write, a sheet and a page if none is named; PlanError where one cannot be written."""
    named = paths or [Path(stem + suffix) for suffix in SUFFIXES]
    return outputs.check(named, SUFFIXES, "neither a PNG nor an HTML file", force=force)


def check_sheet(paths: Sequence[Path], rows: int, columns: int, size: Size) -> None:
    """Raise PlanError for more pictures than one PNG file can show."""
    from crdiff_export.evaluate.report import sheet

    width, height = sheet.estimate_size(rows, columns, (size.width, size.height))
    if _has_sheet(paths) and width * height > MOST_PIXELS:
        raise PlanError(
            f"{rows * columns} pictures of {size} make a sheet of {width}x{height}, which few programs open",
            "Write the page alone, with -o NAME.html, or give fewer prompts, seeds or weights.",
        )


def write(preview: Preview) -> tuple[str, ...]:
    """Write all files or none, and return notes about what a sheet could not show."""
    from crdiff_export.evaluate.report import fonts, page, sheet

    contact = report_text.contact_sheet(preview)
    makers: outputs.Makers = {".png": lambda: sheet.render(contact), ".html": lambda: page.render_sheet(contact)}
    outputs.write(preview.files, makers, replace=preview.job.request.force)
    texts = [contact.title, *(row.prompt for row in contact.rows)]
    if not (_has_sheet(preview.files) and any(map(fonts.lacks, texts))):
        return ()
    return ("no font here has all letters of the prompts: the sheet shows marks for some, its PNG text has them",)


def _has_sheet(paths: Sequence[Path]) -> bool:
    return any(path.suffix.lower() == ".png" for path in paths)
