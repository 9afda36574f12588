"""A search in one process: what it holds, that it goes on where it stopped, and how trials fail."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from crdiff_export.errors import PreviewError
from crdiff_export.search import METHODS, Candidate, FinishedTrial, TrialEvent
from crdiff_export.search.setup import SearchBudget
from crdiff_export.search.trials import best_trial, dense_trial, estimate
from crdiff_export.search.worker import run_trials
from tests.support.messages import raises
from tests.support.search_objective import (
    INTERVAL,
    SPACE,
    START,
    Flat,
    Hill,
    attempts_of,
    check_scores,
    opened,
    run_hill,
    scores_of,
    setup,
    trials_of,
)

COUNT = 12
# The Gaussian process is asked as TPE is, and takes seconds to load.
QUICK = [name for name in METHODS if name != "gp"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[FinishedTrial, ...]]:
    """The trials of a search by each method."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: run_hill(folder / f"{name}.db", setup(name), COUNT) for name in QUICK}


# --- what is in it ---


@pytest.mark.parametrize("name", QUICK)
def test_every_trial_is_kept(name: str, whole: Mapping[str, tuple[FinishedTrial, ...]]) -> None:
    trials = whole[name]
    assert [trial.number for trial in trials] == list(range(COUNT))
    assert trials[0].candidate == Candidate.of({"down": 0, "mid": 0, "up": 0})
    assert trials[1].candidate == START
    assert len({trial.candidate for trial in trials}) == COUNT
    assert all(trial.seconds is not None for trial in trials)
    check_scores(trials)
    stopped = [trial for trial in trials if trial.state == "pruned"]
    assert bool(stopped) == (name != "anneal")
    assert not {0, 1} & {trial.number for trial in stopped}
    best, dense = best_trial(trials), dense_trial(trials)
    assert best
    assert best.value == max(trial.value for trial in trials if trial.value is not None)
    assert dense == trials[0]
    for trial in stopped:  # it was worse than the best, and what is told to the method in its place is near the truth
        value = sum(Hill().scores(trial.candidate, range(8))) / 8
        assert value < best.value
        assert estimate(trial.scores, dense.scores) == pytest.approx(value, abs=0.3)


def test_without_early_stop_all_pairs_are_judged(
    tmp_path: Path, whole: Mapping[str, tuple[FinishedTrial, ...]]
) -> None:
    count = next(trial.number for trial in whole["sobol"] if trial.state == "pruned") + 1
    trials = run_hill(tmp_path / "a.db", setup("sobol", early_stop=False), count)
    assert [trial.state for trial in trials] == ["complete"] * count


