"""Contact sheets as PNG files: the places of all pictures and lines of text, and the drawing."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageDraw
from PIL.ImageFont import FreeTypeFont
from PIL.PngImagePlugin import PngInfo

from crdiff_export.evaluate.report import fonts
from crdiff_export.evaluate.report.contact import ContactSheet, SheetRow, shown_size

Colour = tuple[int, int, int]
PAPER: Final[Colour] = (250, 250, 248)
INK: Final[Colour] = (26, 26, 30)
MUTED: Final[Colour] = (112, 112, 118)
RULE: Final[Colour] = (218, 218, 214)
# The height of letters in pixels. They grow with the pictures: one looks at a wide sheet from further away.
SMALLEST, LARGEST = 15, 64
# The narrowest text, in letters' heights.
NARROWEST = 38


@dataclass(frozen=True, slots=True)
class TextLine:
    """A line of text, its upper left corner in pixels, its font and its colour."""

    text: str
    x: int
    y: int
    font: FreeTypeFont
    colour: Colour = INK


def render(sheet: ContactSheet) -> bytes:
    """Render a contact sheet.

    Args:
        sheet: The pictures and their words.

    Returns:
        The content of a PNG file, which also has all words as PNG text.
    """
    return png_bytes(SheetLayout(sheet).draw(), sheet.text(), sheet.title)


def estimate_size(rows: int, columns: int, picture: tuple[int, int]) -> tuple[int, int]:
    """Estimate the size of a sheet.

    Args:
        rows: Rows of pictures.
        columns: Pictures in a row.
        picture: The width and height of a picture in pixels.

    Returns:
        Its width and height in pixels.
    """
    width, height = shown_size(picture)
    unit = _letter_height(columns * width)
    return columns * (width + unit) + 2 * unit, rows * (height + 4 * unit) + 16 * unit


def png_bytes(image: Image.Image, parameters: str, title: str = "") -> bytes:
    """Encode an image as a PNG file with text under the names that other programs read.

    Args:
        image: The image.
        parameters: How it was made.
        title: Its title, if it has one.

    Returns:
        The content of the file.
    """
    info = PngInfo()
    if title:
        info.add_text("Title", title)
    info.add_text("Software", "crdiff")
    # PNG text ends at a zero; what UTF-8 cannot hold becomes a question mark.
    info.add_text("parameters", parameters.replace("\0", " ").encode("utf-8", "replace").decode())
    stream = io.BytesIO()
    image.save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


class SheetLayout:
    """The places of everything on a sheet, from top to bottom: title, for each prompt its rows, and the facts.

    `corners` holds the upper left corners of the pictures, row by row; `rules` the heights of the lines across.
    """

    def __init__(self, sheet: ContactSheet) -> None:
        self._sheet = sheet
        widths, heights = zip(*(shown_size(image.size) for image in sheet.images), strict=True)
        self._unit = unit = _letter_height(len(sheet.columns) * max(widths))
        self._margin, gap = 2 * unit, max(6, round(unit * 0.6))
        labels = (*sheet.columns, *(picture.caption for row in sheet.rows for picture in row.pictures))
        self._cell = max(*widths, *(fonts.width(label, unit) for label in labels)) + gap
        self._text_width = max(len(sheet.columns) * self._cell - gap, NARROWEST * unit)
        self.width = self._text_width + 2 * self._margin
        self.lines: list[TextLine] = []
        self.rules: list[int] = []
        self.corners: list[list[tuple[int, int]]] = []
        self._y = self._margin
        self._place_text(sheet.title, round(1.6 * unit))
        for prompt, rows in sheet.by_prompt():
            self._place_prompt(prompt)
            for row in rows:
                self._place_row(row, max(heights))
        self._place_facts()
        self.height = self._y + self._margin - round(0.6 * unit)

    def draw(self) -> Image.Image:
        """Draw the sheet; every picture is on it pixel by pixel, a small one with larger pixels."""
        image = Image.new("RGB", (self.width, self.height), PAPER)
        pen = ImageDraw.Draw(image)
        for y in self.rules:
            ends = (self._margin, y, self._margin + self._text_width, y)
            pen.line(ends, fill=RULE, width=max(1, self.width // 1500))
        for line in self.lines:
            pen.text((line.x, line.y), line.text, font=line.font, fill=line.colour)
        corners = (corner for row in self.corners for corner in row)
        for picture, corner in zip(self._sheet.images, corners, strict=True):
            shown = picture.convert("RGB").resize(shown_size(picture.size), Image.Resampling.NEAREST)
            image.paste(shown, corner)
        return image

    def _place_facts(self) -> None:
        self._place_rule()
        names = [name for name, _ in self._sheet.facts]
        indent = max((fonts.width(name, self._unit) for name in names), default=0) + self._unit
        for name, text in self._sheet.facts:
            self._place_line(name, fonts.font_of(name, self._unit), colour=MUTED)
            self._place_text(text, self._unit, indent)

    def _place_prompt(self, prompt: str) -> None:
        self._place_rule()
        self._place_text(prompt, round(1.15 * self._unit))
        self._y += round(0.5 * self._unit)
        for number, name in enumerate(self._sheet.columns):
            self._place_line(name, fonts.font_of(name, self._unit), number * self._cell)
        self._y += round(1.5 * self._unit)

    def _place_row(self, row: SheetRow, height: int) -> None:
        columns = range(len(self._sheet.columns))
        self.corners.append([(self._margin + number * self._cell, self._y) for number in columns])
        self._y += height + round(0.3 * self._unit)
        if any(picture.caption for picture in row.pictures):
            for number, picture in enumerate(row.pictures):
                font = fonts.font_of(picture.caption, self._unit)
                self._place_line(picture.caption, font, number * self._cell, MUTED)
            self._y += round(1.35 * self._unit)
        self._place_text(f"seed {row.seed}", self._unit, colour=MUTED)
        self._y += round(0.5 * self._unit)

    def _place_rule(self) -> None:
        self._y += self._unit
        self.rules.append(self._y)
        self._y += self._unit

    def _place_text(self, text: str, size: int, indent: int = 0, colour: Colour = INK) -> None:
        """Place a text in as many lines as it needs, and go below it."""
        font = fonts.font_of(text, size)
        for line in _wrapped(text, font, self._text_width - indent):
            self._place_line(line, font, indent, colour)
            self._y += round(1.35 * size)

    def _place_line(self, text: str, font: FreeTypeFont, indent: int = 0, colour: Colour = INK) -> None:
        self.lines.append(TextLine(text, self._margin + indent, self._y, font, colour))


def _letter_height(width: int) -> int:
    """Return the height of letters for pictures of this total width, in pixels."""
    return min(max(SMALLEST, round(width / 90)), LARGEST)


def _wrapped(text: str, font: FreeTypeFont, width: int) -> Iterator[str]:
    """Yield a text in lines of a width in pixels; words are kept together where they fit."""
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
    """Cut a word that is wider than a line."""
    pieces, piece = [], ""
    for letter in word:
        if piece and font.getlength(piece + letter) > width:
            pieces.append(piece)
            piece = ""
        piece += letter
    return [*pieces, piece]
