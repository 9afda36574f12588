"""Tables and facts as lines of text: columns where they fit into the width, else a record of lines for each row."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.cells import cell_len

from crdiff_export.cli.blocks import Table

GAP = "  "
# Ours: a word of at most so many letters is never shortened, and a longer one keeps at least so many.
SHORT_WORD, FEWEST = 6, 3
# Ours: texts are wrapped down to this many letters; where a table has less room, its rows become records.
NARROWEST = 16


def table_lines(table: Table, width: int | None = None) -> tuple[str | None, list[str]]:
    """Format a table: the names of its columns, a rule if there is a width, and its rows.

    In a width that is too small the last column is wrapped at words, unless it is numeric, and the names in the
    `name_column` are shortened. No other cell is cut. If that is not enough, the optional columns are left out and
    named below, and if that is not enough, each row becomes a record.

    Args:
        table: The table.
        width: Columns of the terminal; None for as many as it takes.

    Returns:
        The line with the names of the columns, None above records; and all lines below it.
    """
    if width is None:
        header, *rows = _grid(table, _natural(table))
        return header, rows
    for number in range(len(table.optional) + 1):
        left_out = table.optional[:number]
        columns = [column for column in table.columns if column not in left_out]
        smaller = _with_columns(table, columns)
        if widths := _fitting(smaller, width):
            header, *rows = _grid(smaller, widths)
            rule = "─" * (sum(widths) + len(GAP) * (len(widths) - 1))
            present = [name for name in left_out if name in table.columns]
            note = [f"(no room for: {', '.join(present)})"] if present else []
            return header, [rule, *rows, *note]
    return None, list(_records(table, width))


def fact_lines(pairs: Mapping[str, str] | Iterable[tuple[str, str]], width: int | None = None) -> Iterator[str]:
    """Format facts, one a line; the texts begin below each other, and are wrapped at words if there is a width.

    Args:
        pairs: Names and texts.
        width: Columns of the terminal; None for as many as it takes.

    Yields:
        The lines.
    """
    facts = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
    indent = max((cell_len(name) for name, _ in facts), default=0) + len(":" + " ")
    for name, text in facts:
        first, *rest = _wrapped(text, None if width is None else max(width - indent, NARROWEST))
        yield f"{name + ':':<{indent}}{first}".rstrip()
        yield from (" " * indent + line for line in rest)


def _with_columns(table: Table, columns: Sequence[str]) -> Table:
    numbers = [number for number, column in enumerate(table.columns) if column in columns]
    rows = [[row[number] for number in numbers] for row in table.rows]
    return Table(columns, rows, table.numeric, name_column=table.name_column)


def _natural(table: Table) -> list[int]:
    cells = zip(table.columns, *table.rows, strict=True)
    return [max(cell_len(text) for text in column) for column in cells]


def _fitting(table: Table, width: int) -> list[int] | None:
    """Return the width of each column, shortened or wrapped if need be; None if the table does not fit."""
    *others, last = _natural(table)
    if table.name_column in table.columns[:-1]:
        number = table.columns.index(table.name_column)
        excess = sum(others) + last + len(GAP) * len(others) - width
        shortest = max(map(cell_len, (table.name_column, *shorten([row[number] for row in table.rows], 0))))
        others[number] = max(others[number] - max(excess, 0), shortest)
    room = width - sum(others) - len(GAP) * len(others)
    if last > room and table.columns[-1] not in table.numeric:
        texts = (table.columns[-1], *(row[-1] for row in table.rows))
        longest = max((cell_len(word) for text in texts for word in text.split()), default=0)
        last = max(room if room >= NARROWEST else last, longest)
    return [*others, last] if last <= room else None


def _grid(table: Table, widths: Sequence[int]) -> Iterator[str]:
    columns = [
        shorten(texts, width) if name == table.name_column else texts
        for name, width, *texts in zip(table.columns, widths, *table.rows, strict=True)
    ]
    for row in (table.columns, *zip(*columns, strict=True)):
        *cells, last = (
            _aligned(text, width, right=column in table.numeric)
            for column, text, width in zip(table.columns, row, widths, strict=True)
        )
        first, *rest = _wrapped(last, widths[-1])
        yield GAP.join([*cells, first]).rstrip()
        indent = " " * (sum(widths[:-1]) + len(GAP) * len(cells))
        yield from (indent + line for line in rest)


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Shorten long words of names, as in `dow….1` for `down_blocks.1`; a word is shortened alike in all names.

    Args:
        names: Names, such as those of tensors.
        width: The columns that each may take.

    Returns:
        The names with all their numbers and short words, and with as much of the long words as there is room for.
    """
    shorter = list(names)
    for letters in range(max(map(len, names), default=0), FEWEST - 1, -1):
        if max(map(cell_len, shorter), default=0) <= width:
            break
        long_word = rf"([^\W\d]{{{letters}}})[^\W\d]{{{max(SHORT_WORD + 1 - letters, 1)},}}"
        shorter = [re.sub(long_word, r"\1…", name) for name in names]
    return shorter


def share_bar(share: float, width: int = 10) -> str:
    """Draw a share as a bar of block characters.

    Args:
        share: From 0 to 1.
        width: The columns of a full bar.

    Returns:
        The bar; it is empty for 0 alone.
    """
    full, eighths = divmod(max(round(share * width * 8), int(share > 0)), 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[eighths].strip()


def _aligned(text: str, width: int, *, right: bool) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _records(table: Table, width: int) -> Iterator[str]:
    first = ""
    for number, row in enumerate(table.rows):
        if number:
            yield ""
        first = row[0] or first
        cells = zip(table.columns, (first, *row[1:]), strict=True)
        yield from fact_lines([cell for cell in cells if cell[1]], width)


def _wrapped(text: str, width: int | None) -> list[str]:
    """Wrap a text at spaces, by the cells of a terminal; a longer word has a line of its own."""
    if width is None or cell_len(text) <= width:
        return [text]
    glue = "\N{NO-BREAK SPACE}%"  # a number stays with its sign
    lines: list[str] = []
    for word in text.replace(" %", glue).split():
        if lines and cell_len(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [line.replace(glue, " %") for line in lines] or [""]
