"""How much of a demo scene is in a picture, exactly: found by segmentation, without a model.

Each pixel gets the nearest colour of the palette, or none. The most frequent of the background's colours is the ground;
a connected patch of one other colour that is thick and large enough is a thing. The scene's things are matched with
these patches, and each part is graded from 0 to 1. The score is the mean of the parts that the scene has, by `WEIGHTS`.

background  share of the picture around the things that is ground, and 0 where the ground has the wrong colour
count       1 - (things missing or too many) / (things in the scene)
colours     share of the scene's things that have their colour
shapes      how well each thing's mask fits its shape, and 0 where another shape fits better
relation    1 where the first is seen from the second within 35 degrees of the scene's direction, 0 from 60 degrees on
size        the diameter against the smaller side of the picture, where the scene says small or large
purity      1 - (blurred edges and stray pixels) / (area of the things), times how near the colours are to the
            palette, times the share of things that are like the scene's in colour or shape

All but the first are less where there is little ground: nothing in a noise is a thing. All but the first two are less
where there are more things than in the scene, in proportion, so that a crowd does not hit by chance.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from math import atan2, degrees, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from crdiff_export.bake.metadata import tool_version
from crdiff_export.errors import CrdiffError, ScorerError
from crdiff_export.evaluate.scorers.score import Score, Scorer
from crdiff_export.models.demo import drawing, scenes
from crdiff_export.models.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing

if TYPE_CHECKING:
    from PIL.Image import Image

WEIGHTS: Final = {
    "background": 0.10,
    "count": 0.15,
    "colours": 0.25,
    "shapes": 0.20,
    "relation": 0.20,
    "size": 0.20,
    "purity": 0.10,
}
# What each part that the scene has must be for the picture to be right as a whole.
ENOUGH: Final = {"background": 0.85, "count": 1.0, "colours": 1.0, "relation": 0.5, "size": 0.5, "purity": 0.1}
FITS = 0.5  # and what the worst of the shapes must be

PALETTE: Final = (*BACKGROUNDS, *COLOURS)
NOTHING = len(PALETTE)
REACH = 60.0  # in RGB: farther than this from the whole palette, a pixel has no colour
SPECK = 0.008  # of the smaller side squared: less is not a thing; the smallest that is drawn has 0.029
CORE = 0.25  # share of a thing that lies within it: less is a rim where two colours mix
EDGE = 0.8  # pixels of blurred edge that are no fault; a rendered picture has 0.5, and less where contrast is low
CONSIDERED = 6  # patches to match with the scene's things, the largest ones
COVER: Final = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}  # of the square around the shape


class DemoScorer:
    """Scores the demo models' pictures; its parts are those that the scene has, and `right`, which is 1 or 0."""

    name = "demo"

    def score(self, images: "Sequence[Image]", prompts: Sequence[str]) -> list[Score]:
        wanted = [_parse(prompt) for prompt in prompts]  # all of them before the first is judged
        return [judge(np.asarray(image.convert("RGB")), scene) for image, scene in zip(images, wanted, strict=True)]

    def fingerprint(self) -> dict[str, str]:
        """Return the hash of the program text that decides the score, and versions."""
        text = b"".join(Path(str(path)).read_bytes() for path in (__file__, scenes.__file__, drawing.__file__))
        digest = hashlib.sha256(text.replace(b"\r\n", b"\n")).hexdigest()
        return {"name": self.name, "judge": f"sha256:{digest}", "crdiff": tool_version(), "numpy": np.__version__}

    def close(self) -> None:
        """Do nothing: it holds nothing."""


def demo(device: str, dtype: str) -> Scorer:  # noqa: ARG001  every factory gets both
    """Make the scorer; it runs on the CPU and in its own precision, whatever is asked for."""
    return DemoScorer()


def _parse(prompt: str) -> Scene:
    try:
        return Scene.parse(prompt)
    except CrdiffError as error:
        raise ScorerError(f"demo: {error.message}", error.hint) from error


@dataclass(frozen=True, slots=True)
class Patch:
    """A connected patch of one colour that may be a thing: its pixels, and its area without holes and hairs."""

    colour: str
    pixels: int
    area: int
    x: float
    y: float
    fits: dict[str, float]


def judge(image: NDArray[np.uint8], scene: Scene) -> Score:
    """Judge how right a picture, [height, width, 3], is for a scene."""
    height, width = image.shape[:2]
    side = min(width, height)
    classes, far = _classify(image)
    histogram = np.bincount(classes.ravel(), minlength=NOTHING + 1)
    ground = int(histogram[: len(BACKGROUNDS)].argmax())
    patches = _find_patches(classes, ground, SPECK * side * side)
    things = scene.things
    matched = _match(things, scene.relation, patches)
    pairs = [(thing, patch) for thing, patch in zip(things, matched, strict=True) if patch]
    colours = [float(thing.colour == patch.colour) for thing, patch in pairs]
    fits = [patch.fits[thing.shape] for thing, patch in pairs]
    alike = sum(1 for colour, fit in zip(colours, fits, strict=True) if colour or fit) / len(things)

    covered = sum(patch.pixels for patch in patches)
    empty = int(histogram[ground])
    edges = int(histogram[NOTHING])
    specks = height * width - covered - empty - edges
    stray = max(0.0, edges - EDGE * sum(4 * sqrt(patch.area) for patch in patches)) + specks
    calm = empty / max(1.0, empty + stray)
    real = _ramp(calm, 0.1, 0.6)
    each = real * min(1, len(things) / max(1, len(patches)))
    clean = max(0.0, 1 - stray / covered) if covered else 0.0
    parts = {
        "background": calm if PALETTE[ground] == scene.background else 0.0,
        "count": real * max(0.0, 1 - abs(len(patches) - len(things)) / len(things)),
        "colours": each * sum(colours) / len(things),
        "shapes": each * sum(fits) / len(things),
        "purity": each * clean * _ramp(far, REACH, 10) * alike,
    }
    if scene.relation:
        parts["relation"] = each * _relation(scene.relation, matched) if alike == 1 else 0.0
    if scene.first.size:
        parts["size"] = each * _size(scene.first, matched[0], side)
    right = all(parts[name] >= least for name, least in ENOUGH.items() if name in parts) and min(fits) >= FITS
    value = sum(WEIGHTS[name] * part for name, part in parts.items()) / sum(WEIGHTS[name] for name in parts)
    return Score(value, {"right": float(right), **{name: float(parts[name]) for name in WEIGHTS if name in parts}})


