"""How much of a demo scene is in a picture, exactly: found by segmentation, without a model.

Each pixel gets the nearest colour of the palette, or none. The most frequent of the background's colours is the ground;
what is connected, of one other colour, thick and large enough, is a thing. The scene's things are matched with those
found, and each part is graded from 0 to 1. The score is the mean of the parts that the scene has, by their `WEIGHTS`.

background  share of the picture around the things that is ground, and 0 where the ground has the wrong colour
count       1 - (things missing or too many) / (things asked for)
colours     share of the things asked for that have their colour
shapes      how well each thing's mask fits the shape asked for, and 0 where another shape fits better
relation    1 where the first is seen from the second within 35 degrees of the direction asked for, 0 from 60 degrees on
size        the diameter against the smaller side of the picture, where small or large was asked for
purity      1 - (blurred edges and stray pixels) / (area of the things), times how near the colours are to the
            palette, times the share of things that are like those asked for in colour or shape

All but the first are less where there is little ground: nothing in a noise is a thing. All but the first two are less
where there are more things than were asked for, in proportion, so that a crowd does not hit by chance.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from math import atan2, degrees, sqrt

import numpy as np
from numpy.typing import NDArray

from crdiff_export.models.demo.drawing import distance
from crdiff_export.models.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing

WEIGHTS = {
    "background": 0.10,
    "count": 0.15,
    "colours": 0.25,
    "shapes": 0.20,
    "relation": 0.20,
    "size": 0.20,
    "purity": 0.10,
}
# What each part that the scene has must be for the picture to be right as a whole.
ENOUGH = {"background": 0.85, "count": 1.0, "colours": 1.0, "relation": 0.5, "size": 0.5, "purity": 0.1}
FITS = 0.5  # and what the worst of the shapes must be

PALETTE = (*BACKGROUNDS, *COLOURS)
NOTHING = len(PALETTE)
REACH = 60.0  # in RGB: farther than this from the whole palette, a pixel has no colour
SPECK = 0.008  # of the smaller side squared: less is not a thing; the smallest that is drawn has 0.029
CORE = 0.25  # share of a thing that lies within it: less is a rim where two colours mix
EDGE = 0.8  # pixels of blurred edge that are no fault; a rendered picture has 0.5, and less where contrast is low
CONSIDERED = 6  # found things to match with those asked for, the largest ones
COVER = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}  # of the square around the shape


@dataclass(frozen=True, slots=True)
class Verdict:
    """How right a picture is, as a whole and in its parts; a part that its scene does not have is None."""

    score: float
    right: bool
    background: float
    count: float
    colours: float
    shapes: float
    relation: float | None
    size: float | None
    purity: float


@dataclass(frozen=True, slots=True)
class Found:
    """Something in a picture that may be a thing of the scene: its pixels, and its area without holes and hairs."""

    colour: str
    pixels: int
    area: int
    x: float
    y: float
    fits: dict[str, float]


def judge(image: NDArray[np.uint8], scene: Scene) -> Verdict:
    """How right the picture, [height, width, 3], is for the scene."""
    height, width = image.shape[:2]
    side = min(width, height)
    classes, far = _classify(image)
    histogram = np.bincount(classes.ravel(), minlength=NOTHING + 1)
    ground = int(histogram[: len(BACKGROUNDS)].argmax())
    found = _find(classes, ground, SPECK * side * side)
    asked = scene.things
    matched = _match(asked, scene.relation, found)
    pairs = [(thing, one) for thing, one in zip(asked, matched, strict=True) if one]
    colours = [float(thing.colour == one.colour) for thing, one in pairs]
    fits = [one.fits[thing.shape] for thing, one in pairs]
    alike = sum(1 for colour, fit in zip(colours, fits, strict=True) if colour or fit) / len(asked)

    covered = sum(one.pixels for one in found)
    empty = int(histogram[ground])
    edges = int(histogram[NOTHING])
    specks = height * width - covered - empty - edges
    stray = max(0.0, edges - EDGE * sum(4 * sqrt(one.area) for one in found)) + specks
    calm = empty / max(1.0, empty + stray)
    real = _ramp(calm, 0.1, 0.6)
    each = real * min(1, len(asked) / max(1, len(found)))
    clean = max(0.0, 1 - stray / covered) if covered else 0.0
    parts = {
        "background": calm if PALETTE[ground] == scene.background else 0.0,
        "count": real * max(0.0, 1 - abs(len(found) - len(asked)) / len(asked)),
        "colours": each * sum(colours) / len(asked),
        "shapes": each * sum(fits) / len(asked),
        "purity": each * clean * _ramp(far, REACH, 10) * alike,
    }
    if scene.relation:
        parts["relation"] = each * _relation(scene.relation, matched) if alike == 1 else 0.0
    if scene.first.size:
        parts["size"] = each * _size(scene.first, matched[0], side)
    right = all(parts[name] >= least for name, least in ENOUGH.items() if name in parts) and min(fits) >= FITS
    score = sum(WEIGHTS[name] * part for name, part in parts.items()) / sum(WEIGHTS[name] for name in parts)
    return Verdict(
        score=score,
        right=right,
        background=parts["background"],
        count=parts["count"],
        colours=parts["colours"],
        shapes=parts["shapes"],
        relation=parts.get("relation"),
        size=parts.get("size"),
        purity=parts["purity"],
    )


def judge_prompts(images: Iterable[NDArray[np.uint8]], prompts: Sequence[str]) -> list[Verdict]:
    """A verdict for each picture and its prompt."""
    return [judge(image, Scene.parse(prompt)) for image, prompt in zip(images, prompts, strict=True)]


def _ramp(value: float, worst: float, best: float) -> float:
    """From 0 at the worst value to 1 at the best."""
    return min(1.0, max(0.0, (value - worst) / (best - worst)))


@cache
def _palette() -> NDArray[np.float32]:
    return np.array([*BACKGROUNDS.values(), *COLOURS.values()], np.float32)


def _classify(image: NDArray[np.uint8]) -> tuple[NDArray[np.intp], float]:
    """The nearest colour's number for each pixel or NOTHING, and how far those with a colour are from it on average."""
    pixels = image.reshape(-1, 3).astype(np.float32)
    palette = _palette()
    distances = (palette**2).sum(1) - 2 * (pixels @ palette.T)  # squared, less the pixel's own square
    nearest = distances.argmin(1)
    gap = np.sqrt(np.maximum(0, (pixels**2).sum(1) + distances[np.arange(len(pixels)), nearest]))
    near = gap <= REACH
    far = float(gap[near].mean()) if near.any() else REACH
    return np.where(near, nearest, NOTHING).reshape(image.shape[:2]), far


