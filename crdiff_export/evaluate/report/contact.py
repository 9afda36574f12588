"""Contact sheets: rows of labelled pictures, with the facts that belong to them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from PIL.Image import Image

# Small pictures are shown larger, so that the longer side has about as many pixels, but not more often than MOST times.
_ENLARGED: Final = 288
_MOST: Final = 4


@dataclass(frozen=True, slots=True)
class SheetPicture:
    """One picture. `parameters` say in plain text how it was made, as other programs write them into PNG files.

    `caption` stands below the picture.
    """

    image: "Image"
    parameters: str = ""
    caption: str = ""


@dataclass(frozen=True, slots=True)
class SheetRow:
    """Pictures of one prompt from the same noise, one for each column."""

    prompt: str
    seed: int
    pictures: tuple[SheetPicture, ...]


@dataclass(frozen=True, slots=True)
class ContactSheet:
    """Everything on a sheet: facts as name and text, columns of models, rows of prompts and seeds."""

    title: str
    facts: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    rows: tuple[SheetRow, ...]

    @property
    def images(self) -> list["Image"]:
        """All pictures, row by row."""
        return [picture.image for row in self.rows for picture in row.pictures]

    def by_prompt(self) -> Iterator[tuple[str, tuple[SheetRow, ...]]]:
        """Yield each prompt, fit to be shown, with its neighbouring rows."""
        for prompt, rows in groupby(self.rows, key=lambda row: row.prompt):
            yield printable_prompt(prompt) or "(no prompt)", tuple(rows)

    def text(self) -> str:
        """Return all words of the sheet, in lines."""
        facts = [f"{name}: {text}" for name, text in self.facts]
        rows = [
            f"row {number}: seed {row.seed}: {printable_prompt(row.prompt)}" for number, row in enumerate(self.rows, 1)
        ]
        return "\n".join([self.title, *facts, f"columns: {', '.join(self.columns)}", *rows])


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return how large a picture is shown: each pixel of a small one becomes a square of several.

    Args:
        size: The width and height of the picture in pixels.

    Returns:
        The same or a multiple of it.
    """
    times = min(_MOST, max(1, _ENLARGED // max(size)))
    return size[0] * times, size[1] * times


def printable_prompt(text: str) -> str:
    """Return a prompt in one line, without control characters; what UTF-8 cannot hold becomes a question mark."""
    visible = "".join(c if c >= " " and not "\x7f" <= c <= "\x9f" else " " for c in text)
    return " ".join(visible.encode("utf-8", "replace").decode().split())
