"""The contact sheet as a PNG: where every picture and line of text goes, and the drawing. Pictures stay as they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw
from PIL.ImageFont import FreeTypeFont
from PIL.PngImagePlugin import PngInfo

from crdiff_export.evaluate.report import fonts
from crdiff_export.evaluate.report.contact import Contact, shown

Tone = Literal["ink", "muted"]
PAPER = (250, 250, 248)
COLOURS: dict[Tone, tuple[int, int, int]] = {"ink": (26, 26, 30), "muted": (112, 112, 118)}
RULE = (218, 218, 214)
# Pixels. Letters grow with the pictures, as a wide sheet is looked at from further away.
SMALLEST, LARGEST = 15, 64
# The narrowest text, in letters' heights.
NARROWEST = 38


@dataclass(frozen=True, slots=True)
class Line:
    """A line of text, its upper left corner, and its font as `fonts.pick` names it."""

    text: str
    x: int
    y: int
    size: int
    font: str
    tone: Tone = "ink"


@dataclass(frozen=True, slots=True)
class Layout:
    """A sheet before it is drawn. `places` are the upper left corners of the pictures, row by row."""

    width: int
    height: int
    lines: tuple[Line, ...]
    rules: tuple[tuple[int, int, int], ...]
    places: tuple[tuple[tuple[int, int], ...], ...]


def measure(rows: int, columns: int, picture: tuple[int, int]) -> tuple[int, int]:
    """About the width and height of a sheet, for asking whether it can be made at all."""
    unit = _unit(columns * picture[0])
    return columns * (picture[0] + unit) + 2 * unit, rows * (picture[1] + 4 * unit) + 16 * unit


def lay_out(contact: Contact) -> Layout:
    """The places of everything: title, facts, and for each prompt the column names and the rows."""
    return _LayingOut(contact).done()


def draw(contact: Contact, layout: Layout) -> Image.Image:
    """The sheet as a picture; every picture on it is there pixel by pixel."""
    sheet = Image.new("RGB", (layout.width, layout.height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for left, right, y in layout.rules:
        pen.line((left, y, right, y), fill=RULE, width=max(1, layout.width // 1500))
    for line in layout.lines:
        chosen = fonts.load(line.font, line.size)
        pen.text((line.x, line.y), line.text, font=chosen, fill=COLOURS[line.tone])
    for row, places in zip(contact.rows, layout.places, strict=True):
        for shot, place in zip(row.shots, places, strict=True):
            sheet.paste(shot.image.convert("RGB"), place)
    return sheet


def save(contact: Contact, path: Path) -> None:
    """Write the sheet as a PNG that says in text what is on it; nothing of what it shows is lost."""
    draw(contact, lay_out(contact)).save(path, format="PNG", pnginfo=described(contact.text(), contact.title))


def described(parameters: str, title: str | None = None) -> PngInfo:
    """PNG text under the names that other programs read."""
    info = PngInfo()
    if title:
        info.add_text("Title", title)
    info.add_text("Software", "crdiff")
    # PNG text ends at a zero; half a letter of a broken file name is a mark.
    info.add_text("parameters", parameters.replace("\0", " ").encode("utf-8", "replace").decode())
    return info


def wrapped(text: str, font: FreeTypeFont, width: int) -> Iterator[str]:
    """The text in lines of a width; words are kept together where they fit."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            yield line
        *full, line = _pieces(word, font, width)
        yield from full
    yield line


def _pieces(word: str, font: FreeTypeFont, width: int) -> list[str]:
    pieces, piece = [], ""
    for letter in word:
        if piece and font.getlength(piece + letter) > width:
            pieces.append(piece)
            piece = ""
        piece += letter
    return [*pieces, piece]


def _unit(width: int) -> int:
    return min(max(SMALLEST, round(width / 90)), LARGEST)


class _LayingOut:
    """A pen that goes down the sheet."""

    def __init__(self, contact: Contact) -> None:
        self._contact = contact
        sizes = [shot.image.size for row in contact.rows for shot in row.shots]
        self._picture = max(width for width, _ in sizes), max(height for _, height in sizes)
        self._unit = unit = _unit(len(contact.columns) * self._picture[0])
        self._margin, self._gap = 2 * unit, max(6, round(unit * 0.6))
        names = [fonts.width(name, unit) for name in contact.columns]
        self._cell = max(self._picture[0], *names) + self._gap
        self._width = max(len(contact.columns) * self._cell - self._gap, NARROWEST * unit)
        self._y = self._margin
        self._lines: list[Line] = []
        self._rules: list[tuple[int, int, int]] = []
        self._places: list[tuple[tuple[int, int], ...]] = []

    def done(self) -> Layout:
        """Go all the way."""
        unit = self._unit
        self._text(self._contact.title, round(1.6 * unit))
        self._y += round(0.5 * unit)
        self._facts()
        for prompt, rows in self._contact.by_prompt():
            self._y += unit
            self._rules.append((self._margin, self._margin + self._width, self._y))
            self._y += unit
            self._text(shown(prompt) or "(no prompt)", round(1.15 * unit))
            self._y += round(0.5 * unit)
            for place, name in enumerate(self._contact.columns):
                self._lines.append(Line(name, self._margin + place * self._cell, self._y, unit, fonts.pick(name)))
            self._y += round(1.5 * unit)
            for row in rows:
                self._row(row.seed)
        height = self._y + self._margin - round(0.6 * unit)
        return Layout(
            self._width + 2 * self._margin, height, tuple(self._lines), tuple(self._rules), tuple(self._places)
        )

    def _facts(self) -> None:
        indent = max((fonts.width(name, self._unit) for name, _ in self._contact.facts), default=0) + self._unit
        for name, text in self._contact.facts:
            self._lines.append(Line(name, self._margin, self._y, self._unit, fonts.pick(name), "muted"))
            self._text(text, self._unit, indent)

    def _row(self, seed: int) -> None:
        places = range(len(self._contact.columns))
        self._places.append(tuple((self._margin + place * self._cell, self._y) for place in places))
        self._y += self._picture[1] + round(0.3 * self._unit)
        self._text(f"seed {seed}", self._unit, tone="muted")
        self._y += round(0.5 * self._unit)

    def _text(self, text: str, size: int, indent: int = 0, tone: Tone = "ink") -> None:
        font = fonts.pick(text)
        for line in wrapped(text, fonts.load(font, size), self._width - indent):
            self._lines.append(Line(line, self._margin + indent, self._y, size, font, tone))
            self._y += round(1.35 * size)
