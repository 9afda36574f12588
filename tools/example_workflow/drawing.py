"""A picture of a workflow, as ComfyUI's page shows it: groups, nodes, their widgets, and the links between them."""

from collections.abc import Iterator

from PIL import Image, ImageDraw

from crdiff_export.evaluate.report import fonts
from example_workflow.graph import PAGE, Graph, Node

# Everything is drawn larger and then reduced, which gives smooth edges.
_FACTOR = 3
_MARGIN = 24
_HEADER, _ROW, _WIDGET = 30, 20, 24
_LETTERS, _SMALL = 13, 12
_COLORS = {
    "MODEL": "#b39ddb", "CLIP": "#ffd500", "VAE": "#ff6e6e", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6", "FLOAT": "#a5d6a7",
}  # fmt: skip
_BACK, _DOT, _BODY, _TITLE, _FIELD, _EDGE = "#202225", "#2b2d31", "#353535", "#2a2a2a", "#222222", "#666666"
_TEXT, _FAINT = "#dddddd", "#999999"
_OURS_BODY, _OURS_TITLE = "#3a4a3f", "#2c6e49"
_NOTE_BODY, _NOTE_TITLE = "#4a4433", "#5c5238"
_ACCENT = "#8fd6ae"
Point = tuple[float, float]
Box = tuple[float, float, float, float]


def draw(graph: Graph) -> Image.Image:
    """Draw a workflow."""
    boxes = [frame.box for frame in graph.frames]
    left, top = (min(box[axis] for box in boxes) - _MARGIN for axis in (0, 1))
    right, bottom = (max(box[axis] + box[axis + 2] for box in boxes) + _MARGIN for axis in (0, 1))
    canvas = _Canvas(left, top, right - left, bottom - top)
    for frame in graph.frames:
        canvas.panel(frame.box, _mixed(frame.color, _BACK, 0.45), frame.color, 6)
    for link in graph.links:
        source, target = graph.nodes[link.source], graph.nodes[link.target]
        start = _slot(source, list(source.kind.outputs).index(link.output), output=True)
        end = _slot(target, list(target.kind.inputs).index(link.input), output=False)
        canvas.curve(start, end, _COLORS[link.type])
    for frame in graph.frames:
        canvas.text((frame.box[0] + 10, frame.box[1] + 7), frame.title, 18, _mixed(frame.color, "#ffffff", 0.25))
    for node in graph.nodes.values():
        _Drawing(canvas, node).draw(graph)
    return canvas.reduced()


def thumbnail(sizes: dict[str, tuple[int, int]]) -> Image.Image:
    """Draw pictures of some sizes beside each other, each with its size, for ComfyUI's list of templates."""
    width, height, unit = 640, 400, 0.36
    canvas = _Canvas(0, 0, width, height)
    gap = (width - sum(w * unit for w, _ in sizes.values())) / (len(sizes) + 1)
    x = gap
    for name, (w, h) in sizes.items():
        y = (height - 40 - h * unit) / 2 + 14
        canvas.scene((x, y, w * unit, h * unit))
        canvas.text((x, y + h * unit + 8), f"{name} {w}x{h}", 17, _ACCENT)
        x += w * unit + gap
    return canvas.reduced()


def _slot(node: Node, number: int, *, output: bool) -> Point:
    x, y, width, _ = node.box
    return (x + width if output else x), y + (number + 0.7) * _ROW


