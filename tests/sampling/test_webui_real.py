"""POA in real web UIs: REFORGE_PATH, FORGE_PATH and FORGE_CLASSIC_PATH name checkouts.

REFORGE_PYTHON and so on name their Python, if that is not ours.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crdiff_export import ExportRequest, Size, export
from crdiff_export.packs import create, open_pack
from crdiff_export.progress import Silent
from crdiff_export.prune.plan_request import PlanRequest
from crdiff_export.sampling.webui.install import write_extension
from tests.support import ROOT, webui_model

UIS = [name for name in ("REFORGE", "FORGE", "FORGE_CLASSIC") if os.environ.get(f"{name}_PATH")]
pytestmark = pytest.mark.skipif(not UIS, reason="REFORGE_PATH and the like name no web UI")

WIDE, TALL = Size(128, 64), Size(64, 128)
# By size: the ratio, and the weight of POA.
NUMBERS = {WIDE: (0.4, 1.7), TALL: (0.3, 3.0)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models as the UIs have them below `models`."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("Stable-diffusion", "Lora", "crdiff"):
        (folder / name).mkdir()
    checkpoints = folder / "Stable-diffusion"
    base = webui_model.write(checkpoints / "base.safetensors")
    webui_model.write(checkpoints / "other.safetensors", seed=5)
    webui_model.write_lora(folder / "Lora" / "lora.safetensors")
    for name, size, criterion in (
        ("baked", WIDE, "magnitude"),
        ("tall", TALL, "magnitude"),
        ("random", WIDE, "random"),
    ):
        ratio, weight = NUMBERS[size]
        output = checkpoints / f"{name}.safetensors"
        export(ExportRequest(str(base), size, output, ratio=ratio, poa_weight=weight, criterion=criterion))
    pack = folder / "crdiff" / "base.crdiff"
    for size, (ratio, weight) in NUMBERS.items():
        request = create.PackRequest((PlanRequest(str(base), size, ratio=ratio, poa_weight=weight),), pack)
        job = create.prepare_more(request, open_pack(pack)) if pack.exists() else create.prepare_new(request)
        create.make(job, Silent())
    return folder


@pytest.fixture(scope="module", params=UIS or ["REFORGE"])
def results(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `webui_check.py` finds."""
    work = tmp_path_factory.mktemp(request.param.lower())
    extension = work / "extensions" / "sd-webui-crdiff"
    extension.mkdir(parents=True)
    write_extension(extension)
    (work / "models").symlink_to(models, target_is_directory=True)
    python = os.environ.get(f"{request.param}_PYTHON", sys.executable)
    line = [python, "-m", "tests.support.webui_check", os.environ[f"{request.param}_PATH"], str(work)]
    ran = subprocess.run(line, check=False, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    measured = json.loads(ran.stdout.splitlines()[-1])
    assert isinstance(measured, dict)
    return measured


def numbers(results: dict[str, Any], *words: str) -> dict[str, float]:
    """The results that have one of these words in their names."""
    found = {name: value for name, value in results.items() if any(word in name for word in words)}
    assert len(found) >= len(words)
    return found


def test_poa_is_two_models_and_the_formula(results: dict[str, Any]) -> None:
    """With thresholds and masks, with a LoRA, in part of sampling, and with a sampler that asks twice a step."""
    measured = numbers(results, ": mixed", ": again", ": start 0.5", ": stop 0.5", "Heun")
    assert set(measured.values()) == {0.0}
    assert all(value > 0.01 for value in numbers(results, "moves the picture").values())


def test_w_0_is_the_dense_model_and_w_1_the_baked_file(results: dict[str, Any]) -> None:
    assert set(numbers(results, ": w=0", ": w=1").values()) == {0.0}


def test_a_pack_follows_the_size_of_each_pass(results: dict[str, Any]) -> None:
    assert set(numbers(results, "pack: wide", "pack: tall", "pack: small is dense", "pack: hires fix").values()) >= {
        0.0
    }
    assert results["pack: hires fix"] == 0
    assert results["pack: passes of hires fix"] is True
    assert "has no size near 64x64" in results["pack: small, comment"]


def test_the_weights_are_as_before(results: dict[str, Any]) -> None:
    """After POA, an error within a pruned layer, an interrupt, and another checkpoint."""
    words = ("tensors changed", "dense again", "hooks left", "switch: other, again", "switch: back")
    assert set(numbers(results, *words).values()) == {0.0}
    assert results["error: raised"] == results["error, LoRA: raised"] == "this check ends the sampling here"
    assert results["interrupt: stopped"] is results["interrupt, LoRA: stopped"] is True


def test_a_model_that_does_not_fit_is_refused_below_the_picture(results: dict[str, Any]) -> None:
    for label in ("other model", "other model, pack", "pruned model"):
        assert results[f"{label}: comment"].startswith("CR-Diff is off: ")
        assert "\n" not in results[f"{label}: comment"]
        assert results[f"{label}: dense"] == 0
        assert results[f"{label}: infotext"] is False
    assert "already" in results["pruned model: comment"]
    assert "gone.safetensors: is not among this UI's models" in results["no file: comment"]
    assert "is no part of sampling" in results["bad start: comment"]


def test_infotext_is_read_back(results: dict[str, Any]) -> None:
    assert "CR-Diff: baked.safetensors, CR-Diff weight: 2.25, CR-Diff start: 0.25" in results["infotext"]
    assert results["infotext, read back"] == ["baked.safetensors", False, 2.25, 0.25, 0.75]
    assert results["infotext of another picture"] == ["None", True, 0.0, 1.0]


def test_the_plot_has_an_axis_for_every_setting(results: dict[str, Any]) -> None:
    assert results["axes"] == ["[CR-Diff] file", "[CR-Diff] weight", "[CR-Diff] start", "[CR-Diff] stop"]
    assert results["plot"] == 0


def test_the_extension_loads_its_own_copy(results: dict[str, Any]) -> None:
    assert results["package"] == "extensions/sd-webui-crdiff/crdiff_export/__init__.py"
