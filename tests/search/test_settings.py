"""What a search refuses, each time with what to do about it, and its manners."""

import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from crdiff_export.errors import SearchError
from crdiff_export.search.engine import (
    Budget,
    Candidate,
    Method,
    Setup,
    Space,
    load_study,
    open_study,
    run,
    study_names,
)
from tests.support.search_objective import (
    NAME,
    PRINTS,
    SPACE,
    Hill,
    searched,
    setup,
)

# --- what is refused ---


def changed(**changes: object) -> Setup:
    return replace(setup(), **changes)  # type: ignore[arg-type]


OTHERS = {
    "pairs was 8, now 9": (changed(pairs=9), PRINTS),
    "method was anneal, now tpe; pruning was no, now yes": (setup("tpe"), PRINTS),
    "search seed was 7, now 8": (changed(method=Method("anneal", 8)), PRINTS),
    "ratios was 0.0 to 0.9, now 0.1 to 0.8": (changed(space=replace(SPACE, low=0.1, high=0.8)), PRINTS),
    "POA weights was none, now 1.0 to 2.5": (changed(space=replace(SPACE, weights=(1.0, 2.5))), PRINTS),
    "start was down 0.3": (changed(start=Candidate.of({"down": 0.2, "mid": 0.3, "up": 0.3})), PRINTS),
    "steps was 20, now 30$": (setup(), {**PRINTS, "steps": "30"}),
    "scorer was not set, now pick$": (setup(), {**PRINTS, "scorer": "pick"}),
    "size was 64x64, now not set; steps was 20, now 2$": (setup(), {"base": "0123", "steps": "2"}),
}


@pytest.mark.parametrize(("said", "now"), OTHERS.items(), ids=OTHERS)
def test_other_settings_are_named(said: str, now: tuple[Setup, Mapping[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    open_study(path, NAME, setup(), PRINTS).close()
    before = path.read_bytes()
    with pytest.raises(SearchError) as error:
        open_study(path, NAME, *now)
    assert error.value.message.startswith("the search 'tiny' cannot go on with other settings: ")
    assert said.removesuffix("$") in error.value.message
    assert not said.endswith("$") or error.value.message.endswith(said[:-1])
    assert path.read_bytes() == before
    open_study(path, "another", *now).close()
    assert study_names(path) == ("another", NAME)


def test_a_method_of_its_own_is_no_matter_where_it_is_not_used(tmp_path: Path) -> None:
    """Whether `anneal` would prune, if it did, changes nothing."""
    path = tmp_path / "a.journal"
    assert searched(path, setup("anneal"), 2) == searched(path, setup("anneal", pruning=False), 2)


def test_a_run_is_that_of_its_study(tmp_path: Path) -> None:
    with open_study(tmp_path / "a.journal", NAME, setup(), PRINTS) as study:
        for objective, method in ((Hill(), Method("tpe")), (Hill(9), setup().method)):
            with pytest.raises(SearchError, match="opened with another method, or for other pairs"):
                run(study, objective, method, budget=Budget(1))


def test_a_start_outside_the_box_is_refused() -> None:
    for start in (0.95, 0.0):
        with pytest.raises(SearchError, match="cannot begin at down"):
            Setup(Space(("down",), 0.1, 0.8), Candidate.of({"down": start}), 1, Method())
    with pytest.raises(SearchError, match="nothing to judge"):
        changed(pairs=0)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"a.journal: no such journal"):
        load_study(tmp_path / "a.journal", NAME)
    assert not (tmp_path / "a.journal").exists()
    open_study(tmp_path / "a.journal", NAME, setup(), PRINTS).close()
    with pytest.raises(SearchError, match=r"has no search 'tony'\nDid you mean tiny\?"):
        load_study(tmp_path / "a.journal", "tony")


@pytest.mark.parametrize("spec", ["sqlite:///a.db", "sqlite+pysqlite:///a.db", "mysql://host/a", "redis://host"])
def test_other_storages_are_refused(spec: str) -> None:
    with pytest.raises(SearchError, match="a search cannot be kept in") as error:
        open_study(spec, NAME, setup(), PRINTS)
    assert ("several workers and on network drives" in error.value.hint) == spec.startswith("sqlite")
    assert "postgresql://" in error.value.hint


def test_the_journal_is_called_like_the_search(here: Path) -> None:
    open_study(None, "sdxl 512/a", setup(), PRINTS).close()
    assert [path.name for path in here.iterdir()] == ["sdxl-512-a.journal"]


# --- manners ---


def test_nothing_is_said_on_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    searched(tmp_path / "a.journal", setup("tpe"), 12)
    logging.getLogger("optuna.storages").warning("not for people")
    assert capfd.readouterr() == ("", "")


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, crdiff_export.search.engine; print(*({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"optuna", "numpy", "scipy", "torch", "sqlalchemy", "cmaes"} & set(loaded)


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import crdiff_export.search.engine as package

    monkeypatch.setattr(package, "find_spec", lambda name: None)
    with pytest.raises(SearchError, match=r"needs optuna, scipy, cmaes, .*\nInstall it: pip install"):
        package.__getattr__("run")
    with pytest.raises(AttributeError, match="no attribute 'walk'"):
        package.__getattr__("walk")
    assert sorted(package.__all__) == sorted(name for names in package._WHERE.values() for name in names)
