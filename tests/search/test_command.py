"""`crdiff search`: what people see, what is refused, and that nothing that is finished is ever lost."""

import io
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from crdiff_export.cli.search import _again
from tests.support.forks import Forks
from tests.support.isolation import Crdiff, Ran
from tests.support.messages import refused
from tests.support.search_objective import let_grace_pass, plain_storage

Line = Callable[[str], Ran]

QUICK = "--res 48 --limit 4 --held-out-limit 8 --steps 1 --batch 2 --no-native"
# A scorer that, at one of its calls, does what a user or a machine may do: the picture's brightness is the score.
JUDGE = """
import os, signal
calls = 0
def score(images, prompts):
    global calls
    calls += 1
    if calls == int(os.environ.get("AT", 0)):
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    return [sum(image.convert("L").tobytes()) / 1e5 + 1e-9 * len(prompt) for image, prompt in zip(images, prompts)]
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def line(crdiff: Crdiff, here: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    return lambda text: crdiff(*shlex.split(text))


@pytest.fixture
def judge(here: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A scorer of this test's own: modules are imported once."""
    (here / "judge.py").write_text(JUDGE)
    monkeypatch.delitem(sys.modules, "judge", raising=False)
    return "judge:score"


def trials_of(path: Path, name: str = "demo-48x48") -> list[tuple[object, ...]]:
    """A search's finished trials, apart from their numbers and from how long they took."""
    with plain_storage(path) as storage:
        trials = optuna.load_study(study_name=name, storage=storage).trials
    done = [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]
    return [(trial.state, trial.params, trial.value, trial.intermediate_values) for trial in done]


# --- what people see ---


def test_lines_facts_table_and_files(line: Line, here: Path) -> None:
    ran = line(f"search demo {QUICK} --trials 3 -o a.toml -o a.html --pictures-of-best best.png")
    assert ran.code == 0, ran.err
    err = ran.err.splitlines()
    assert "note: a trial is 4 pictures of 4 prompts, the check 8 of 8; on cpu in fp32" in err
    trials = [text for text in err if text.startswith("trial ")]
    assert [text.split(":")[0] for text in trials] == ["trial 0", "trial 1", "trial 2"]
    assert trials[0].startswith("trial 0: dense: 0.")
    assert trials[1].startswith("trial 1: down 0.839, mid 0.654, up 0.316: 0.")
    assert all(" of 3 over, best 0." in text for text in trials)
    out = ran.out.splitlines()
    assert out[0].split() == ["base:", "demo", "(demo)", "at", "48x48"]
    assert (here / "a.db").exists()
    written = [name for name in ("a.toml", "a.html", "best.png") if (here / name).exists()]
    assert out[-len(written) :] == written
    assert out[-len(written) - 1].startswith("on 8 held-out prompts, " if "a.toml" in written else "the dense model")
    quiet = line(f"search demo {QUICK} --trials 3 -o a.toml -o a.html --force -q")
    assert (quiet.code, quiet.out.split(), quiet.err) == (0, [name for name in written if name != "best.png"], "")


def test_recipe_is_valid_exports_and_publishes_its_evidence(line: Line, here: Path, judge: str) -> None:
    """Brightness likes pruning here: what was found is the best by a scorer that knows nothing."""
    ran = line(f"search demo {QUICK} --scorer {judge} --trials 4 --method sobol --json")
    assert ran.code == 0, ran.err
    said = ran.result
    assert (said["schema"], said["study"], said["storage"]) == (1, "demo-48x48", "demo-48x48.db")
    assert [trial["place"] for trial in said["trials"]] == [0, 1, 2, 3]
    assert said["trials"][said["best"]]["score"] == max(t["score"] for t in said["trials"] if t["score"] is not None)
    assert said["verdict"] in ("better", "no difference shown"), said["conclusion"]
    assert said["files"] == ["demo-48x48.toml"]
    (size,) = said["check"]["sizes"]
    assert [model["model"] for model in size["models"]] == ["dense", "pruned"]
    assert len(said["check"]["pairs"]) == 8
    assert line("recipes validate demo-48x48.toml").code == 0
    assert line("export demo --res 48 --recipe demo-48x48.toml -o o.safetensors").code == 0
    shown = line("inspect o.safetensors").out
    assert "searched (crdiff search: sobol, seed 42, the best of 4 trials" in shown
    assert ", 8 prompts, scorer " in shown
    assert line("inspect o.safetensors --json").result["crdiff"]["evidence.method"] == "sobol"


