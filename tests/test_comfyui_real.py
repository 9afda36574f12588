"""The nodes in a real ComfyUI. `COMFYUI_PATH` names a checkout, `COMFYUI_PYTHON` its Python, if that is not ours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from crdiff_export import ExportRequest, Size, demo, export, poa
from crdiff_export.poa.comfyui.install import install

COMFYUI = os.environ.get("COMFYUI_PATH")
pytestmark = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH names no ComfyUI")

WEIGHT = 1.7
TIMESTEPS = [999, 749, 499, 249]
RATIO = 0.4


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `comfyui_check.py` finds."""
    assert COMFYUI
    work = tmp_path_factory.mktemp("comfyui")
    for folder in ("custom_nodes", "comfy"):
        (work / folder).mkdir()
    install(work)
    base = work / "demo.safetensors"
    base.write_bytes(demo.path().read_bytes())
    baked = export(ExportRequest(str(base), Size(96, 64), work / "baked.safetensors", ratio=RATIO)).written.path
    scaled = {k: v * 1.5 if "attn1" in k else v for k, v in safetensors.torch.load_file(base).items()}
    safetensors.torch.save_file(scaled, work / "other.safetensors")
    safetensors.torch.save_file(lora(), work / "lora.safetensors")
    safetensors.torch.save_file(reference(base, baked, work), work / "reference.safetensors")
    script = Path(__file__).with_name("comfyui_check.py")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    ran = subprocess.run([python, str(script), COMFYUI, str(work)], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


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


def reference(base: Path, baked: Path, work: Path) -> dict[str, Tensor]:
    """What diffusers makes of the same noise: Euler steps with guidance 2."""
    config = demo.config()
    unet = UNet2DConditionModel.from_single_file(
        str(base), config=str(config), subfolder="unet", local_files_only=True, torch_dtype=torch.float32
    )
    torch.manual_seed(0)
    given = {"noise": torch.randn(1, 4, 8, 12), "cond": torch.randn(1, 77, 64), "uncond": torch.randn(1, 77, 64)}
    sigmas = schedule()
    made = {**given, "sigmas": sigmas, "dense": euler(unet, given, sigmas)}
    with poa.enabled(unet, baked, WEIGHT):
        made["poa"] = euler(unet, given, sigmas)
    made["part"] = euler(unet, given, sigmas, {1: baked, 2: baked})
    return {name: tensor.contiguous() for name, tensor in made.items()}


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
    for name in ("dense", "poa", "poa, start and stop"):
        assert results[f"diffusers {name}"] < CLOSE, name


def test_it_does_something(results: dict[str, Any]) -> None:
    assert results["poa moves the result"] > 0.001
    assert results["controlnet moves the result"] > 0.001


def test_like_two_models(results: dict[str, Any]) -> None:
    """With one model in memory just what two models with these weights give, bit by bit."""
    apart = ("diffusers", "moves", "rounded")
    same = {k: v for k, v in results.items() if isinstance(v, float) and not any(word in k for word in apart)}
    assert len(same) > 40
    assert {name: value for name, value in same.items() if value} == {}


def test_a_lora_is_rounded_as_with_little_memory(results: dict[str, Any]) -> None:
    """ComfyUI would add it in float32 and round the weights, where there is memory for them."""
    rounded = {name: value for name, value in results.items() if "rounded" in name}
    assert len(rounded) == 3
    assert rounded["float16 lora, mixed, rounded"] < 0.001
    assert max(rounded.values()) < 0.1


ERRORS = {
    "pruned model": "holds the pruned weights of",
    "other model": "are not those of 'demo.safetensors'",
    "two fit": "2 of ComfyUI's models were made from the loaded one by crdiff: again.safetensors, baked.safetensors",
    "none fits": "none of ComfyUI's models was made from the loaded one",
    "pruned model, found": "holds the pruned weights of",
    "not baked": "not made by crdiff",
    "no file": "gone.safetensors: is not among ComfyUI's models",
    "bad start": "Give fractions with 0 <= start < stop <= 1.",
    "no guider": "Use a sampler node",
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(results: dict[str, Any], name: str) -> None:
    assert ERRORS[name] in results[name]


def test_information(results: dict[str, Any]) -> None:
    assert "baked.safetensors" in results["choices"]
    assert "demo.safetensors" not in results["choices"]
    assert "POA weight: 1.5" in results["info"]
    assert "tuned by nobody" in results["info"]
