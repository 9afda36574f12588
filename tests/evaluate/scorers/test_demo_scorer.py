"""The judge of the demo's pictures: near 1 for the truth, low for what is wrong, near 0 for noise, at every size."""

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product
from statistics import mean

import numpy as np
import pytest
import scipy.ndimage
from numpy.typing import NDArray
from PIL import Image

from crdiff_export.evaluate.scorers import demo_scorer
from crdiff_export.evaluate.scorers.demo_scorer import judge
from crdiff_export.evaluate.scorers.score import Score
from crdiff_export.models.demo.drawing import draw, draw_batch
from crdiff_export.models.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    all_scenes,
    sample,
)

Picture = NDArray[np.uint8]
Damage = Callable[[Picture, np.random.Generator], Picture]

ALL = tuple(all_scenes())
SIZES = [(48, 48), (64, 64), (96, 64), (64, 96), (96, 96), (128, 128), (192, 64), (256, 256)]
SOME = sample(np.random.default_rng(0), ALL, 60)


def name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def judged(scenes: list[Scene], width: int, height: int, damage: Damage | None = None) -> list[Score]:
    rng = np.random.default_rng(2)
    pictures: Iterator[Picture] = iter(draw_batch(scenes, width, height, rng))
    return [judge(damage(p, rng) if damage else p, s) for p, s in zip(pictures, scenes, strict=True)]


def values(scores: list[Score]) -> list[float]:
    return [score.value for score in scores]


def rights(scores: list[Score]) -> float:
    return mean(score.parts["right"] for score in scores)


def bytes_of(values: NDArray[np.float64]) -> Picture:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def blurred(sigma: float) -> Damage:
    return lambda picture, _: bytes_of(scipy.ndimage.gaussian_filter(picture.astype(float), sigma, axes=(0, 1)))


def noisy(deviation: float) -> Damage:
    return lambda picture, rng: bytes_of(picture + rng.normal(0, deviation, picture.shape))


def shifted(deviation: float) -> Damage:
    return lambda picture, rng: bytes_of(picture + rng.normal(0, deviation, 3))


def uneven(deviation: float) -> Damage:
    """Smooth errors, one number for 8x8 pixels, as a decoder makes them."""

    def damage(picture: Picture, rng: np.random.Generator) -> Picture:
        height, width = picture.shape[:2]
        coarse = rng.normal(0, deviation, (3, height // 8, width // 8)).astype(np.float32)
        fine = [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in coarse]
        return bytes_of(picture + np.stack(fine, -1).astype(float))

    return damage


def jpeg(picture: Picture, _: np.random.Generator) -> Picture:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "jpeg", quality=75)
    return np.asarray(Image.open(stream))


def decoded(picture: Picture, rng: np.random.Generator) -> Picture:
    for damage in (blurred(0.8), shifted(5), uneven(6), noisy(6)):
        picture = damage(picture, rng)
    return picture


# The truth.


@pytest.mark.parametrize("size", SIZES, ids=name)
def test_the_truth_is_right(size: tuple[int, int]) -> None:
    step = 64 if size == (256, 256) else 24
    scores = judged(list(ALL[SIZES.index(size) :: step]), *size)
    assert mean(values(scores)) > 0.995
    assert min(values(scores)) > 0.95
    assert rights(scores) == 1


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=name)
def test_the_truth_of_every_scene_is_right(size: tuple[int, int]) -> None:
    scores = judged(list(ALL), *size)
    assert mean(values(scores)) > 0.98
    assert rights(scores) >= 0.99


@pytest.mark.parametrize("size", [(48, 48), (96, 64)], ids=name)
@pytest.mark.parametrize(
    "damage",
    [blurred(0.7), blurred(1), jpeg, noisy(10), shifted(8), uneven(10), decoded],
    ids=["blur 0.7", "blur 1", "JPEG 75", "noise", "another white", "uneven", "all of it"],
)
def test_a_decoders_errors_are_forgiven(damage: Damage, size: tuple[int, int]) -> None:
    scores = judged(SOME, *size, damage)
    assert rights(scores) >= 0.95
    assert mean(values(scores)) > 0.95


def test_a_part_is_only_there_where_the_scene_has_it() -> None:
    for kind, parts in {"single": {"size"}, "counted": set(), "related": {"relation"}}.items():
        scene = next(scene for scene in ALL if scene.kind == kind)
        score = judge(draw(scene, 64, 64, 0), scene)
        assert score.parts.keys() == {"right", "background", "count", "colours", "shapes", "purity", *parts}


# What is wrong.


def others(scene: Scene) -> Iterator[tuple[str, Scene]]:
    """What differs from the scene in one thing, and which part must say so."""
    first = scene.first
    shape = SHAPES[SHAPES.index(first.shape) - 1]
    colour = list(COLOURS)[list(COLOURS).index(first.colour) - 1]
    if scene.second != replace(first, shape=shape):
        yield "shapes", replace(scene, first=replace(first, shape=shape))
    if scene.second != replace(first, colour=colour):
        yield "colours", replace(scene, first=replace(first, colour=colour))
    yield "background", replace(scene, background=next(b for b in BACKGROUNDS if b != scene.background))
    if scene.second:
        for relation in RELATIONS:
            if relation != scene.relation:
                yield "relation", replace(scene, relation=relation)
        yield "count", Scene(scene.background, Thing(first.shape, first.colour, "small"))
    elif first.size:
        yield "size", replace(scene, first=replace(first, size="small" if first.size == "large" else "large"))
        yield "count", replace(scene, first=replace(first, size="", count=2))
    else:
        yield "count", replace(scene, first=replace(first, count=5 - first.count))
        yield "count", replace(scene, first=replace(first, size="small", count=1))


