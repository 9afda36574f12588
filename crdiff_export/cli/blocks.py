"""The parts of a result as people see it: lines, facts and tables."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """Named texts, shown one a line; the texts begin below each other."""

    pairs: Mapping[str, str] | Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows of texts. On a narrow terminal the last column is wrapped, unless it is numeric; see `text_table.py`.

    Attributes:
        columns: The names of the columns.
        rows: The cells, as text; where the first one is empty, it is that of the row before.
        numeric: Columns that are aligned to the right.
        optional: Columns that may be left out where there is no room, the first ones first.
        name_column: A column of names whose words may be cut where there is no room; the numbers in them stay.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[str] = ()
    optional: Sequence[str] = ()
    name_column: str = ""


Block = str | Facts | Table
