"""The part of a Markdown text that is ours: what stands between two markers, unless they are shown as code."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from crdiff_export.errors import CardError

BEGIN = "<!-- crdiff:begin -->"
END = "<!-- crdiff:end -->"
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_ENDINGS = "\r\n"
# CommonMark 4.5, 5.2, 4.1, 4.2 and 5.1: fences, items of lists, rules, headings and quotes.
_FENCE = re.compile(r"(?P<fence>`{3,})[^`]*|(?P<tildes>~{3,}).*")
_ITEM = re.compile(r"(?:[-*+]|(?P<number>[0-9]{1,9})[.)])(?: {1,4}(?! )| )(?=.)")
_RULE = re.compile(r"(?:[-] *){3,}|(?:[*] *){3,}|(?:_ *){3,}|[-]+|=+")  # and what makes a heading of the text above
_HEADING = re.compile(r"#{1,6}(?: .*|$)")
# CommonMark 4.6: what begins HTML, and what ends it. The last two go on to a blank line, the very last not after text.
_RAW = "(?:pre|script|style|textarea)"
_BLOCKS = (
    "(?:address|article|aside|base|basefont|blockquote|body|caption|center|col|colgroup|dd|details|dialog|dir|div|dl|dt"
    "|fieldset|figcaption|figure|footer|form|frame|frameset|h[1-6]|head|header|hr|html|iframe|legend|li|link|main|menu"
    "|menuitem|nav|noframes|ol|optgroup|option|p|param|search|section|summary|table|tbody|td|tfoot|th|thead|title|tr"
    "|track|ul)"
)
_VALUE = r"""(?:[^\s"'=<>`]+|'[^']*'|"[^"]*")"""
_TAG = rf"<(?:[A-Z][\w-]*(?:\s+[\w:][\w.:-]*(?:\s*=\s*{_VALUE})?)*\s*/?|/[A-Z][\w-]*\s*)>$"
_HTML = tuple(
    (re.compile(opens, re.ASCII | re.IGNORECASE), re.compile(closes, re.IGNORECASE))
    for opens, closes in (
        (rf"<{_RAW}(?:[\s>]|$)", rf"</{_RAW}>"), ("<!--", "-->"), (r"<\?", r"\?>"), (r"<![A-Z]", ">"),
        (r"<!\[CDATA\[", r"\]\]>"), (rf"</?{_BLOCKS}(?:\s|/?>|$)", "^$"), (_TAG, "^$"),
    )
)  # fmt: skip
_MOST_INDENT = 3  # with one more it is code


@dataclass(frozen=True, slots=True)
class Marked:
    """A text's lines, with their ends; ours are `lines[begin + 1 : end]`, between the markers. None: there are none."""

    lines: tuple[str, ...]
    begin: int | None
    end: int | None

    def inside(self) -> tuple[str, ...]:
        """Our lines as they are."""
        return () if self.begin is None else self.lines[self.begin + 1 : self.end]

    def replaced(self, content: Sequence[str], newline: str) -> str:
        """The text with `content` between its markers; markers and content come last where there are none."""
        written = [line + newline for line in content]
        if self.begin is not None and self.end is not None:
            return "".join([*self.lines[: self.begin + 1], *written, *self.lines[self.end :]])
        before = "".join(self.lines)
        if before and before[-1] not in _ENDINGS:
            before += newline
        blank = newline if self.lines and self.lines[-1].strip() else ""
        return "".join([before, blank, BEGIN + newline, *written, END + newline])


def find(text: str, line: int = 1) -> Marked:
    """Where our part is; `line` is the number of the text's first line.

    CardError for markers that are not one pair, and for a text after which nothing can stand: one that ends in code.
    """
    lines = tuple(_LINE.findall(text))
    shown, unclosed = _code(lines)
    places = {
        marker: [number for number, text in enumerate(lines) if text.strip() == marker and number not in shown]
        for marker in (BEGIN, END)
    }
    begins, ends = places[BEGIN], places[END]
    if not begins and not ends:
        if unclosed is not None:
            raise CardError(
                f"README.md, line {line + unclosed}: the code that begins here never ends, so nothing can follow it",
                "Close it with a line like the one that opens it, then run it again.",
            )
        return Marked(lines, None, None)
    if len(begins) == len(ends) == 1 and begins[0] < ends[0]:
        return Marked(lines, begins[0], ends[0])
    found = sorted((number, marker) for marker, numbers in places.items() for number in numbers)
    told = ", ".join(f"{marker} in line {line + number}" for number, marker in found)
    open_code = f"; the code that begins in line {line + unclosed} never ends" if unclosed is not None else ""
    raise CardError(
        f"README.md: not one pair of markers, but {told}{open_code}",
        f"Leave one line {BEGIN} and after it one {END}, or none of both.",
    )


def newline(text: str) -> str:
    """How most of the text's lines end."""
    ends = _LINE_ENDS.findall(text)
    return max(dict.fromkeys(ends), key=ends.count, default="\n")


def line_ends(text: str) -> int:
    """How many of the text's lines end."""
    return len(_LINE_ENDS.findall(text))


class _Reader:
    """Goes through Markdown line by line and knows whether it is in code, fenced or indented, or in HTML."""

    def __init__(self) -> None:
        self._lists: list[int] = []  # where the contents of the open lists' items begin
        self.home = 0  # and of the innermost
        self._until: re.Pattern[str] | None = None
        self._text = False  # a paragraph that the line may go on with, however it is indented
        self.fenced = False

    def reads(self, line: str) -> bool:
        """Whether the line is code, or a fence."""
        text = line.rstrip(_ENDINGS).expandtabs(4)
        rest = text.strip(" ")
        column = len(text.rstrip(" ")) - len(rest)
        if self._until is not None and rest and column < self.home:  # the list's item ends, and what is in it
            self._until, self.fenced = None, False
        if self._until is not None:
            return self._goes_on(self._until, rest, column)
        if not rest:
            self._text = False
            return False
        inside = [home for home in self._lists if home <= column]
        self.home = inside[-1] if inside else 0
        if self._text and not self._interrupts(rest, column, left=inside != self._lists):
            return False
        self._lists = inside
        return self._begins(rest, column)

    def _goes_on(self, until: re.Pattern[str], rest: str, column: int) -> bool:
        fenced = self.fenced
        near = column - self.home <= _MOST_INDENT
        if (near and until.fullmatch(rest)) if fenced else until.search(rest):
            self._until, self.fenced = None, False
        return fenced

    def _interrupts(self, rest: str, column: int, *, left: bool) -> bool:
        """Whether the line begins something of its own behind a paragraph; `left`: one that a list's item ends with."""
        item = _ITEM.match(rest)
        listed = item is not None and (left or item["number"] in (None, "1"))
        return column - self.home <= _MOST_INDENT and (
            listed or rest.startswith(">") or _is_special(rest, len(_HTML) - 1)
        )

    def _begins(self, rest: str, column: int) -> bool:
        self._text = False
        while column - self.home <= _MOST_INDENT and (item := _ITEM.match(rest)) and not _RULE.fullmatch(rest):
            self.home = column + len(item[0])
            self._lists.append(self.home)
            inside = rest[len(item[0]) :].lstrip(" ")
            rest, column = inside, column + len(rest) - len(inside)
        if column - self.home > _MOST_INDENT:
            return True
        if fence := _FENCE.fullmatch(rest):
            run = fence["fence"] or fence["tildes"]
            self._until, self.fenced = re.compile(f"{run[0]}{{{len(run)},}}"), True
            return True
        for opens, closes in _HTML:
            if match := opens.match(rest):
                self._until = None if closes.search(rest, match.end()) and closes.pattern != "^$" else closes
                return False
        quoted = rest.lstrip("> ")
        self._text = bool(quoted) and not _is_special(quoted)
        return False


def _is_special(rest: str, kinds: int = len(_HTML)) -> bool:
    """Whether the line is a fence, a rule, a heading, or begins HTML of the first so many kinds."""
    marks = any(kind.fullmatch(rest) for kind in (_FENCE, _RULE, _HEADING))
    return marks or any(opens.match(rest) for opens, _ in _HTML[:kinds])


def _code(lines: Sequence[str]) -> tuple[frozenset[int], int | None]:
    """The numbers of the lines that are code, and of the one that begins code which whatever follows would be in."""
    reader, shown, begun = _Reader(), set(), None
    for number, line in enumerate(lines):
        was = reader.fenced
        if reader.reads(line):
            shown.add(number)
        if reader.fenced and not was:
            begun = number
    return frozenset(shown), begun if reader.fenced and reader.home == 0 else None
