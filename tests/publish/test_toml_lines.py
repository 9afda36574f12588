"""The line of every key of a TOML text, against a writer that knows them; and how problems are kept."""

import random
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
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
    "nothing": numbered(("",)),
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
    "inline tables": numbered(
        ("r = { up = 1e3, 'd' = 2, e.f = '}' }", ("r",), ("r", "up"), ("r", "d"), ("r", "e"), ("r", "e", "f")),
        ("s = 1", ("s",)),
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


# --- against a writer that knows the lines ---

KEYS = st.text(st.sampled_from("ab-1.[]{}=,#'\"\\\n é"), max_size=4)
TEXTS = st.text(st.sampled_from("a [x]={},.#'\"\\\n\r\t\x01é"), max_size=12) | st.sampled_from(
    ['"""', "'''", '""""', "[a]\nb = 1", "\n[[a]]\n", "\\", '\\"', "# a"]
)
SCALARS = (
    TEXTS | st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.floats(allow_nan=False) | st.datetimes() | st.dates()
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


@dataclass
class Node:
    """A table: what it says itself, and the tables and arrays of tables in it, told apart by a letter."""

    values: dict[str, Any]
    tables: "dict[str, Node]" = field(default_factory=dict)
    arrays: "dict[str, list[Node]]" = field(default_factory=dict)

    @property
    def data(self) -> dict[str, Any]:
        return {
            **{f"v{key}": value for key, value in self.values.items()},
            **{f"t{key}": node.data for key, node in self.tables.items()},
            **{f"a{key}": [node.data for node in nodes] for key, nodes in self.arrays.items()},
        }


LEAVES = st.builds(Node, st.dictionaries(KEYS, VALUES, max_size=3))
NODES: st.SearchStrategy[Node] = st.recursive(
    LEAVES,
    lambda inner: st.builds(
        Node,
        st.dictionaries(KEYS, VALUES, max_size=3),
        st.dictionaries(KEYS, inner, max_size=2),
        st.dictionaries(KEYS, st.lists(inner, min_size=1, max_size=3), max_size=2),
    ),
    max_leaves=6,
)


@dataclass
class Writer:
    """Spells a document in any of the ways that TOML has."""

    chance: random.Random
    text: str = ""
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def put(self, *texts: str) -> None:
        self.text += self.chance.choice(texts)

    def mark(self, path: KeyPath) -> None:
        self.lines.setdefault(path, self.text.count("\n") + 1)

    def gap(self) -> None:
        self.put("", " ", "\t ")

    def breaks(self) -> None:
        self.put("", " ", "\n", ' # ] } \' """ [a]\n\n  ', "\r\n")

    def quoted(self, text: str, *, keys: bool = False) -> str:
        escaped = re.sub(r"[\x00-\x1f\\\"]", lambda char: f"\\u{ord(char[0]):04x}", text)
        ways = [f'"{escaped}"', '"' + escaped.replace("\\u005c", "\\\\").replace("\\u0022", '\\"') + '"']
        if not re.search(r"['\x00-\x08\x0a-\x1f]", text):
            ways.append(f"'{text}'")
        if not keys:
            some = re.sub(r"[\x00-\x08\x0b-\x1f\\]", lambda char: f"\\u{ord(char[0]):04x}", text)
            ways.append('"""\n' + some.replace('"""', '""\\"') + '"""')
            if not re.search(r"'''|[\x00-\x08\x0b-\x1f]", text):
                ways.append(f"'''\n{text}'''")
        return self.chance.choice(ways)

    def spell(self, keys: list[str]) -> None:
        for number, key in enumerate(keys):
            self.put("." if number else "")
            self.gap()
            bare = [key] if re.fullmatch("[A-Za-z0-9_-]+", key) else []
            self.put(*bare, self.quoted(key, keys=True))
            self.gap()

    def dotted(self, keys: list[str], path: KeyPath) -> KeyPath:
        """Spell a key that begins in the table at a path."""
        for depth in range(len(keys)):
            self.mark((*path, *keys[: depth + 1]))
        self.spell(keys)
        return (*path, *keys)

    def value(self, value: Any, path: KeyPath) -> None:
        if isinstance(value, str):
            self.put(self.quoted(value))
        elif isinstance(value, list):
            self.put("[")
            for number, item in enumerate(value):
                self.breaks()
                self.mark((*path, number))
                self.value(item, (*path, number))
                self.breaks()
                self.put(",", *([""] if number == len(value) - 1 else []))
            self.breaks()
            self.put("]")
        elif isinstance(value, dict):
            self.put("{")
            for number, (key, item) in enumerate(value.items()):
                self.put("," if number else "")
                self.gap()
                inner = self.dotted([key], path)
                self.put("=")
                self.gap()
                self.value(item, inner)
                self.gap()
            self.put("}")
        elif isinstance(value, bool):
            self.put(str(value).lower())
        else:
            self.put(str(value))

    def statements(self, values: dict[str, Any], path: KeyPath, before: list[str]) -> None:
        for key, value in values.items():
            if isinstance(value, dict) and value and self.chance.random() < 0.3:
                self.statements(value, path, [*before, key])
                continue
            self.gap()
            inner = self.dotted([*before, key], path)
            self.put("=")
            self.gap()
            self.value(value, inner)
            self.gap()
            self.put("\n", "\r\n", " # [[a]]\n", "\n\n#\n")

    def node(self, node: Node, path: KeyPath) -> None:
        names = [part for part in path if isinstance(part, str)]
        self.statements({f"v{key}": value for key, value in node.values.items()}, path, [])
        for key, inner in node.tables.items():
            name = f"t{key}"
            if inner.values or not inner.tables or self.chance.random() < 0.5:
                self.header([*names, name], (*path, name), "[", "]")
            self.node(inner, (*path, name))
        for key, nodes in node.arrays.items():
            name = f"a{key}"
            for number, inner in enumerate(nodes):
                self.header([*names, name], (*path, name, number), "[[", "]]")
                self.node(inner, (*path, name, number))

    def header(self, names: list[str], path: KeyPath, start: str, end: str) -> None:
        self.gap()
        for depth in range(len(path)):
            self.mark(path[: depth + 1])
        self.put(start)
        self.spell(names)
        self.put(f"{end}\n", f"{end} # ]\n")


@settings(max_examples=60)
@given(NODES, st.randoms(use_true_random=False))
def test_lines_agree_with_a_writer(node: Node, chance: random.Random) -> None:
    writer = Writer(chance)
    writer.node(node, ())
    assert tomllib.loads(writer.text) == node.data
    assert dict(lines(writer.text)) == {path: line for path, line in writer.lines.items() if len(path) <= MAX_DEPTH}


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
