"""The tables of docs/json.md, and outputs of `--json` compared with them.

A table stands below a heading, which is its name: a command line such as `crdiff export --dry-run`, or the name of an
object that several tables refer to. A row has a key, when it is present, its type and its meaning:

    key       a path: `groups.<group>.ratio` is a key of the object of each group, `files[].path` of each in a list
    present   `always`, or `where` and a condition
    type      text, size, number, whole, true/false, object, a link to another table, `list of` one of these,
              and null; alternatives are separated by `or`
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER = ("key", "present", "type", "meaning")
_HEADING = re.compile(r"#+ (.+)")
_LINK = re.compile(r"\[(.+?)\]\(#.+?\)")
_LIST = "list of "
_SIZE = re.compile(r"[1-9][0-9]*x[1-9][0-9]*")
_SCALARS: Mapping[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "size": lambda value: isinstance(value, str) and bool(_SIZE.fullmatch(value)),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "whole": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "true/false": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


@dataclass
class Node:
    """A key of a table, with the keys inside of its object or of the objects in its list.

    Attributes:
        path: The key as the table has it.
        types: The alternatives of its type; empty for a path that has no row of its own.
        always: Whether it is always present.
        keys: The nodes below it, by name; a name in angle brackets is that of any key.
        seen: The alternatives that outputs had so far.
        absent: Whether an output did not have the key.
    """

    path: str = ""
    types: tuple[str, ...] = ()
    always: bool = False
    keys: dict[str, "Node"] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    absent: bool = False

    def child(self, name: str) -> "Node | None":
        """The node of a key that an output has."""
        return self.keys.get(name) or next((node for key, node in self.keys.items() if key.startswith("<")), None)

    def below(self) -> Iterator["Node"]:
        """All nodes below this one that have a row."""
        for node in self.keys.values():
            if node.types:
                yield node
            yield from node.below()


class JsonPage:
    """All tables of a page."""

    def __init__(self, path: Path) -> None:
        self.tables: dict[str, Node] = {}
        name, inside = "", False
        for line in path.read_text(encoding="utf-8").splitlines():
            if heading := _HEADING.fullmatch(line):
                name, inside = heading[1].replace("`", ""), False
            cells = tuple(cell.strip() for cell in line.strip("|").split("|")) if line.startswith("|") else ()
            inside = inside and bool(cells)
            if cells == HEADER:
                assert name not in self.tables, f"two tables of {name}"
                self.tables[name], inside = Node(), True
            elif inside and not set(line) <= set("|-"):
                _add(self.tables[name], name, cells)

    @property
    def commands(self) -> list[str]:
        """The names of the tables of commands."""
        return [name for name in self.tables if name.startswith("crdiff ")]

    def check(self, name: str, value: Any) -> None:
        """Assert that an object is as its table says, and note what it had."""
        self._check_object(self.tables[name], value, name)

    def unseen(self, name: str) -> set[str]:
        """What no output had: `KEY` for a key, `KEY: TYPE` for a type; `KEY: absent` if a key was always there."""
        missing = set()
        for node in self.tables[name].below():
            if not node.seen:
                missing.add(node.path)
                continue
            missing |= {f"{node.path}: {type_}" for type_ in node.types if type_ not in node.seen}
            if not (node.always or node.absent or "<" in node.path.rpartition(".")[2]):
                missing.add(f"{node.path}: absent")
        return missing

    def _check_object(self, node: Node, value: Any, where: str) -> None:
        assert isinstance(value, dict), f"{where} is no object"
        for name, child in node.keys.items():
            if name not in value and not name.startswith("<"):
                assert not child.always, f"{where}: the output has no {name}, which is always there"
                child.absent = True
        for name, item in value.items():
            found = node.child(name)
            assert found, f"{where}: the page does not have the key {name}"
            self._check_value(found, item, f"{where}: {name}")

    def _check_value(self, node: Node, value: Any, where: str) -> None:
        if not node.types:  # `<group>` of `groups.<group>.ratio`
            self._check_object(node, value, where)
            return
        type_ = next((type_ for type_ in node.types if self._fits(type_, value)), None)
        assert type_, f"{where} is {value!r}, not {' or '.join(node.types)}"
        node.seen.add(type_)
        values, inner = (value, type_.removeprefix(_LIST)) if type_.startswith(_LIST) else ([value], type_)
        for item in values:
            if inner == "object":
                self._check_object(node, item, where)
            elif inner not in _SCALARS:
                self._check_object(self.tables[inner], item, where)

    def _fits(self, type_: str, value: Any) -> bool:
        if type_.startswith(_LIST):
            return isinstance(value, list) and all(self._fits(type_.removeprefix(_LIST), item) for item in value)
        if type_ in _SCALARS:
            return _SCALARS[type_](value)
        assert type_ == "object" or type_ in self.tables, f"the page has no type {type_!r}"
        return isinstance(value, dict)


def _add(table: Node, name: str, cells: tuple[str, ...]) -> None:
    key, present, types, meaning = cells
    path = key.strip("`")
    assert present == "always" or present.startswith("where "), f"{name}: {path}: present {present!r}"
    assert meaning, f"{name}: {path} has no meaning"
    node = table
    *parents, last = path.split(".")
    for parent in parents:
        listed = parent.endswith("[]")
        node = node.keys[parent.removesuffix("[]")] if not parent.startswith("<") else _any_key(node, parent)
        assert not listed or any(type_ == f"{_LIST}object" for type_ in node.types), f"{name}: {path}"
    assert last not in node.keys, f"{name}: two rows of {path}"
    alternatives = tuple(_LINK.sub(r"\1", type_).replace("`", "").strip() for type_ in types.split(" or "))
    node.keys[last] = Node(path, alternatives, present == "always")


def _any_key(node: Node, name: str) -> Node:
    return node.keys.setdefault(name, Node())
