"""The files that pictures go to: whether they may, before anything is drawn, and the writing."""

from collections.abc import Sequence
from pathlib import Path

from crdiff_export.errors import PlanError
from crdiff_export.evaluate.report import Contact, outputs
from crdiff_export.sizes import Size

KINDS = (".png", ".html")
# Pillow opens no picture of more pixels (twice its MAX_IMAGE_PIXELS); other programs give up before.
MOST_PIXELS = 178_956_970


def place(asked: Sequence[Path], stem: str, *, force: bool) -> tuple[Path, ...]:
    """The files to write, a sheet and a page if none is named; PlanError where one must not or cannot be."""
    wanted = asked or tuple(Path(stem + kind) for kind in KINDS)
    return outputs.check(wanted, KINDS, "neither a PNG nor an HTML file", force=force)


def check_sheet(paths: Sequence[Path], rows: int, columns: int, size: Size) -> None:
    """PlanError for more pictures than a PNG file can show at once."""
    from crdiff_export.evaluate.report import sheet

    width, height = sheet.measure(rows, columns, (size.width, size.height))
    if any(path.suffix.lower() == ".png" for path in paths) and width * height > MOST_PIXELS:
        raise PlanError(
            f"{rows * columns} pictures of {size} make a sheet of {width}x{height}, which few programs open",
            "Write the page alone, with -o NAME.html, or give fewer prompts, seeds or weights.",
        )


def write(contact: Contact, paths: Sequence[Path], *, replace: bool) -> None:
    """Write all files, then give them their names; BakeError says why one could not be written."""
    from crdiff_export.evaluate.report import page, sheet

    def save(part: Path, kind: str) -> None:
        (sheet if kind == ".png" else page).save(contact, part)

    outputs.write(paths, save, replace=replace)


def warnings(contact: Contact, paths: Sequence[Path]) -> tuple[str, ...]:
    """What a sheet could not show."""
    from crdiff_export.evaluate.report import fonts

    lacking = [text for text in (contact.title, *(row.prompt for row in contact.rows)) if fonts.lacks(text)]
    if not lacking or not any(path.suffix.lower() == ".png" for path in paths):
        return ()
    return ("no font here has all letters of the prompts: the sheet shows marks for some, its PNG text has them",)
