"""HTML pages that need nothing else: pictures and plots are inside, no script runs, and nothing links elsewhere.

The pages of preview, evaluate and search are all made of sections; `templates/page.html` is the page itself.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from crdiff_export.evaluate.report.contact import ContactSheet, SheetPicture, printable_prompt

if TYPE_CHECKING:
    from jinja2 import Template

# The longer side, in pixels, up to which an enlarged picture shows its single pixels.
SMALL: Final = 256


@dataclass(frozen=True, slots=True)
class PageSection:
    """One block of a page: a heading, then a sentence, a table, a plot or pictures, whichever are given.

    `table` holds the names of its columns and its rows; `plot` is an SVG file.
    """

    title: str = ""
    text: str = ""
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    plot: bytes = b""
    sheet: ContactSheet | None = None


def render(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[PageSection]) -> str:
    """Render a page.

    Args:
        title: The heading of the page.
        facts: What stands above the sections, as name and text.
        sections: The blocks of the page; their pictures are kept pixel by pixel.

    Returns:
        The HTML document. All text is escaped but the SVG of a plot.
    """
    images = [image for section in sections if section.sheet for image in section.sheet.images]
    small = all(max(image.size) <= SMALL for image in images)
    return _template().render(title=title, facts=facts, sections=sections, small=small)


def render_sheet(sheet: ContactSheet) -> str:
    """Render the page of a contact sheet alone."""
    return render(sheet.title, sheet.facts, [PageSection(sheet=sheet)])


@cache
def _template() -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"printable_prompt": printable_prompt, "data_url": _data_url, "svg": _svg_element}
    return environment.get_template("page.html")


def _data_url(picture: SheetPicture) -> str:
    """Return a picture as a PNG file inside a URL."""
    from crdiff_export.evaluate.report import sheet

    png = sheet.png_bytes(picture.image, picture.parameters)
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _svg_element(plot: bytes) -> str:
    """Return the <svg> element of an SVG file, which a page takes as it is."""
    text = plot.decode()
    return text[text.index("<svg") :]
