"""The files that pictures go to: whether they may, before anything is drawn, and the writing."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from crdiff_export import staging
from crdiff_export.errors import PlanError
from crdiff_export.recipe import Size
from crdiff_export.report import Contact

KINDS = (".png", ".html")
# Pillow opens no picture of more pixels (twice its MAX_IMAGE_PIXELS); other programs give up before.
MOST_PIXELS = 178_956_970


def place(asked: Sequence[Path], stem: str, *, force: bool) -> tuple[Path, ...]:
    """The files to write, a sheet and a page if none is named; PlanError where one must not or cannot be."""
    found = tuple(dict.fromkeys(asked)) or tuple(Path(stem + kind) for kind in KINDS)
    for path in found:
        try:
            _check(path, force=force)
        except OSError as error:
            raise PlanError(f"{path}: {error.strerror}", "Give another place with -o.") from error
    return found


def _check(path: Path, *, force: bool) -> None:
    if path.suffix.lower() not in KINDS:
        name = path.name or "preview"
        raise PlanError(f"{path}: neither a PNG nor an HTML file", f"Name it {name}.png or {name}.html.")
    if not path.parent.is_dir():
        raise PlanError(f"{path}: the folder {path.parent} does not exist", "Create it, or give another -o.")
    if os.path.lexists(path):
        path.lstat()
        if path.exists() and not path.is_file():
            raise PlanError(f"{path}: not a regular file", "Give another place with -o.")
        if not force:
            raise PlanError(f"{path}: already exists", "Give another -o, or --force to replace it.")
    if not os.access(path.parent, os.W_OK):
        raise PlanError(f"{path}: the folder {path.parent} cannot be written to", "Give another place with -o.")


def check_sheet(paths: Sequence[Path], rows: int, columns: int, size: Size) -> None:
    """PlanError for more pictures than a PNG file can show at once."""
    from crdiff_export.report import sheet

    width, height = sheet.measure(rows, columns, (size.width, size.height))
    if any(path.suffix.lower() == ".png" for path in paths) and width * height > MOST_PIXELS:
        raise PlanError(
            f"{rows * columns} pictures of {size} make a sheet of {width}x{height}, which few programs open",
            "Write the page alone, with -o NAME.html, or give fewer prompts, seeds or weights.",
        )


def write(contact: Contact, paths: Sequence[Path], *, replace: bool) -> None:
    """Write all files, then give them their names; BakeError says why one could not be written."""
    from crdiff_export.report import page, sheet

    with ExitStack() as stack:
        parts: list[Path] = []
        for path in paths:
            try:
                part = stack.enter_context(staging.staged(path, folder=False))
                (sheet if path.suffix.lower() == ".png" else page).save(contact, part)
            except OSError as error:
                raise staging.explained(error, path) from error
            parts.append(part)
        for part, path in zip(parts, paths, strict=True):
            try:
                staging.settle(part, path)
                staging.publish(part, path, replace=replace)
            except OSError as error:
                raise staging.explained(error, path) from error


def warnings(contact: Contact, paths: Sequence[Path]) -> tuple[str, ...]:
    """What a sheet could not show."""
    from crdiff_export.report import fonts

    lacking = [text for text in (contact.title, *(row.prompt for row in contact.rows)) if fonts.lacks(text)]
    if not lacking or not any(path.suffix.lower() == ".png" for path in paths):
        return ()
    return ("no font here has all letters of the prompts: the sheet shows marks for some, its PNG text has them",)
