"""Workers that are killed, and workers beside each other, on a journal: nothing is lost, nothing counts twice."""

import os
import signal
from pathlib import Path

import pytest

from crdiff_export.search.engine import (
    Budget,
    Finished,
    history,
    load_study,
    open_study,
    run,
)
from tests.support.search_objective import NAME, PRINTS, Hill, setup, told
from tests.support.search_workers import worker

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")


def kept(storage: object) -> tuple[Finished, ...]:
    with load_study(str(storage), NAME) as study:
        return history(study)


def alone(path: Path, method: str, trials: int) -> tuple[Finished, ...]:
    """What one worker finds that nobody disturbs."""
    search = setup(method)
    with open_study(path, NAME, search, PRINTS) as study:
        run(study, Hill(), search.method, budget=Budget(trials))
        return history(study)


def test_a_killed_search_goes_on_to_the_same_history(tmp_path: Path) -> None:
    path, method = tmp_path / "a.journal", "anneal"
    with worker(path, method, 14, 0.05) as first:
        first.until("scored", place=5, done=4)
        first.process.kill()
        first.process.wait()
    before = kept(path)
    assert [one.place for one in before] == [0, 1, 2, 3, 4]
    with worker(path, method, 14, 0.0) as second:
        assert [event["kind"] for event in second.end()][:2] == ["orphaned", "started"]
    after = kept(path)
    assert after[:5] == before
    assert [one.attempts for one in after] == [1] * 5 + [2] + [1] * 8
    assert told(after) == told(alone(tmp_path / "b.journal", method, 14))


def test_ctrl_c_gives_the_trial_back(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    with worker(path, "sobol", 6, 0.05) as first:
        first.until("scored", place=3, done=4)
        first.process.send_signal(signal.SIGINT)
        assert first.process.wait(30) != 0
    with load_study(path, NAME) as study:
        board = study.ledger.board()
    assert [place.over for place in board.places] == [True, True, True, False]
    assert board.places[3].last.reason == "interrupted"
    assert told(alone(path, "sobol", 6)) == told(alone(tmp_path / "b.journal", "sobol", 6))


@pytest.mark.parametrize("method", ["anneal", "tpe"])
def test_two_workers_share_a_journal_and_one_is_killed(method: str, tmp_path: Path) -> None:
    path, trials = tmp_path / "a.journal", 24
    with worker(path, method, trials, 0.1) as one, worker(path, method, trials, 0.1) as other:
        # In the middle of a trial that began after the other's second: both have a chain of their own by then.
        other.until("started")
        begun = other.until("started", after=1)["place"]
        place = one.until("scored", after=begun, done=4)["place"]
        one.process.kill()
        one.process.wait()
        other.end()
    found = kept(path)
    assert [one.place for one in found] == list(range(trials))
    assert {one.state for one in found} <= {"complete", "pruned"}
    assert found[place].attempts == 2
    assert sum(one.attempts for one in found) == trials + 1
    assert sorted(one.finished() + other.finished()) == list(range(trials))
    if method == "anneal":
        assert {one.chain for one in found[1:]} == {0, 1}
        for chain in (0, 1):  # each chain is what it would be alone
            points = [one.candidate for one in found if one.chain == chain]
            assert len(points) == len(set(points)) > 1
        first = [one.candidate for one in found if one.chain == 0]
        assert first == [one.candidate for one in alone(tmp_path / "b.journal", method, trials)[1 : 1 + len(first)]]
