"""What to try next: the same answer to the same question, within the box, and a good one."""

import math

import pytest

from crdiff_export.errors import OptionError
from crdiff_export.search import METHODS, Candidate, RatioSpace
from crdiff_export.search.methods import MethodName, PointScore, SearchMethod, TrialHistory, suggest
from crdiff_export.search.space import Point
from tests.support.messages import raises
from tests.support.search_objective import SPACE

OPTUNA: tuple[MethodName, ...] = ("tpe", "cmaes", "gp", "sobol")
TOP = 0.6
SPACES = {
    "unet": (SPACE, (0.3, 0.3, 0.3)),
    "dit": (RatioSpace(("blocks",)), (0.3,)),
    "weight": (RatioSpace(("down", "mid", "up"), poa_weights=(1.0, 2.5)), (0.3, 0.3, 0.3, 1.5)),
    "paper's box": (RatioSpace(("down", "mid", "up"), 0.1, 0.8), (0.3, 0.3, 0.3)),
}


def height(space: RatioSpace, point: Point) -> float:
    return -sum((at - TOP) ** 2 for at in space.unit(point))


def suggest_point(name: MethodName, history: TrialHistory, seed: int = 3) -> Point:
    point = suggest(SearchMethod(name, seed), history)
    assert point is not None
    return point


def climb(name: MethodName, space: RatioSpace, start: Point, trials: int) -> list[PointScore]:
    finished = [PointScore(point, height(space, point)) for point in (space.dense, start)]
    while len(finished) < trials:
        point = suggest_point(name, TrialHistory(space, start, len(finished), finished))
        assert space.contains(point)
        assert len(point) == len(space.names)
        finished.append(PointScore(point, height(space, point)))
    return finished


def best(finished: list[PointScore]) -> float:
    return max(score for _, score in finished if score is not None)


# The Gaussian process, which takes long, is asked as TPE is: in the smallest and in the largest of the spaces.
CASES = [(name, key) for name in OPTUNA for key in SPACES if name != "gp" or key in ("dit", "weight")]


@pytest.mark.parametrize(("name", "key"), CASES)
def test_a_point_depends_on_the_history_alone(name: MethodName, key: str) -> None:
    (space, start), trials = SPACES[key], 13
    finished = climb(name, space, start, trials)
    assert len({point for point, _ in finished}) == trials
    middle = trials // 2
    for number in (middle, trials - 1):
        history = TrialHistory(space, start, number, [*finished[:number], PointScore(start, None)])
        assert suggest_point(name, history) == finished[number].point
    assert suggest_point(name, TrialHistory(space, start, middle, finished[:middle]), 4) != finished[middle].point


@pytest.mark.parametrize("name", ["tpe", "cmaes"])
def test_it_climbs(name: MethodName) -> None:
    top = best(climb(name, SPACE, (0.3, 0.3, 0.3), 60))
    assert top > -0.02
    assert top >= best(climb("sobol", SPACE, (0.3,) * 3, 60))


def test_a_process_climbs_on_few_trials() -> None:
    assert best(climb("gp", SPACE, (0.3, 0.3, 0.3), 24)) > -0.01


@pytest.mark.parametrize("name", OPTUNA)
def test_what_others_are_at_is_not_tried_again(name: MethodName) -> None:
    finished = climb(name, SPACE, (0.3, 0.3, 0.3), 12)
    running: list[Point] = []
    for number in range(12, 15):
        running.append(suggest_point(name, TrialHistory(SPACE, (0.3, 0.3, 0.3), number, finished, running)))
    assert len(set(running)) == 3


def test_a_sobol_sequence_covers_the_box() -> None:
    points = [suggest_point("sobol", TrialHistory(SPACE, (0.3,) * 3, number), 0) for number in range(2, 66)]
    for at in range(3):
        eighths = [math.floor(point[at] / 0.9 * 8) for point in points]
        assert [eighths.count(eighth) for eighth in range(8)] == [8] * 8


def test_a_method_has_a_name() -> None:
    assert [SearchMethod(name).stops_early for name in METHODS] == [True, False, True, True, True]
    with raises(OptionError, "anneel"):
        SearchMethod("anneel")  # type: ignore[arg-type]


WRONG_SPACES = [
    (0.9, 0.9, None, "0.9 to 0.9"),
    (0.0, 1.0, None, "0.0 to 1.0"),
    (math.nan, 0.9, None, "nan"),
    (0.0, 0.9, (2.0, 1.0), "2.0 to 1.0"),
    (0.0, 0.9, (1.0, math.inf), "1.0 to inf"),
]


@pytest.mark.parametrize(("low", "high", "weights", "key"), WRONG_SPACES)
def test_a_box_is_a_box(low: float, high: float, weights: tuple[float, float] | None, key: str) -> None:
    with raises(OptionError, key):
        RatioSpace(("up",), low, high, weights)


def test_a_point_is_a_candidate() -> None:
    space = RatioSpace(("down", "up"), poa_weights=(1.0, 2.5))
    candidate = Candidate.of({"down": 0.25, "up": 0.5}, 1.5)
    assert space.candidate(space.point(candidate)) == candidate
    assert space.point(Candidate.of({"up": 0.5, "down": 0.25})) == (0.25, 0.5, 1.0)
    dense = Candidate.of({"down": 0, "up": 0}, 2.0)
    assert space.point(dense) == space.dense
    assert space.candidate(space.dense) == Candidate.of({"down": 0, "up": 0})
    assert space.scale(space.unit((0.25, 0.5, 1.5))) == pytest.approx((0.25, 0.5, 1.5))
