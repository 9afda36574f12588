"""The line of every key of a TOML text, against texts that say it; and how problems are kept."""

import re
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdiff_export.errors import CrdiffError
from crdiff_export.publish.toml_lines import MAX_DEPTH, KeyPath, Problems, lines


def found(text: str) -> dict[KeyPath, int]:
    tomllib.loads(text)
    return dict(lines(text))


def numbered(*rows: tuple[str, *tuple[KeyPath, ...]]) -> tuple[str, dict[KeyPath, int]]:
    """A text of these lines, and the line of each of the paths that are named behind them."""
    text = "\n".join(row[0] for row in rows)
    return text, {path: number for number, row in enumerate(rows, 1) for path in row[1:]}


EXAMPLES = {
    "comments": numbered(("# a = 1 ' \"\"\"",), ("",), ("a = 1 # b = 2", ("a",)), ("  \t b=2", ("b",))),
    "dotted": numbered(
        ("a.b . 'c.d' = 1", ("a",), ("a", "b"), ("a", "b", "c.d")),
        ('a."\\u0065\\"" = 2', ("a", 'e"')),
        ('"" = 3', ("",)),
        ("3.1 = 4", ("3",), ("3", "1")),
    ),
    "tables": numbered(
        ("[a]", ("a",)),
        ("x = 1", ("a", "x")),
        ("[ a . 'b]' ] # ]", ("a", "b]")),
        ("x = 1", ("a", "b]", "x")),
        ("[c.d]", ("c",), ("c", "d")),
        ("[c]",),
        ("x = 1", ("c", "x")),
    ),
    "arrays of tables": numbered(
        ("[[base]]", ("base",), ("base", 0)),
        ("sizes = [", ("base", 0, "sizes")),
        ("  '[x]', # , ]", ("base", 0, "sizes", 0)),
        ("  '''",  ("base", 0, "sizes", 1)),
        ("[y]",),
        ("z = 1''',",),
        ("]",),
        ("[[base.variant]]", ("base", 0, "variant"), ("base", 0, "variant", 0)),
        ("[base.variant.ratios]", ("base", 0, "variant", 0, "ratios")),
        ("up = 1.5", ("base", 0, "variant", 0, "ratios", "up")),
        ("[[base.variant]]", ("base", 0, "variant", 1)),
        ("ratios = {} # up = 1", ("base", 0, "variant", 1, "ratios")),
        ("[[base]]", ("base", 1)),
        ("[[base.variant]]", ("base", 1, "variant"), ("base", 1, "variant", 0)),
    ),
    "inline": numbered(
        ("a = [{}, { b = [", ("a",), ("a", 0), ("a", 1), ("a", 1, "b")),
        ("  [], [1,", ("a", 1, "b", 0), ("a", 1, "b", 1), ("a", 1, "b", 1, 0)),
        ("  2]], c.d = 1979-05-27 07:32:00 }, -1.5,", ("a", 1, "b", 1, 1), ("a", 1, "c"), ("a", 1, "c", "d"), ("a", 2)),
        ("inf]", ("a", 3)),
        ("f = 1", ("f",)),
    ),
    "texts": numbered(
        ('a = """', ("a",)),
        ("[a]",),
        ('b = 1 \\""" """""',),
        ('c = "#\\"[c]" # "', ("c",)),
        ("d = ''''a' = 1''''", ("d",)),
        ("e = '\\'", ("e",)),
        ('f = """\\\\""" # """', ("f",)),
        ('g = """"" """', ("g",)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), EXAMPLES.values(), ids=EXAMPLES)
def test_each_key_has_its_line(text: str, expected: dict[KeyPath, int]) -> None:
    assert found(text) == expected
    assert found(text.replace("\n", "\r\n")) == expected


def test_what_is_too_deep_is_left_out() -> None:
    deep = ".".join("abcdefghijklmnopqrstuvwxyz")
    (*_, last) = found(f"{deep} = 1\n")
    assert last == tuple("abcdefghijklmnopqrstuvwxyz"[:MAX_DEPTH])
    assert found(f"[{deep}]\nx = [1]\n[[{deep}1]]\ny = 1\n[z]\n")["z",] == 5
    assert len(found(f"a = {'[' * 60}1{']' * 60}\nb = 1")) == MAX_DEPTH + 1


# --- texts whose keys and numbers say on which line they are ---

# Ways to spell a key. `@` is replaced by the number of the line, `{}` by what makes keys of a line differ.
SPELLINGS = ["k@_{}", "'k@_{} . [#'", '"\\u0065@_{} \\"]=\\n"', "k@_{} . 'x@'", "\"k@_{}\".x@.'@ y'"]
# Values of several tokens, and texts that look like something else.
OTHERS = [
    "-1.5e3", "1979-05-27 07:32:00", "inf", "true", "'] # ='", "'\\'", '"#\\"] \\\\"', "'''\n[[t]]\nk = 1, ]'''",
    '"""a"""""', '"""\\""" ]\n[a]\n"" \\\\"""', '""""a"" \\\n """""',
]  # fmt: skip
GAPS = st.sampled_from(["", "", " ", "\t "])
BREAKS = st.sampled_from(["", " ", "\n", ' # ] } \' """ [a]\n\n  ', "\r\n"])
ENDS = st.sampled_from(["\n", "\r\n", " # [[a]]\n", "\n\n#\n"])


@st.composite
def pairs(draw: st.DrawFn, depth: int = 0) -> list[str]:
    keys = [draw(st.sampled_from(SPELLINGS)).format(number) for number in range(draw(st.integers(0, 3)))]
    return [draw(GAPS) + key + draw(GAPS) + "=" + draw(GAPS) + draw(values(depth)) + draw(GAPS) for key in keys]


@st.composite
def values(draw: st.DrawFn, depth: int) -> str:
    kind = draw(st.sampled_from(["line", "other", "array", "table"][: 2 if depth == 3 else 4]))
    if kind == "array":
        items = [draw(BREAKS) + draw(values(depth + 1)) + draw(BREAKS) for _ in range(draw(st.integers(0, 3)))]
        return f"[{','.join(items)}{',' if draw(st.booleans()) and items else ''}{draw(BREAKS)}]"
    if kind == "table":
        return f"{{{','.join(draw(pairs(depth + 1)))}}}"
    return "@" if kind == "line" else draw(st.sampled_from(OTHERS))


@st.composite
def documents(draw: st.DrawFn) -> str:
    """A document with tables and arrays of tables; the line below a header has a key that begins with h."""
    text, tables = "", [""]
    arrays: list[str] = []
    for number in range(draw(st.integers(0, 5))):
        text += "".join(pair + draw(ENDS) for pair in draw(pairs()))
        line = text.count("\n") + 1
        if draw(st.booleans()) and arrays:
            header = draw(st.sampled_from(arrays))
            # Its tables so far are those of the element before.
            tables = [table for table in tables if table == f"{header} . " or not table.startswith(f"{header} . ")]
            arrays = [array for array in arrays if not array.startswith(f"{header} . ")]
        else:
            header = draw(st.sampled_from(tables)) + draw(st.sampled_from(["t{}_{}", '"t{} ]_{}"'])).format(
                line, number
            )
            tables.append(f"{header} . ")
            if draw(st.booleans()):
                arrays.append(header)
        text += f"[[{header}]]" if header in arrays else f"[ {header} ]"
        text += f"\nh@ = 0{draw(ENDS)}"
    text += "".join(pair + draw(ENDS) for pair in draw(pairs()))
    return re.sub("@", lambda mark: str(text.count("\n", 0, mark.start()) + 1), text)


def said(key: str | int, value: Any) -> int | None:
    """The line that a key, or what stands in an array, says that it is on."""
    if isinstance(key, str):
        return int(re.findall(r"\d+", key)[0])
    if isinstance(value, dict) and value:
        first = str(next(iter(value)))
        return int(re.findall(r"\d+", first)[0]) - first.startswith("h")
    return int(value) if type(value) is int else None


def paths(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int | None]]:
    """Every path of a document, with its line where the text says it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key), said(key, inner)
        yield from paths(inner, (*path, key))


@given(documents())
def test_lines_are_those_that_a_text_says(text: str) -> None:
    expected = {path: line for path, line in paths(tomllib.loads(text)) if len(path) <= MAX_DEPTH}
    made = lines(text)
    assert made.keys() == expected.keys()
    assert [path for path, line in expected.items() if line not in (None, made[path])] == []


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a=", "}")])
def test_nothing_that_the_reader_takes_is_too_deep(opening: str, closing: str) -> None:
    for depth in range(50, 2000, 50):
        text = f"a = {opening * depth}1{closing * depth}"
        try:
            tomllib.loads(text)
        except RecursionError:
            return
        assert len(lines(text)) <= MAX_DEPTH


# --- problems ---

PROBLEM = CrdiffError(": b is wrong", "Mend it.")


def messages(act: Callable[[Problems], None]) -> list[str]:
    problems = Problems("plan.toml", {("a",): 3, ("a", 0): 4, ("b",): 2})
    act(problems)
    return [error.message for error in problems.in_order()]


@pytest.mark.parametrize(
    ("at", "where"),
    [
        (("a",), "plan.toml:3"),
        (("a", 0), "plan.toml:4"),
        (("a", 1, "x"), "plan.toml:3"),
        (("c",), "plan.toml"),
        ((), "plan.toml"),
        (7, "plan.toml:7"),
    ],
)
def test_a_problem_is_where_the_nearest_key_is(at: KeyPath | int, where: str) -> None:
    assert messages(lambda problems: problems.add(at, "is wrong", "Mend it.")) == [f"{where}: is wrong"]


def test_problems_are_kept_once_and_by_line() -> None:
    def act(problems: Problems) -> None:
        for place in (("a",), ("b",), ("a",)):
            with problems.catching(place):
                raise PROBLEM
        with problems.catching(("c",), "around: "):
            raise PROBLEM

    whole = ["plan.toml: around: b is wrong", "plan.toml:2: b is wrong", "plan.toml:3: b is wrong"]
    assert messages(act) == whole


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), Problems("plan.toml", {}).catching(()):
        raise KeyError
