"""The demo's scenes: a language that parses back, sets that do not overlap, and pictures that show what it says."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdiff_export.errors import CrdiffError
from crdiff_export.models.demo import drawing, scenes
from crdiff_export.models.demo.drawing import draw, draw_batch
from crdiff_export.models.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    sample,
    split,
)
from tests.support.messages import raises

ALL = tuple(scenes.all_scenes())
SIZES = [(32, 32), (48, 48), (64, 64), (96, 64), (192, 64), (64, 192), (512, 512)]


def name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


# The language.


def test_a_prompt_for_each_kind() -> None:
    assert Scene("white", Thing("circle", "red", "large")).prompt == "a large red circle on white"
    assert Scene("grey", Thing("square", "blue", count=3)).prompt == "three blue squares on grey"
    related = Scene("black", Thing("circle", "orange"), "left of", Thing("triangle", "orange"))
    assert related.prompt == "an orange circle left of an orange triangle on black"


def test_every_prompt_parses_back_and_is_unique() -> None:
    assert [Scene.parse(scene.prompt) for scene in ALL] == list(ALL)
    assert len({scene.prompt for scene in ALL}) == len(set(ALL)) == len(ALL) == 3888


def test_the_vocabulary_is_small_and_all_of_it_is_used() -> None:
    used = {word for scene in ALL for word in scene.prompt.split()}
    assert tuple(sorted(used)) == scenes.vocabulary()
    assert len(used) == 27


@given(st.lists(st.sampled_from(scenes.vocabulary()), max_size=12), st.sampled_from(ALL), st.integers(0, 12))
def test_nothing_else_parses(words: list[str], scene: Scene, cut: int) -> None:
    mixed = scene.prompt.split()
    mixed[cut : cut + 1] = words[:2]
    for prompt in (" ".join(words), " ".join(mixed)):
        try:
            parsed = Scene.parse(prompt)
        except CrdiffError as error:
            assert error.hint.startswith("Write it like")  # noqa: PT017  # the other outcome is as good
        else:
            assert parsed in ALL
            assert parsed.prompt == prompt


@pytest.mark.parametrize(
    ("prompt", "key"),
    [
        ("a red fox on a sofa", "fox, sofa"),
        ("", ""),
        ("a red circle on white", ""),  # on its own it has a size
        ("a small red circle on white ", ""),
        ("a orange circle left of a red circle on white", ""),
        ("two red circle on white", ""),
        ("a red circle left of a red circle on white", ""),
    ],
)
def test_a_prompt_outside_of_the_language(prompt: str, key: str) -> None:
    with raises(CrdiffError, f'"{prompt}"', key):
        Scene.parse(prompt)
    Scene.parse(scenes.EXAMPLE)


# What is trained on, and what is not.


def test_held_out_combinations_are_never_trained_on() -> None:
    train, held_out = split()
    assert sorted([*train, *held_out]) == sorted(ALL)
    assert 0.08 < len(held_out) / len(ALL) < 0.14
    seen = {scene.combination for scene in train}
    assert not seen & {scene.combination for scene in held_out}
    for scene in held_out:
        assert not {Scene(b, scene.first, scene.relation, scene.second).combination for b in BACKGROUNDS} & seen
        if scene.second:  # nor with its things named the other way round
            assert Scene(scene.background, scene.second, RELATIONS[scene.relation], scene.first) not in train
    assert {scene.kind for scene in held_out} == {"single", "counted", "related"}


def test_every_word_and_every_coloured_shape_is_trained_on() -> None:
    train, _ = split()
    assert {word for scene in train for word in scene.prompt.split()} == set(scenes.vocabulary())
    kinds = Counter((thing.shape, thing.colour) for scene in train for thing in scene.things)
    assert len(kinds) == len(SHAPES) * len(COLOURS)
    assert min(kinds.values()) > 100


def test_the_share_is_asked_for() -> None:
    assert split(0.0)[1] == ()
    assert set(split(0.1)[1]) < set(split(0.3)[1])


def test_a_sample_has_the_kinds_in_their_shares() -> None:
    drawn = sample(np.random.default_rng(0), ALL, 3000)
    kinds = Counter(scene.kind for scene in drawn)
    assert {kind: round(count / 3000, 1) for kind, count in kinds.items()} == scenes.SHARES
    assert drawn == sample(np.random.default_rng(0), ALL, 3000)
    alone = [scene for scene in ALL if scene.kind == "single"]
    assert {scene.kind for scene in sample(np.random.default_rng(0), alone, 9)} == {"single"}


# The pictures.


@pytest.mark.parametrize("size", SIZES, ids=name)
def test_things_are_apart_and_inside_and_related(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    side = min(size)
    for scene in ALL[::11]:
        placed = drawing.place(scene, *size, rng)
        assert tuple(one.thing for one in placed) == scene.things
        for one in placed:
            assert 0.04 * side < min(one.x - one.half, one.y - one.half)
            assert one.x + one.half < size[0] - 0.04 * side
            assert one.y + one.half < size[1] - 0.04 * side
        for one, other in combinations(placed, 2):
            gap = max(abs(one.x - other.x), abs(one.y - other.y)) - one.half - other.half
            assert gap > 0.05 * side
        if scene.relation:
            dx, dy = placed[0].x - placed[1].x, placed[0].y - placed[1].y
            along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[scene.relation]
            across = dy if scene.relation in ("left of", "right of") else dx
            assert along > 2 * abs(across)


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_mixed_by_what_a_pixel_has_of_the_shape(shape: str) -> None:
    """Against 16x16 points in every pixel, each inside or not."""
    scene = Scene("black", Thing(shape, "yellow", "small"))
    (placed,) = drawing.place(scene, 48, 48, np.random.default_rng(3))
    picture = draw(scene, 48, 48, 3).astype(float)
    ground, colour = np.array(BACKGROUNDS["black"]), np.array(COLOURS["yellow"])
    points = (np.arange(48 * 16) + 0.5) / 16
    x, y = (points[None, :] - placed.x) / placed.half, (points[:, None] - placed.y) / placed.half
    inside = {
        "circle": x**2 + y**2 <= 1,
        "square": (abs(x) <= 1) & (abs(y) <= 1),
        "triangle": (abs(y) <= 1) & (abs(x) <= (y + 1) / 2),
    }[shape]
    cover = inside.reshape(48, 16, 48, 16).mean((1, 3))
    shown = ((picture - ground) / (colour - ground)).mean(-1)
    assert np.abs(shown - cover).max() < 0.3  # at corners; a distance is not an area
    assert np.abs(shown - cover).mean() < 0.003


@pytest.mark.parametrize("size", SIZES, ids=name)
def test_a_picture_has_its_colours_and_little_else(size: tuple[int, int]) -> None:
    for scene in ALL[::997]:
        picture = draw(scene, *size, 5)
        assert picture.shape == (size[1], size[0], 3)
        assert picture.dtype == np.uint8
        flat = picture.reshape(-1, 3)
        asked = {BACKGROUNDS[scene.background], *(COLOURS[thing.colour] for thing in scene.things)}
        pure = sum((flat == np.array(colour)).all(1).mean() for colour in asked)
        assert 1 - pure < 6 / min(size)
        assert all((flat == np.array(colour)).all(1).any() for colour in asked)


def test_a_seed_decides_and_a_batch_is_the_same() -> None:
    chosen = ALL[::500]
    one, other = (np.random.default_rng(7) for _ in range(2))
    batch = draw_batch(chosen, 96, 64, one)
    assert batch.shape == (len(chosen), 64, 96, 3)
    assert np.array_equal(batch, np.stack([draw(scene, 96, 64, other) for scene in chosen]))
    assert np.array_equal(draw(chosen[0], 64, 64, 7), draw(chosen[0], 64, 64, 7))
    assert not np.array_equal(draw(chosen[0], 64, 64, 7), draw(chosen[0], 64, 64, 8))


def test_a_picture_too_small_for_its_things() -> None:
    with pytest.raises(CrdiffError, match="200x31 is too small for a scene"):
        draw(ALL[0], 200, 31, 0)


def test_no_two_colours_are_near_each_other() -> None:
    palette = np.array([*BACKGROUNDS.values(), *COLOURS.values()])
    apart = min(float(np.linalg.norm(one - other)) for one, other in combinations(palette, 2))
    assert apart > 97