def test_the_recipes_variant_is_never_stopped_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are, where the dense model is better on every pair."""
    monkeypatch.setattr(Hill, "scores", lambda _, candidate, pairs: [-sum(candidate.by_group.values())] * len(pairs))
    trials = run_hill(tmp_path / "a.db", setup(), 3)
    assert [trial.state for trial in trials] == ["complete", "complete", "pruned"]


def test_how_far_a_search_is(tmp_path: Path) -> None:
    """Ties go to the first, and none is stopped."""
    began = time.monotonic()
    with opened(tmp_path / "a.db", setup()) as study:
        before = study.progress(SearchBudget(4), began)
        assert (before.over, before.best, before.dense, before.left) == (0, None, None, None)
        run_trials(study, Flat(), SearchBudget(4))
        trials = study.trials()
        after, more, timed = (study.progress(b, began) for b in (SearchBudget(4), SearchBudget(8), SearchBudget(8, 1)))
    assert {trial.value for trial in trials} == {3.5}
    assert (after.over, after.trials, after.best, after.dense, after.left) == (4, 4, trials[0], trials[0], 0)
    assert more.left == pytest.approx(sum(trial.seconds or 0 for trial in trials))
    assert timed.left is not None
    assert timed.left <= 1


def test_the_poa_weight_is_a_coordinate(tmp_path: Path) -> None:
    space = replace(SPACE, poa_weights=(1.0, 2.5))
    search = replace(setup(space=space), start=Candidate.of(START.by_group, 1.5))
    weights = [trial.candidate.poa_weight for trial in run_hill(tmp_path / "a.db", search, 4)]
    assert weights[:2] == [None, 1.5]
    assert all(weight and 1.0 <= weight <= 2.5 for weight in weights[1:])
    assert len(set(weights)) == 4


def test_a_box_without_the_dense_model(tmp_path: Path) -> None:
    search = setup(space=replace(SPACE, low=0.2))
    trials = run_hill(tmp_path / "a.db", search, 4)
    assert trials[0].candidate.dense
    assert all(search.space.contains(search.space.point(trial.candidate)) for trial in trials[1:])


def test_events_tell_the_story(tmp_path: Path) -> None:
    events: list[TrialEvent] = []
    run_hill(tmp_path / "a.db", setup(), 2, on_event=events.append)
    assert [event.kind for event in events] == [*(["started", "scored", "scored", "complete"] * 2), "ended"]
    assert events[-1] == TrialEvent("ended", note="all trials are over")
    assert [event.done for event in events[:4]] == [0, 4, 8, 8]
    assert {event.pairs for event in events[:-1]} == {8}


# --- it goes on ---


def test_an_interruption_keeps_what_is_finished(tmp_path: Path, whole: Mapping[str, tuple[FinishedTrial, ...]]) -> None:
    path, search = tmp_path / "a.db", setup("anneal")
    with pytest.raises(KeyboardInterrupt):
        run_hill(path, search, 4, Hill(stop=3))
    before = trials_of(path, search)
    assert [trial.number for trial in before] == [0]
    after = run_hill(path, search, 4)
    assert after[:1] == before
    assert attempts_of(path, search) == {0: 1, 1: 2, 3: 1, 4: 1}
    check_scores(after)
    # The walk of one worker is as if it had not been interrupted.
    assert scores_of(after) == scores_of(whole["anneal"][:4])


def test_interruptions_are_no_failures(tmp_path: Path) -> None:
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run_hill(tmp_path / "a.db", setup(), 3, Hill(stop=0))
    assert len(run_hill(tmp_path / "a.db", setup(), 2)) == 2
    assert attempts_of(tmp_path / "a.db", setup()) == {0: 3, 1: 3}  # each goes to the end of the queue


def test_an_interruption_after_a_trial_costs_nothing(tmp_path: Path) -> None:
    def stop(event: TrialEvent) -> None:
        if (event.kind, event.number) in (("complete", 0), ("failed", 1)):
            raise KeyboardInterrupt

    path = tmp_path / "a.db"
    for objective in (Hill(), Hill(fail=[0])):
        with pytest.raises(KeyboardInterrupt):
            run_hill(path, setup(), 2, objective, stop)
    assert len(run_hill(path, setup(), 2)) == 2
    assert attempts_of(path, setup()) == {0: 1, 1: 2}


def test_more_trials_go_on_from_fewer(tmp_path: Path) -> None:
    counts = [len(run_hill(tmp_path / "a.db", setup(), trials)) for trials in (1, 3, 2)]
    assert counts == [2, 3, 3]  # the dense model and the start are queued together


def test_annealing_ends_by_itself(tmp_path: Path) -> None:
    events: list[TrialEvent] = []
    search = setup("anneal", pairs=1)
    search = replace(search, method=replace(search.method, constants=replace(search.method.constants, iterations=4)))
    trials = run_hill(tmp_path / "a.db", search, 50, on_event=events.append)
    assert 4 < len(trials) <= 1 + 1 + 4 + 2
    assert events[-1].note == "the annealing has come to its end"


def test_time_is_a_budget(tmp_path: Path) -> None:
    events: list[TrialEvent] = []
    trials = run_hill(tmp_path / "a.db", setup(pairs=2), None, Hill(2, delay=0.05), events.append, seconds=0.2)
    assert all(trial.value is not None for trial in trials)
    assert events[-1].note == "the time is over"


# --- trials that fail ---


def test_a_failed_trial_is_tried_three_times(tmp_path: Path) -> None:
    path, events = tmp_path / "a.db", list[TrialEvent]()
    trials = run_hill(path, setup(), 4, Hill(fail=[4, 5]), events.append)
    assert "failed" not in {trial.state for trial in trials}
    assert attempts_of(path, setup())[2] == 3
    assert [event.note for event in events if event.kind in ("failed", "retried")] == ["the machine is too small"] * 4
    check_scores(trials)


def test_a_trial_that_fails_for_good_ends_the_worker_and_not_the_search(tmp_path: Path) -> None:
    path, search = tmp_path / "a.db", setup("anneal")
    with raises(PreviewError, "the machine is too small"):
        run_hill(path, search, 4, Hill(fail=[4, 5, 6]))
    trials = run_hill(path, search, 4)
    assert [trial.state for trial in trials] == ["complete", "complete", "failed", "complete"]
    assert (trials[2].reason, trials[2].value) == ("the machine is too small", None)


def test_the_dense_model_is_tried_again_by_the_next_command(tmp_path: Path) -> None:
    """Nothing could be compared without it."""
    with raises(PreviewError, "the machine is too small"):
        run_hill(tmp_path / "a.db", setup(), 2, Hill(fail=[0, 3, 4]))
    assert dense_trial(run_hill(tmp_path / "a.db", setup(), 3))


def test_an_error_in_the_code_ends_the_worker_and_gives_the_trial_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna raises errors of this class, too, where another worker has taken a trial."""
    monkeypatch.setattr(Hill, "scores", lambda self, candidate, pairs: [0.0])
    with pytest.raises(ValueError, match="argument 2"):
        run_hill(tmp_path / "a.db", setup(pairs=2), 2)
    with opened(tmp_path / "a.db", setup(pairs=2)) as study:
        assert [trial.state.name for trial in study.optuna.trials] == ["FAIL", "WAITING", "WAITING"]


