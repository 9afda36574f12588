"""Workers that are killed, and workers beside each other, on one file: nothing is lost, nothing counts twice."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.search_objective import (
    attempts_of,
    check_scores,
    let_grace_pass,
    opened,
    run_hill,
    scores_of,
    setup,
    trials_of,
)
from tests.support.search_workers import worker

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


def test_ctrl_c_gives_the_trial_back(tmp_path: Path) -> None:
    path, search = tmp_path / "a.db", setup()
    with worker(path, "sobol", 6, 0.05) as first:
        first.until("scored", number=3, done=4)
        assert first.process.pid
        os.kill(first.process.pid, signal.SIGINT)
        first.process.join(30)
        assert first.process.exitcode == 1
    with opened(path, search) as study:
        assert [trial.state.name for trial in study.optuna.trials if trial.number > 2] == ["FAIL", "WAITING"]


def test_two_workers_share_a_file_and_one_is_killed(tmp_path: Path) -> None:
    path, method, trials, search = tmp_path / "a.db", "tpe", 14, setup("tpe")
    with worker(path, method, trials, 0.1) as one, worker(path, method, trials, 0.1) as other:
        begun = other.until("started", after=1)  # both are at work
        lost = one.until("scored", after=begun, done=4)
        one.kill()
        other.end()
    results = trials_of(path, search)
    # Both may begin the last trial at once.
    assert trials <= len(results) <= trials + 1
    assert {trial.state for trial in results} <= {"complete", "pruned"}
    assert attempts_of(path, search)[lost] == 2
    assert sorted(one.finished() + other.finished()) == [trial.number for trial in results]
    check_scores(results)
