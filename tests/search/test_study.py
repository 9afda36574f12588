"""A search in a journal: what it holds, that it goes on where it stopped, and what it refuses."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from crdiff_export.errors import PreviewError, SearchError
from crdiff_export.search.board import estimate
from crdiff_export.search.engine import (
    METHODS,
    Budget,
    Candidate,
    Event,
    Finished,
    best,
    dense,
    history,
    load_study,
    open_study,
    run,
    time_left,
)
from crdiff_export.search.lease import Lost, Worker, alive
from crdiff_export.search.ledger import Claim
from tests.support.search_objective import (
    NAME,
    PRINTS,
    PYTHON,
    SPACE,
    START,
    Flat,
    Hill,
    searched,
    setup,
    told,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Finished, ...]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {name: searched(folder / f"{name}.journal", setup(name), 16) for name in METHODS}


# --- what is in it ---


@pytest.mark.parametrize("name", METHODS)
def test_every_trial_is_kept(name: str, uninterrupted: Mapping[str, tuple[Finished, ...]]) -> None:
    found = uninterrupted[name]
    assert [one.place for one in found] == list(range(16))
    assert found[0].candidate == Candidate.of({"down": 0, "mid": 0, "up": 0})
    assert found[1].candidate == START
    for one in found:
        assert one.attempts == 1
        assert one.seconds is not None
        assert one.worker.split(":")[1] == str(os.getpid())
        exact = {pair: Hill().scores(one.candidate, [pair])[0] for pair in one.scores}
        assert one.scores == exact
        if one.state == "complete":
            assert len(exact) == 8
            assert one.value == pytest.approx(sum(exact.values()) / 8)
        else:
            assert one.state == "pruned"
            assert one.value is None
            assert len(exact) == 4
    pruned = [one.place for one in found if one.state == "pruned"]
    assert bool(pruned) == (name != "anneal")
    assert not {0, 1} & set(pruned)


def test_only_what_is_worse_is_pruned_and_never_the_best(tmp_path: Path) -> None:
    search = setup("tpe")
    found = searched(tmp_path / "a.journal", search, 30)
    values = [one.value for one in found if one.value is not None]
    with load_study(tmp_path / "a.journal", NAME) as study:
        top = best(study)
        base = dense(study)
    assert top
    assert base
    assert top.value == max(values) > found[1].value  # type: ignore[operator]
    assert base == found[0]
    whole = {one.place: sum(Hill().scores(one.candidate, range(8))) / 8 for one in found if one.state == "pruned"}
    assert whole
    assert all(value < max(values) for value in whole.values())
    for place, value in whole.items():  # what is told to the method in their place is near the truth
        assert estimate(found[place].scores, base.scores) == pytest.approx(value, abs=0.3)
    assert all(one.state == "complete" for one in searched(tmp_path / "b.journal", setup("tpe", pruning=False), 12))


def test_no_trial_is_over_in_the_beginning(tmp_path: Path) -> None:
    with open_study(tmp_path / "a.journal", NAME, setup(), PRINTS) as study:
        assert history(study) == ()
        assert best(study) is None
        assert dense(study) is None
        assert time_left(study, 10) is None


def test_ties_go_to_the_first_and_none_is_pruned(tmp_path: Path) -> None:
    found = searched(tmp_path / "a.journal", setup("sobol"), 6, Flat())
    assert {one.value for one in found} == {3.5}
    with load_study(tmp_path / "a.journal", NAME) as study:
        assert best(study) == found[0]
        assert time_left(study, 6) == 0
        left = time_left(study, 12)
        assert left
        assert left == pytest.approx(sum(one.seconds or 0 for one in found))


def test_the_poa_weight_is_a_coordinate(tmp_path: Path) -> None:
    space = replace(SPACE, weights=(1.0, 2.5))
    search = replace(setup("sobol", space=space), start=Candidate.of(START.by_group, 1.5))
    found = searched(tmp_path / "a.journal", search, 8)
    weights = [one.candidate.poa_weight for one in found]
    assert weights[:2] == [None, 1.5]
    assert all(weight and 1.0 <= weight <= 2.5 for weight in weights[1:])
    assert len(set(weights)) == 8


def test_events_tell_the_story(tmp_path: Path) -> None:
    events: list[Event] = []
    search, objective = setup("tpe"), Hill()
    with open_study(tmp_path / "a.journal", NAME, search, PRINTS) as study:
        run(study, objective, search.method, budget=Budget(3), on_event=events.append)
    whole = ["started", "scored", "scored", "complete"]
    assert [event.kind for event in events][:8] == whole * 2
    assert events[-1] == Event("ended", note="all trials are over")
    assert [event.done for event in events[:4]] == [0, 4, 8, 8]
    assert {event.pairs for event in events[:-1]} == {8}


# --- it goes on ---


@pytest.mark.parametrize(
    ("name", "stop"), [("anneal", 0), ("anneal", 3), ("anneal", 14), ("tpe", 12), *((name, 19) for name in METHODS)]
)
def test_an_interruption_keeps_what_is_finished(
    name: str, stop: int, tmp_path: Path, uninterrupted: Mapping[str, tuple[Finished, ...]]
) -> None:
    path = tmp_path / "a.journal"
    with pytest.raises(KeyboardInterrupt):
        searched(path, setup(name), 16, Hill(stop=stop))
    with load_study(path, NAME) as study:
        before = history(study)
    expected = told(uninterrupted[name])
    assert told(before) == expected[: len(before)]
    assert len(before) >= stop // 2
    after = searched(path, setup(name), 16)
    assert told(after) == expected
    assert after[: len(before)] == before
    assert after[len(before)].attempts == 2


def test_interruptions_are_no_failures(tmp_path: Path) -> None:
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            searched(tmp_path / "a.journal", setup(), 3, Hill(stop=0))
    assert searched(tmp_path / "a.journal", setup(), 1)[0].attempts == 6


def test_more_trials_go_on_from_fewer(tmp_path: Path, uninterrupted: Mapping[str, tuple[Finished, ...]]) -> None:
    for trials in (1, 5, 16, 4):
        found = searched(tmp_path / "a.journal", setup("tpe"), trials)
    assert told(found) == told(uninterrupted["tpe"])


def test_annealing_ends_by_itself(tmp_path: Path) -> None:
    events: list[Event] = []
    search = setup("anneal", pairs=1)
    search = replace(search, method=replace(search.method, constants=replace(search.method.constants, iterations=7)))
    with open_study(tmp_path / "a.journal", NAME, search, PRINTS) as study:
        run(study, Hill(1), search.method, budget=Budget(50), on_event=events.append)
        assert len(history(study)) <= 1 + 1 + 7 + 2
    assert events[-1].note == "the annealing has come to its end"
    assert searched(tmp_path / "a.journal", search, 50)[-1].chain == 0


def test_time_is_a_budget(tmp_path: Path) -> None:
    events: list[Event] = []
    search = setup("sobol", pairs=2)
    with open_study(tmp_path / "a.journal", NAME, search, PRINTS) as study:
        run(study, Hill(2, delay=0.05), search.method, budget=Budget(seconds=0.2), on_event=events.append)
        found = history(study)
    assert 1 <= len(found) <= 6
    assert all(one.value is not None for one in found)
    assert events[-1].note == "the time is over"
    for budget in ({}, {"trials": 0}, {"seconds": 0.0}):
        with pytest.raises(SearchError, match="no end, or no beginning"):
            Budget(**budget)


def test_a_failed_trial_is_tried_three_times(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    found = searched(path, setup(), 4, Hill(fail=[4, 5]))
    assert [one.attempts for one in found] == [1, 1, 3, 1]
    assert told(found) == told(searched(tmp_path / "b.journal", setup(), 4))
    path = tmp_path / "c.journal"
    with pytest.raises(PreviewError, match="the machine is too small"):
        searched(path, setup(), 4, Hill(fail=[4, 5, 6]))
    after = searched(path, setup(), 5)
    assert [(one.state, one.attempts) for one in after[1:4]] == [("complete", 1), ("failed", 3), ("complete", 1)]
    assert after[2].reason == "the machine is too small"
    assert after[2].value is None


@pytest.mark.parametrize("scores", [[0.0], [0.0, float("nan")], [0.0, float("inf")], [0.0] * 3])
def test_an_objective_keeps_its_promise(scores: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hill, "scores", lambda self, candidate, pairs: scores)
    with pytest.raises(ValueError, match=r"argument 2|an objective gave"):
        searched(tmp_path / "a.journal", setup(pairs=2), 2)


# --- leases ---


def test_a_place_is_claimed_once(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    with open_study(path, NAME, setup(), PRINTS) as one, open_study(path, NAME, setup(), PRINTS) as other:
        first = one.ledger.claim(Claim(0, SPACE.dense), Worker.here(), 60)
        assert first
        assert other.ledger.claim(Claim(0, SPACE.dense), Worker.here(), 60) is None
        second = other.ledger.claim(Claim(1, START_POINT), Worker.here(), 60)
        assert second
        board = one.ledger.board()
        assert [place.running for place in board.places] == [True, True]
        assert board == other.ledger.board()
        one.ledger.finish(first, {0: 1.0}, 1.0, 1.0)
        late: list[Callable[[], None]] = [
            lambda: other.ledger.fail(first, "late"),
            lambda: other.ledger.renew(first, 0.0),
            lambda: one.ledger.record(first, {1: 2.0}),
            lambda: one.ledger.finish(first, {0: 2.0}, 1.0, 2.0),
        ]
        for change in late:
            with pytest.raises(Lost):
                change()
        assert one.ledger.board().places[0].last.value == 1.0


START_POINT = SPACE.point(START)


def test_who_is_dead_is_seen_at_once_here_and_after_the_lease_elsewhere(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    here = Worker.here()
    dead = Worker(f"host:{int(gone.stdout)}:0", here.machine)
    elsewhere = Worker(f"host:{int(gone.stdout)}:0", "elsewhere")
    with open_study(tmp_path / "a.journal", NAME, setup(), PRINTS) as study:
        ledger = study.ledger
        for place, (worker, lease) in enumerate([(dead, 60), (elsewhere, 60), (elsewhere, -1), (here, 60)]):
            assert ledger.claim(Claim(place, START_POINT), worker, lease)
        reaped = ledger.reap(ledger.board(), Worker.here())
        assert [one.place for one in reaped] == ([0, 2] if os.name == "posix" else [2])
        assert ledger.reap(ledger.board(), here) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only there can it be seen")
def test_a_process_that_nobody_waited_for_is_dead() -> None:
    with subprocess.Popen([*PYTHON, "input()"], stdin=subprocess.PIPE) as process:
        assert alive(process.pid)
        process.kill()
        until = time.monotonic() + 10
        while alive(process.pid) and time.monotonic() < until:
            time.sleep(0.01)
        assert not alive(process.pid)
        assert process.returncode is None
    assert alive(os.getpid())
    assert alive(0)


def test_a_worker_that_was_thought_dead_gives_way(tmp_path: Path) -> None:
    """Another takes its trial over while it is at it; the trial counts once, and the worker goes on."""
    path, search = tmp_path / "a.journal", setup("sobol")
    events: list[Event] = []
    with open_study(path, NAME, search, PRINTS) as study, open_study(path, NAME, search, PRINTS) as other:

        def thief(event: Event) -> None:
            events.append(event)
            if (event.kind, event.place, event.done) == ("scored", 2, 4) and len(events) < 12:
                last = other.ledger.board().places[2].last
                other.ledger.fail(last, "its worker died")

        run(study, Hill(), search.method, budget=Budget(4), on_event=thief)
        found = history(study)
    assert [event.kind for event in events].count("lost") == 1
    assert [one.attempts for one in found] == [1, 1, 2, 1]
    assert told(found) == told(searched(tmp_path / "b.journal", search, 4))


def test_a_lease_is_renewed_while_a_batch_takes_long(tmp_path: Path) -> None:
    path, search = tmp_path / "a.journal", setup("sobol", pairs=1)
    with open_study(path, NAME, search, PRINTS) as study:
        run(study, Hill(1, delay=0.6), search.method, budget=Budget(1), lease=0.2)
        (place,) = study.ledger.board().places
        assert place.last.until > time.time() - 0.3
        assert len(place.attempts) == 1
