"""The nodes in a real ComfyUI. `COMFYUI_PATH` names a checkout, `COMFYUI_PYTHON` its Python, if that is not ours."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfyui_registry
import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from crdiff_export import ExportRequest, Size, export
from crdiff_export.calibrate import CalibrateRequest, calibrate
from crdiff_export.convert import ConvertRequest
from crdiff_export.convert import prepare as prepare_convert
from crdiff_export.convert import run as run_convert
from crdiff_export.models import demo
from crdiff_export.models.families import by_id
from crdiff_export.packs import create, open_pack
from crdiff_export.progress import Silent
from crdiff_export.prune.plan_request import PlanRequest
from crdiff_export.sampling import poa
from crdiff_export.sampling.comfyui.install import install
from crdiff_export.verify import open_baked
from tests.support import ROOT, makers

COMFYUI = os.environ.get("COMFYUI_PATH")
pytestmark = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH names no ComfyUI")

WEIGHT, WEIGHTS = 1.7, (0.5, 1.7, 3.0)
TIMESTEPS = [999, 749, 499, 249]
RATIO = 0.4
SIZE, TALL = Size(96, 64), Size(64, 96)
MASKS = ("random:seed=3", "wanda", "obs")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `comfyui_check.py` finds."""
    assert COMFYUI
    work = tmp_path_factory.mktemp("comfyui")
    for folder in ("custom_nodes", "comfy", "checkpoints", "masks", "scaled", "packs"):
        (work / folder).mkdir()
    install(work)
    scaled_fp8(work / "scaled")
    base = work / "checkpoints" / "demo.safetensors"
    base.write_bytes(demo.path().read_bytes())
    (work / "unet.json").write_bytes((demo.config() / "unet" / "config.json").read_bytes())
    baked = bake(base, base.with_name("baked.safetensors"), poa_weight=1.5)
    scaled = {k: v * 1.5 if "attn1" in k else v for k, v in safetensors.torch.load_file(base).items()}
    safetensors.torch.save_file(scaled, base.with_name("other.safetensors"))
    safetensors.torch.save_file(lora(), work / "lora.safetensors")
    packs(base, work / "packs")
    masked = masks(base, work / "masks")
    safetensors.torch.save_file(reference(base, baked, masked), work / "reference.safetensors")
    measured = json.loads(run("comfyui_check", str(work)).splitlines()[-1])
    assert isinstance(measured, dict)
    return measured


