"""Draw a scene: place its things, and paint each pixel by the share of it that they cover."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crdiff_export.errors import CrdiffError
from crdiff_export.models.demo.scenes import BACKGROUNDS, COLOURS, Scene, Thing

SMALLEST = 32
# All lengths are fractions of the picture's smaller side; the size of a thing is the side of the square around it.
DIAMETERS = {"small": (0.24, 0.30), "large": (0.50, 0.60), "counted": (0.27, 0.31), "related": (0.30, 0.36)}
MARGIN = 0.05
GAP = 0.06
SLANT = 0.4  # the largest slant of a relation against its axis: a tangent, 22 degrees


@dataclass(frozen=True, slots=True)
class ThingAtPosition:
    """A thing and the square around it: its centre and half of its side, in pixels."""

    thing: Thing
    x: float
    y: float
    half: float


def draw(scene: Scene, width: int, height: int, rng: np.random.Generator | int) -> NDArray[np.uint8]:
    """Draw a scene. Nothing touches the border or another thing, and the relation holds clearly.

    Args:
        scene: The scene.
        width: Pixels.
        height: Pixels.
        rng: A generator, or the seed of one, that decides the positions.

    Returns:
        uint8 [height, width, 3], RGB.
    """
    picture: NDArray[np.uint8] = draw_batch((scene,), width, height, rng)[0]
    return picture


def draw_batch(scenes: Sequence[Scene], width: int, height: int, rng: np.random.Generator | int) -> NDArray[np.uint8]:
    """Draw several scenes.

    Args:
        scenes: The scenes.
        width: Pixels.
        height: Pixels.
        rng: A generator, or the seed of one, that decides the positions.

    Returns:
        uint8 [scenes, height, width, 3], RGB.

    Raises:
        CrdiffError: The picture is too small for a scene.
    """
    if min(width, height) < SMALLEST:
        raise CrdiffError(
            f"{width}x{height} is too small for a scene", f"Use at least {SMALLEST} pixels on either side."
        )
    generator = np.random.default_rng(rng)
    pictures = np.empty((len(scenes), height, width, 3), np.uint8)
    for picture, scene in zip(pictures, scenes, strict=True):
        picture[:] = BACKGROUNDS[scene.background]
        for placed in place(scene, width, height, generator):
            _paint(picture, placed)
    return pictures


def place(scene: Scene, width: int, height: int, rng: np.random.Generator) -> list[ThingAtPosition]:
    """Place the things of a scene.

    Args:
        scene: The scene.
        width: Pixels.
        height: Pixels.
        rng: Decides the positions.

    Returns:
        The things with their positions, in the order of `scene.things`.
    """
    side = min(width, height)
    things = scene.things
    low, high = DIAMETERS[scene.first.size or scene.kind]
    halves = (rng.uniform(low, high, len(things)) * side / 2).tolist()
    if scene.kind == "related":
        centres = _related(scene.relation, (width, height), halves, rng)
    else:
        centres = _scattered((width, height), halves, rng)
    return [ThingAtPosition(thing, x, y, half) for thing, (x, y), half in zip(things, centres, halves, strict=True)]


def _related(
    relation: str, size: tuple[int, int], halves: list[float], rng: np.random.Generator
) -> list[tuple[float, float]]:
    """Return two centres, one behind the other along the relation's axis and nearly level across it."""
    side = min(size)
    axis = 0 if relation in ("left of", "right of") else 1
    swapped = relation in ("right of", "below")
    a, b = reversed(halves) if swapped else halves
    start, end, across, shift = rng.random(4).tolist()
    start, end = min(start, end), max(start, end)
    apart = a + b + GAP * side
    slack = size[axis] - 2 * MARGIN * side - a - b - apart
    near = MARGIN * side + a + slack * start
    far = near + apart + slack * (end - start)

    def level(half: float) -> tuple[float, float]:
        return MARGIN * side + half, size[1 - axis] - MARGIN * side - half

    low, high = level(a)
    first = low + (high - low) * across
    low, high = level(b)
    second = min(max(first + SLANT * (far - near) * (2 * shift - 1), low), high)
    centres = [(near, first), (far, second)] if axis == 0 else [(first, near), (second, far)]
    return centres[::-1] if swapped else centres


def _scattered(size: tuple[int, int], halves: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Return random centres with a gap between the squares around the things."""
    side = min(size)
    half = np.array(halves)[:, None]
    low = MARGIN * side + half
    high = np.array(size) - low
    first, second = np.triu_indices(len(halves), 1)
    apart = half[first, 0] + half[second, 0] + GAP * side
    while True:  # in the worst case, three things in a square, one try of 20 fits
        tries = low + (high - low) * rng.random((32 if len(halves) > 1 else 1, len(halves), 2))
        fits = (np.abs(tries[:, first] - tries[:, second]).max(-1) >= apart).all(-1)
        if fits.any():
            return [(x, y) for x, y in tries[fits.argmax()].tolist()]


def _paint(picture: NDArray[np.uint8], placed: ThingAtPosition) -> None:
    """Mix the thing's colour into the picture, by the share of each pixel that it covers."""
    height, width = picture.shape[:2]
    left, right = max(0, int(placed.x - placed.half) - 1), min(width, int(placed.x + placed.half) + 2)
    top, bottom = max(0, int(placed.y - placed.half) - 1), min(height, int(placed.y + placed.half) + 2)
    x = np.arange(left, right, dtype=np.float32)[None, :] + np.float32(0.5 - placed.x)
    y = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - placed.y)
    cover = np.clip(0.5 - distance(placed.thing.shape, x, y, placed.half), 0, 1)[..., None]
    part = picture[top:bottom, left:right]
    colour = np.array(COLOURS[placed.thing.colour], np.float32)
    part[:] = np.rint(part + (colour - part) * cover)


def distance(shape: str, x: NDArray[np.float32], y: NDArray[np.float32], half: float) -> NDArray[np.float32]:
    """Return how far points are outside of a shape around the origin.

    Args:
        shape: circle, square or triangle.
        x: float32, pixels right of the origin, broadcast with `y`.
        y: float32, pixels below the origin.
        half: Half of the side of the square around the shape, in pixels.

    Returns:
        float32, distances in pixels; negative inside the shape.
    """
    if shape == "circle":
        outside = np.hypot(x, y)
    elif shape == "square":
        outside = np.maximum(np.abs(x), np.abs(y))
    else:  # as wide as high: the sides of the triangle go two down for one across
        outside = np.maximum((2 * np.abs(x) - y - half) / 5**0.5 + half, y)
    return np.asarray(outside - half, np.float32)
