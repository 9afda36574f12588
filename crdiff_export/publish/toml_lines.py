"""On which line of a TOML text each of its keys stands, which `tomllib` does not tell, and what is wrong there."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from crdiff_export.errors import CrdiffError
from crdiff_export.formats.text import printable

KeyPath = tuple[str | int, ...]

# A dotted key may have thousands of parts, and every beginning of it would be a path.
MAX_DEPTH: Final = 16
_TOKEN: Final = re.compile(
    r"""
    (?P<text> \"{3} (?: [^"\\]++ | \\. | "{1,2}(?!") )*+ "{3,5}
            | '{3} (?: [^']++ | '{1,2}(?!') )*+ '{3,5}
            | " (?: [^"\\\n]++ | \\. )*+ "
            | ' [^'\n]*+ ' )
    | (?P<break> \n )
    | (?P<nothing> [ \t\r]++ | \#[^\n]*+ )
    | (?P<mark> [\[\]{}=,.] )
    | (?P<word> [^\[\]{}=,.\s\#"']++ )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)


def lines(text: str) -> Mapping[KeyPath, int]:
    """The lines, from 1 on, that the keys, tables and elements of a text that `tomllib` accepts begin on.

    `("base", 0)` is the first table of an array or the first element, `("base", 0, "sizes")` a key in it. What is
    spelt in several places, such as the `a` of `[a.b]` and `[a.c]`, is on the first of their lines. Paths of more than
    MAX_DEPTH parts are left out.
    """
    scan, line = _Scan(), 1
    for token in _TOKEN.finditer(text):
        if token.lastgroup != "nothing":
            scan.take(token[0], line, quoted=token.lastgroup == "text")
        line += token[0].count("\n")
    return scan.found


@dataclass(slots=True)
class _Open:
    """An array or an inline table that has not ended; in an array, `index` is the element's that is being read."""

    path: KeyPath
    index: int | None


@dataclass(slots=True)
class _Scan:
    """What is known at some place in the text.

    `table` is the path of the last header, `value` that of the last key; `header` counts the brackets of a header that
    is being read.
    """

    found: dict[KeyPath, int] = field(default_factory=dict)
    arrays: dict[KeyPath, int] = field(default_factory=dict)
    table: KeyPath = ()
    value: KeyPath = ()
    key: list[str] = field(default_factory=list)
    header: int = 0
    in_value: bool = False
    stack: list[_Open] = field(default_factory=list)

    def take(self, token: str, line: int, *, quoted: bool) -> None:
        """Go one token further."""
        mark = "" if quoted else token
        if self.in_value:
            self._in_value(mark, line)
        elif quoted or mark not in ("[", "]", "{", "}", "=", ",", ".", "\n"):
            self.key.append(_unquoted(token) if quoted else token)
        elif mark == "[":
            self.header += 1
        elif mark == "]" and self.header:
            self._end_of_header(line)
        elif mark == "=":
            self.value = self.stack[-1].path if self.stack else self.table
            for part in self.key:
                self._found(part, line)
            self.key.clear()
            self.in_value = True
        elif mark == "}":  # after a key's value that is handled in `_in_value`: the table is empty
            self._end_of_container()

    def _in_value(self, mark: str, line: int) -> None:
        last = self.stack[-1] if self.stack else None
        if mark == "\n":
            self.in_value = last is not None
        elif mark == ",":
            if last is None or last.index is None:
                self.in_value = False
            else:
                last.index += 1
        elif mark in ("]", "}"):
            self._end_of_container()
        else:
            if last is not None and last.index is not None:
                self.value = last.path
                self._found(last.index, line)
            if mark in ("[", "{"):
                self.stack.append(_Open(self.value, 0 if mark == "[" else None))
                self.in_value = mark == "["

    def _end_of_container(self) -> None:
        if self.stack:
            self.stack.pop()
            self.in_value = True  # after it comes what comes after any value

    def _end_of_header(self, line: int) -> None:
        self.value = ()
        for number, part in enumerate(self.key, 1):
            self._found(part, line)
            if self.header == 2 and number == len(self.key):
                self.arrays[self.value] = self.arrays.get(self.value, -1) + 1
            if self.value in self.arrays:
                self._found(self.arrays[self.value], line)
        self.table = self.value
        self.key.clear()
        self.header = 0

    def _found(self, part: str | int, line: int) -> None:
        """Go down to a part of the value's path; one too deep stays where it is, and so does what is in it."""
        if len(self.value) < MAX_DEPTH:
            self.value = (*self.value, part)
            self.found.setdefault(self.value, line)


def _unquoted(key: str) -> str:
    if "\\" not in key:
        return key[1:-1]
    try:
        return str(tomllib.loads(f"key = {key}")["key"])
    except tomllib.TOMLDecodeError:
        return key


@dataclass(slots=True)
class Problems:
    """What is wrong in the file `name`, in which every key has its line; nothing is in it twice.

    What has the same `kind` at the same place is one problem, and so is what reads the same.
    """

    name: str
    lines: Mapping[KeyPath, int]
    found: dict[object, tuple[int, CrdiffError]] = field(default_factory=dict)

    def line(self, place: KeyPath) -> int:
        """The line of a key, or of the nearest thing around it that has one; 0 for the file."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 0)

    def add(self, at: KeyPath | int, problem: str, hint: str, kind: str | None = None) -> None:
        """Keep a problem at a key, or on a line."""
        line = at if isinstance(at, int) else self.line(at)
        message = printable(f"{self.name}:{line}: {problem}" if line else f"{self.name}: {problem}", 400)
        self.found.setdefault((at, kind) if kind else message, (line, CrdiffError(message, printable(hint, 400))))

    @contextmanager
    def catching(self, at: KeyPath, what: str = "") -> Iterator[None]:
        """Keep what is raised as a problem at a key; `what` goes before it."""
        try:
            yield
        except CrdiffError as error:
            self.add(at, what + error.message.removeprefix(": "), error.hint)

    def in_order(self) -> list[CrdiffError]:
        """All of them, by line."""
        return [error for _, error in sorted(self.found.values(), key=lambda found: found[0])]