class _Drawing:
    """The drawing of one node."""

    def __init__(self, canvas: "_Canvas", node: Node) -> None:
        self._canvas, self._node = canvas, node
        kind = node.class_type
        self._ours = kind.startswith("Crdiff")
        self._body, self._title = (
            (_OURS_BODY, _OURS_TITLE) if self._ours
            else (_NOTE_BODY, _NOTE_TITLE) if node.kind.virtual
            else (_BODY, _TITLE)
        )  # fmt: skip

    def draw(self, graph: Graph) -> None:
        """Draw the node, which lies above the links as on the page."""
        (x, y, width, height), canvas = self._node.box, self._canvas
        edge = _ACCENT if self._ours else "#151515"
        canvas.panel((x, y - _HEADER, width, height + _HEADER), self._body, edge, 9, 2 if self._ours else 1)
        canvas.panel((x + 1, y - _HEADER + 1, width - 2, _HEADER - 1), self._title, self._title, 8)
        canvas.text((x + 12, y - _HEADER + 7), self._node.title, 15, "#ffffff" if self._ours else _TEXT)
        if self._node.kind.virtual:
            self._note(str(self._node.values[0]))
            return
        self._slots(graph)
        rows = max(len(self._node.kind.inputs), len(self._node.kind.outputs))
        top = y + rows * _ROW + (8 if rows else 4)
        for name, kind, value in self._node.widgets:
            if kind == "STRING" and len(self._node.kind.widgets) == 1 and not self._saves:
                self._paragraph((x + 10, top, width - 20, y + height - top - 10), str(value))
            else:
                self._widget(top, name, kind, value)
            top += _WIDGET
        if self._saves:
            self._picture(top + 4)

    def _slots(self, graph: Graph) -> None:
        """Draw the dots of inputs and outputs with their names."""
        node, canvas = self._node, self._canvas
        connected = {link.output for link in graph.links if graph.nodes[link.source] is node}
        for number, (name, kind) in enumerate(node.kind.inputs.items()):
            x, y = _slot(node, number, output=False)
            canvas.dot((x, y), _COLORS[kind], filled=name in node.sources)
            canvas.text((x + 11, y - 8), name, _LETTERS, _TEXT if name in node.sources else _FAINT)
        for number, (name, kind) in enumerate(node.kind.outputs.items()):
            x, y = _slot(node, number, output=True)
            canvas.dot((x, y), _COLORS[kind], filled=name in connected)
            canvas.text((x - 11 - canvas.width(name, _LETTERS), y - 8), name, _LETTERS, _TEXT)

    @property
    def _saves(self) -> bool:
        return "images" in self._node.kind.inputs

    def _widget(self, top: float, name: str, kind: str, value: str | float) -> None:
        (x, _, width, _), canvas = self._node.box, self._canvas
        canvas.panel((x + 10, top, width - 20, _ROW), _FIELD, _EDGE, 9)
        canvas.text((x + 20, top + 2), "control after generate" if kind == PAGE else name, _SMALL, _FAINT)
        shown = canvas.cut(str(value), _SMALL, width - 56 - canvas.width(name, _SMALL))
        canvas.text((x + width - 20 - canvas.width(shown, _SMALL), top + 2), shown, _SMALL, _TEXT)

    def _paragraph(self, box: Box, text: str) -> None:
        self._canvas.panel(box, _FIELD, _FIELD, 4)
        for number, line in enumerate(self._canvas.wrapped(text, _LETTERS, box[2] - 16)):
            self._canvas.text((box[0] + 8, box[1] + 7 + number * 18), line, _LETTERS, _TEXT)

    def _note(self, markdown: str) -> None:
        """Draw the text of a note; a line that begins a step or a command is indented as Markdown does it."""
        x, y, width, _ = self._node.box
        top = y + 14.0
        for line in markdown.splitlines():
            heading, code = line.startswith("## "), line.strip().startswith("`")
            text = line.removeprefix("## ").strip().replace("`", "")
            size, indent = (17, 0) if heading else (_SMALL, 18) if code else (_LETTERS + 1, 0)
            color = "#ffffff" if heading else _ACCENT if code else _TEXT
            for part in self._canvas.wrapped(text, size, width - 32 - indent):
                self._canvas.text((x + 16 + indent, top), part, size, color)
                top += size + 7
            top += 6 if text else 4

    def _picture(self, top: float) -> None:
        """Draw what a node for files shows below its widgets."""
        x, y, width, height = self._node.box
        shape = (2, 3) if height > width else (3, 2)
        unit = min((width - 20) / shape[0], (y + height - top - 10) / shape[1])
        w, h = shape[0] * unit, shape[1] * unit
        self._canvas.scene((x + (width - w) / 2, top, w, h))


