"""Find the line of each key in a TOML text, which `tomllib` does not tell, and collect problems by line.

No library that we know gives lines for TOML without a second parser (tomlkit keeps none).
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from crdiff_export.errors import CrdiffError
from crdiff_export.formats.text import printable

# `("base", 0, "sizes")` is the key `sizes` in the first [[base]].
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
    """Find the lines, from 1 on, on which the keys, tables and array elements of a TOML text begin.

    What is spelt in several places, such as the `a` of `[a.b]` and `[a.c]`, is on the first of their lines. Paths of
    more than MAX_DEPTH parts are left out. `tomllib` must accept the text.
    """
    scanner = _Scanner(text)
    scanner.read_document()
    return scanner.lines


class _Scanner:
    """Reads a text that is known to be TOML, token by token."""

    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._tokens = [*_tokens(text)]
        self._next = 0

    def read_document(self) -> None:
        table: KeyPath = ()
        counts: dict[KeyPath, int] = {}
        while not self._at(""):
            if self._skip("\n"):
                continue
            if self._at("["):
                table = self._read_header(counts)
            else:
                self._read_pair(table)

    def _read_header(self, counts: dict[KeyPath, int]) -> KeyPath:
        """Read `[a.b]` or `[[a.b]]`, of which `counts` has the last index so far; return the path."""
        brackets = self._skip("[")
        parts, line = self._read_key()
        self._skip("]")
        path: KeyPath = ()
        for number, part in enumerate(parts, 1):
            path = self._add(path, part, line)
            if brackets == 2 and number == len(parts):
                counts[path] = counts.get(path, -1) + 1
            if path in counts:
                path = self._add(path, counts[path], line)
        return path

    def _read_pair(self, path: KeyPath) -> None:
        parts, line = self._read_key()
        self._skip("=")
        for part in parts:
            path = self._add(path, part, line)
        self._read_value(path)

    def _read_key(self) -> tuple[list[str], int]:
        parts, line = [], self._line()
        while not self._at("=", "]"):
            if not self._skip("."):
                parts.append(_unquoted(self._take()))
        return parts, line

    def _read_value(self, path: KeyPath) -> None:
        opening = self._take()
        if opening not in ("[", "{"):
            while not self._at(",", "]", "}", "\n", ""):  # numbers and dates have several tokens
                self._take()
            return
        index = 0
        while True:
            self._skip("\n", ",")
            if self._at("]", "}"):
                self._take()
                return
            if opening == "{":
                self._read_pair(path)
            else:
                self._read_value(self._add(path, index, self._line()))
                index += 1

    def _add(self, path: KeyPath, part: str | int, line: int) -> KeyPath:
        if len(path) >= MAX_DEPTH:
            return path
        path = (*path, part)
        self.lines.setdefault(path, line)
        return path

    def _line(self) -> int:
        return self._tokens[self._next][1]

    def _take(self) -> str:
        self._next += 1
        return self._tokens[self._next - 1][0]

    def _at(self, *marks: str) -> bool:
        """Whether the next token is one of these marks; "" is the end, and a quoted text begins with its quote."""
        return self._tokens[self._next][0] in marks

    def _skip(self, *marks: str) -> int:
        start = self._next
        while self._at(*marks):
            self._next += 1
        return self._next - start


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    """Yield each token and its line, and at last an empty one."""
    line = 1
    for match in _TOKEN.finditer(text):
        if match.lastgroup != "nothing":
            yield match[0], line
        line += match[0].count("\n")
    yield "", line


def _unquoted(key: str) -> str:
    return str(tomllib.loads(f"key = {key}")["key"]) if key.startswith(("'", '"')) else key


@dataclass(slots=True)
class Problems:
    """The problems of the file `name`, each once.

    Problems of the same `kind` at the same key are one problem, and so are problems with the same message.
    """

    name: str
    lines: Mapping[KeyPath, int]
    problems: dict[object, tuple[int, CrdiffError]] = field(default_factory=dict)

    def line(self, path: KeyPath) -> int:
        """Return the line of a key, or of the nearest table around it that has one; 0 for the file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 0)

    def add(self, at: KeyPath | int, problem: str, hint: str, kind: str | None = None) -> None:
        """Add a problem at a key, or on a line."""
        line = at if isinstance(at, int) else self.line(at)
        message = printable(f"{self.name}:{line}: {problem}" if line else f"{self.name}: {problem}", 400)
        self.problems.setdefault((at, kind) if kind else message, (line, CrdiffError(message, printable(hint, 400))))

    @contextmanager
    def catching(self, at: KeyPath, prefix: str = "") -> Iterator[None]:
        """Add a CrdiffError that is raised in this block as a problem at a key."""
        try:
            yield
        except CrdiffError as error:
            self.add(at, prefix + error.message.removeprefix(": "), error.hint)

    def in_order(self) -> list[CrdiffError]:
        """Return all problems by line."""
        return [error for _, error in sorted(self.problems.values(), key=lambda problem: problem[0])]
