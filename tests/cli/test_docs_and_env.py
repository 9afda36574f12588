"""`crdiff docs` and `crdiff env`."""

from importlib.metadata import version

import pytest
from huggingface_hub import constants

from crdiff_export.cli import docs, env
from tests.support import DOCS
from tests.support.command_lines import Line
from tests.support.messages import refused


def test_pages_are_listed_and_printed(line: Line) -> None:
    pages = {path.stem: path for path in DOCS.glob("*.md")}
    assert line("docs -q").out.split() == sorted(pages)
    assert [page["name"] for page in line("docs --json").result["pages"]] == sorted(pages)
    for name, path in pages.items():
        assert line(f"docs {name}").out == path.read_text(encoding="utf-8").rstrip("\n") + "\n"
    assert line("docs poa.md").out == line("docs poa").out


def test_a_misspelt_page_has_the_nearest_one(line: Line) -> None:
    refused(line("docs famlies"), 2, "famlies")


def test_the_environment_is_told(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/elsewhere/hub")
    ran = line("env")
    assert ran.code == 0
    facts = dict(row.split(":", 1) for row in ran.out.splitlines())
    assert facts["torch"].strip() == version("torch")
    assert "cpu" in facts["devices"]
    assert "HF_TOKEN" in facts["variables"]
    result = line("env --json").result
    assert result["packages"]["diffusers"] == version("diffusers")
    assert result["extras"].keys() == {"score", "search", "fid"}
    assert result["hub_cache"] == facts["Hub's cache"].strip() == "/elsewhere/hub"
    assert "hf_secret" not in ran.out + str(result)


def test_an_extra_lacks_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = env._version
    monkeypatch.setattr(env, "_version", lambda package: None if package == "optuna" else real(package))
    assert env._missing("search") == ["optuna"]
    assert env._missing("score") == []


def test_no_pages_is_no_traceback(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "_FOLDERS", ())
    assert line("docs").code == 0
    assert line("docs poa").code == 2
