"""Pictures and what is known of them: the records that a sheet and a page are made from."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Shot:
    """One picture. `parameters` tell in plain text how it was made, as other programs write them into PNG files."""

    image: "Image"
    parameters: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """Pictures of one prompt from the same noise, one for each column."""

    prompt: str
    seed: int
    shots: tuple[Shot, ...]


@dataclass(frozen=True, slots=True)
class Contact:
    """Everything on a sheet: facts as name and text, columns of models, rows of prompts and seeds."""

    title: str
    facts: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def by_prompt(self) -> Iterator[tuple[str, tuple[Row, ...]]]:
        """The rows of each prompt that follow each other."""
        for prompt, rows in groupby(self.rows, key=lambda row: row.prompt):
            yield prompt, tuple(rows)

    def text(self) -> str:
        """All of its words, in lines."""
        facts = [f"{name}: {text}" for name, text in self.facts]
        rows = [f"row {number}: seed {row.seed}: {shown(row.prompt)}" for number, row in enumerate(self.rows, 1)]
        return "\n".join([self.title, *facts, f"columns: {', '.join(self.columns)}", *rows])


def shown(text: str) -> str:
    """A prompt in one line, without characters that move a cursor; half a letter of a broken file name is a mark."""
    visible = "".join(c if c >= " " and not "\x7f" <= c <= "\x9f" else " " for c in text)
    return " ".join(visible.encode("utf-8", "replace").decode().split())
