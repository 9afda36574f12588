"""Find and replace the section of a Markdown text that crdiff manages: the lines between two markers.

Markers that are shown as code are not markers. A CommonMark parser tells which lines are code.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from crdiff_export.errors import CardError

BEGIN = "<!-- crdiff:begin -->"
END = "<!-- crdiff:end -->"
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


@dataclass(frozen=True, slots=True)
class ManagedSection:
    """The lines of a text, with their ends; `lines[begin + 1 : end]` are ours. Without markers both are None."""

    lines: tuple[str, ...]
    begin: int | None
    end: int | None

    def content(self) -> tuple[str, ...]:
        """Return our lines as they are."""
        return () if self.begin is None else self.lines[self.begin + 1 : self.end]

    def replace(self, content: Sequence[str], newline: str) -> str:
        """Replace the lines of the section; a text without the section gets it appended."""
        written = [line + newline for line in content]
        if self.begin is not None and self.end is not None:
            return "".join([*self.lines[: self.begin + 1], *written, *self.lines[self.end :]])
        before = "".join(self.lines)
        if before and not before.endswith(("\r", "\n")):
            before += newline
        blank = newline if self.lines and self.lines[-1].strip() else ""
        return "".join([before, blank, BEGIN + newline, *written, END + newline])


def find(text: str, line: int = 1) -> ManagedSection:
    """Find the managed section.

    Args:
        text: Markdown without front matter.
        line: The number of the text's first line in its file, for errors.

    Returns:
        The section.

    Raises:
        CardError: If the markers are not one pair, or if the text ends in code, which a section would become part of.

    """
    lines = tuple(_LINE.findall(text))
    code = _code_blocks(text)
    open_block = code.get(len(lines))
    markers = [
        (number, marker)
        for number, marker in enumerate(line.strip() for line in lines)
        if marker in (BEGIN, END) and number not in code
    ]
    if [marker for _, marker in markers] == [BEGIN, END]:
        return ManagedSection(lines, markers[0][0], markers[1][0])
    if markers:
        listed = ", ".join(f"{marker} in line {line + number}" for number, marker in markers)
        never_ends = "" if open_block is None else f"; the code that begins in line {line + open_block} never ends"
        raise CardError(
            f"README.md: not one pair of markers, but {listed}{never_ends}",
            f"Leave one line {BEGIN} and after it one {END}, or none of both.",
        )
    if open_block is not None:
        raise CardError(
            f"README.md, line {line + open_block}: the code that begins here never ends, so nothing can follow it",
            "Close it with a line like the one that opens it, then run it again.",
        )
    return ManagedSection(lines, None, None)


def _code_blocks(text: str) -> dict[int, int]:
    """Map each line that is code to the first line of its block; the line after the text counts, too."""
    from markdown_it import MarkdownIt

    # A line after the text shows whether the text ends inside a block. Only blocks matter, not what is in a line.
    ended = text if text.endswith(("\r", "\n")) or not text else f"{text}\n"
    tokens = MarkdownIt("commonmark").disable("inline").parse(f"{ended}{BEGIN}")
    spans = [token.map for token in tokens if token.type in ("fence", "code_block") and token.map]
    return {number: start for start, stop in spans for number in range(start, stop)}


def count_lines(text: str) -> int:
    """Return how many lines of the text end."""
    return len(_LINE_ENDS.findall(text))


def newline(text: str) -> str:
    """Return how most lines of the text end."""
    ends = _LINE_ENDS.findall(text)
    return max(dict.fromkeys(ends), key=ends.count, default="\n")
