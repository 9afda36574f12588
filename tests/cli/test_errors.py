"""Errors that come from outside: code of others, variables of the environment, streams that are full."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import crdiff_export
from crdiff_export.errors import CrdiffError, PreviewError, ScorerError, foreign_errors
from crdiff_export.export import export
from crdiff_export.sizes import Size
from tests.support.command_lines import Line
from tests.support.isolation import Crdiff
from tests.support.messages import raises, refused

OWN = """
import sys

def value(images, prompts):
    raise ValueError("boom\\nand more")

def silent(images, prompts):
    raise KeyboardInterruptLike

def ends(images, prompts):
    sys.exit(3)

def short(images):
    return [1.0]

def factory(device, dtype):
    raise OSError("no weights")
"""
EVALUATE = "evaluate demo --res 48 --no-native --limit 1 --steps 1"
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")


@pytest.fixture
def own(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delitem(sys.modules, "own", raising=False)
    (here / "own.py").write_text(OWN)
    return here


@pytest.mark.parametrize(
    ("function", "key"),
    [
        ("value", "own:value: ValueError: boom"),
        ("silent", "own:silent: NameError: name 'KeyboardInterruptLike' is not defined"),
        ("ends", "own:ends: SystemExit: 3"),
        ("short", "own:short: TypeError: "),
        ("factory", "own:factory: OSError: no weights"),
    ],
)
def test_a_scorer_that_raises_is_an_error_of_one_line(line: Line, own: Path, function: str, key: str) -> None:
    ran = line(f"{EVALUATE} --scorer own:{function} --json")
    assert (ran.code, ran.out, ran.error["code"]) == (1, "", "scorer")
    assert ran.error["message"].startswith(key)
    assert "--debug" in ran.error["hint"]
    assert "traceback" not in ran.error


def test_the_traceback_is_shown_on_request(line: Line, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = line(f"{EVALUATE} --scorer own:value -q --debug")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("Traceback (most recent call last):\n")
    assert "own.py" in ran.err
    assert ran.err.splitlines()[-2] == "crdiff: own:value: ValueError: boom"
    monkeypatch.setenv("CRDIFF_DEBUG", "1")
    ran = line(f"{EVALUATE} --scorer own:value --json")
    assert "own.py" in ran.error["traceback"]
    assert json.loads(ran.err)["error"]["message"] == "own:value: ValueError: boom"


def test_a_bug_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(AttributeError), foreign_errors(ScorerError, "a scorer", "Correct it."):
        export(None)  # type: ignore[arg-type]
    with raises(ScorerError, "a scorer: TypeError"), foreign_errors(ScorerError, "a scorer", "Correct it."):
        export()  # type: ignore[call-arg]  # the caller's fault


def test_a_plug_in_whose_name_begins_with_ours_is_not_ours() -> None:
    package = Path(crdiff_export.__file__).parent
    code = compile("def score():\n    raise ValueError('boom')", f"{package}_extra/scorer.py", "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    with raises(ScorerError, "a scorer: ValueError"), foreign_errors(ScorerError, "a scorer", "Correct it."):
        names["score"]()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory"), CrdiffError("a", "b")])
def test_what_has_an_error_of_its_own_passes(error: Exception) -> None:
    with pytest.raises(type(error)) as info, foreign_errors(ScorerError, "a scorer", "Correct it."):
        raise error
    assert info.value is error


def test_a_pipeline_that_fails_is_an_error_of_one_line() -> None:
    from crdiff_export.models.families import by_id
    from crdiff_export.sampling.session import Session

    class Pipe:
        def __call__(self, *_: object, **__: object) -> None:
            raise IndexError("in diffusers")

    session = Session(Pipe(), by_id("demo").pipelines[""])
    with raises(PreviewError, "Pipe cannot draw: IndexError: in diffusers"):
        session.draw(["a"], [0], session.style(Size(8, 8)))


# --- streams ---


@full
@pytest.mark.parametrize("words", ["-h", "--version", "export -h", ""])
def test_help_on_a_full_disk_is_an_error_of_two_lines(here: Path, words: str) -> None:
    with Path("/dev/full").open("w") as nowhere:
        command = [sys.executable, "-m", "crdiff_export", *words.split()]
        ran = subprocess.run(command, text=True, check=False, stdout=nowhere, stderr=subprocess.PIPE)
    if not words:  # click shows the help of a line without words on stderr
        assert (ran.returncode, "Traceback" in ran.stderr) == (2, False)
        return
    assert (ran.returncode, len(ran.stderr.splitlines())) == (1, 2)
    assert ran.stderr.startswith("crdiff: standard output: ")


@full
def test_a_full_stderr_does_not_lose_a_result(here: Path) -> None:
    with Path("/dev/full").open("w") as nowhere:
        command = [sys.executable, "-m", "crdiff_export", "export", "demo", "--res", "72", "-o", "n.safetensors"]
        ran = subprocess.run(command, text=True, check=False, stdout=subprocess.PIPE, stderr=nowhere)
        failed = subprocess.run([*command[:4], "nothing.ckpt", "--res", "8"], check=False, stderr=nowhere)
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (0, "n.safetensors")
    assert (here / "n.safetensors").exists()
    assert failed.returncode == 1


# --- variables of the environment ---


def test_a_variable_with_a_wrong_value_is_named(line: Line, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRDIFF_EXPORT_DEVICE", "gpu")
    refused(line("export demo --res 48 --dry-run"), 2, "CRDIFF_EXPORT_DEVICE: ")
    assert line("export demo --res 48 --dry-run --device cpu").code == 0
    monkeypatch.delenv("CRDIFF_EXPORT_DEVICE")
    monkeypatch.setenv("CRDIFF_EXPORT_CRITERION", "taste")
    refused(line("export demo --res 48 --dry-run"), 2, "CRDIFF_EXPORT_CRITERION")


def test_a_variable_that_has_nothing_to_do_with_an_error_is_not_named(
    line: Line, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRDIFF_EXPORT_DEVICE", "cpu")
    monkeypatch.setenv("CRDIFF_JSON", "1")  # there is no option for all commands
    ran = line("export demo --res 48 --dry-run --criterion taste")
    assert ran.code == 2
    assert ran.err.startswith("crdiff: ")
    assert "CRDIFF_EXPORT_DEVICE" not in ran.err


@pytest.mark.parametrize(("name", "value"), [("TAG", "v1"), ("PATH_IN_REPO", "a/b"), ("CREATE_PR", "1")])
def test_variables_of_a_push_do_nothing_without_one(
    line: Line, here: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"CRDIFF_EXPORT_{name}", value)
    ran = line("export demo --res 48 --dry-run")
    assert (ran.code, ran.err) == (0, "")


# --- words ---


def test_a_longer_name_of_an_option_is_answered_with_the_right_one(crdiff: Crdiff) -> None:
    ran = crdiff("export", "demo", "--resolution", 64, "--json")
    assert (ran.code, ran.error["code"]) == (2, "usage")
    assert "--res" in ran.error["message"].partition("Did you mean")[2]


def test_the_demo_is_inspected_by_its_name(line: Line, here: Path) -> None:
    assert line("inspect demo --json").result["family"] == "demo"
