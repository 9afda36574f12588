"""The folder for ComfyUI's registry: what is in it, and that it loads."""

import sys
import tomllib
from pathlib import Path

import comfyui_registry
import pytest

from crdiff_export.sampling.comfyui import install
from tests.support import ROOT
from tests.support.comfyui_nodes import load
from tests.support.isolation import Crdiff

FILES = {"__init__.py", "crdiff.json", "crdiff_export", "example_workflows", "pyproject.toml", "LICENSE", "README.md"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder as it is among ComfyUI's custom nodes."""
    for name in ("comfy", "custom_nodes"):
        (tmp_path / name).mkdir()
    made = tmp_path / "custom_nodes" / install.FOLDER
    comfyui_registry.write(made)
    return made


def test_the_folder_is_complete(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 5_000_000
    assert not list(folder.rglob("__pycache__"))


def test_the_nodes_load_where_nothing_is_installed(folder: Path) -> None:
    ran = load(folder)
    assert ran.returncode == 0, ran.stderr
    names, package = ran.stdout.splitlines()
    assert names.startswith("CrdiffPack|")
    assert Path(package).is_relative_to(folder)


def test_its_project_file_says_what_ours_says(folder: Path) -> None:
    own, made = (tomllib.loads((path / "pyproject.toml").read_text("utf-8")) for path in (ROOT, folder))
    for key in ("version", "requires-python", "urls"):
        assert made["project"][key] == own["project"][key]
    assert made["tool"]["comfy"] == own["tool"]["comfy"]
    assert made["project"]["name"] == "crdiff"
    assert made["project"]["dependencies"] == []
    assert (folder / made["project"]["license"]["file"]).is_file()
    assert (folder / made["project"]["readme"]).is_file()


def test_what_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["comfyui_registry.py", str(tmp_path / "new")])
    assert comfyui_registry.main() == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'new'}\n"
    assert "PublisherId in [tool.comfy]" in captured.err
    assert "Repository in [project.urls]" in captured.err
    with pytest.raises(SystemExit):
        comfyui_registry.main()
    assert "is not empty" in capsys.readouterr().err


def test_install_and_uninstall_leave_it_alone(crdiff: Crdiff, folder: Path) -> None:
    """It belongs to the manager that installed it from the registry."""
    comfyui = folder.parents[1]
    for command in ("install", "uninstall"):
        assert crdiff("comfyui", command, comfyui).code == 1
    assert {path.name for path in folder.iterdir()} == FILES
