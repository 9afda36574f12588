"""The files of a preview: a sheet of the pictures as a PNG, and the same as an HTML page."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from crdiff_export.errors import PlanError
from crdiff_export.evaluate.preview import report_text
from crdiff_export.evaluate.preview.request import Preview, PreviewRequest
from crdiff_export.evaluate.report import outputs
from crdiff_export.evaluate.request import Subject

SUFFIXES: Final = (".png", ".html")
# Pillow opens no picture of more pixels (twice its MAX_IMAGE_PIXELS); other programs give up before.
MOST_PIXELS: Final = 178_956_970


def choose(request: PreviewRequest, subject: Subject, stem: str) -> tuple[Path, ...]:
    """Choose the files to write, a sheet and a page if none is named.

    Args:
        request: The request.
        subject: The size and the models to draw.
        stem: What a file is named after.

    Returns:
        The files.

    Raises:
        PlanError: One of them cannot be written, or there are more pictures than one PNG file can show.
    """
    from crdiff_export.evaluate.report import sheet

    columns = len(subject.weights) + len(request.beside)
    size, rows = subject.size, len(request.prompts) * len(request.seeds)
    named = request.outputs or [Path(f"{stem}-preview-{size}{suffix}") for suffix in SUFFIXES]
    paths = outputs.check(named, SUFFIXES, "neither a PNG nor an HTML file", force=request.force)
    width, height = sheet.estimate_size(rows, columns, (size.width, size.height))
    if _has_sheet(paths) and width * height > MOST_PIXELS:
        raise PlanError(
            f"{rows * columns} pictures of {size} make a sheet of {width}x{height}, which few programs open",
            "Write the page alone, with -o NAME.html, or give fewer prompts, seeds or weights.",
        )
    return paths


def write(preview: Preview) -> Preview:
    """Write the files, all or none; each has its name only once it is complete.

    Args:
        preview: The pictures.

    Returns:
        The same, with a note for what a file cannot show.

    Raises:
        BakeError: A file could not be written.
    """
    from crdiff_export.evaluate.report import fonts, page, sheet

    contact = report_text.contact_sheet(preview)
    makers: outputs.Makers = {
        ".png": lambda: sheet.render(contact),
        ".html": lambda: page.render_sheet(contact, preview.job.request.command),
    }
    outputs.write(preview.job.outputs, makers, replace=preview.job.request.force)
    texts = [contact.title, *(row.prompt for row in contact.rows)]
    if not (_has_sheet(preview.job.outputs) and any(map(fonts.lacks, texts))):
        return preview
    note = "no font here has all letters of the prompts: the sheet shows marks for some, its PNG text has them"
    return replace(preview, notes=(*preview.notes, note))


def _has_sheet(paths: Sequence[Path]) -> bool:
    return any(path.suffix.lower() == ".png" for path in paths)