@pytest.mark.parametrize("size", [(48, 48), (96, 64)], ids=name)
def test_one_wrong_attribute_is_wrong(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    wrong: dict[str, list[float]] = {}
    for scene in SOME[:40]:
        truth = judge(draw(scene, *size, rng), scene).value
        for part, other in others(scene):
            score = judge(draw(other, *size, rng), scene)
            assert not score.parts["right"], (scene.prompt, other.prompt)
            assert score.parts[part] < 0.7, (scene.prompt, other.prompt)
            assert truth - score.value > 0.06, (scene.prompt, other.prompt)
            wrong.setdefault(part, []).append(score.value)
    assert wrong.keys() == {"shapes", "colours", "background", "relation", "count", "size"}
    assert all(mean(found) < 0.9 for found in wrong.values())


def test_attributes_swapped_between_the_things_are_wrong() -> None:
    scene = Scene.parse("a red circle left of a blue square on white")
    for prompt in ("a blue circle left of a red square on white", "a blue square left of a red circle on white"):
        score = judge(draw(Scene.parse(prompt), 64, 64, 0), scene)
        assert not score.parts["right"]
        assert score.parts["relation"] == 0 or score.parts["shapes"] == 0


def test_one_thing_too_many_is_wrong() -> None:
    scene = Scene.parse("a red circle left of a blue square on white")
    wide, more = draw(scene, 128, 64, 0), draw(Scene.parse("a small green circle on white"), 64, 64, 0)
    score = judge(np.concatenate([wide, more], 1), scene)
    assert not score.parts["right"]
    assert score.parts["count"] == 0.5
    assert score.parts["colours"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("size", [(48, 48), (96, 64)], ids=name)
def test_any_other_scene_scores_low(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    scores = [judge(draw(other, *size, rng), scene) for scene, other in pairwise(SOME)]
    assert mean(values(scores)) < 0.45
    assert rights(scores) == 0


NOISES: dict[str, Damage] = {
    "uniform": lambda picture, rng: rng.integers(0, 256, picture.shape, dtype=np.uint8),
    "grey": lambda picture, rng: noisy(60)(np.full_like(picture, 128), rng),
    "smooth": lambda picture, rng: uneven(80)(np.full_like(picture, 128), rng),
    "two values": lambda picture, rng: np.where(rng.random(picture.shape) < 0.5, 15, 245).astype(np.uint8),
}


@pytest.mark.parametrize("size", SIZES[::3], ids=name)
@pytest.mark.parametrize("noise", NOISES)
def test_noise_scores_next_to_nothing(noise: str, size: tuple[int, int]) -> None:
    scores = judged(SOME[:30], *size, NOISES[noise])
    assert mean(values(scores)) < 0.05
    assert max(values(scores)) < 0.2
    assert rights(scores) == 0


def test_an_empty_ground_gets_its_own_part_and_no_more() -> None:
    for scene, (background, colour) in product(SOME[:20], BACKGROUNDS.items()):
        score = judge(np.full((64, 96, 3), colour, np.uint8), scene)
        asked = float(background == scene.background)
        had = sum(weight for part, weight in demo_scorer.WEIGHTS.items() if part in score.parts)
        assert score.parts["background"] == asked
        assert score.value == pytest.approx(asked * demo_scorer.WEIGHTS["background"] / had)
        assert not score.parts["right"]


@pytest.mark.parametrize(
    ("damage", "amounts"),
    [(blurred, (0.5, 1, 1.5, 2, 3, 4)), (noisy, (5, 10, 20, 30, 45, 80)), (uneven, (5, 10, 20, 40, 80))],
    ids=["blur", "noise", "uneven"],
)
def test_more_damage_scores_less(damage: Callable[[float], Damage], amounts: tuple[float, ...]) -> None:
    found = [mean(values(judged(SOME[:30], 64, 64, damage(amount)))) for amount in amounts]
    assert found == sorted(found, reverse=True)
    assert found[0] - found[-1] > 0.2


def test_specks_are_no_things_but_not_pure() -> None:
    scene = Scene.parse("two red circles on white")
    picture = draw(scene, 64, 64, 0)
    clean = judge(picture, scene)
    for x in range(1, 64, 9):
        picture[1:3, x : x + 2] = COLOURS["blue"]
    score = judge(picture, scene)
    assert score.parts["right"]
    assert score.parts["count"] == 1
    assert score.parts["purity"] < clean.parts["purity"] - 0.02
    assert score.value < clean.value


# How things are found.


def test_components_are_those_of_scipy() -> None:
    rng = np.random.default_rng(6)
    for classes in (2, 3, 9):
        grid = rng.integers(0, classes, (23, 31))
        components = demo_scorer._components(grid)
        expected = np.zeros_like(grid)
        for value in range(classes):
            numbers, _ = scipy.ndimage.label(grid == value)
            expected += np.where(numbers, numbers + expected.max(), 0)
        pairs = set(zip(components.ravel().tolist(), expected.ravel().tolist(), strict=True))
        assert len(pairs) == len(np.unique(components)) == len(np.unique(expected))
