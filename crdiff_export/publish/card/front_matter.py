"""Edit the YAML front matter of a card in place: comments, order, quotes and line ends stay as they are.

A library that writes YAML (ruamel.yaml) keeps comments and order but not every other byte, which is promised.

PyYAML tells where every value begins and ends; text is only cut and pasted. The result is parsed again and must be the
old mapping with exactly the wanted changes. So an unforeseen case is refused, and no card is damaged.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn

from crdiff_export.errors import CardError
from crdiff_export.publish.card.text import quoted

# The Hub's own pattern (`huggingface_hub.repocard.REGEX_YAML_BLOCK`), with a BOM, and with nothing between the lines.
_OPENS = re.compile(r"\ufeff?\s*---(?:\r\n|\r|\n)")
_BLOCK = re.compile(rf"({_OPENS.pattern})((?:[\S\s]*?(?:\r\n|\r|\n))??)(?=---[ \t]*(?:\r\n|\n|\Z))")
_ALMOST = re.compile(r"\ufeff?\s*---[ \t]+(?:\r|\n|\Z)")
_LINE_END = re.compile(r"\r\n|\r|\n|\Z")
# Text that needs no quotes in YAML 1.1 (PyYAML) and 1.2 (the Hub): no number begins with a letter.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./+-]*(?: [A-Za-z0-9_./+-]+)*")
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
_TEXT, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"


@dataclass(frozen=True, slots=True)
class Changes:
    """The wanted changes of the front matter.

    Attributes:
        units: Keys to add together, by a stem; none is added if there is a key that begins with the stem.
        items: Items to add to lists, by key.
        stale: Items to remove from lists, by key.
        single: Keys that may have one text in place of a list of one.
        order: The order of new keys; others follow.
    """

    units: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    items: Mapping[str, Sequence[str]] = field(default_factory=dict)
    stale: Mapping[str, frozenset[str]] = field(default_factory=dict)
    single: frozenset[str] = frozenset()
    order: Sequence[str] = ()


def split(text: str) -> tuple[str, str, str] | None:
    """Split a card: the text up to the front matter, the front matter, and the rest from the `---` that ends it.

    Returns None for a card without front matter. Raises CardError for lines that look like front matter but are none
    to the Hub.
    """
    if match := _BLOCK.match(text):
        return match[1], match[2], text[match.end() :]
    if _OPENS.match(text) or _ALMOST.match(text):
        line = len(re.findall(r"\r\n|\r|\n", text[: text.index("---")])) + 1
        raise CardError(
            f"README.md: line {line} begins front matter (---) that the Hub does not read as such",
            "End it with a line of its own that is exactly ---, without spaces after the first one.",
        )
    return None


def edit(block: str, changes: Changes, newline: str, line: int) -> str:
    """Return the front matter with the changes; `line` is the number of its first line in the card.

    Raises CardError if it is not a mapping, or is written in a way that cannot be changed without a risk.
    """
    root = _compose(block, line)
    pairs = _pairs(root, line)
    present = {_key(key): number for number, (key, _) in enumerate(pairs)}
    expected = list(pairs)
    added: list[tuple[str, Any]] = []
    for stem, unit in changes.units.items():
        if not any(key.startswith(stem) for key in present):
            added += unit.items()
    edits = _Edits(block, root, newline, line)
    for name, items in changes.items.items():
        lone = name in changes.single and len(items) == 1
        if name in present:
            key, value = pairs[present[name]]
            merged = edits.merge(key, value, items, changes.stale.get(name, frozenset()), lone=lone)
            expected[present[name]] = key, merged
        elif items:
            added.append((name, items[0] if lone else list(items)))
    added.sort(key=lambda pair: changes.order.index(pair[0]) if pair[0] in changes.order else len(changes.order))
    edits.add(added)
    expected += [(_node(name), _node(value)) for name, value in added]
    edited = edits.apply()
    after = _pairs(_compose(edited, line), line)
    if [tuple(map(_content, pair)) for pair in after] != [tuple(map(_content, pair)) for pair in expected]:
        _refuse(line, "the front matter is written in a way that crdiff cannot edit safely")
    return edited


class _Edits:
    """Cuts and pastes in one block: collected first, with positions in the old text, then applied together."""

    def __init__(self, block: str, root: Any, newline: str, line: int) -> None:
        self._block, self._root, self._newline, self._line = block, root, newline, line
        self._flow = root is not None and bool(root.flow_style) and bool(root.value)
        self._column = root.start_mark.column if root is not None and not root.flow_style else 0
        lists = (value for _, value in (root.value if root is not None else ()) if _is_list(value))
        # The indent of the lists that exist.
        self._dash = next((value.start_mark.column for value in lists if not value.flow_style), self._column)
        self._edits: list[tuple[int, int, str]] = []

    def merge(self, key: Any, value: Any, items: Sequence[str], stale: frozenset[str], *, lone: bool) -> Any:
        """Add and remove items of a value; return the node that it will be."""
        nodes = self._texts(key, value)
        remaining = [node for node in nodes if node.value not in stale]
        new = [text for text in dict.fromkeys(items) if text not in {node.value for node in remaining}]
        if remaining == nodes and not new:
            return value
        if not nodes and lone:
            self._replace(key, value, scalar(*new, flow=self._flow))
            return _node(new[0])
        if _is_list(value) and value.value:
            edit = self._in_flow if value.flow_style else self._in_block
            edit(value, remaining, new)
        elif nodes:
            self._to_list(key, value, new)
        else:
            self._replace(key, value, _in_line(new))
        merged = _node([])
        merged.value = [*remaining, *map(_node, new)]
        return merged

    def _texts(self, key: Any, value: Any) -> list[Any]:
        """Return the nodes of a list's texts, or of one text alone; none if there is no value."""
        if not _is_list(value) and (value.tag == _NULL or value.value == ""):
            return []
        nodes = value.value if _is_list(value) else [value]
        for node in nodes:
            if node.id != "scalar" or node.style in ("|", ">") or (node is value and node.tag != _TEXT):
                line = self._line + node.start_mark.line
                _refuse(line, f"{_key(key)} is neither text nor a list of texts of one line")
        return list(nodes)

    def _replace(self, key: Any, value: Any, text: str) -> None:
        """Replace an empty value."""
        start = value.start_mark.index
        space = "" if self._block[key.end_mark.index : start][-1:].isspace() else " "
        self._edits.append((start, value.end_mark.index, space + text))

    def _to_list(self, key: Any, value: Any, new: Sequence[str]) -> None:
        """Turn one text into a list, whose first item it becomes as it is written."""
        start, end = value.start_mark.index, value.end_mark.index
        if self._flow:
            more = "".join(f", {scalar(text, flow=True)}" for text in new)
            self._edits += [(start, start, "["), (end, end, f"{more}]")]
            return
        colon = re.fullmatch(r"( *:) +", self._block[key.end_mark.index : start])
        if not colon:
            _refuse(self._line + value.start_mark.line, f"the value of {_key(key)} is not on the line of its key")
        dash = " " * self._dash + "- "
        self._edits.append((key.end_mark.index, start, colon[1] + self._newline + dash))
        self._paste(end, [dash + scalar(text) for text in new])

    def _in_block(self, value: Any, remaining: Sequence[Any], new: Sequence[str]) -> None:
        for item in value.value:
            if item not in remaining:
                start = self._start_of_line(item.start_mark.index)
                if not re.fullmatch(r" *- +", self._block[start : item.start_mark.index]):
                    _refuse(self._line + item.start_mark.line, "an item of a list is not on a line of its own")
                self._edits.append((start, self._end_of_line(item.end_mark.index), ""))
        dash = " " * value.start_mark.column + "- "
        self._paste(value.value[-1].end_mark.index, [dash + scalar(text) for text in new])

    def _in_flow(self, value: Any, remaining: Sequence[Any], new: Sequence[str]) -> None:
        nodes = value.value
        last = nodes.index(remaining[-1]) if remaining else -1
        for node, following in pairwise(nodes[: last + 1]):
            if node not in remaining:
                self._edits.append((node.start_mark.index, following.start_mark.index, ""))
        start = nodes[-1].start_mark.index
        lead = self._block[self._start_of_line(start) : start]
        comma = f",{self._newline}{lead}" if lead.isspace() else ", "  # each on a line of its own, or all on one
        texts = comma.join(scalar(text, flow=True) for text in new)
        index = remaining[-1].end_mark.index if remaining else nodes[0].start_mark.index
        self._edits.append((index, nodes[-1].end_mark.index, comma + texts if remaining and new else texts))

    def add(self, pairs: Sequence[tuple[str, Any]]) -> None:
        """Add new keys behind those that exist."""
        if not pairs:
            return
        if self._flow:
            end = self._root.value[-1][1].end_mark.index
            self._edits.append((end, end, "".join(f", {scalar(k, flow=True)}: {_in_line(v)}" for k, v in pairs)))
            return
        indent, deeper = " " * self._column, " " * (self._dash - self._column)
        lines = [line for name, value in pairs for line in _lines(name, value, indent, deeper)]
        if self._root is not None and self._root.flow_style:  # {}, as the Hub's own template has it
            self._edits.append((self._root.start_mark.index, self._root.end_mark.index, self._newline.join(lines)))
        else:
            end = len(self._block)
            self._edits.append((end, end, "".join(line + self._newline for line in lines)))

    def apply(self) -> str:
        """Return the block with all edits."""
        pieces, done = [], 0
        for start, end, text in sorted(self._edits, key=lambda edit: edit[0]):  # stable: insertions keep their order
            pieces += [self._block[done:start], text]
            done = end
        return "".join([*pieces, self._block[done:]])

    def _paste(self, index: int, lines: Sequence[str]) -> None:
        """Insert lines after the one that the index is in."""
        end = self._end_of_line(index)
        self._edits.append((end, end, "".join(line + self._newline for line in lines)))

    def _start_of_line(self, index: int) -> int:
        return max(self._block.rfind("\n", 0, index), self._block.rfind("\r", 0, index)) + 1

    def _end_of_line(self, index: int) -> int:
        match = _LINE_END.search(self._block, index)
        assert match
        return match.end()


