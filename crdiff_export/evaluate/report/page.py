"""HTML pages that need nothing else: pictures and plots are inside, and nothing links elsewhere.

The pages of preview, evaluate and search are all made of sections; `templates/page.html` is the page itself. The one
script is `templates/compare.js`, which lays two pictures of a row over each other; the page's policy lets no other run.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from crdiff_export.evaluate.report.colours import PALETTE
from crdiff_export.evaluate.report.contact import ContactSheet, SheetPicture, printable_prompt, shown_size

if TYPE_CHECKING:
    from jinja2 import Template

# The longer side, in pixels, up to which an enlarged picture shows its single pixels.
SMALL: Final = 256
_TEMPLATES: Final = Path(__file__).with_name("templates")
# Words that a page colours, in a table and above a sentence, with the name of their style.
_VERDICTS: Final = {"better": "better", "worse": "worse", "no difference shown": "none", "too few to say": "few"}


@dataclass(frozen=True, slots=True)
class PageTable:
    """A table: the names of its columns, its rows, and which columns are numbers, which stand to the right.

    A row whose only text is its first begins a group.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class PageSection:
    """One block of a page: a heading, then a sentence, a table, a plot or pictures, whichever are given.

    `plot` is an SVG file. The pictures of a sheet stand below headings of their own, its prompts.
    """

    title: str = ""
    text: str = ""
    table: PageTable | None = None
    plot: bytes = b""
    sheet: ContactSheet | None = None


def render(
    title: str,
    sections: Sequence[PageSection],
    *,
    verdicts: Sequence[tuple[str, str]] = (),
    facts: Sequence[tuple[str, str]] = (),
    command: str = "",
) -> str:
    """Render a page.

    Args:
        title: The heading of the page.
        sections: The blocks of the page; their pictures are kept pixel by pixel.
        verdicts: What the page shows, each as a verdict and a sentence; it stands first.
        facts: How it was made, as name and text; it stands last.
        command: The command line that made the page, if one did.

    Returns:
        The HTML document. All text is escaped but the SVG of a plot.
    """
    images = [image for section in sections if section.sheet for image in section.sheet.images]
    small = all(max(image.size) <= SMALL for image in images)
    return _template().render(
        title=title, sections=sections, verdicts=verdicts, facts=facts, command=command, small=small, images=images
    )


def render_sheet(sheet: ContactSheet, command: str = "") -> str:
    """Render the page of a contact sheet alone.

    Args:
        sheet: The pictures and their words.
        command: The command line that made the page, if one did.

    Returns:
        The HTML document.
    """
    return render(sheet.title, [PageSection(sheet=sheet)], facts=sheet.facts, command=command)


@cache
def _template() -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "printable_prompt": printable_prompt, "data_url": _data_url, "svg": _svg_element,
        "verdict": lambda text: _VERDICTS.get(text, ""), "shown_size": shown_size,
    }  # fmt: skip
    script = (_TEMPLATES / "compare.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    environment.globals |= {"script": script, "script_hash": f"sha256-{digest}"}
    return environment.get_template("page.html")


def _data_url(picture: SheetPicture) -> str:
    """Return a picture as a PNG file inside a URL."""
    from crdiff_export.evaluate.report import sheet

    png = sheet.png_bytes(picture.image, picture.parameters)
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _svg_element(plot: bytes) -> str:
    """Return the <svg> element of an SVG file, whose colours follow the page's, light or dark."""
    text = plot.decode()
    names = {colour.lower(): name for name, colour in PALETTE.items()}
    element = text[text.index("<svg") :]
    return re.sub(
        r"#[0-9a-fA-F]{6}\b", lambda match: f"var(--{names[c]})" if (c := match[0].lower()) in names else c, element
    )