def _find(classes: NDArray[np.intp], ground: int, least: float) -> list[Found]:
    """All that may be a thing, the largest first."""
    labels = _components(classes)
    areas = np.bincount(labels.ravel())
    found = []
    for label in np.flatnonzero(areas >= least).tolist():
        mask = labels == label
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, left = int(rows[0]), int(columns[0])
        colour = int(classes[top, left + int(mask[top, left:].argmax())])
        if colour in (ground, NOTHING):
            continue
        crop = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 2)
        inner = crop[1:-1, 1:-1] & crop[:-2, 1:-1] & crop[2:, 1:-1] & crop[1:-1, :-2] & crop[1:-1, 2:]
        if inner.sum() >= CORE * areas[label]:
            found.append(_measure(PALETTE[colour], crop, left - 2, top - 2))
    return sorted(found, key=lambda one: -one.area)


def _components(classes: NDArray[np.intp]) -> NDArray[np.intp]:
    """A number for each set of pixels of one class that touch side to side."""
    starts = np.ones(classes.shape, bool)
    starts[:, 1:] = classes[:, 1:] != classes[:, :-1]
    runs = starts.ravel().cumsum().reshape(classes.shape) - 1
    joined = classes[1:] == classes[:-1]
    first = joined.copy()  # once for each pair of runs is enough
    first[:, 1:] &= ~joined[:, :-1] | starts[1:, 1:] | starts[:-1, 1:]
    above, below = runs[:-1][first], runs[1:][first]
    parent = np.arange(int(runs[-1, -1]) + 1)
    while True:
        one, other = parent[above], parent[below]
        apart = one != other
        if not apart.any():
            return np.asarray(parent[runs])
        np.minimum.at(parent, np.maximum(one, other)[apart], np.minimum(one, other)[apart])
        while (parent[parent] != parent).any():
            parent = parent[parent]


def _measure(colour: str, mask: NDArray[np.bool_], left: int, top: int) -> Found:
    """Fill pinholes, shave hairs, and lay each shape of the same area and centre over what is left."""
    padded = np.pad(mask, 1).astype(np.uint8)
    pixels = int(mask.sum())
    three = padded[:-2] + padded[1:-1] + padded[2:]
    mask = (three[:, :-2] + three[:, 1:-1] + three[:, 2:]) >= 4
    area = int(mask.sum())
    height, width = mask.shape
    x = np.arange(width, dtype=np.float32)
    y = np.arange(height, dtype=np.float32)
    middle_x, middle_y = float(mask.sum(0) @ x) / area, float(mask.sum(1) @ y) / area
    overlaps = {}
    for shape in SHAPES:
        half = sqrt(area / COVER[shape]) / 2
        lower = half / 3 if shape == "triangle" else 0.0  # its centre of mass below the middle of its height
        ideal = distance(shape, (x - middle_x)[None, :], (y - middle_y + lower)[:, None], half) <= 0
        both = int((ideal & mask).sum())
        overlaps[shape] = both / (int(ideal.sum()) + area - both)
    best = max(overlaps, key=lambda shape: overlaps[shape])
    fits = {shape: _ramp(overlap, 0.70, 0.88) if shape == best else 0.0 for shape, overlap in overlaps.items()}
    return Found(colour, pixels, area, left + middle_x, top + middle_y, fits)


def _match(things: Sequence[Thing], relation: str, found: Sequence[Found]) -> tuple[Found | None, ...]:
    """What was found for each thing asked for: by colour, then by shape, then by place."""
    choices: list[Found | None] = [*found[:CONSIDERED]]
    choices += [None] * (len(things) - len(choices))

    def gain(matched: tuple[Found | None, ...]) -> float:
        alike = sum(
            2 * (thing.colour == one.colour) + one.fits[thing.shape]
            for thing, one in zip(things, matched, strict=True)
            if one
        )
        return alike + (0.5 * _relation(relation, matched) if relation else 0)

    return max(permutations(choices, len(things)), key=gain)


def _relation(relation: str, matched: Sequence[Found | None]) -> float:
    """How clearly the first stands so to the second; 0 unless both are there."""
    first, second = matched
    if not first or not second:
        return 0.0
    right, down = first.x - second.x, first.y - second.y
    along, across = {
        "left of": (-right, down),
        "right of": (right, down),
        "above": (-down, right),
        "below": (down, right),
    }[relation]
    return _ramp(degrees(atan2(abs(across), along)), 60, 35)


def _size(asked: Thing, found: Found | None, side: int) -> float:
    """How clearly it is small or large: at most 0.30 or at least 0.50 of the side is drawn."""
    if not found:
        return 0.0
    diameter = sqrt(found.area / COVER[asked.shape]) / side
    return _ramp(diameter, 0.46, 0.34) if asked.size == "small" else _ramp(diameter, 0.34, 0.46)