def scaled_fp8(folder: Path) -> None:
    """The demo model as codes with a scale, its export, and the numbers of both in float32."""
    weights = safetensors.torch.load_file(demo.path())
    stored, layers = dict(weights), {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if ("attn1" in name or ".ff.net" in name) and layer != name:
            scale = weight.abs().max().float() / 448
            stored[name], stored[f"{layer}.weight_scale"] = (weight / scale).to(torch.float8_e4m3fn), scale
            layers[layer] = {"format": "float8_e4m3fn"}
    base = folder / "scaled.safetensors"
    safetensors.torch.save_file(stored, base, {"_quantization_metadata": json.dumps({"layers": layers})})
    for path in (base, bake(base, folder / "baked-scaled.safetensors")):
        codes = safetensors.torch.load_file(path)
        wide = {
            name: codes[name].float() * codes[f"{name.removesuffix('.weight')}.weight_scale"]
            if name.removesuffix(".weight") in layers else codes[name]
            for name in weights
        }  # fmt: skip
        safetensors.torch.save_file(wide, folder / f"wide-{path.name}")


def run(module: str, *words: str) -> str:
    """Run a check with ComfyUI's Python; what it prints."""
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    line = [python, "-m", f"tests.support.{module}", str(COMFYUI), *words]
    ran = subprocess.run(line, check=False, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def bake(base: Path, output: Path, **options: Any) -> Path:
    return export(ExportRequest(str(base), SIZE, output, ratio=RATIO, **options)).written.path


def masks(base: Path, folder: Path) -> list[Path]:
    """Files that were not pruned by magnitude; and one that has its residual in it."""
    request = CalibrateRequest("demo", SIZE, ("wanda", "obs"), folder.parent / "seen.safetensors", limit=2, steps=2)
    seen = calibrate(request).path
    made = []
    for criterion in MASKS:
        calibration = None if criterion == MASKS[0] else seen
        output = folder / f"{criterion.partition(':')[0]}.safetensors"
        made.append(bake(base, output, criterion=criterion, calibration=calibration))
    bake(base, folder / "embedded.safetensors", criterion=MASKS[0], residual="embed")
    return made


def packs(base: Path, folder: Path) -> None:
    """Packs of two sizes, and the exports of their sizes that the check does not have yet."""
    for name, criterion, files in (
        ("thresholds", "magnitude", {SIZE: (RATIO, WEIGHT, ""), TALL: (0.25, 3.0, "tall")}),
        ("masks", MASKS[0], {SIZE: (RATIO, WEIGHT, "masked"), TALL: (0.25, 1.0, "masked-tall")}),
    ):
        pack = folder / f"{name}.crdiff"
        for size, (ratio, weight, file) in files.items():
            plan = PlanRequest(str(base), size, ratio=ratio, poa_weight=weight, criterion=criterion)
            request = create.PackRequest((plan,), pack)
            job = create.prepare_more(request, open_pack(pack)) if pack.exists() else create.prepare_new(request)
            create.make(job, Silent())
            if file:
                output = folder / f"{file}.safetensors"
                export(ExportRequest(str(base), size, output, ratio=ratio, criterion=criterion))


def lora() -> dict[str, Tensor]:
    """Rank 4, on two pruned layers and on one that is not."""
    torch.manual_seed(5)
    made = {}
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
    for name, (rows, columns) in {"attn1_to_q": (64, 64), "ff_net_2": (64, 256), "attn2_to_k": (64, 64)}.items():
        made[f"{block}{name}.lora_up.weight"] = torch.randn(rows, 4)
        made[f"{block}{name}.lora_down.weight"] = torch.randn(4, columns) / 10
        made[f"{block}{name}.alpha"] = torch.tensor(4.0)
    return made


def opened(path: Path) -> Any:
    """A checkpoint's UNet, by diffusers."""
    config = str(demo.config())
    return UNet2DConditionModel.from_single_file(
        str(path), config=config, subfolder="unet", local_files_only=True, torch_dtype=torch.float32
    )


def reference(base: Path, baked: Path, masked: list[Path]) -> dict[str, Tensor]:
    """What diffusers makes of the same noise: Euler steps with guidance 2."""
    unet = opened(base)
    torch.manual_seed(0)
    given = {"noise": torch.randn(1, 4, 8, 12), "cond": torch.randn(1, 77, 64), "uncond": torch.randn(1, 77, 64)}
    sigmas = schedule()
    made = {**given, "sigmas": sigmas, "dense": euler(unet, given, sigmas)}
    with poa.enabled(unet, baked, WEIGHT):
        made["poa"] = euler(unet, given, sigmas)
    made["part"] = euler(unet, given, sigmas, {1: baked, 2: baked})
    for path in masked:
        # Of two UNets, with nothing of ours.
        pruned = opened(path)
        for weight in WEIGHTS:
            made[f"{path.stem} {weight}"] = euler(two(unet, pruned, dict.fromkeys(TIMESTEPS, weight)), given, sigmas)
        inside = dict.fromkeys(TIMESTEPS, 0.0) | dict.fromkeys(TIMESTEPS[1:3], WEIGHT)
        made[f"{path.stem} part"] = euler(two(unet, pruned, inside), given, sigmas)
    return {name: tensor.contiguous() for name, tensor in made.items()}


def two(dense: Any, pruned: Any, weights: Mapping[int, float]) -> Any:
    """The formula, of two models."""

    def predict(x: Tensor, timestep: int, context: Tensor) -> Any:
        w = weights[timestep]
        first, second = (unet(x, timestep, context).sample for unet in (dense, pruned))
        return SimpleNamespace(sample=(1 - w) * first + w * second)

    return predict


def schedule() -> Tensor:
    """The sigmas of SD1's timesteps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    every = ((1 - kept) / kept) ** 0.5
    return torch.cat((every[TIMESTEPS], every.new_zeros(1))).float()


@torch.no_grad()
def euler(unet: Any, given: dict[str, Tensor], sigmas: Tensor, only: dict[int, Path] | None = None) -> Tensor:
    """Sample; with `only` POA is on at these steps."""
    x = given["noise"] * (1 + sigmas[0] ** 2) ** 0.5
    for step, timestep in enumerate(TIMESTEPS):
        if only and step in only:
            poa.enable(unet, only[step], WEIGHT)
        scaled = x / (1 + sigmas[step] ** 2) ** 0.5
        cond, uncond = (unet(scaled, timestep, given[name]).sample for name in ("cond", "uncond"))
        noise = uncond + 2.0 * (cond - uncond)
        x = x + noise * (sigmas[step + 1] - sigmas[step])
        poa.disable(unet) if only else None
    return x / 0.18215  # as ComfyUI gives latents back


# Different kernels and orders of sums; what is the same in the same way is equal bit by bit.
CLOSE = 1e-4


def test_the_node_loads(results: dict[str, Any]) -> None:
    assert results["loaded"] is True


def test_like_diffusers(results: dict[str, Any]) -> None:
    apart = {name: far for name, far in results.items() if name.startswith("diffusers ")}
    assert len(apart) == 3 + len(MASKS) * (len(WEIGHTS) + 1)
    assert max(apart.values()) < CLOSE, apart


def test_it_does_something(results: dict[str, Any]) -> None:
    moves = {name: far for name, far in results.items() if name.endswith(" moves the result")}
    packs = 2 * 5
    assert len(moves) == (3 if "scaled fp8, mixed" in results else 2) + len(MASKS) + packs
    assert min(moves.values()) > 0.001, moves


def test_like_two_models(results: dict[str, Any]) -> None:
    """With one model in memory just what two models with these weights give, bit by bit; and nothing is left behind."""
    apart = ("diffusers", "moves", "rounded")
    same = {k: v for k, v in results.items() if isinstance(v, float) and not any(word in k for word in apart)}
    assert len(same) > 250
    assert {name: value for name, value in same.items() if value} == {}


def test_a_lora_is_rounded_as_with_little_memory(results: dict[str, Any]) -> None:
    """ComfyUI would add it in float32 and round the weights, where there is memory for them."""
    rounded = {name: value for name, value in results.items() if "rounded" in name}
    assert len(rounded) == 3 * (1 + len(MASKS))
    assert max(value for name, value in rounded.items() if name.startswith("float16")) < 0.001
    assert max(rounded.values()) < 0.1


ANOTHER = "are not those of 'demo.safetensors'"
ANOTHER_OF_PACK = "are not those of demo.safetensors, which"
PRUNED = "holds the pruned weights of"
SPARSE = "prunes are zero in the model already"
ERRORS = {
    "pruned model": PRUNED,
    "other model": ANOTHER,
    "two fit": "2 of ComfyUI's models were made from the loaded one by crdiff: again.safetensors, baked.safetensors",
    "none fits": "none of ComfyUI's models was made from the loaded one",
    "pruned model, found": PRUNED,
    "not baked": "not made by crdiff",
    "no file": "gone.safetensors: is not among ComfyUI's models",
    "bad start": "Give fractions with 0 <= start < stop <= 1.",
    "no guider": "Use a sampler node",
    "random.safetensors, pruned model": PRUNED,
    "wanda.safetensors, pruned model": PRUNED,
    "obs.safetensors, pruned model": PRUNED,
    "embedded.safetensors, pruned model": ", which `crdiff restore` makes from it, and choose the baked file",
    "random.safetensors, other model": ANOTHER,
    "wanda.safetensors, other model": ANOTHER,
    "obs.safetensors, other model": ANOTHER,
    "embedded.safetensors, other model": ANOTHER,
    "random.safetensors, pruned by magnitude": ANOTHER,
    "wanda.safetensors, pruned by magnitude": ANOTHER,
    "obs.safetensors, pruned by magnitude": SPARSE,
    "pack, other model": ANOTHER_OF_PACK,
    "pack, pruned model": ANOTHER_OF_PACK,
    "pack, none": "gone.crdiff: is not among ComfyUI's packs",
    "pack, native": "64x64 is the native size of demo.safetensors: the model stays dense",
    "pack, far": "has no size near 320x64: the model stays dense",
    "pack, near": "has no 104x64; it takes that for 96x64, a starting point",
    "several fit": "4 of ComfyUI's models were made from the loaded one by crdiff: baked.safetensors, embedded.",
}


def test_scaled_fp8_is_refused_for_other_models(results: dict[str, Any]) -> None:
    if "scaled fp8, mixed" not in results:
        pytest.skip("this ComfyUI holds codes and scales apart")
    assert PRUNED in results["scaled fp8, pruned model"]
    assert "prunes fp8 with the scale" in results["scaled fp8, other model"]


@pytest.mark.parametrize("name", ERRORS)
def test_errors(results: dict[str, Any], name: str) -> None:
    assert ERRORS[name] in results[name]


def test_information(results: dict[str, Any]) -> None:
    assert "baked.safetensors" in results["choices"]
    assert "demo.safetensors" not in results["choices"]
    assert results["packs"] == ["masks.crdiff", "thresholds.crdiff"]
    assert "POA weight: 1.5" in results["info"]
    assert "not tuned" in results["info"]


FAMILIES = {
    "flux-lite": 8 * 6 + 38 * 3,
    "chroma": 19 * 6 + 38 * 3,
    "qwen-image": 60 * 6,
    "flux-2-dev": 8 * 6,
    "z-image": 30 * 7,
    "lumina-2": 26 * 7,
    "auraflow": (4 + 32) * 7,
    "pixart-sigma": 28 * 10,
    "hidream-i1": 288,
    "cosmos2-2b": 28 * 10,
    "anima": 28 * 10,
    "unet": 17 * 6,
    "sdxl": 420,
}


# The pictures whose latents the check samples.
PICTURES = {"pixart-sigma": Size(320, 320)}


def test_models_of_other_families(tmp_path: Path) -> None:
    """ComfyUI's own classes with random weights: their names are those of a family, and POA is that of two models."""
    for folder in ("custom_nodes", "comfy", "checkpoints"):
        (tmp_path / folder).mkdir()
    install(tmp_path)
    run("comfyui_families", str(tmp_path), "bases")
    for family, layers in FAMILIES.items():
        base = tmp_path / "checkpoints" / f"{family}.safetensors"
        output = base.with_name(f"baked-{base.name}")
        known = "cosmos2-2b" if family == "anima" else family
        kinds = ("attn", "ff") if family == "unet" else by_id(known).kinds
        export(ExportRequest(str(base), SIZE, output, ratio=RATIO, native=SIZE, targets=kinds))
        size = PICTURES.get(family, Size(64, 64))
        packed = PlanRequest(str(base), size, ratio=RATIO, native=SIZE, targets=kinds, poa_weight=WEIGHT)
        request = create.PackRequest((packed,), base.with_suffix(".crdiff"))
        create.make(create.prepare_new(request), Silent())
        plan = open_baked(output).plan
        assert (plan.match.family.id, plan.match.layout.name) == (
            known, "diffusers" if family in ("qwen-image", "hidream-i1") else "original",
        )  # fmt: skip
        assert len(plan.targets) == layers
    measured = json.loads(run("comfyui_families", str(tmp_path)).splitlines()[-1])
    assert measured.pop("loaded") is True
    moves = {name: value for name, value in measured.items() if name.endswith(" moves the result")}
    assert len(moves) == 2 * len(FAMILIES)
    assert min(moves.values()) > 0.001, moves
    same = {name: value for name, value in measured.items() if name not in moves}
    assert len(same) == 6 * len(FAMILIES)
    assert {name: value for name, value in same.items() if value} == {}


CHECKPOINT, PACK = "v1-5-pruned-emaonly.safetensors", "sd15.crdiff"
# The workflow's sizes are twice these; a CPU needs minutes for them.
PAGES = {"portrait": (256, 384), "landscape": (384, 256)}


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `comfyui_workflow.py` finds, with the folder for ComfyUI's registry and a whole SD1.5 of random weights."""
    work = tmp_path_factory.mktemp("workflow")
    (work / "checkpoints").mkdir()
    comfyui_registry.write(work / "custom_nodes" / "crdiff")
    base = makers.write_whole(work / "checkpoints" / CHECKPOINT, "sd15.original")
    ratios = {name: 0.2 + 0.2 * number for number, name in enumerate(PAGES)}
    plans = tuple(
        PlanRequest(str(base), Size(*PAGES[name]), ratio=ratio, poa_weight=1) for name, ratio in ratios.items()
    )
    for plan in plans:
        request = create.PackRequest((plan,), base.with_name(PACK))
        pack = request.output
        job = create.prepare_more(request, open_pack(pack)) if pack.exists() else create.prepare_new(request)
        create.make(job, Silent())
    for name, ratio in ratios.items():
        export(ExportRequest(str(base), Size(*PAGES[name]), base.with_name(f"{name}.safetensors"), ratio=ratio))
    try:
        measured = json.loads(run("comfyui_workflow", str(work)).splitlines()[-1])
    finally:
        for path in base.parent.glob("*.safetensors"):  # of 2 GB each
            path.unlink()
    assert isinstance(measured, dict)
    return measured


def test_the_example_workflow_draws_what_the_exported_files_draw(workflow: dict[str, Any]) -> None:
    """From the picture's chunk through ComfyUI's validation and executor to the saved files, bit by bit."""
    pictures = workflow["with the node"]
    assert {name: tuple(about["size"]) for name, about in pictures.items()} == {
        f"crdiff-{name}_00001_.png": size for name, size in PAGES.items()
    }
    assert all(about["values"] > 100 for about in pictures.values()), pictures
    exported = {key: about for name in PAGES for key, about in workflow[f"exported for {name}"].items()}
    assert pictures == exported
    for name, about in workflow["unpruned"].items():
        assert about["sha256"] != pictures[name]["sha256"]


def test_comfyui_knows_the_nodes_of_the_example_workflow(workflow: dict[str, Any]) -> None:
    assert workflow["page errors"] == []


def test_comfyui_lists_and_serves_the_example_workflow(workflow: dict[str, Any]) -> None:
    folder = ROOT / "crdiff_export" / "sampling" / "comfyui" / "example_workflows"
    assert workflow["templates"] == {
        "listed": {"crdiff": ["crdiff-two-sizes"]},
        "served": {path.suffix[1:]: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()},
    }


def test_the_folder_for_the_registry_loads(workflow: dict[str, Any]) -> None:
    assert workflow["loaded"] is True
    project, comfy = workflow["project"]["project"], workflow["project"]["tool_comfy"]
    assert (project["name"], project["license"]["file"], project["dependencies"]) == ("crdiff", "LICENSE", [])
    assert project["supported_os"] == ["OS Independent"]
    assert (comfy["display_name"], project["supported_comfyui_version"]) == ("CR-Diff", ">=0.3.64")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd15", "sd21"])
def test_a_full_size_folder_and_its_file_draw_the_same(model: str, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file.safetensors"
    line = [sys.executable, str(ROOT / "benchmarks/layout.py"), "--model", model, "--make", str(folder)]
    subprocess.run(line, check=True, capture_output=True)
    run_convert(prepare_convert(ConvertRequest(str(folder), "original", file)), Silent())
    (tmp_path / "work/custom_nodes").mkdir(parents=True)
    measured = json.loads(run("comfyui_layouts", str(tmp_path / "work"), str(folder), str(file)).splitlines()[-1])
    assert measured["cond"] == measured["latent"] == measured["pixels"] == 0
    # SD1 has neither of the two, in any file; the last layer of SD2 is not used for pictures.
    expected = ("logit_scale", "text_projection", "encoder.layers.23.")
    missing = [key for line in measured["keys"] for key in line.split("'")[1::2]]
    assert [key for key in missing if not any(part in key for part in expected)] == []
