"""A workflow of ComfyUI, in the two forms that ComfyUI reads.

`Graph.workflow` is the format of its page (nodes, links, groups), `Graph.prompt` that of its server's `/prompt`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any

# Marks an optional input in the format of the page (LiteGraph's GRID_SHAPE).
_OPTIONAL = 7
# The type of a widget that only the page has.
PAGE = ""


@dataclass(frozen=True, slots=True)
class Kind:
    """What nodes of one class have.

    Attributes:
        inputs: The types of the inputs that are connected, by name.
        widgets: The types of the inputs with a widget, by name; `PAGE` for a widget that is no input.
        outputs: The types of the outputs, by name.
        optional: The names of inputs that may stay unconnected.
        virtual: Whether only the page knows the class.
    """

    inputs: dict[str, str] = field(default_factory=dict)
    widgets: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    virtual: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """A node on the page.

    Attributes:
        class_type: The node's class.
        kind: What that class has.
        title: The node's title.
        box: Left, top, width and height, without the title, in pixels of the page.
        sources: The name of the node and of its output that an input is connected to, by the input's name.
        values: The values of the widgets, in their order.
    """

    class_type: str
    kind: Kind
    title: str
    box: tuple[int, int, int, int]
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)
    values: tuple[str | float, ...] = ()

    @property
    def widgets(self) -> Iterator[tuple[str, str, str | float]]:
        """The name, type and value of each widget."""
        return ((name, kind, value) for (name, kind), value in zip(self.kind.widgets.items(), self.values, strict=True))


@dataclass(frozen=True, slots=True)
class Frame:
    """A group: a titled frame behind nodes, with its box and its colour."""

    title: str
    box: tuple[int, int, int, int]
    color: str


@dataclass(frozen=True, slots=True)
class Link:
    """A connection, from an output to an input of a type."""

    source: str
    output: str
    target: str
    input: str
    type: str


@dataclass(frozen=True)
class Graph:
    """A workflow.

    Attributes:
        id: A UUID, by which the page knows it.
        nodes: The nodes, by names that only this description uses.
        frames: The groups.
    """

    id: str
    nodes: dict[str, Node]
    frames: tuple[Frame, ...]

    @property
    def ids(self) -> dict[str, int]:
        """The number of each node."""
        return {name: number for number, name in enumerate(self.nodes, 1)}

    @property
    def links(self) -> list[Link]:
        """All connections, in the order of the inputs."""
        return [
            Link(*node.sources[name], target, name, kind)
            for target, node in self.nodes.items()
            for name, kind in node.kind.inputs.items()
            if name in node.sources
        ]

    def workflow(self) -> dict[str, Any]:
        """Return the workflow in the format of the page, version 0.4."""
        links, ids = self.links, self.ids
        sources = {name: {source for source, _ in node.sources.values()} for name, node in self.nodes.items()}
        order = {name: number for number, name in enumerate(TopologicalSorter(sources).static_order())}
        return {
            "id": self.id,
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [self._page_node(name, order[name]) for name in self.nodes],
            "links": [
                [
                    number, ids[link.source], list(self.nodes[link.source].kind.outputs).index(link.output),
                    ids[link.target], list(self.nodes[link.target].kind.inputs).index(link.input), link.type,
                ]
                for number, link in enumerate(links, 1)
            ],
            "groups": [
                {"id": number, "title": frame.title, "bounding": list(frame.box), "color": frame.color,
                 "font_size": 24, "flags": {}}
                for number, frame in enumerate(self.frames, 1)
            ],
            "config": {},
            "extra": {},
            "version": 0.4,
        }  # fmt: skip

    def _page_node(self, name: str, order: int) -> dict[str, Any]:
        node, links = self.nodes[name], self.links
        numbers = {link.input: number for number, link in enumerate(links, 1) if link.target == name}
        return {
            "id": self.ids[name],
            "type": node.class_type,
            "pos": list(node.box[:2]),
            "size": list(node.box[2:]),
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": [
                *(
                    {"name": key, "type": kind, **({"shape": _OPTIONAL} if key in node.kind.optional else {}),
                     "link": numbers.get(key)}
                    for key, kind in node.kind.inputs.items()
                ),
                *(
                    {"name": key, "type": kind, "widget": {"name": key}, "link": None}
                    for key, kind in node.kind.widgets.items()
                    if kind != PAGE
                ),
            ],
            "outputs": [
                {"name": key, "type": kind,
                 "links": [n for n, link in enumerate(links, 1) if (link.source, link.output) == (name, key)] or None}
                for key, kind in node.kind.outputs.items()
            ],
            "title": node.title,
            "properties": {} if node.kind.virtual else {"Node name for S&R": node.class_type},
            "widgets_values": list(node.values),
        }  # fmt: skip

    def prompt(self) -> dict[str, Any]:
        """Return the workflow in the format of the server."""
        ids = self.ids
        return {
            str(ids[name]): {
                "inputs": {
                    **{key: value for key, kind, value in node.widgets if kind != PAGE},
                    **{
                        key: [str(ids[source]), list(self.nodes[source].kind.outputs).index(output)]
                        for key, (source, output) in node.sources.items()
                    },
                },
                "class_type": node.class_type,
                "_meta": {"title": node.title},
            }
            for name, node in self.nodes.items()
            if not node.kind.virtual
        }
