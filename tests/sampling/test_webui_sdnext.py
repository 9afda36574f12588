"""POA in SD.Next: with a small pipeline, and in a real one.

`SDNEXT_PATH` names a checkout, `SDNEXT_PYTHON` its Python, if that is not ours.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor

from crdiff_export import ExportRequest, Size, export
from crdiff_export.calibrate import CalibrateRequest, calibrate
from crdiff_export.errors import PoaError
from crdiff_export.models import demo
from crdiff_export.sampling.webui import sdnext as adapter
from crdiff_export.sampling.webui.install import write_extension
from crdiff_export.sampling.webui.settings import Settings
from crdiff_export.sampling.webui.source import PoaFile
from tests.sampling.test_webui_a1111 import (
    RANDOM,
    SECOND,
    SECOND_RATIO,
    SECOND_WEIGHT,
    SIZE,
    WEIGHT,
    bake,
    check_numbers,
    lora,
    pack,
)  # fmt: skip
from tests.support import ROOT

SDNEXT = os.environ.get("SDNEXT_PATH")
needs_sdnext = pytest.mark.skipif(not SDNEXT, reason="SDNEXT_PATH names no SD.Next")


class Ui:
    """SD.Next as the adapter sees it: its modules, a pipeline, and LoRAs that are merged into layers."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.callbacks: list[Any] = []
        self.opts = SimpleNamespace(diffusers_offload_mode="balanced", lora_fuse_native=False)
        self.shares: dict[str, Tensor] = {}

    def modules(self) -> dict[str, Any]:
        names = ("modules", "modules.shared", "modules.script_callbacks", "modules.devices", "modules.lora")
        made: dict[str, Any] = {name: ModuleType(name) for name in (*names, "modules.lora.lora_apply")}
        made["modules.shared"].__dict__.update(sd_model=self.pipe, opts=self.opts)
        made["modules.devices"].__dict__.update(device=torch.device("cpu"))
        made["modules.script_callbacks"].__dict__.update(
            on_after_process=self.callbacks.append,
            remove_callbacks_for_function=lambda function: self.callbacks.clear(),
        )
        made["modules.lora.lora_apply"].__dict__.update(network_calc_weights=self.calculate)
        for name in names[1:4]:
            setattr(made["modules"], name.rpartition(".")[2], made[name])
        return made

    def calculate(self, layer: Any, name: str) -> tuple[Tensor | None, None]:
        return self.shares.get(name), None

    def merge(self, unet: Any) -> None:
        """Merge a LoRA into two layers that files prune and one that they do not."""
        block = "down_blocks.0.attentions.0.transformer_blocks.0"
        for index, path in enumerate(("attn1.to_q", "ff.net.2", "attn2.to_k")):
            layer = unet.get_submodule(f"{block}.{path}")
            name = path.replace(".", "_")
            self.shares[name] = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(index)) / 10
            layer.network_layer_name, layer.network_current_names = name, (("style", 1.0),)
            layer.network_weights_backup = layer.weight.detach().clone()
            layer.weight = torch.nn.Parameter(layer.network_weights_backup + self.shares[name], requires_grad=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    base = folder / "base.safetensors"
    base.write_bytes(demo.path().read_bytes())
    bake(base, folder / "baked.safetensors", poa_weight=1.5)
    bake(base, folder / "random.safetensors", criterion=RANDOM)
    bake(base, folder / "residual.safetensors", residual="embed")
    export(ExportRequest(str(base), SECOND, folder / "second.safetensors", ratio=SECOND_RATIO))
    pack(base, folder / "sizes.crdiff")
    return folder


def opened(path: Path) -> Any:
    pipe = StableDiffusionPipeline.from_single_file(
        str(path), config=str(demo.config()), local_files_only=True, torch_dtype=torch.float32, safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.register_modules(vae=vae())
    pipe.vae_scale_factor = 8
    return pipe


@pytest.fixture
def sdnext(files: Path, monkeypatch: pytest.MonkeyPatch) -> Ui:
    ui = Ui(opened(files / "base.safetensors"))
    for name, module in ui.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return ui


def draw(pipe: Any, size: Size = SIZE) -> Tensor:
    picture = pipe(
        "a fox", width=size.width, height=size.height, num_inference_steps=4, guidance_scale=2.0, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    latents: Tensor = picture.images
    return latents


def mixed(pipe: Any, pruned: Any, weight: float, size: Size = SIZE, steps: range = range(4)) -> Tensor:
    """Draw with two UNets by the formula itself."""
    calls = iter(range(9))

    def mix(_unet: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if next(calls) not in steps:
            return None
        return ((1 - weight) * output[0] + weight * pruned(*args, **kwargs)[0],)

    hook = pipe.unet.register_forward_hook(mix, with_kwargs=True)
    try:
        return draw(pipe, size)
    finally:
        hook.remove()


def put_on(ui: Ui, file: Path, weight: float | None = WEIGHT, **options: Any) -> Any:
    p = SimpleNamespace(all_prompts=options.pop("prompts", ["a fox"]))
    return adapter.apply(p, PoaFile.open(file), Settings(file.name, weight, **options))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["baked", "random"])
def test_like_two_models(name: str, lora: bool, sdnext: Ui, files: Path) -> None:
    pruned = opened(files / f"{name}.safetensors").unet
    if lora:
        sdnext.merge(sdnext.pipe.unet)
        sdnext.merge(pruned)
    kept = {key: value.clone() for key, value in sdnext.pipe.unet.state_dict().items()}
    dense, file = draw(sdnext.pipe), files / f"{name}.safetensors"
    for weight in (0.0, 1.0, WEIGHT):
        poa = put_on(sdnext, file, weight)
        assert torch.equal(draw(sdnext.pipe), mixed_or(sdnext.pipe, pruned, weight, poa))
    put_on(sdnext, file, start=0.25, stop=0.75)
    drawn = draw(sdnext.pipe)
    sdnext.callbacks[0](None)  # SD.Next has finished the picture
    assert torch.equal(drawn, mixed(sdnext.pipe, pruned, WEIGHT, steps=range(1, 3)))
    assert torch.equal(draw(sdnext.pipe), dense)
    assert not torch.equal(drawn, dense)
    now = sdnext.pipe.unet.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in kept.items())


def mixed_or(pipe: Any, pruned: Any, weight: float, poa: Any) -> Tensor:
    """Draw without POA: with one model, where the weight takes one, or with two."""
    poa.remove()
    poa.remove()
    if weight != 1:
        return draw(pipe) if weight == 0 else mixed(pipe, pruned, weight)
    dense, pipe.unet = pipe.unet, pruned
    try:
        return draw(pipe)
    finally:
        pipe.unet = dense


def test_a_pack_follows_the_size(sdnext: Ui, files: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (opened(files / f"{name}.safetensors").unet for name in ("baked", "second"))
    poa = put_on(sdnext, files / "sizes.crdiff", None)
    drawn = [draw(sdnext.pipe, size) for size in (SIZE, SECOND, SIZE)]
    native = draw(sdnext.pipe, Size(64, 64))
    poa.remove()
    assert torch.equal(drawn[0], mixed(sdnext.pipe, first, WEIGHT))
    assert torch.equal(drawn[1], mixed(sdnext.pipe, second, SECOND_WEIGHT, SECOND))
    assert torch.equal(drawn[2], drawn[0])
    assert torch.equal(native, draw(sdnext.pipe, Size(64, 64)))
    assert "64x64 is the native size of base.safetensors: the model stays dense" in caplog.text


def test_an_error_leaves_the_weights(sdnext: Ui, files: Path) -> None:
    dense = draw(sdnext.pipe)
    put_on(sdnext, files / "baked.safetensors")
    calls = iter(range(9))

    def fail(*_: Any) -> None:
        if next(calls):  # the second call is the first one with pruned weights
            raise RuntimeError("in the middle")

    layer = sdnext.pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    hook = layer.register_forward_hook(fail)
    with pytest.raises(RuntimeError):
        draw(sdnext.pipe)
    hook.remove()
    sdnext.callbacks[0](None)
    assert torch.equal(draw(sdnext.pipe), dense)


def test_accelerates_hooks_come_and_go(sdnext: Ui, files: Path) -> None:
    """SD.Next's balanced offload replaces the forward of the model and of its layers after POA was put on."""
    put_on(sdnext, files / "baked.safetensors")
    drawn = draw(sdnext.pipe)
    for module in sdnext.pipe.unet.modules():
        add_hook_to_module(module, AlignDevicesHook("cpu"), append=True)
    assert torch.equal(draw(sdnext.pipe), drawn)
    remove_hook_from_module(sdnext.pipe.unet, recurse=True)
    assert torch.equal(draw(sdnext.pipe), drawn)


def test_a_model_is_compared_once(sdnext: Ui, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on(sdnext, files / "baked.safetensors").remove()
    monkeypatch.setattr(adapter.ModelPoa, "compare", None)
    put_on(sdnext, files / "baked.safetensors").remove()


@pytest.mark.parametrize("file", ["baked.safetensors", "residual.safetensors", "sizes.crdiff"])
def test_another_model_is_refused(file: str, sdnext: Ui, files: Path) -> None:
    with torch.no_grad():
        for name, weight in sdnext.pipe.unet.named_parameters():
            if "attn1" in name:
                weight.mul_(1.5)
    with pytest.raises(PoaError, match="are not those of"):
        put_on(sdnext, files / file)


@pytest.mark.parametrize("file", ["baked.safetensors", "residual.safetensors"])
def test_a_pruned_model_is_refused(file: str, sdnext: Ui, files: Path) -> None:
    pruned = opened(files / file).unet
    kept = {key: value.clone() for key, value in pruned.state_dict().items()}
    sdnext.pipe.unet = pruned
    with pytest.raises(PoaError, match="the model holds the pruned weights"):
        put_on(sdnext, files / file)
    assert all(torch.equal(value, kept[key]) for key, value in pruned.state_dict().items())


def test_models_without_weights_of_their_own_are_refused(sdnext: Ui, files: Path) -> None:
    file, unet = files / "baked.safetensors", sdnext.pipe.unet
    sdnext.opts.diffusers_offload_mode = "sequential"
    with pytest.raises(PoaError, match="layer by layer"):
        put_on(sdnext, file)
    sdnext.opts.diffusers_offload_mode = "none"
    sdnext.opts.lora_fuse_native = True
    with pytest.raises(PoaError, match="keeps no copy"):
        put_on(sdnext, file, prompts=["a fox <lora:style:1>"])
    sdnext.merge(unet)
    unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q").network_weights_backup = True
    with pytest.raises(PoaError, match="keeps no copy"):
        put_on(sdnext, file)
    unet.mid_block.sdnq_dequantizer = None
    with pytest.raises(PoaError, match="SDNQ"):
        put_on(sdnext, file)
    sdnext.pipe.unet = torch.compile(opened(files / "base.safetensors").unet, backend="eager")
    with pytest.raises(PoaError, match="compiled"):
        put_on(sdnext, file)


def prepare(work: Path) -> None:
    """Fill SD.Next's folder with the demo model as a folder of diffusers, files made from it, and a LoRA."""
    models, files = work / "models" / "Diffusers", work / "files"
    extension, packs = work / "extensions" / "sd-webui-crdiff", work / "models" / "crdiff"
    for folder in (models, files, work / "models" / "Lora", extension, packs):
        folder.mkdir(parents=True)
    write_extension(extension)
    base = files / "plain.safetensors"
    base.write_bytes(demo.path().read_bytes())
    calibration = calibrate(CalibrateRequest("demo", SIZE, ("obs",), work / "seen.safetensors", limit=2, steps=2)).path
    bake(base, files / "baked.safetensors", poa_weight=1.5)
    bake(base, files / "random.safetensors", poa_weight=1.5, criterion=RANDOM)
    bake(base, files / "obs.safetensors", poa_weight=1.5, criterion="obs", calibration=calibration)
    pack(base, files / "sizes.crdiff")
    export(ExportRequest(str(base), SECOND, files / "second.safetensors", ratio=SECOND_RATIO))
    for file in ("sizes.crdiff", "baked.safetensors"):
        (packs / file).write_bytes((files / file).read_bytes())
    other = {k: v * 1.5 if "attn1" in k else v for k, v in safetensors.torch.load_file(base).items()}
    safetensors.torch.save_file(other, files / "other.safetensors")
    for name in ("plain", "other", "second", "baked", "random", "obs"):
        pipe = StableDiffusionPipeline.from_single_file(
            str(files / f"{name}.safetensors"), config=str(demo.config()), local_files_only=True,
            torch_dtype=torch.float32, safety_checker=None,
        )  # fmt: skip
        pipe.register_modules(vae=vae())
        pipe.save_pretrained(models / name.replace("plain", "base"))
    safetensors.torch.save_file(lora(), work / "models" / "Lora" / "style.safetensors")


def vae() -> AutoencoderKL:
    """Eight pixels in a cell, which SD.Next's hires fix takes for granted; the demo model has four."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, **blocks)


@needs_sdnext
def test_a_real_sdnext(tmp_path: Path) -> None:
    """Just what two loaded models give, bit by bit; and the weights are as they were, whatever ends a picture."""
    prepare(tmp_path)
    python = os.environ.get("SDNEXT_PYTHON", sys.executable)
    line = [python, "-m", "tests.support.sdnext_check", str(SDNEXT), str(tmp_path)]
    ran = subprocess.run(line, check=False, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    results: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    check_numbers(results, 40)
    assert results["extension, infotext"] == "baked.safetensors, CR-Diff weight: 1.7"
    assert results["extension, another model's infotext"] == ""
    assert results["extension, another model, line"].startswith("CR-Diff is off: the weights of")
    assert {value for name, value in results.items() if "calls until" in name} == {2}
    assert {value for name, value in results.items() if "hooks after" in name} == {0}
    for name in ("other, baked.safetensors", "other, random.safetensors", "other, sizes.crdiff"):
        assert "PoaError: the weights of" in results[name]
    assert "the model holds the pruned weights already" in results["baked, baked.safetensors"]
    assert "not made by crdiff" in results["not baked"]
    assert "Give fractions with 0 <= start < stop <= 1." in results["start after stop"]
    assert "SD.Next fuses LoRAs into the weights" in results["fused LoRA"]
    assert "quantised by SDNQ" in results["SDNQ"]