def test_a_search_with_another_criterion_says_so_to_the_end(line: Line, here: Path, judge: str) -> None:
    """Its trials are not another criterion's, its recipe is; an export with another one does not call it searched."""
    asked = f"search demo {QUICK} --scorer {judge} --trials 3 --method sobol --json -o r.toml"
    ran = line(f"{asked} --criterion random:seed=1,compare=block")
    assert ran.code == 0, ran.err
    assert ran.result["verdict"] in ("better", "no difference shown"), ran.result["conclusion"]
    other = line(f"{asked} --criterion random:seed=2 --force")
    assert (other.code, other.out) == (1, "")
    assert other.error["message"].endswith("criterion was random:seed=1, now random:seed=2")
    plain = line(f"{asked} --force")
    assert "criterion was random:seed=1" in plain.error["message"], plain.error
    assert line("export demo --res 48 --recipe r.toml --criterion random:seed=1 -o own.safetensors").code == 0
    own = line("inspect own.safetensors --metadata --json").result["metadata"]
    assert (own["crdiff.provenance"], own["crdiff.evidence.criterion"]) == ("searched", "random:seed=1")
    assert " with random:seed=1, " in own["crdiff.provenance.source"]
    assert line("export demo --res 48 --recipe r.toml -o plain.safetensors").code == 0
    without = line("inspect plain.safetensors --metadata --json").result["metadata"]
    assert without["crdiff.provenance"] == "starting-point"
    assert without["crdiff.provenance.source"].endswith("; found with random:seed=1")
    assert not any(key.startswith("crdiff.evidence") for key in without)


def test_a_worker_leaves_the_check_to_others(line: Line, here: Path) -> None:
    """And more trials go on where fewer ended."""
    ran = line(f"search demo {QUICK} --trials 2 -o a.toml --worker")
    assert ran.code == 0, ran.err
    assert "this worker checked nothing" in ran.out
    assert [path.name for path in here.iterdir()] == ["a.db"]
    before = trials_of(here / "a.db")
    ran = line(f"search demo {QUICK} --trials 3 -o a.toml")
    assert ran.code == 0, ran.err
    assert trials_of(here / "a.db")[:2] == before
    assert [text.split(":")[0] for text in ran.err.splitlines() if text.startswith("trial")] == ["trial 2"]


def test_ratios_that_prune_nothing_are_the_dense_model(line: Line, here: Path) -> None:
    """Not a weight of so small a share: equal scores, and of equal ones the dense model's is the best."""
    ran = line(f"search demo {QUICK} --trials 3 --high 1e-9 -o a.toml -o a.svg --json")
    assert ran.code == 0, ran.err
    said = ran.result
    assert len({trial["score"] for trial in said["trials"]}) == 1
    assert (said["verdict"], said["ratios"], said["check"]) == ("dense is best", None, None)
    assert said["conclusion"] == (
        "the dense model scored highest of 3 trials: there is nothing to recommend, and no recipe was written"
    )
    note = "the recipe's variant lies outside what is searched; trial 1 is the nearest point within"
    assert note in said["notes"]
    assert said["files"] == ["a.svg"]
    assert not (here / "a.toml").exists()


# --- that it goes on ---


WORDS = f"search demo {QUICK} --scorer judge:score --trials 4 --method anneal --poa-range 1 2 --worker"