def _ramp(value: float, worst: float, best: float) -> float:
    """Grade a value from 0 at the worst to 1 at the best."""
    return min(1.0, max(0.0, (value - worst) / (best - worst)))


@cache
def _palette() -> NDArray[np.float32]:
    return np.array([*BACKGROUNDS.values(), *COLOURS.values()], np.float32)


def _classify(image: NDArray[np.uint8]) -> tuple[NDArray[np.intp], float]:
    """Return the number of each pixel's nearest colour, or NOTHING, and the mean distance of the others from it."""
    pixels = image.reshape(-1, 3).astype(np.float32)
    palette = _palette()
    distances = (palette**2).sum(1) - 2 * (pixels @ palette.T)  # squared, less the pixel's own square
    nearest = distances.argmin(1)
    gap = np.sqrt(np.maximum(0, (pixels**2).sum(1) + distances[np.arange(len(pixels)), nearest]))
    near = gap <= REACH
    far = float(gap[near].mean()) if near.any() else REACH
    return np.where(near, nearest, NOTHING).reshape(image.shape[:2]), far


def _find_patches(classes: NDArray[np.intp], ground: int, least: float) -> list[Patch]:
    """Find all that may be a thing, the largest first."""
    labels = _components(classes)
    areas = np.bincount(labels.ravel())
    patches = []
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
            patches.append(_measure(PALETTE[colour], crop, left - 2, top - 2))
    return sorted(patches, key=lambda patch: -patch.area)


def _components(classes: NDArray[np.intp]) -> NDArray[np.intp]:
    """Number the sets of pixels of one class that touch side to side."""
    starts = np.ones(classes.shape, bool)
    starts[:, 1:] = classes[:, 1:] != classes[:, :-1]
    runs = starts.ravel().cumsum().reshape(classes.shape) - 1
    joined = classes[1:] == classes[:-1]
    first = joined.copy()  # once for each pair of runs is enough
    first[:, 1:] &= ~joined[:, :-1] | starts[1:, 1:] | starts[:-1, 1:]
    above, below = runs[:-1][first], runs[1:][first]
    parent = np.arange(int(runs[-1, -1]) + 1)
    while True:
        upper, lower = parent[above], parent[below]
        apart = upper != lower
        if not apart.any():
            return np.asarray(parent[runs])
        np.minimum.at(parent, np.maximum(upper, lower)[apart], np.minimum(upper, lower)[apart])
        while (parent[parent] != parent).any():
            parent = parent[parent]


def _measure(colour: str, mask: NDArray[np.bool_], left: int, top: int) -> Patch:
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
        ideal = drawing.distance(shape, (x - middle_x)[None, :], (y - middle_y + lower)[:, None], half) <= 0
        both = int((ideal & mask).sum())
        overlaps[shape] = both / (int(ideal.sum()) + area - both)
    best = max(overlaps, key=lambda shape: overlaps[shape])
    fits = {shape: _ramp(overlap, 0.70, 0.88) if shape == best else 0.0 for shape, overlap in overlaps.items()}
    return Patch(colour, pixels, area, left + middle_x, top + middle_y, fits)


def _match(things: Sequence[Thing], relation: str, patches: Sequence[Patch]) -> tuple[Patch | None, ...]:
    """Choose the patch of each thing: by colour, then by shape, then by place."""
    choices: list[Patch | None] = [*patches[:CONSIDERED]]
    choices += [None] * (len(things) - len(choices))

    def gain(matched: tuple[Patch | None, ...]) -> float:
        pairs = zip(things, matched, strict=True)
        alike = sum(2 * (thing.colour == patch.colour) + patch.fits[thing.shape] for thing, patch in pairs if patch)
        return alike + (0.5 * _relation(relation, matched) if relation else 0)

    return max(permutations(choices, len(things)), key=gain)


def _relation(relation: str, matched: Sequence[Patch | None]) -> float:
    """Grade how clearly the first stands so to the second; 0 unless both are there."""
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


def _size(thing: Thing, patch: Patch | None, side: int) -> float:
    """Grade how clearly it is small or large: at most 0.30 or at least 0.50 of the side is drawn."""
    if not patch:
        return 0.0
    diameter = sqrt(patch.area / COVER[thing.shape]) / side
    return _ramp(diameter, 0.46, 0.34) if thing.size == "small" else _ramp(diameter, 0.34, 0.46)