class _Canvas:
    """A picture that is drawn in pixels of the page."""

    def __init__(self, left: float, top: float, width: float, height: float) -> None:
        self._left, self._top, self._size = left, top, (round(width), round(height))
        self._image = Image.new("RGB", (self._size[0] * _FACTOR, self._size[1] * _FACTOR), _BACK)
        self._pen = ImageDraw.Draw(self._image)
        for x in range(0, self._size[0], 20):
            for y in range(0, self._size[1], 20):
                self._pen.rectangle([x * _FACTOR, y * _FACTOR, (x + 1) * _FACTOR, (y + 1) * _FACTOR], fill=_DOT)

    def reduced(self) -> Image.Image:
        """Return the picture in its own size."""
        return self._image.resize(self._size, Image.Resampling.BOX)

    def panel(self, box: Box, fill: str, edge: str, radius: float, line: float = 1) -> None:
        """Draw a rectangle with round corners."""
        x, y, width, height = box
        corners = [*self._at((x, y)), *self._at((x + width, y + height))]
        self._pen.rounded_rectangle(corners, radius * _FACTOR, fill, edge, round(line * _FACTOR))

    def dot(self, center: Point, color: str, *, filled: bool) -> None:
        """Draw the dot of an input or output."""
        x, y = self._at(center)
        for radius, fill in ((5.5, "#151515"), (4.5, color), *(() if filled else ((3.0, _BODY),))):
            r = radius * _FACTOR
            self._pen.ellipse([x - r, y - r, x + r, y + r], fill=fill)

    def curve(self, start: Point, end: Point, color: str) -> None:
        """Draw a link, as a cubic curve with level ends."""
        reach = max(40.0, ((end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2) ** 0.5 * 0.25)
        handles = (start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end)
        points = [self._at(_bezier(handles, step / 60)) for step in range(61)]
        for width, fill in ((5, "#151515"), (3, color)):
            self._pen.line(points, fill, width * _FACTOR, "curve")

    def text(self, corner: Point, text: str, size: int, color: str) -> None:
        """Write one line."""
        self._pen.text(self._at(corner), text, color, fonts.load(fonts.BUILT_IN, size * _FACTOR))

    def width(self, text: str, size: int) -> float:
        """Return the width of a line."""
        return fonts.load(fonts.BUILT_IN, size * _FACTOR).getlength(text) / _FACTOR

    def cut(self, text: str, size: int, room: float) -> str:
        """Return a text, or its end if there is not enough room."""
        shown = text
        while self.width(shown, size) > room:
            shown = "..." + shown.removeprefix("...")[1:]
        return shown

    def wrapped(self, text: str, size: int, room: float) -> Iterator[str]:
        """Break a text into lines."""
        line = ""
        for word in text.split():
            longer = f"{line} {word}".strip()
            if line and self.width(longer, size) > room:
                yield line
                longer = word
            line = longer
        if line:
            yield line

    def scene(self, box: Box) -> None:
        """Draw a mountain above a lake at sunset."""
        x, y, width, height = box
        shore = 0.68

        def spot(across: float, down: float) -> Point:
            return self._at((x + across * width, y + down * height))

        bands = 48
        for band in range(bands):
            part = band / (bands - 1)
            sky = _mixed("#2b2d5b", "#f6a25e", 1 - part) if part < 1 else "#f6a25e"
            top, bottom = band / bands * shore, (band + 1) / bands * shore
            self._pen.rectangle([*spot(0, top), *spot(1, bottom)], fill=sky)
            water = _mixed("#e08a58", "#1d2547", 1 - part)
            low, deep = shore + band / bands * (1 - shore), shore + (band + 1) / bands * (1 - shore)
            self._pen.rectangle([*spot(0, low), *spot(1, deep)], fill=water)
        radius = 0.11 * min(width, height) * _FACTOR
        sun_x, sun_y = spot(0.7, 0.5)
        self._pen.ellipse([sun_x - radius, sun_y - radius, sun_x + radius, sun_y + radius], fill="#ffe2a8")
        for color, ridge in (
            ("#6b5a86", ((0, 0.5), (0.18, 0.4), (0.36, 0.52), (0.55, 0.36), (0.78, 0.55), (1, 0.44))),
            ("#453f6b", ((0, 0.62), (0.2, 0.42), (0.38, 0.2), (0.56, 0.42), (0.72, 0.58), (0.86, 0.54), (1, 0.62))),
        ):
            self._pen.polygon([spot(*point) for point in (*ridge, (1, shore), (0, shore))], fill=color)
        snow = ((0.38, 0.2), (0.29, 0.31), (0.335, 0.345), (0.375, 0.3), (0.42, 0.36), (0.47, 0.315))
        self._pen.polygon([spot(*point) for point in snow], fill="#f3eaf4")
        for across, down, length in ((0.6, 0.73, 0.2), (0.64, 0.78, 0.13), (0.57, 0.84, 0.25), (0.66, 0.9, 0.1)):
            self._pen.line([spot(across, down), spot(across + length, down)], "#ffd9a0", 2 * _FACTOR)
        self._pen.rectangle([*spot(0, 0), *spot(1, 1)], outline="#151515", width=_FACTOR)

    def _at(self, point: Point) -> Point:
        return (point[0] - self._left) * _FACTOR, (point[1] - self._top) * _FACTOR


def _bezier(points: tuple[Point, Point, Point, Point], t: float) -> Point:
    parts = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    return (
        sum(part * point[0] for part, point in zip(parts, points, strict=True)),
        sum(part * point[1] for part, point in zip(parts, points, strict=True)),
    )


def _mixed(one: str, other: str, share: float) -> str:
    """Mix two colours; `share` is that of the first."""
    channels = ((int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a * share + b * (1 - share)):02x}" for a, b in channels)
