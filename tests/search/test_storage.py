"""The file of a search and its settings: what is refused, each time with what to do about it, and its manners."""

import importlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy.exc

from crdiff_export import Size
from crdiff_export.errors import OptionError, SearchError
from crdiff_export.search import Candidate, SearchRequest, prepare
from crdiff_export.search.methods import SearchMethod
from crdiff_export.search.setup import SearchSetup
from crdiff_export.search.storage import as_search_error
from crdiff_export.search.study import SearchStudy, check_settings, open_study
from tests.support.messages import raises
from tests.support.search_objective import NAME, PRINTS, SPACE, opened, plain_storage, run_hill, setup


def begin(storage: object, search: SearchSetup | None = None, prints: Mapping[str, str] = PRINTS) -> None:
    with opened(storage, search or setup(), prints):
        pass


# --- settings ---


def changed(**changes: object) -> SearchSetup:
    return replace(setup("anneal"), **changes)  # type: ignore[arg-type]


OTHERS: dict[str, tuple[SearchSetup, Mapping[str, str]]] = {
    "pairs was 8, now 9": (changed(pairs=9), PRINTS),
    "method was anneal, now tpe; pruning was no, now yes": (setup("tpe"), PRINTS),
    "search seed was 7, now 8": (changed(method=SearchMethod("anneal", 8)), PRINTS),
    "ratios was 0.0 to 0.9, now 0.1 to 0.8": (changed(space=replace(SPACE, low=0.1, high=0.8)), PRINTS),
    "POA weights was none, now 1.0 to 2.5": (changed(space=replace(SPACE, poa_weights=(1.0, 2.5))), PRINTS),
    "start was down 0.3": (changed(start=Candidate.of({"down": 0.2, "mid": 0.3, "up": 0.3})), PRINTS),
    "steps was 20, now 30": (setup("anneal"), {**PRINTS, "steps": "30"}),
    "scorer was not set, now pick": (setup("anneal"), {**PRINTS, "scorer": "pick"}),
    "size was 64x64, now not set; steps was 20, now 2": (setup("anneal"), {"base": "0123", "steps": "2"}),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("begun") / "a.db"
    begin(path, setup("anneal"))
    return path


@pytest.mark.parametrize(("change", "now"), OTHERS.items(), ids=OTHERS)
def test_other_settings_are_named(change: str, now: tuple[SearchSetup, Mapping[str, str]], begun: Path) -> None:
    before = begun.read_bytes()
    with raises(SearchError, NAME, change):
        begin(begun, *now)
    assert begun.read_bytes() == before
    if now[1] == PRINTS:  # what is known before a weight is read
        with raises(SearchError, NAME, change):
            check_settings(begun, NAME, now[0])
    else:
        check_settings(begun, NAME, now[0])
    check_settings(begun, "another", now[0])


def test_two_searches_in_one_file(tmp_path: Path) -> None:
    begin(tmp_path / "a.db")
    with open_study(tmp_path / "a.db", "another", setup("tpe"), {}) as study:
        assert sorted(optuna.get_all_study_names(study.storage)) == ["another", NAME]


def test_early_stop_is_no_setting_of_annealing(tmp_path: Path) -> None:
    """It never stops a trial early."""
    begin(tmp_path / "a.db", setup("anneal"))
    begin(tmp_path / "a.db", setup("anneal", early_stop=False))


# --- files ---


def other_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE places (name TEXT)")


def damaged(path: Path) -> None:
    begin(path)
    path.write_bytes(path.read_bytes()[:100] + b"x" * 5000)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("a text that is none of ours"),
    "folder": lambda path: path.mkdir(),
    "database": other_database,
    "damaged": damaged,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_left_alone(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    FOREIGN[kind](path)
    before = path.read_bytes() if path.is_file() else b""
    with raises(SearchError, "a.db"):
        begin(path)
    with raises(SearchError, "a.db"):
        check_settings(path, NAME, setup())
    assert (path.read_bytes() if path.is_file() else b"") == before


@pytest.mark.parametrize(
    "storage", ["a.journal", "model.safetensors", "no/a.db", "sqlite:///a.db", "mysql://host/a", "redis://host"]
)
def test_other_storages_are_refused(storage: str, here: Path) -> None:
    (here / "a.journal").touch()
    with raises(SearchError if storage == "no/a.db" else OptionError, storage.partition(":")[0]):
        begin(storage)
    assert [path.name for path in here.iterdir()] == ["a.journal"]


def test_a_name_may_hold_anything(here: Path) -> None:
    begin("a ?{b}%20#.db")
    check_settings("a ?{b}%20#.db", NAME, setup())
    assert [path.name for path in here.iterdir()] == ["a ?{b}%20#.db"]


def test_a_study_of_someone_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with plain_storage(path) as storage:
        study = optuna.create_study(storage=storage, study_name=NAME, direction="maximize")
        study.add_trial(optuna.trial.create_trial(value=1.0))
        with raises(SearchError, NAME):
            begin(path)
        study.set_user_attr("crdiff", {"schema": 0, "settings": {}})
        with raises(SearchError, NAME):
            begin(path)


def test_a_search_whose_founder_died_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with plain_storage(path) as storage:
        optuna.create_study(storage=storage, study_name=NAME, direction="maximize")
    assert len(run_hill(path, setup(), 2)) == 2


def test_many_begin_at_once(tmp_path: Path) -> None:
    """All tables, the search and its first trials are made once."""
    path, start = tmp_path / "a.db", threading.Barrier(4)
    begun: list[int] = []

    def race() -> None:
        start.wait()
        begin(path)
        begun.append(1)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(begun) == 4
    with opened(path, setup()) as study:
        assert [trial.state.name for trial in study.optuna.trials] == ["WAITING"] * 2


# --- manners ---


def test_nothing_is_said_on_stderr_and_no_thread_is_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    run_hill(tmp_path / "a.db", setup("tpe"), 12)
    logging.getLogger("optuna.storages").warning("not for people")
    assert capfd.readouterr() == ("", "")
    assert threading.active_count() == before


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("crdiff_export.search.prepare")  # the package has a function of this name
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with raises(SearchError, "optuna, sqlalchemy, scipy, cmaes"):
        prepare(SearchRequest("demo", Size(48, 48)))


def test_no_error_shows_a_secret() -> None:
    secrets = ["s3cret", "", "k3y"]
    with raises(SearchError, "no answer for ***, key ***") as caught, as_search_error("a server", secrets):
        raise sqlalchemy.exc.OperationalError("connect", {}, OSError("no answer for s3cret, key k3y"))
    assert caught.value.__suppress_context__, "a traceback shows no other error"


def test_a_storage_that_goes_away_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.db"

    def spoil(study: SearchStudy) -> None:
        study.storage.engine.dispose()
        path.write_bytes(b"gone" * 5000)
        study.trials()

    with pytest.raises(SearchError) as caught, opened(path, setup()) as study:
        spoil(study)
    assert caught.value.message == f"{path}: file is not a database"
    assert "Finished trials are kept" in caught.value.hint
