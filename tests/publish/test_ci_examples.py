"""The examples for CI jobs do what they say: their own commands, run against a loopback Hub that trusts the job."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

from crdiff_export.models import recipe_files
from crdiff_export.publish import plan_file, plan_keys
from tests.support import DOCS, makers
from tests.support.hub_runs import environment
from tests.support.loopback.trusting import ID_TOKEN, REQUEST_TOKEN
from tests.support.loopback_hub import WRITE_TOKEN, LoopbackHub

DOCUMENT = (DOCS / "publishing.md").read_text(encoding="utf-8")
REPO = "my-org/sdxl-crdiff"
SIZES = ["512x512", "768x768", "1024x1536", "1536x1024", "2048x2048"]


def example(name: str) -> Any:
    return yaml.safe_load((DOCS / "examples" / name).read_text(encoding="utf-8"))


def bash(hub: LoopbackHub, home: Path, cwd: Path, script: str, env: Mapping[str, str]) -> CompletedProcess[str]:
    """A step, as a runner runs it, with `crdiff` on the path."""
    whole = environment(hub, home, token=None, env=env)
    whole["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{whole['PATH']}"
    return subprocess.run(["bash", "-e", "-c", script], env=whole, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job's folder, with the example's plan."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "variants.toml").write_bytes((DOCS / "examples/variants.toml").read_bytes())
    return folder


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A Hub with the base, in a narrow make, and a private repository, in which a job finds what another published."""
    recipe = recipe_files.by_alias("sdxl")
    assert recipe
    assert recipe.repo
    assert recipe.file
    base = makers.write(tmp_path_factory.mktemp("base") / recipe.file, makers.tiny("sdxl.original"))
    with LoopbackHub() as hub:
        hub.add_repo(recipe.repo, {recipe.file: base, "README.md": b"---\nlicense: openrail++\n---\n"})
        hub.add_repo(REPO, private=True)
        yield hub


def check_published(hub: LoopbackHub) -> None:
    log = hub.repo(REPO).log()
    assert [commit.title for commit in log] == [
        *(f"Publish sdxl-{size}.safetensors with crdiff" for size in reversed(SIZES)), "initial commit",
    ]  # fmt: skip
    card = hub.read(REPO, "README.md").decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "openrail++"
    assert all(f"sdxl-{size}.safetensors" in card for size in SIZES)


@pytest.mark.skipif(sys.platform == "win32", reason="no bash")
@pytest.mark.parametrize("way", ["trusted publishing", "token"])
def test_github(job: LoopbackHub, tmp_path: Path, here: Path, way: str) -> None:
    workflow = example("publish.yml")
    assert workflow["permissions"]["id-token"] == "write"
    assert set(workflow[True]) == {"push", "workflow_dispatch"}  # YAML 1.1 reads `on` as true
    (work,) = workflow["jobs"].values()
    names = {"vars.HF_OIDC_RESOURCE": REPO, "secrets.HF_TOKEN": ""}
    if way == "token":
        names = {"vars.HF_OIDC_RESOURCE": "", "secrets.HF_TOKEN": WRITE_TOKEN.replace("write", "my_org")}
        job.accounts[names["secrets.HF_TOKEN"]] = job.accounts[WRITE_TOKEN].__class__("my-org")
    env = {
        key: re.sub(r"\$\{\{ (.*?) \}\}", lambda name: names[name[1]], str(text)) for key, text in work["env"].items()
    }
    job.requests.clear()
    env |= {
        "GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "ACTIONS_ID_TOKEN_REQUEST_URL": f"{job.url}/runner/id-token", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": REQUEST_TOKEN,
    }  # fmt: skip
    steps = [step["run"] for step in work["steps"] if "crdiff publish" in step.get("run", "")]
    assert len(steps) == 2
    for step in steps if way == "trusted publishing" else steps[-1:]:
        ran = bash(job, tmp_path / "home", here, step, env)
        assert ran.returncode == 0, ran.stderr
    check_published(job)
    assert {p.name for p in here.iterdir()} == {"variants.toml", "report.json"}
    assert len(re.findall("✅ (published|unchanged)", (tmp_path / "summary.md").read_text())) == len(SIZES)
    exchanged = any(asked.path.startswith("/oauth/token") for asked in job.requests)
    assert exchanged == (way == "trusted publishing")
    said = ran.stdout + ran.stderr + (here / "report.json").read_text()
    assert not [token for token in (*job.accounts, ID_TOKEN, REQUEST_TOKEN) if token in said]


@pytest.mark.skipif(sys.platform == "win32", reason="no bash")
def test_gitlab(job: LoopbackHub, tmp_path: Path, here: Path) -> None:
    work = example("gitlab-ci.yml")["publish"]
    assert work["id_tokens"] == {"HF_OIDC_ID_TOKEN": {"aud": "https://huggingface.co"}}
    script = [line for line in work["script"] if line.startswith("crdiff")]
    ran = bash(job, tmp_path / "home", here, script[-1], {**work["variables"], "HF_OIDC_ID_TOKEN": ID_TOKEN})
    assert ran.returncode == 0, ran.stderr
    check_published(job)
    assert work["artifacts"]["paths"] == ["report.json"]
    assert (here / "report.json").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="no bash")
def test_a_job_that_the_hub_does_not_trust(job: LoopbackHub, tmp_path: Path, here: Path) -> None:
    env = {"HF_OIDC_RESOURCE": "my-org/another", "HF_OIDC_ID_TOKEN": ID_TOKEN}
    ran = bash(job, tmp_path / "home", here, "crdiff publish variants.toml -q", env)
    assert ran.returncode == 4
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""
    env = {"HF_OIDC_RESOURCE": REPO}
    ran = bash(job, tmp_path / "home", here, "crdiff publish variants.toml -q", env)
    assert ran.returncode == 4
    assert "trusted publishing failed" in ran.stderr


def test_the_example_plan_is_one() -> None:
    found = plan_file.load(DOCS / "examples/variants.toml")
    assert [str(entry.request.size) for entry in found.entries] == SIZES
    assert {entry.repo for entry in found.entries} == {REPO}


def test_the_document_has_a_plan_that_holds(tmp_path: Path) -> None:
    text = re.search(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
    assert text
    found = plan_file.parse(text[1], "plan.toml", tmp_path)
    assert [entry.path for entry in found.entries] == [
        "sdxl-512x512-fp16.safetensors", "sdxl-400x560-fp16.safetensors",
        "model-crdiff-768x768.safetensors", "other-tall.safetensors",
    ]  # fmt: skip


def test_the_document_names_every_key_of_a_plan() -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", DOCUMENT, re.MULTILINE)
    named = {key for cells, _ in rows for key in re.findall(r"`(\w+)`", cells)}
    known = {key for keys in plan_keys.TABLES.values() for key in keys}
    assert named == known - {"variant"}  # which is a table
