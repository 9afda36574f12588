"""The README's commands do what it says, and the tables of the documents are those of the code."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crdiff_export.families import all_families
from crdiff_export.recipe_files import aliases

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
LINES = [line.split("#")[0].strip() for block in SHELL for line in block.splitlines()]
COMMANDS = [part.strip() for line in LINES for part in line.split("&&") if part.strip().startswith("crdiff ")]
OFFLINE = [command for command in COMMANDS if "sdxl" not in command]
HUB = [command for command in COMMANDS if "sdxl" in command]


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "crdiff_export", *shlex.split(command)[1:]]
    return subprocess.run(words, cwd=folder, check=False, capture_output=True, text=True)


def test_the_offline_commands_in_their_order(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    assert len(OFFLINE) >= 7
    for command in OFFLINE:
        ran = run(command, tmp_path)
        assert ran.returncode == 0, (command, ran.stderr)
    assert (tmp_path / "demo-96x64.safetensors").exists()
    assert not (tmp_path / "plan.safetensors").exists()


@pytest.mark.parametrize("command", HUB)
def test_commands_that_need_the_hub_are_spelt_right(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    ran = run(command, tmp_path)
    assert ran.returncode == 4, ran.stderr  # 2 would be wrong usage
    assert "not in the local cache" in ran.stderr


def test_the_python_example(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert ran.stdout.rstrip().endswith("from-python.safetensors")


def test_continuous_integration_finds_the_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script
    (block,) = [block for block in SHELL if "pytest" in block]
    assert block.strip() == 'python -m pip install -e ".[test]" && python -m pytest'


def test_every_family_has_a_recipe() -> None:
    assert sorted(family.id for family in all_families()) == sorted(aliases())


def test_links_lead_somewhere() -> None:
    for text in (ROOT / "README.md", ROOT / "docs" / "metadata.md"):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text.read_text(encoding="utf-8")):
            assert (text.parent / link).exists(), f"{text.name}: {link}"
