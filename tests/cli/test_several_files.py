"""Commands for several files: each has its turn, and the exit code is the worst."""

from pathlib import Path

import pytest

from tests.support import makers
from tests.support.command_lines import Line


@pytest.fixture
def changed(baked: Path, here: Path) -> Path:
    """The baked file with one weight that should be zero."""
    name = next(name for name in makers.read(baked) if name.endswith("attn1.to_q.weight"))
    data = makers.read(baked)[name][2]
    zero = data.index(b"\0\0") // 2 * 2
    return makers.changed(baked, name, {zero: b"\x01\x3c"}, here / "changed.safetensors")


def test_inspect_shows_one_below_the_other(line: Line, baked: Path, here: Path) -> None:
    alone = line(f"inspect {baked}").out
    both = line(f"inspect {baked} demo nothere")
    assert both.code == 1
    assert both.out.startswith(f"{alone}\nfile: ")
    assert both.out.endswith(line("inspect demo").out)
    assert "nothere" in both.err


def test_a_list_in_json(line: Line, baked: Path, here: Path) -> None:
    ran = line(f"inspect {baked} nothere --json")
    assert (ran.code, ran.err) == (1, "")
    first, second = ran.result["files"]
    assert first == {key: value for key, value in line(f"inspect {baked} --json").result.items() if key != "schema"}
    assert second == {
        "file": "nothere",
        "error": {"code": "checkpoint", "message": "nothere: no such file or folder", "hint": "Check the path."},
    }


def test_verify_goes_on_and_ends_with_the_worst(line: Line, baked: Path, changed: Path) -> None:
    ran = line(f"verify {baked} {changed} nothere {baked}")
    assert ran.code == 3
    assert ran.out.count("holds what its header says") == 2
    assert changed.name in ran.err
    assert line(f"verify {baked} {baked} -q").code == 0
    files = line(f"verify {changed} {baked} --json").result["files"]
    assert [file.get("verified", False) for file in files] == [False, True]


def test_recipes_are_all_checked(line: Line, shelf: Path, here: Path) -> None:
    ran = line("recipes validate {shelf}/part.toml {shelf}/bare.toml {shelf}/latin.toml")
    assert ran.code == 1
    assert ran.out == f"{shelf}/bare.toml: a recipe for demo with 0 variants\n"
    assert f"{shelf}/part.toml" in ran.err
    assert f"{shelf}/latin.toml" in ran.err
    result = line("recipes validate {shelf}/bare.toml {shelf}/part.toml --json").result
    assert result["valid"] == [f"{shelf}/bare.toml"]
    assert len(result["errors"]) == 1
