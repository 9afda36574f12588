"""POA in A1111: with small modules, and in a real one. `A1111_PATH` names a checkout, `A1111_PYTHON` its Python."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from crdiff_export import ExportRequest, Size, export
from crdiff_export.calibrate import CalibrateRequest, calibrate
from crdiff_export.models import demo
from crdiff_export.packs import create, open_pack
from crdiff_export.progress import Silent
from crdiff_export.prune.plan_request import PlanRequest
from tests.support import ROOT

A1111 = os.environ.get("A1111_PATH")
needs_a1111 = pytest.mark.skipif(not A1111, reason="A1111_PATH names no A1111")

RATIO, WEIGHT, SIZE = 0.4, 1.7, Size(96, 64)
SECOND_RATIO, SECOND_WEIGHT, SECOND = 0.25, 3.0, Size(144, 96)
RANDOM = "random:seed=3"
TEXT = "cond_stage_model.transformer.text_model.embeddings"
# The demo model's structure for A1111, whose VAE has no weights in the checkpoint and stays zero.
CONFIG = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: 16
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    scale_factor: 0.18215
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {image_size: 16, in_channels: 4, out_channels: 4, model_channels: 64, attention_resolutions: [1, 2],
        num_res_blocks: 1, channel_mult: [1, 2], num_heads: 4, use_spatial_transformer: true, transformer_depth: 1,
        context_dim: 64, use_checkpoint: false, legacy: false}
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        ddconfig: {double_z: true, z_channels: 4, resolution: 64, in_channels: 3, out_ch: 3, ch: 32,
          ch_mult: [1, 1, 1, 1], num_res_blocks: 1, attn_resolutions: [], dropout: 0.0}
        lossconfig: {target: torch.nn.Identity}
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
      params: {version: FOLDER, device: cpu}
"""


def prepare(work: Path) -> None:
    """Fill A1111's folder with the demo model, files made from it, and a LoRA."""
    models, files = work / "models" / "Stable-diffusion", work / "files"
    for folder in (models, files, work / "models" / "Lora", work / "clip"):
        folder.mkdir(parents=True)
    for part in ("tokenizer", "text_encoder"):
        for file in (demo.config() / part).iterdir():
            text = file.read_text().replace('"max_position_embeddings": 32', '"max_position_embeddings": 77')
            (work / "clip" / file.name).write_text(text)
    base = models / "base.safetensors"
    unused = ("first_stage_model.", "alphas_cumprod", "betas")
    weights = {k: v for k, v in safetensors.torch.load_file(demo.path()).items() if not k.startswith(unused)}
    # A1111 gives CLIP 77 tokens, the demo model has places for 32.
    places = f"{TEXT}.position_embedding.weight"
    weights[places] = weights[places].repeat(3, 1)[:77].clone()
    weights[f"{TEXT}.position_ids"] = torch.arange(77)[None]
    safetensors.torch.save_file(weights, base)
    other = {k: v * 1.5 if "attn1" in k else v for k, v in weights.items()}
    safetensors.torch.save_file(other, models / "other.safetensors")
    calibration = calibrate(CalibrateRequest("demo", SIZE, ("obs",), work / "seen.safetensors", limit=2, steps=2)).path
    bake(base, files / "baked.safetensors", poa_weight=1.5)
    bake(base, files / "random.safetensors", poa_weight=1.5, criterion=RANDOM)
    bake(base, files / "obs.safetensors", poa_weight=1.5, criterion="obs", calibration=calibration)
    pack(base, files / "sizes.crdiff")
    safetensors.torch.save_file(weights, files / "plain.safetensors")
    export(ExportRequest(str(base), SECOND, models / "second.safetensors", ratio=SECOND_RATIO))
    for name in ("baked", "random", "obs"):
        (models / f"{name}.safetensors").write_bytes((files / f"{name}.safetensors").read_bytes())
    for name in ("base", "other", "second", "baked", "random", "obs"):
        (models / f"{name}.yaml").write_text(CONFIG.replace("FOLDER", str(work / "clip")))
    safetensors.torch.save_file(lora(), work / "models" / "Lora" / "style.safetensors")


def bake(base: Path, output: Path, **options: Any) -> Path:
    return export(ExportRequest(str(base), SIZE, output, ratio=RATIO, **options)).written.path


def pack(base: Path, path: Path) -> None:
    """Make a pack of two sizes."""
    for size, ratio, weight in ((SIZE, RATIO, WEIGHT), (SECOND, SECOND_RATIO, SECOND_WEIGHT)):
        request = create.PackRequest((PlanRequest(str(base), size, ratio=ratio, poa_weight=weight),), path)
        job = create.prepare_more(request, open_pack(path)) if path.exists() else create.prepare_new(request)
        create.make(job, Silent())


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


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run the check in A1111 with some of its options; what it finds."""
    work = tmp_path_factory.mktemp("a1111")
    prepare(work)

    def run(*options: str) -> dict[str, Any]:
        python = os.environ.get("A1111_PYTHON", sys.executable)
        line = [python, "-m", "tests.support.a1111_check", str(A1111), str(work), *options]
        ran = subprocess.run(line, check=False, capture_output=True, text=True, cwd=ROOT)
        assert ran.returncode == 0, ran.stderr
        results: dict[str, Any] = json.loads(ran.stdout)
        return results

    return run


@needs_a1111
def test_a_real_a1111(found: Callable[..., dict[str, Any]]) -> None:
    """Just what two loaded models give, bit by bit; and the weights are as they were, whatever ends a sampling."""
    results = found("--no-half")
    check_numbers(results, 34)
    assert {value for name, value in results.items() if "calls until" in name} == {2}
    assert results["raised by an error"] == "RuntimeError: in the middle"
    assert results["raised by an interrupt"] == ""
    assert results["pack, native size, note"] == "64x64 is the native size of base.safetensors: the model stays dense"
    for file in ("baked.safetensors", "random.safetensors", "sizes.crdiff"):
        assert "PoaError: the weights of" in results[f"other, {file}"]
    assert "holds the pruned weights of" in results["baked, baked.safetensors"]
    assert "not made by crdiff" in results["not baked"]
    assert "Give fractions with 0 <= start < stop <= 1." in results["start after stop"]


@needs_a1111
@pytest.mark.parametrize("options", [["--medvram", "--no-half"], ["--no-half", "--lowvram"], ["--precision", "half"]])
def test_with_little_memory_and_in_half(options: list[str], found: Callable[..., dict[str, Any]]) -> None:
    check_numbers(found(*options), 15)


def check_numbers(results: dict[str, Any], least: int) -> None:
    moves = {name: value for name, value in results.items() if name.endswith("moves") or "moves," in name}
    assert min(moves.values()) > 0.001, moves
    apart = {name: value for name, value in results.items() if isinstance(value, float) and name not in moves}
    assert len(apart) >= least, results
    assert {name: value for name, value in apart.items() if value} == {}
    assert {name for name, value in results.items() if value is False} == set()