def scalar(text: str, *, flow: bool = False) -> str:
    """Return a YAML scalar that every reader takes for text; `flow`: inside brackets."""
    plain = _PLAIN.fullmatch(text) or (not flow and re.fullmatch(r"resolution:[0-9]+x[0-9]+", text))
    return text if plain and text.lower() not in _WORDS else quoted(text)


def _in_line(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(key, flow=True)}: {_in_line(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_in_line, value))}]"
    return scalar(value, flow=True) if isinstance(value, str) else str(value).lower()


def _lines(name: str, value: Any, indent: str, deeper: str) -> Iterator[str]:
    key = f"{indent}{scalar(name)}:"
    if isinstance(value, Mapping) and value:
        yield key
        for inner, below in value.items():
            yield from _lines(inner, below, indent + "  ", deeper)
    elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        yield key
        yield from (f"{indent}{deeper}- {scalar(item)}" for item in value)
    else:
        yield f"{key} {scalar(value) if isinstance(value, str) else _in_line(value)}"


def _compose(block: str, line: int) -> Any:
    """Parse the block to a tree with positions; None if it is empty.

    Raises CardError for what is not YAML, and for anchors and tags, which make a value depend on other places.
    """
    import yaml

    try:
        for event in yaml.parse(block, Loader=yaml.SafeLoader):
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                _refuse(line + event.start_mark.line, "anchors, aliases and tags in front matter are not edited")
        return yaml.compose(block, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        at = line + error.problem_mark.line if error.problem_mark else line
        _refuse(at, f"the front matter is not YAML: {error.problem or 'it cannot be read'}", error)
    except (yaml.YAMLError, RecursionError) as error:
        _refuse(line, "the front matter is not YAML that can be read", error)


def _pairs(root: Any, line: int) -> list[tuple[Any, Any]]:
    """Return the mapping's keys and values; CardError if it is none, or has a key twice or a merge key."""
    if root is None:
        return []
    if root.id != "mapping":
        _refuse(line + root.start_mark.line, "the front matter is not a mapping of keys to values")
    seen = set()
    for key, _ in root.value:
        name = _key(key)
        if name in seen or key.tag.endswith(":merge"):
            _refuse(line + key.start_mark.line, f"the key {name!r} is there twice, or merges others")
        seen.add(name)
    return list(root.value)


def _key(node: Any) -> str:
    return node.value if isinstance(node.value, str) else _content(node)


def _is_list(node: Any) -> bool:
    return bool(node.id == "sequence")


def _node(value: Any) -> Any:
    """Return the node of a value of ours."""
    from yaml.representer import SafeRepresenter

    return SafeRepresenter(sort_keys=False).represent_data(value)


def _content(node: Any) -> str:
    """Return types and values of a node as text, without the style in which it is written."""
    import yaml

    return str(yaml.serialize(node, Dumper=yaml.SafeDumper, canonical=True))


def _refuse(line: int, what: str, cause: BaseException | None = None) -> NoReturn:
    raise CardError(
        f"README.md, line {line}: {what}",
        "Write the front matter as plain `key: value` lines and `- item` lists, each key once, then run it again.",
    ) from cause
