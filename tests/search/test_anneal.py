"""Annealing takes the walk of the public code: compared with a plain retelling of it, draw by draw."""

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdiff_export.search.anneal import PAPER, AnnealingConstants, next_point, walk
from crdiff_export.search.space import Point, RatioSpace

PAPERS = RatioSpace(("down", "mid", "up"), 0.1, 0.8)
START: Point = (0.3, 0.3, 0.3)
Score = Callable[[Point], float]


def retold(score: Score, seed: int = 42) -> list[Point]:  # noqa: C901 - as it is told
    """The search of the paper, from its description: everything it evaluates, in order, as (down, mid, up)."""
    chance = random.Random(seed)
    tried: list[Point] = []

    def evaluate(ratios: dict[str, float]) -> float:
        tried.append((ratios["down"], ratios["mid"], ratios["up"]))
        return score(tried[-1])

    def neighbour(ratios: dict[str, float], temperature: float) -> dict[str, float]:
        name = chance.choice(["down", "up", "mid"])
        reach = max(0.005, 0.10 * (temperature / 0.1))
        moved = {**ratios, name: ratios[name] + chance.uniform(-reach, reach)}
        return {key: min(0.8, max(0.1, value)) for key, value in moved.items()}

    now = {"down": 0.3, "up": 0.3, "mid": 0.3}
    now_score = evaluate(now)
    record, record_score = now, now_score
    temperature, stale, heated, restarted, may_heat = 0.1, 0, 0, 0, False
    for _ in range(120):
        other = neighbour(now, temperature)
        other_score = evaluate(other)
        change = other_score - now_score
        accepted = True if change > 0 else chance.random() < math.exp(change / temperature)
        if accepted:
            now, now_score = other, other_score
        if accepted and now_score > record_score:
            record, record_score, stale = now, now_score, 0
            if record_score > 0.8:
                may_heat = True
        else:
            stale += 1
        temperature = temperature * 0.95
        if stale >= 24:
            if may_heat and heated < 3:
                heated, stale, temperature = heated + 1, 0, temperature * 1.5
            elif restarted < 2:
                restarted, stale = restarted + 1, 0
                now = neighbour(record, 0.1 * 3.0)
                now_score = evaluate(now)
                temperature = 0.1
                if now_score > record_score:
                    record, record_score = now, now_score
            else:
                break
    return tried


def walked(score: Score, seed: int = 42) -> list[Point]:
    path = walk(PAPERS, START, seed)
    point = next(path)
    tried = [point]
    while True:
        try:
            point = path.send(score(point))
        except StopIteration:
            return tried
        tried.append(point)


def bump(height: float, noise: float) -> Score:
    def score(point: Point) -> float:
        near = math.exp(-sum((at - 0.6) ** 2 for at in point) / 0.1)
        return height * near - 0.5 + random.Random(str(point)).gauss(0, noise)

    return score


SCORES: dict[str, Score] = {
    "never a better one": lambda point: -sum((at - 0.3) ** 2 for at in point),
    "all the same": lambda point: 0.0,
    "below the reheats": bump(1.0, 0.0),
    "noisy": bump(1.0, 0.2),
    "with reheats": bump(2.0, 0.05),
    "to a wall": sum,
    "always failing": lambda point: -2.0,
    "rejected": lambda point: -1000 * sum(abs(at - 0.3) for at in point),
}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_the_walk_is_the_public_codes(score: Score) -> None:
    expected = retold(score)
    assert walked(score) == expected
    assert 25 < len(expected) <= 1 + 120 + 2


def test_the_scores_reach_every_branch() -> None:
    lengths = {name: len(retold(score)) for name, score in SCORES.items()}
    assert lengths["rejected"] == 1 + 3 * 24 + 2  # it stops early, after both restarts
    assert lengths["to a wall"] >= 121
    assert walked(SCORES["with reheats"]) != walked(SCORES["with reheats"], seed=43)


@given(seed=st.integers(0, 10**6), height=st.floats(0, 3), noise=st.floats(0, 0.5))
def test_for_any_seed_and_surface(seed: int, height: float, noise: float) -> None:
    score = bump(height, noise)
    assert walked(score, seed) == retold(score, seed)


def test_the_next_point_depends_on_seed_and_scores_alone() -> None:
    """A point that the walk comes to again is not tried again."""
    score, scores = bump(2.0, 0.1), dict[Point, float]()
    for point in walked(score):
        if point not in scores:
            assert next_point(PAPERS, START, 42, scores) == point
            scores[point] = score(point)
    assert next_point(PAPERS, START, 42, scores) is None


def test_walks_are_independent_and_stay_in_the_box() -> None:
    """Where a worker is at a walk, another one takes or begins another; once one has ended, no more begin."""
    space, start = RatioSpace(("blocks",), poa_weights=(1.0, 2.5)), (0.3, 1.5)
    scores: dict[Point, float] = {}
    running: list[Point] = []
    for number in range(3):
        point = next_point(space, start, 1, scores, running)
        assert point is not None
        assert space.contains(point)
        assert (point == start) == (number == 0)
        running.append(point)
    assert len(set(running)) == 3
    first, *others = running
    second = next_point(space, start, 1, {first: 1.0}, others)
    assert second is not None
    assert second not in running  # the walk goes on
    scores = {first: 1.0}
    while (point := next_point(space, start, 1, scores, others)) is not None:
        assert space.contains(point)
        scores[point] = sum(point)
    assert len({weight for _, weight in scores}) > 1
    assert next_point(space, start, 1, {**scores, others[0]: 0.0}, others[1:]) is not None  # a walk that was begun


def test_points_of_no_walk_do_no_harm() -> None:
    score = bump(2.0, 0.1)
    scores: dict[Point, float] = {(0.31, 0.3, 0.3): 9.0, (0.1, 0.1, 0.1): 0.0}
    for point in walked(score)[:5]:
        assert next_point(PAPERS, START, 42, scores) == point
        scores[point] = score(point)


def test_a_short_walk_has_its_least_patience() -> None:
    assert AnnealingConstants() == PAPER
    scores: dict[Point, float] = {}
    constants = AnnealingConstants(iterations=12, restarts=0)
    while (point := next_point(PAPERS, START, 42, scores, (), constants)) is not None:
        scores[point] = -float(len(scores)) * 1000
    assert len(scores) == 1 + 5
