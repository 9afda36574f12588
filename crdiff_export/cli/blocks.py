"""The parts of a result as people see it: lines, facts and tables."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """Named texts, shown one a line; the texts begin below each other."""

    pairs: Mapping[str, str] | Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows of texts. Only the last column may be wrapped on a narrow terminal, unless it is numeric."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[str] = ()


Block = str | Facts | Table