@pytest.fixture(scope="module")
def whole(drawing: Forks, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, ...]]:
    """The trials of a search that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "here"
    folder.mkdir()
    (folder / "judge.py").write_text(JUDGE)
    assert drawing.start(folder, *shlex.split(WORDS)).end().code == 0
    return trials_of(folder / "demo-48x48.db")


@pytest.mark.parametrize(("number", "also"), [(3, ""), (8, "--json")], ids=["second-trial", "last-trial"])
def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(
    number: int,
    also: str,
    line: Line,
    here: Path,
    judge: str,
    whole: list[tuple[object, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SIGNAL", "SIGINT")
    monkeypatch.setenv("AT", str(number))
    ran = line(f"{WORDS} -o a.toml {also}")
    assert ran.code == 130
    over = (number - 1) // 2
    kept = "1 finished trial" if over == 1 else f"{over} finished trials"
    if also:
        assert ran.error["code"] == "interrupted"
        message, hint = ran.error["message"], ran.error["hint"]
    else:
        message, hint = (text.removeprefix("crdiff: ").strip() for text in ran.err.splitlines()[-2:])
    assert message == f"interrupted; {kept} kept in a.db"
    assert hint.startswith("To go on: crdiff search demo --res 48 ")
    assert trials_of(here / "a.db") == whole[:over]
    monkeypatch.setenv("AT", "0")
    ran = line(hint.removeprefix("To go on: crdiff "))
    assert ran.code == 0, ran.err
    assert trials_of(here / "a.db") == whole


def test_killed_and_started_again_it_goes_on(
    line: Line, here: Path, judge: str, whole: list[tuple[object, ...]], drawing: Forks
) -> None:
    killed = drawing.start(here, *shlex.split(f"{WORDS} -o a.toml"), env={"SIGNAL": "SIGKILL", "AT": "6"}).end()
    assert killed.code == -signal.SIGKILL, killed.err
    assert trials_of(here / "a.db") == whole[:2]
    let_grace_pass(here / "a.db")
    again = line(f"{WORDS} -o a.toml")
    assert again.code == 0, again.err
    assert "trial 2: tried again (its worker died)" in again.err
    assert trials_of(here / "a.db") == whole


def test_the_command_that_goes_on_has_no_password() -> None:
    storage, shown = "postgresql://me:s3cret@host/db?password=s3cret", "postgresql://me:***@host/db"
    for words in (["--storage", storage], [f"--storage={storage}"]):
        text = _again(["search", "sdxl", *words, "-o", "a b.toml"], storage, shown)
        plain = [word.replace(storage, shown) for word in words]
        assert shlex.split(text) == ["crdiff", "search", "sdxl", *plain, "-o", "a b.toml"]


# --- what is refused ---

REFUSED = {
    "no-scorer": ("search {sd15} --res 512 --prompt x", 2, "--scorer"),
    "no-such-scorer": ("search demo --res 48 --scorer beauty", 2, "'beauty'"),
    "no-prompts": ("search {sd15} --res 512 --scorer aesthetic", 2, "--prompts FILE"),
    "one-prompt": ("search demo --res 48 --prompts one.txt", 2, "--held-out FILE"),
    "no-such-file": ("search demo --res 48 --prompts no.txt", 1, "no.txt"),
    "seen-prompts": ("search demo --res 48 --prompts two.txt --held-out one.txt", 2, "--held-out"),
    "two-kinds": ("search demo --res 48 --prompt x --prompts two.txt", 2, "--prompt"),
    "limit-of-one": ("search demo --res 48 --prompt x --limit 2", 2, "--pictures"),
    "empty-prompt": ("search demo --res 48 --prompt ' '", 2, "prompt"),
    "too-many": ("search demo --res 48 --limit 1000", 2, "1000"),
    "off-grid": ("search demo --res 50", 2, "50x50"),
    "paper": ("search demo --res 48 --paper --method tpe", 2, "--paper"),
    "uniform": ("search demo --res 48 --criterion uniform", 2, "uniform"),
    "empty-box": ("search demo --res 48 --low 0.5 --high 0.2", 2, "0.5 to 0.2"),
    "weight-0": ("search demo --res 48 --poa-range 0 2", 2, "--poa-range"),
    "strange-output": ("search demo --res 48 -o a.jpg", 2, "a.jpg"),
    "two-recipes": ("search demo --res 48 -o a.toml -o b.toml", 2, ".toml"),
    "same-name": ("search demo --res 48 -o a.png --pictures-of-best a.png", 2, "a.png"),
    "exists": ("search demo --res 48 -o taken.toml", 1, "taken.toml"),
    "no-folder": ("search demo --res 48 -o no/a.toml", 1, "folder no"),
    "old-journal": ("search demo --res 48 --storage old.journal", 2, "NAME.db"),
    "other-server": ("search demo --res 48 --storage mysql://host/a", 2, "mysql"),
    "no-database": ("search demo --res 48 --storage odd.db", 1, "odd.db"),
    "not-a-scene": ("search demo --res 48 --prompt fox --pictures 2 --steps 1", 1, "fox"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "code", "key"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(words: str, code: int, key: str, line: Line, here: Path, shelf: Path) -> None:
    (here / "one.txt").write_text("a large red circle on white\n")
    (here / "two.txt").write_text("a large red circle on white\ntwo red circles on white\n")
    (here / "taken.toml").write_text("")
    (here / "odd.db").write_text("what is this?\n")
    (here / "old.journal").touch()
    before = {path.name for path in here.iterdir()}
    ran = line(words.format(sd15=shelf / "sd15.safetensors"))
    refused(ran, code, key)
    assert {path.name for path in here.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "code", "key"),
    [
        ("search demo", 2, "--res"),
        ("search demo --res 48 --method guess", 2, "'guess'"),
        ("search demo --res 48 --trials 1", 2, "'--trials'"),
        ("search demo --res 48 --storage postgresql://me:s3cret@127.0.0.1:9/x", 1, "postgresql://me:***@127.0.0.1:9/x"),
    ],
    ids=["no-size", "no-method", "one-trial", "no-server"],
)
def test_what_libraries_refuse_in_their_own_words(words: str, code: int, key: str, line: Line, here: Path) -> None:
    ran = line(words)
    assert ran.code == code, ran.err
    assert key in ran.err
    assert "Traceback" not in ran.err
    assert "s3cret" not in ran.err


def test_other_settings_are_refused_with_their_names(line: Line, here: Path) -> None:
    words = f"search demo {QUICK} -o a.toml --worker --trials 2"
    assert line(words).code == 0
    ran = line(f"{words} --steps 2 --seed 9 --guidance 1.5 --negative 'a blue circle' -q")
    changes = ("guidance was 4.0, now 1.5; negative was none, now a blue circle", "steps was 1, now 2")
    refused(ran, 1, "'demo-48x48'", "prompts and seeds was ", *changes)
    early = line(f"{words} --method-seed 5 --limit 3 --method sobol")
    assert "method was tpe, now sobol; pairs was 4, now 3; search seed was 42, now 5" in early.err
    assert "hashing" not in early.err  # before a weight is read
    assert line(f"{words} --steps 2 --study other").code == 0


class Terminal(io.StringIO):
    """A stderr that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_of_trials(monkeypatch: pytest.MonkeyPatch, line: Line, here: Path) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    assert line(f"search demo {QUICK} --trials 2 --worker").code == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "trial 1" in text
    assert "1 of 2 over, best 0." in text
    assert "trial 1: down" not in text
    drawn = text[text.index("0 of 2 over") : text.index("2 of 2 over")]
    assert "\n" not in drawn
    assert max(len(each) for each in drawn.split("\r")) <= 80
