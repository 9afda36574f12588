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
from tests.support import ROOT, makers
from tests.support.forks import Forks
from tests.support.loopback.store import Account
from tests.support.loopback_hub import LoopbackHub
from tests.support.publishing import Desk


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The blocks of code of a document."""
    return re.findall(rf"```{language}\n(.*?)```", text_of(name), re.DOTALL)


def commands(*names: str, hub: bool) -> list[list[str]]:
    """The command lines of crdiff in documents: those that need the Hub, or all others; --dry-run and all."""
    lines = [line.split("#")[0] for name in names for block in blocks(name, "sh") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("crdiff ")]
    return [shlex.split(part)[1:] for part in parts if ("sdxl" in part or "publish" in part) == hub]


# A picture of few steps is a picture, too: what a command does not say is said here, and what it says is replaced.
FEW_STEPS = {
    "CRDIFF_PREVIEW_STEPS": "2", "CRDIFF_EVALUATE_STEPS": "2", "CRDIFF_SEARCH_NATIVE": "0",
    "CRDIFF_PREVIEW_FORCE": "1",  # two documents have a preview of one name
}  # fmt: skip
FEW = {"--steps": "1", "--limit": "6", "--held-out-limit": "6"}


@pytest.mark.parametrize("names", [("README.md", "docs/getting-started.md"), ("docs/residual.md",)], ids=" ".join)
def test_the_offline_commands_in_their_order(names: tuple[str, ...], drawing: Forks, here: Path) -> None:
    """A command that stands in two documents runs once."""
    shutil.copytree(ROOT / "recipes", here / "recipes")
    for folder in ("comfy", "custom_nodes"):
        (here / "ComfyUI" / folder).mkdir(parents=True)
    for folder in ("modules_forge", "backend/patcher", "extensions"):
        (here / "stable-diffusion-webui" / folder).mkdir(parents=True)
    for words in dict.fromkeys(map(tuple, commands(*names, hub=False))):
        few = [FEW.get(before, word) for before, word in zip(("", *words), words, strict=False)]
        ran = drawing.start(here, *few, env=FEW_STEPS).end()
        assert ran.code == 0, (words, ran.err)
        if words[0] in ("preview", "evaluate"):
            assert "2 steps of " in ran.out, words
    assert not (here / "plan.safetensors").exists()


def test_the_commands_that_need_the_hub_in_their_order(
    loopback_hub: LoopbackHub, clients: Forks | None, tmp_path: Path
) -> None:
    """Against a loopback Hub that has the base, in a narrow make."""
    desk = Desk(loopback_hub, tmp_path, clients)
    recipe = by_alias("sdxl")
    assert recipe
    assert recipe.repo
    assert recipe.file
    base = makers.write(tmp_path / recipe.file, makers.tiny("sdxl.original"))
    loopback_hub.add_repo(recipe.repo, {recipe.file: base})
    loopback_hub.accounts["hf_of_my_org"] = Account("my-org")
    desk.plan(blocks("docs/getting-started.md", "toml")[0], "variants.toml")
    for words in commands("README.md", "docs/getting-started.md", hub=True):
        ran = desk.run(*words, token="hf_of_my_org")
        assert ran.code == 0, (words, ran.err)
    assert len(loopback_hub.repo("my-org/sdxl-crdiff").log()) == 1 + 2 + 5


def test_the_python_example(tmp_path: Path) -> None:
    (code,) = blocks("README.md", "python")
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert ran.stdout.rstrip().endswith("from-python.safetensors")


POA = [
    code for name in ("docs/getting-started.md", "docs/poa.md") for code in blocks(name, "python")
    if "poa.enable" in code
]  # fmt: skip


def test_the_examples_of_poa(tmp_path: Path) -> None:
    """With the demo for SDXL, at its size, in few steps."""
    import diffusers

    from crdiff_export import ExportRequest, Size, export
    from crdiff_export.models import demo
    from crdiff_export.packs import create
    from crdiff_export.progress import Silent
    from crdiff_export.prune.plan_request import PlanRequest
    from crdiff_export.sampling import poa

    config = demo.config()
    pipe = diffusers.StableDiffusionPipeline.from_single_file(demo.path(), config=str(config), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    before = pipe.unet.state_dict()
    assert len(POA) == 3
    for code in POA:
        (name,) = set(re.findall(r'"([\w-]+\.(?:safetensors|crdiff))"', code))
        path = tmp_path / name
        if name.endswith(".crdiff"):
            plans = tuple(PlanRequest("demo", Size.parse(size)) for size in ("64", "96x128"))
            create.make(create.prepare_new(create.PackRequest(plans, path)), Silent())
        else:
            export(ExportRequest("demo", Size(64, 64), path))
        names: dict[str, object] = {"pipe": pipe}
        short = code.replace(f'"{name}"', repr(str(path))).replace("height=512", "height=64, num_inference_steps=2")
        short = (
            short.replace("=512", "=64").replace("768", "96").replace("1024", "128").replace("(512, 512)", "(64, 64)")
        )
        exec(short.replace("height=height", "height=height, num_inference_steps=2"), names)
        poa.disable(pipe)
        assert names.get("image") or "image" not in code
        assert not hasattr(pipe.unet, "crdiff_poa")
        assert pipe.unet.state_dict().keys() == before.keys()


def test_continuous_integration_finds_the_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script
    (block,) = [block for block in blocks("README.md", "sh") if "pytest" in block]
    assert block.strip() == 'python -m pip install -e ".[test]" && python -m pytest -n auto'


def test_every_family_has_a_recipe() -> None:
    assert sorted(family.id for family in all_families()) == sorted(aliases())


def test_the_readme_is_short_and_links_lead_somewhere() -> None:
    assert len(text_of("README.md").splitlines()) <= 130
    for text in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text.read_text(encoding="utf-8")):
            assert (text.parent / link).exists(), f"{text.name}: {link}"
