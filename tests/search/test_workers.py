"""Workers that are killed, and workers beside each other, on one file: nothing is lost, nothing counts twice."""

import os
from pathlib import Path

import pytest

from tests.support.search_objective import attempts_of, let_grace_pass, run_hill, scores_of, setup, trials_of
from tests.support.search_workers import check_that_nothing_is_lost, worker

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    """The trial that was lost is tried again; a walk of annealing needs it, and then is what it would have been."""
    path, search = tmp_path / "a.db", setup("anneal")
    with worker(path, "anneal", 8, 0.02) as first:
        first.until("scored", number=4, done=4)
        first.kill()
    let_grace_pass(path)
    before = trials_of(path, search)
    assert [trial.number for trial in before] == [0, 1, 2, 3]
    with worker(path, "anneal", 8, 0.0) as second:
        kinds = second.end()
    assert kinds.count("retried") == 1
    after = trials_of(path, search)
    assert after[:4] == before
    assert len(after) == 8
    assert [count for count in attempts_of(path, search).values() if count > 1] == [2]
    assert scores_of(after) == scores_of(run_hill(tmp_path / "b.db", search, 8))
    (tmp_path / "b.db").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["a.db"]


def test_two_workers_share_a_file_and_one_is_killed(tmp_path: Path) -> None:
    check_that_nothing_is_lost(tmp_path / "a.db", "tpe", trials=8, workers=2)
