"""What to try next: the same answer to the same question, within the box, and a good one."""

import math

import pytest

from crdiff_export.errors import SearchError
from crdiff_export.search.engine import METHODS, Candidate, Method, Space
from crdiff_export.search.methods import Known, Name, Question, suggest
from crdiff_export.search.space import Point
from tests.support.search_objective import SPACE

ASKED: tuple[Name, ...] = ("tpe", "cmaes", "gp", "sobol")
TOP = 0.6
SPACES = {
    "unet": (SPACE, (0.3, 0.3, 0.3)),
    "dit": (Space(("blocks",)), (0.3,)),
    "weight": (Space(("down", "mid", "up"), weights=(1.0, 2.5)), (0.3, 0.3, 0.3, 1.5)),
    "paper's box": (Space(("down", "mid", "up"), 0.1, 0.8), (0.3, 0.3, 0.3)),
}


def height(space: Space, point: Point) -> float:
    return -sum((at - TOP) ** 2 for at in space.unit(point))


def searched(name: Name, space: Space, start: Point, trials: int, seed: int = 3) -> list[Known]:
    known = [Known(point, height(space, point)) for point in (space.dense, start)]
    while len(known) < trials:
        point = suggest(name, Question(space, start, seed, len(known), known))
        assert space.contains(point)
        assert len(point) == len(space.names)
        known.append(Known(point, height(space, point)))
    return known


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize(("space", "start"), SPACES.values(), ids=SPACES)
def test_an_answer_depends_on_the_question_alone(name: Name, space: Space, start: Point) -> None:
    trials = 14
    known = searched(name, space, start, trials)
    assert len({one.point for one in known}) == trials
    place = trials // 2
    for asked in (place, trials - 1):
        question = Question(space, start, 3, asked, known[:asked])
        assert suggest(name, question) == known[asked].point
    assert suggest(name, Question(space, start, 4, place, known[:place])) != known[place].point


@pytest.mark.parametrize("name", ["tpe", "cmaes"])
def test_it_climbs(name: Name) -> None:
    known = searched(name, SPACE, (0.3, 0.3, 0.3), 60)
    assert max(one.score for one in known) > -0.02
    assert max(one.score for one in known) >= max(one.score for one in searched("sobol", SPACE, (0.3,) * 3, 60))


def test_a_process_climbs_on_few_trials() -> None:
    assert max(one.score for one in searched("gp", SPACE, (0.3, 0.3, 0.3), 24)) > -0.01


@pytest.mark.parametrize("name", ASKED)
def test_what_others_are_at_is_not_tried_again(name: Name) -> None:
    known = searched(name, SPACE, (0.3, 0.3, 0.3), 12)
    running: list[Point] = []
    for place in range(12, 15):
        running.append(suggest(name, Question(SPACE, (0.3, 0.3, 0.3), 3, place, known, running)))
    assert len(set(running)) == 3


def test_a_sobol_sequence_covers_the_box() -> None:
    points = [suggest("sobol", Question(SPACE, (0.3,) * 3, 0, place)) for place in range(2, 66)]
    for at in range(3):
        eighths = [math.floor(point[at] / 0.9 * 8) for point in points]
        assert [eighths.count(eighth) for eighth in range(8)] == [8] * 8


def test_a_method_has_a_name() -> None:
    assert [Method(name).prunes for name in METHODS] == [True, False, True, True, True]
    with pytest.raises(SearchError, match=r"no method is called 'anneel'\nDid you mean anneal\?"):
        Method("anneel")  # type: ignore[arg-type]


WRONG_SPACES = [
    ((), 0.0, 0.9, None, "are no groups to search"),
    (("up", "up"), 0.0, 0.9, None, "are no groups to search"),
    (("up",), 0.9, 0.9, None, "ratios from 0.9 to 0.9"),
    (("up",), 0.0, 1.0, None, "ratios from 0.0 to 1.0"),
    (("up",), math.nan, 0.9, None, "ratios from nan"),
    (("up",), 0.0, 0.9, (2.0, 1.0), "POA weights from 2.0 to 1.0"),
    (("up",), 0.0, 0.9, (1.0, math.inf), "POA weights from 1.0 to inf"),
]


@pytest.mark.parametrize(("groups", "low", "high", "weights", "said"), WRONG_SPACES)
def test_a_box_is_a_box(
    groups: tuple[str, ...], low: float, high: float, weights: tuple[float, float] | None, said: str
) -> None:
    with pytest.raises(SearchError, match=said):
        Space(groups, low, high, weights)


def test_a_point_is_a_candidate() -> None:
    space = Space(("down", "up"), weights=(1.0, 2.5))
    candidate = Candidate.of({"down": 0.25, "up": 0.5}, 1.5)
    assert space.candidate(space.point(candidate)) == candidate
    assert space.point(Candidate.of({"up": 0.5, "down": 0.25})) == (0.25, 0.5, 1.0)
    dense = Candidate.of({"down": 0, "up": 0}, 2.0)
    assert space.point(dense) == space.dense
    assert space.candidate(space.dense) == Candidate.of({"down": 0, "up": 0})
    assert space.scale(space.unit((0.25, 0.5, 1.5))) == pytest.approx((0.25, 0.5, 1.5))
    for other in (Candidate.of({"down": 0.1}), Candidate.of({"down": 0.1, "mid": 0.2}), candidate):
        narrow = Space(("down", "up"))
        with pytest.raises(SearchError, match=r"is no candidate of this search\nGive down, up, and no more\."):
            narrow.point(other)
    with pytest.raises(
        SearchError, match=r"cannot begin at down 0\.95, up 0\.1\nThe search goes over down 0 to 0\.9, up"
    ):
        Space(("down", "up")).require(Candidate.of({"down": 0.95, "up": 0.1}))