# --- workers that are thought dead ---


def fail_as_stale(study: optuna.Study) -> None:
    """What another worker does with a trial whose signs of life have ended."""
    (running,) = (trial for trial in study.trials if trial.state == TrialState.RUNNING)
    study.tell(running.number, state=TrialState.FAIL)
    storage = study._storage
    assert isinstance(storage, optuna.storages._CachedStorage)
    callback = storage.get_heartbeat_stale_trial_callback()
    assert callback
    callback(study, running)


def test_a_worker_that_was_thought_dead_gives_way(tmp_path: Path) -> None:
    """Another fails its trial while it is at it; the trial counts once, and the worker goes on."""
    path, search, events = tmp_path / "a.db", setup(), list[TrialEvent]()
    with opened(path, search) as other:

        def thief(event: TrialEvent) -> None:
            events.append(event)
            if (event.kind, event.number, event.done) == ("scored", 2, 4) and len(events) < 12:
                fail_as_stale(other.optuna)

        trials = run_hill(path, search, 4, on_event=thief)
    kinds = [event.kind for event in events]
    assert (kinds.count("lost"), kinds.count("retried")) == (1, 1)
    assert len(trials) == 4
    assert attempts_of(path, search)[2] == 2
    check_scores(trials)


def test_signs_of_life_go_on_while_a_batch_takes_long(tmp_path: Path) -> None:
    path, search = tmp_path / "a.db", setup(pairs=1)
    events: list[TrialEvent] = []
    with opened(path, search) as other:

        def look(event: TrialEvent) -> None:
            events.append(event)
            if event.kind == "scored":
                with pytest.warns(optuna.exceptions.ExperimentalWarning):
                    optuna.storages.fail_stale_trials(other.optuna)

        run_hill(path, search, 1, Hill(1, delay=4.5 * INTERVAL), look, seconds=1)
    assert "lost" not in [event.kind for event in events]
    assert len(trials_of(path, search)) == 1


def test_a_trial_whose_worker_died_before_its_first_sign_is_found(tmp_path: Path) -> None:
    path, search = tmp_path / "a.db", setup(pairs=1)
    events: list[TrialEvent] = []
    with opened(path, search) as study, pytest.warns(UserWarning, match="Heartbeat of storage"):
        study.optuna.ask()
    trials = run_hill(path, search, 2, on_event=events.append, seconds=30)
    assert {trial.number for trial in trials} == {0, 1}
    assert "waiting" in [event.kind for event in events]
    assert ("retried", "its worker died") in [(event.kind, event.note) for event in events]
    assert [path.name for path in tmp_path.iterdir()] == ["a.db"]
