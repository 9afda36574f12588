"""Tables and facts at every width: what they say is never cut, least of all a verdict."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from crdiff_export.cli import text_table
from crdiff_export.cli.blocks import Table
from crdiff_export.cli.output import Output, Result
from crdiff_export.cli.text_table import NARROWEST, fact_lines
from crdiff_export.evaluate import report_text as evaluation
from crdiff_export.publish import report
from crdiff_export.verify.inspect import GROUP_COLUMNS
from tests.support.isolation import Crdiff


def table_lines(table: Table, width: int | None = None) -> list[str]:
    header, lines = text_table.table_lines(table, width)
    return lines if header is None else [header, *lines]


WIDTHS = (60, 80, 100, 200)
VERDICT = "no difference shown"
MODELS = (
    ("128x96 (native)", "dense", "4.21", "0.960", "0.948 to 0.972", "96 %", "12.31", "", "", ""),
    ("", "pruned", "4.2", "0.951", "0.938 to 0.962", "94 %", "12.40", "-0.009", "-0.020 to +0.002", VERDICT),
    ("", "POA 1.5", "8.4", "0.953", "0.938 to 0.962", "94 %", "12.50", "-0.007", "-0.020 to +0.002", "better"),
)
GROUPS = [(name, "0.3", "1,234,567,890", "2,345,678,901", "0.3001", "0.0250092") for name in ("down", "mid", "up")]
WHY = "the base needs 12.4 GB of disk, of which 3.1 GB are free"
TABLES = {
    "evaluate": Table(evaluation.COLUMNS, MODELS, evaluation.NUMERIC, evaluation.OPTIONAL),
    "export": Table(GROUP_COLUMNS, GROUPS, GROUP_COLUMNS[1:]),
    "publish, planned": Table(
        report.PLANNED,
        [("sdxl.safetensors", "1024x1024", "starting-point", "my-org/my-repository", "make and push", WHY)],
        optional=["ratios"],
    ),
    "publish": Table(
        report.DONE,
        [("sdxl.safetensors", "1024x1024", "failed", "6.94 GB", "0123456789", "my-org/my-repository/sdxl.safetensors")],
        optional=["bytes", "commit"],
    ),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_only_optional_columns_are_left_out(name: str, width: int) -> None:
    """They are named then; no line is wider than the terminal."""
    check_width(TABLES[name], width)


# A command of every kind that shows a table, besides those above.
COMMANDS = (
    "families list", "recipes list", "recipes show demo", "recipes show sdxl", "docs", "export demo --res 48 --dry-run",
    "export demo --res 48 -o demo-48.safetensors", "inspect demo", "inspect demo --layers", "diff demo {other}",
    "pack create demo --res 48 --res 128x64 --criterion random", "pack create demo --res 48 --dry-run",
    "diff demo {other} --all",
)  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS)
def test_the_tables_of_commands_fit_every_terminal(
    words: str, crdiff: Crdiff, baked: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: list[Table] = []

    def show(_: Output, result: Result) -> None:
        tables.extend(block for block in result.text if isinstance(block, Table))

    monkeypatch.setattr(Output, "show", show)
    assert crdiff(*words.format(other=baked).split()).code == 0
    assert tables
    for table in tables:
        for width in WIDTHS:
            check_width(table, width)


def check_width(table: Table, width: int) -> None:
    """Check that a table loses nothing but its optional columns, and is no wider than it may be."""
    lines = table_lines(table, width)
    left_out = [name for name in table.optional if name in lines[-1]] if "no room" in lines[-1] else []
    words = " ".join(lines).split()
    for number, column in enumerate(table.columns):
        texts = [row[number] for row in table.rows]
        if column == table.name_column:
            texts = shortened_to_fit(texts, lines)
        cells = {word for text in texts for word in text.split()}
        assert (cells <= set(words)) or column in left_out, column
    assert max(map(len, lines)) <= width
    assert width < 200 or not left_out


def shortened_to_fit(names: list[str], lines: list[str]) -> list[str]:
    """The names as they stand in a table, or else all of them: shorter ones, with the same numbers and order."""
    words = iter(word for line in lines for word in line.split() if "." in word)
    shown = {re.sub(r"[^\W\d]{3,}…|[^\W\d]{7,}", "*", word): word for word in words}
    return [shown.get(re.sub(r"[^\W\d]{7,}", "*", name), name) for name in names]


def test_the_verdict_is_in_the_table_at_80_columns() -> None:
    table = Table(*_without_fid(), evaluation.NUMERIC, evaluation.OPTIONAL)
    lines = table_lines(table, 80)
    assert lines[0].split()[-2:] == ["which", "shows"]
    assert any(line.split()[:2] == ["POA", "1.5"] and line.endswith("better") for line in lines)
    assert lines[-1] == "(no room for: s/picture, score's 95 %, right)"


def _without_fid() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    place = evaluation.COLUMNS.index("FID")
    rows = [(*row[:place], *row[place + 1 :]) for row in (evaluation.COLUMNS, *MODELS)]
    return rows[0], rows[1:]


def test_records_name_the_size_of_every_row() -> None:
    lines = table_lines(TABLES["evaluate"], 60)
    assert sum(line.split() == ["size:", "128x96", "(native)"] for line in lines) == 3
    assert any(line.split() == ["which", "shows:", *VERDICT.split()] for line in lines)


def test_in_a_pipe_columns_are_as_wide_as_they_need() -> None:
    header, first, *rest = table_lines(TABLES["evaluate"])
    assert header.split()[0] == "size"
    assert first.startswith("128x96 (native)  dense         4.21  0.960  0.948 to 0.972")
    assert len(rest) == 2


def test_wide_letters_take_two_columns() -> None:
    table = Table(["size", "why"], [["64x64", "寸法 " * 30]])
    assert max(map(cell_len, table_lines(table, 60))) <= 60


@pytest.mark.parametrize("width", [None, 10, 80])
def test_a_table_without_rows(width: int | None) -> None:
    assert table_lines(Table(["alias", "a title that is long"], []), width) is not None


WORDS = st.text("abcdefghij", min_size=1, max_size=12)
CELLS = st.lists(WORDS, min_size=1, max_size=6).map(" ".join)


@given(st.data(), st.integers(20, 120))
def test_any_table_keeps_its_words(data: st.DataObject, width: int) -> None:
    count = data.draw(st.integers(1, 6))
    columns = data.draw(st.lists(WORDS, min_size=count, max_size=count, unique=True))
    rows = data.draw(st.lists(st.lists(CELLS, min_size=count, max_size=count), min_size=1, max_size=4))
    lines = table_lines(Table(columns, rows, tuple(data.draw(st.sets(st.sampled_from(columns))))), width)
    text = {word for line in lines for word in line.replace(":", " ").split()}
    assert {word for row in rows for cell in row for word in cell.split()} <= text
    assert max(map(len, lines)) <= max(width, max(map(len, columns)) + len(": ") + NARROWEST)


NAMES = [
    "down_blocks.1.attentions.0.transformer_blocks.3.attn1.to_out.0",
    "up_blocks.1.attentions.0.transformer_blocks.13.attn1.to_q",
    "double_blocks.12.img_attn.qkv[3072:6144]",
]


@pytest.mark.parametrize("width", [0, 20, 31, 40, 50, 61, 62, 100])
def test_a_name_keeps_its_numbers_and_short_words(width: int) -> None:
    shorter = text_table.shorten(NAMES, width)
    for name, short in zip(NAMES, shorter, strict=True):
        assert re.findall(r"\d+", name) == re.findall(r"\d+", short)
        assert re.findall(r"\b[a-z]{1,6}\b", name) == re.findall(r"\b[a-z]{1,6}\b(?!…)", short)
        assert re.fullmatch(re.escape(short).replace("…", r"\w+"), name)
    assert max(map(len, shorter)) <= max(width, len("dow….1.att….0.tra….3.attn1.to_out.0"))
    assert (shorter == NAMES) == (width >= max(map(len, NAMES)))


def test_a_word_is_shortened_alike_in_all_names() -> None:
    shorter = text_table.shorten(NAMES[:2], 45)
    assert len({re.findall(r"\bt\w+…", name)[0] for name in shorter}) == 1


@given(st.lists(st.text("ab_.0[", max_size=30), max_size=4), st.integers(0, 40))
def test_any_names_are_no_longer_than_before(names: list[str], width: int) -> None:
    shorter = text_table.shorten(names, width)
    assert all(len(short) <= len(name) for short, name in zip(shorter, names, strict=True))
    assert shorter == names or max(map(len, names)) > width


@pytest.mark.parametrize(
    ("share", "bar"),
    [(0, ""), (1e-9, "▏"), (0.3, "███"), (0.5, "█████"), (0.7583, "███████▋"), (0.9999, "██████████"), (1, "█" * 10)],
)
def test_a_bar_has_eighths_of_a_column(share: float, bar: str) -> None:
    assert text_table.share_bar(share) == bar


@given(st.floats(0, 1), st.integers(1, 40))
def test_a_bar_is_as_long_as_its_share(share: float, width: int) -> None:
    bar = text_table.share_bar(share, width)
    eighths = sum(8 - "█▉▊▋▌▍▎▏".index(block) for block in bar)
    assert abs(eighths - share * width * 8) <= 1
    assert len(bar) <= width
    assert bool(bar) == (share > 0)


@pytest.mark.parametrize("width", WIDTHS)
def test_facts_are_wrapped_at_words(width: int) -> None:
    """The lines below begin where the text does; a word that is too long, such as a path, is not cut."""
    text = " ".join(["one of many words"] * 20)
    *lines, last = fact_lines({"ratios": text, "base": "x" * 300}, width)
    assert " ".join(" ".join(lines).split()) == f"ratios: {text}"
    assert all(line.startswith(" " * len("ratios: ")) for line in lines[1:])
    assert max(map(len, lines)) <= width
    assert last == f"base:   {'x' * 300}"
