"""The README's commands do what it says, and the tables of the documents are those of the code."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crdiff_export.models.families import all_families
from crdiff_export.models.recipe_files import aliases, by_alias
from tests.support import ROOT, hub_runs, makers
from tests.support.forks import Forks
from tests.support.loopback.store import Account
from tests.support.loopback_hub import LoopbackHub

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
LINES = [line.split("#")[0].strip() for block in SHELL for line in block.splitlines()]
COMMANDS = [part.strip() for line in LINES for part in line.split("&&") if part.strip().startswith("crdiff ")]
OFFLINE = [command for command in COMMANDS if "sdxl" not in command and "publish" not in command]
HUB = [command for command in COMMANDS if "sdxl" in command or "publish" in command]


# A picture of few steps is a picture, too: what a command does not say is said here.
FEW_STEPS = {"CRDIFF_PREVIEW_STEPS": "3", "CRDIFF_EVALUATE_STEPS": "3"}


def test_the_offline_commands_in_their_order(drawing: Forks, here: Path) -> None:
    shutil.copytree(ROOT / "recipes", here / "recipes")
    for name in ("comfy", "custom_nodes"):
        (here / "ComfyUI" / name).mkdir(parents=True)
    assert len(OFFLINE) >= 7
    for command in OFFLINE:
        ran = drawing.start(here, *shlex.split(command)[1:], env=FEW_STEPS).end()
        assert ran.code == 0, (command, ran.err)
        if "preview" in command or "evaluate" in command:
            assert "3 steps of " in ran.out, command
    assert (here / "demo-96x64.safetensors").exists()
    assert not (here / "plan.safetensors").exists()


def test_the_commands_that_need_the_hub_in_their_order(loopback_hub: LoopbackHub, tmp_path: Path, here: Path) -> None:
    """Against a loopback Hub that has the base, in a narrow make."""
    recipe = by_alias("sdxl")
    assert recipe
    assert recipe.repo
    assert recipe.file
    base = makers.write(tmp_path / recipe.file, makers.tiny("sdxl.original"))
    loopback_hub.add_repo(recipe.repo, {recipe.file: base})
    loopback_hub.state.accounts["hf_of_my_org"] = Account("my-org")
    (here / "variants.toml").write_text(re.findall(r"```toml\n(.*?)```", README, re.DOTALL)[0])
    assert len(HUB) >= 5
    for command in HUB:
        force = ["--force"] if "export" in command and (here / "sdxl-2048.safetensors").exists() else []
        ran = hub_runs.run(
            loopback_hub, tmp_path / "home", here, *shlex.split(command)[1:], *force, token="hf_of_my_org"
        )
        assert ran.code == 0, (command, ran.err)
    assert len(loopback_hub.repo("my-org/sdxl-crdiff").log()) == 1 + 2 + 5


def test_the_python_example(tmp_path: Path) -> None:
    code = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "pipe" not in code)
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert ran.stdout.rstrip().endswith("from-python.safetensors")


POA = [
    code
    for name in ("README.md", "docs/poa.md")
    for code in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    if "poa.enable" in code
]


@pytest.mark.parametrize("code", POA, ids=["README", "docs/poa.md"])
def test_the_examples_of_poa(code: str, tmp_path: Path) -> None:
    """With the demo for SDXL, and at its size."""
    import diffusers

    from crdiff_export import ExportRequest, Size, export
    from crdiff_export.models import demo
    from crdiff_export.sampling import poa

    (name,) = set(re.findall(r'"([\w-]+\.safetensors)"', code))
    baked = export(ExportRequest("demo", Size(64, 64), tmp_path / name)).written.path
    config = demo.config()
    pipe = diffusers.StableDiffusionPipeline.from_single_file(demo.path(), config=str(config), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    before = pipe.unet.state_dict()
    code = code.replace(f'"{name}"', repr(str(baked))).replace("=512", "=64")
    found: dict[str, object] = {"pipe": pipe}
    exec(code, found)
    poa.disable(pipe)
    assert found.get("image") or "image" not in code
    assert not hasattr(pipe.unet, "crdiff_poa")
    assert pipe.unet.state_dict().keys() == before.keys()


def test_continuous_integration_finds_the_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script
    (block,) = [block for block in SHELL if "pytest" in block]
    assert block.strip() == 'python -m pip install -e ".[test]" && python -m pytest -n auto'


def test_every_family_has_a_recipe() -> None:
    assert sorted(family.id for family in all_families()) == sorted(aliases())


def test_links_lead_somewhere() -> None:
    for text in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text.read_text(encoding="utf-8")):
            assert (text.parent / link).exists(), f"{text.name}: {link}"
