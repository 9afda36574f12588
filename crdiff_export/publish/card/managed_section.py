"""Find and replace the section of a Markdown text that crdiff manages: the lines between two markers.

Markers that are shown as code are not markers. A CommonMark parser tells which lines are code.
"""

import re
from collections.abc import Sequence

from crdiff_export.errors import CardError

BEGIN = "<!-- crdiff:begin -->"
END = "<!-- crdiff:end -->"
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


def split(text: str, newline: str, line: int = 1) -> tuple[str, Sequence[str], str]:
    """Split a text around what the managed section holds; a text without the section gets an empty one at its end.

    Args:
        text: Markdown without front matter.
        newline: How lines end.
        line: The number of the text's first line in its file, for errors.

    Returns:
        The text up to the first marker's line, the lines between the markers, and the rest from the other marker on.

    Raises:
        CardError: If the markers are not one pair, or if the text ends in code, which a section would become part of.

    """
    lines = _LINE.findall(text)
    code = _code_blocks(text)
    open_block = code.get(len(lines))
    markers = [
        (number, marker)
        for number, marker in enumerate(line.strip() for line in lines)
        if marker in (BEGIN, END) and number not in code
    ]
    if [marker for _, marker in markers] == [BEGIN, END]:
        (begin, _), (end, _) = markers
        return "".join(lines[: begin + 1]), lines[begin + 1 : end], "".join(lines[end:])
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
    last = lines[-1] if lines else ""
    gap = (newline if last and not last.endswith(("\r", "\n")) else "") + (newline if last.strip() else "")
    return f"{text}{gap}{BEGIN}{newline}", (), f"{END}{newline}"


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
