"""POA in A1111: with small modules, and in a real one. `A1111_PATH` names a checkout, `A1111_PYTHON` its Python."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from crdiff_export import ExportRequest, Size, export
from crdiff_export.calibrate import CalibrateRequest, calibrate
from crdiff_export.errors import PoaError
from crdiff_export.models import demo
from crdiff_export.packs import create, open_pack
from crdiff_export.progress import Silent
from crdiff_export.prune.plan_request import PlanRequest
from crdiff_export.sampling.webui import a1111
from crdiff_export.sampling.webui.install import write_extension
from crdiff_export.sampling.webui.settings import Settings
from crdiff_export.sampling.webui.source import PoaFile
from tests.support import ROOT

A1111 = os.environ.get("A1111_PATH")
needs_a1111 = pytest.mark.skipif(not A1111, reason="A1111_PATH names no A1111")

RATIO, WEIGHT, SIZE = 0.4, 1.7, Size(96, 64)
SECOND_RATIO, SECOND_WEIGHT, SECOND = 0.25, 3.0, Size(144, 96)
RANDOM = "random:seed=3"
LINEAR = re.compile(r"^model\.diffusion_model\..*transformer_blocks.*\.(to_\w+|0|proj|2)\.weight$")
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


class Layer(torch.nn.Linear):
    """A layer that merges LoRAs when it computes, as A1111's Lora extension lets all layers do."""

    def forward(self, given: Tensor) -> Tensor:
        if "networks" in sys.modules:
            sys.modules["networks"].network_apply_weights(self)
        return super().forward(given)


class Lora(ModuleType):
    """The Lora extension as the adapter sees it: what it wants merged, and how it merges."""

    def __init__(self) -> None:
        super().__init__("networks")
        self.wanted: dict[str, Tensor] = {}

    def network_apply_weights(self, layer: Any) -> None:
        names = tuple(self.wanted)
        if layer.network_weights_backup is None and names:
            layer.network_weights_backup = layer.weight.detach().clone()
        if getattr(layer, "network_current_names", ()) == names:
            return
        with torch.no_grad():
            self.network_restore_weights_from_backup(layer)
            if layer.network_layer_name in self.wanted:
                layer.weight.copy_(layer.weight + self.wanted[layer.network_layer_name])
        layer.network_current_names = names

    def network_restore_weights_from_backup(self, layer: Any) -> None:
        if layer.network_weights_backup is not None:
            layer.weight.data.copy_(layer.network_weights_backup)

    def network_reset_cached_weight(self, layer: Any) -> None:
        layer.network_current_names, layer.network_weights_backup = (), None


class Unet(torch.nn.Module):
    """The linear layers of a checkpoint's UNet by their own names, one after another."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        prefix, weights = "model.diffusion_model.", safetensors.torch.load_file(path)
        self.order = [key.removeprefix(prefix).removesuffix(".weight") for key in weights if LINEAR.search(key)]
        for name in self.order:
            owner: torch.nn.Module = self
            *folders, last = name.split(".")
            for folder in folders:
                if not hasattr(owner, folder):
                    owner.add_module(folder, torch.nn.Module())
                owner = getattr(owner, folder)
            weight, bias = weights[f"{prefix}{name}.weight"].float(), weights.get(f"{prefix}{name}.bias")
            rows, columns = weight.shape
            layer: Any = Layer(columns, rows, bias=bias is not None)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                layer.bias = torch.nn.Parameter(bias.float(), requires_grad=False)
            layer.network_layer_name, layer.network_weights_backup = name, None
            owner.add_module(last, layer)

    def forward(self, x: Tensor, timesteps: Any = None, context: Any = None) -> Tensor:
        for name in self.order:
            layer: Any = self.get_submodule(name)
            x = x + layer(x.mean() * torch.linspace(-1, 1, layer.weight.shape[1])).mean()
        return x


class Sampler:
    """A sampler of A1111 with four steps."""

    def __init__(self) -> None:
        self.model_wrap_cfg = SimpleNamespace(step=0, total_steps=4)

    def launch_sampling(self, _steps: int, function: Callable[[], Any]) -> Any:
        return function()


class Picture:
    """A1111's processing object, with its model and sampler."""

    def __init__(self, path: Path, size: Size = SIZE) -> None:
        model = torch.nn.Module()
        model.diffusion_model = Unet(path)
        self.sd_model = SimpleNamespace(model=model, sd_checkpoint_info=object())
        self.sampler, self.is_hr_pass = Sampler(), False
        self.width, self.height = size.width, size.height
        self.hr_upscale_to_x = self.hr_upscale_to_y = 0

    @property
    def unet(self) -> Any:
        return self.sd_model.model.diffusion_model

    def draw(self, action: Callable[[int], None] = lambda _: None) -> Tensor:
        def sample() -> Tensor:
            x = torch.linspace(-1, 2, 16)
            for step in range(4):
                self.sampler.model_wrap_cfg.step = step
                action(step)
                x = x - 0.1 * self.unet(x, timesteps=step, context=None)
            return x

        with torch.no_grad():
            drawn: Tensor = self.sampler.launch_sampling(4, sample)
        return drawn

    def mixed(self, pruned: Any, weight: float, steps: range = range(4)) -> Tensor:
        """Draw with two UNets by the formula itself."""
        calls = iter(range(9))

        def mix(_unet: Any, args: Any, kwargs: Any, output: Tensor) -> Any:
            return (1 - weight) * output + weight * pruned(*args, **kwargs) if next(calls) in steps else None

        hook = self.unet.register_forward_hook(mix, with_kwargs=True)
        try:
            return self.draw()
        finally:
            hook.remove()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    base = folder / "base.safetensors"
    base.write_bytes(demo.path().read_bytes())
    bake(base, folder / "baked.safetensors", poa_weight=1.5)
    bake(base, folder / "random.safetensors", criterion=RANDOM)
    export(ExportRequest(str(base), SECOND, folder / "second.safetensors", ratio=SECOND_RATIO))
    pack(base, folder / "sizes.crdiff")
    return folder


@pytest.fixture
def ui(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A1111's modules as the adapter sees them."""
    made: dict[str, Any] = {name: ModuleType(name) for name in ("modules", "modules.sd_unet", "modules.shared")}
    made["modules"].__dict__.update(sd_unet=made["modules.sd_unet"], shared=made["modules.shared"])
    made["modules.sd_unet"].current_unet = None
    made["modules.shared"].opts = SimpleNamespace(lora_functional=False)
    made["networks"] = Lora()
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def put_on(p: Picture, file: Path, weight: float | None = WEIGHT, **options: Any) -> Any:
    return a1111.apply(p, PoaFile.open(file), Settings(file.name, weight, **options))


def state(p: Picture) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in p.unet.state_dict().items()}


def check_untouched(p: Picture, kept: dict[str, Tensor]) -> None:
    now = p.unet.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in kept.items())
    assert "forward" not in vars(p.unet)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["baked", "random"])
def test_like_two_models(name: str, lora: bool, ui: dict[str, Any], files: Path) -> None:
    file, p = files / f"{name}.safetensors", Picture(files / "base.safetensors")
    pruned, kept, plain = Picture(file), state(p), p.draw()
    if lora:
        names = [
            n for n in p.unet.order if n.endswith(("input_blocks.1.1.transformer_blocks.0.attn1.to_q", "ff.net.2"))
        ]
        ui["networks"].wanted = {n: torch.ones_like(p.unet.get_submodule(n).weight) / 50 for n in names}
    poa = put_on(p, file, 1)  # the first call of the layers is a pruned one
    drawn = p.draw()
    poa.remove()
    assert torch.equal(drawn, pruned.draw())
    ways: list[tuple[dict[str, Any], Callable[[], Tensor]]] = [
        ({"weight": WEIGHT}, lambda: p.mixed(pruned.unet, WEIGHT)),
        ({"weight": 0}, p.draw),
        ({"weight": WEIGHT, "start": 0.25, "stop": 0.75}, lambda: p.mixed(pruned.unet, WEIGHT, range(1, 3))),
    ]
    for options, expected in ways:
        poa = put_on(p, file, **options)
        drawn = p.draw()
        poa.remove()
        assert torch.equal(drawn, expected())
    ui["networks"].wanted = {}
    assert torch.equal(p.draw(), plain)
    check_untouched(p, kept)


def test_a_lora_that_is_added_in_the_forward(ui: dict[str, Any], files: Path) -> None:
    """A1111's option `lora_functional`: the layers' weights stay, what was merged before is taken back."""
    p = Picture(files / "base.safetensors")
    pruned, kept = Picture(files / "baked.safetensors"), state(p)
    ui["networks"].wanted = {n: torch.ones_like(p.unet.get_submodule(n).weight) for n in p.unet.order}
    p.draw()
    ui["networks"].wanted = {}
    ui["modules.shared"].opts.lora_functional = True
    put_on(p, files / "baked.safetensors", 1)
    assert torch.equal(p.draw(), pruned.draw())
    check_untouched(p, kept)


def test_a_pack_takes_the_size_of_the_pass(ui: dict[str, Any], files: Path) -> None:
    p, kept = Picture(files / "base.safetensors"), {}
    for size, name, weight in ((SIZE, "baked", WEIGHT), (SECOND, "second", SECOND_WEIGHT)):
        p.is_hr_pass = size == SECOND
        p.hr_upscale_to_x, p.hr_upscale_to_y = SECOND.width, SECOND.height
        poa = put_on(p, files / "sizes.crdiff", None)
        kept[name] = p.draw()
        poa.remove()
        assert torch.equal(kept[name], p.mixed(Picture(files / f"{name}.safetensors").unet, weight))
    native = Picture(files / "base.safetensors", Size(64, 64))
    dense = native.draw()
    poa = put_on(native, files / "sizes.crdiff")
    assert torch.equal(native.draw(), dense)
    assert poa.note == "64x64 is the native size of base.safetensors: the model stays dense"


def test_an_error_leaves_the_weights(ui: dict[str, Any], files: Path) -> None:
    p = Picture(files / "base.safetensors")
    kept = state(p)
    put_on(p, files / "baked.safetensors")
    calls = iter(range(9))

    def fail(*_: Any) -> None:
        if next(calls):  # the second call is the first one with pruned weights
            raise RuntimeError("in the middle")

    hook = p.unet.get_submodule(p.unet.order[3]).register_forward_hook(fail)
    with pytest.raises(RuntimeError):
        p.draw()
    hook.remove()
    check_untouched(p, kept)


def test_another_wrapper_of_the_unet_stays(ui: dict[str, Any], files: Path) -> None:
    """ControlNet's extension replaces the UNet's forward as well."""
    p = Picture(files / "base.safetensors")
    pruned = Picture(files / "baked.safetensors")
    for picture in (p, pruned):
        picture.unet.forward = lambda *args, own=picture.unet.forward, **kwargs: own(*args, **kwargs) * 0.5
    wrapper = p.unet.forward
    expected = p.mixed(pruned.unet, WEIGHT)
    put_on(p, files / "baked.safetensors")
    assert torch.equal(p.draw(), expected)
    assert p.unet.forward is wrapper


def test_a_refiner_in_the_same_unet_stays_dense(ui: dict[str, Any], files: Path) -> None:
    """A1111 loads another checkpoint of the same structure into the UNet that it has."""
    p, expected = Picture(files / "base.safetensors"), Picture(files / "base.safetensors")

    def switch(picture: Picture) -> Callable[[int], None]:
        def to_refiner(step: int) -> None:
            if step == 2:
                picture.sd_model.sd_checkpoint_info = object()

        return to_refiner

    pruned = Picture(files / "baked.safetensors")
    put_on(p, files / "baked.safetensors")
    assert torch.equal(p.draw(switch(p)), expected.mixed(pruned.unet, WEIGHT, range(2)))


def test_both_predictions_have_the_same_tiles(ui: dict[str, Any], files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hypertile = ModuleType("hypertile")
    hypertile.RNG_INSTANCE = random.Random(1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hypertile", hypertile)
    p, chosen = Picture(files / "base.safetensors"), []
    p.unet.get_submodule(p.unet.order[0]).register_forward_hook(
        lambda *_: chosen.append(hypertile.RNG_INSTANCE.randint(0, 1 << 30))
    )
    put_on(p, files / "baked.safetensors")
    p.draw()
    assert chosen[::2] == chosen[1::2]
    assert len(set(chosen)) == 4


def test_what_cannot_be_used_is_refused(ui: dict[str, Any], files: Path) -> None:
    p = Picture(files / "base.safetensors")
    for weight in p.unet.parameters():
        weight.mul_(1.5)
    for file in ("baked.safetensors", "random.safetensors", "sizes.crdiff"):
        with pytest.raises(PoaError, match="are not those of"):
            put_on(p, files / file)
    with pytest.raises(PoaError, match="holds the pruned weights"):
        put_on(Picture(files / "baked.safetensors"), files / "baked.safetensors")
    ui["modules.sd_unet"].current_unet = object()
    with pytest.raises(PoaError, match="another UNet computes"):
        put_on(Picture(files / "base.safetensors"), files / "baked.safetensors")
    assert "launch_sampling" not in vars(p.sampler)


def prepare(work: Path) -> None:
    """Fill A1111's folder with the demo model, files made from it, and a LoRA."""
    models, files = work / "models" / "Stable-diffusion", work / "files"
    extension = work / "extensions" / "sd-webui-crdiff"
    for folder in (models, files, work / "models" / "Lora", work / "models" / "crdiff", work / "clip", extension):
        folder.mkdir(parents=True)
    write_extension(extension)
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
    (work / "models" / "crdiff" / "sizes.crdiff").write_bytes((files / "sizes.crdiff").read_bytes())
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
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a1111")
    prepare(folder)
    return folder


@pytest.fixture
def found(work: Path) -> Callable[..., dict[str, Any]]:
    """Run the check in A1111 with some of its options; what it finds."""

    def run(*options: str) -> dict[str, Any]:
        python = os.environ.get("A1111_PYTHON", sys.executable)
        line = [python, "-m", "tests.support.a1111_check", str(A1111), str(work), *options]
        ran = subprocess.run(line, check=False, capture_output=True, text=True, cwd=ROOT)
        assert ran.returncode == 0, ran.stderr
        results: dict[str, Any] = json.loads(ran.stdout or "{}")
        return results

    return run


@needs_a1111
def test_a_real_a1111(found: Callable[..., dict[str, Any]]) -> None:
    """Just what two loaded models give, bit by bit; and the weights are as they were, whatever ends a sampling."""
    results = found("--no-half")
    check_numbers(results, 39)
    assert results["extension, infotext"] == "baked.safetensors, CR-Diff weight: 1.7"
    assert results["extension, another model's infotext"] == ""
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


@needs_a1111
def test_sd21_and_sdxl(work: Path, found: Callable[..., dict[str, Any]]) -> None:
    """Of these only the sizes are small: SD2.1, which predicts v, and SDXL, which is of other classes."""
    found("write", "--no-half")
    models = work / "models" / "Stable-diffusion"
    for name in ("sd21", "sdxl"):
        baked = bake(models / f"{name}.safetensors", work / "files" / f"baked-{name}.safetensors")
        (models / baked.name).write_bytes(baked.read_bytes())
    results = found("geometries", "--no-half")
    assert results["sd21, class"] == "LatentDiffusion, v"
    assert results["sdxl, class"] == "DiffusionEngine, eps"
    assert "weights, that of" in results["sd21, another model"]
    assert "is of the family demo" in results["sdxl, another model"]
    check_numbers(results, 8)


def check_numbers(results: dict[str, Any], least: int) -> None:
    moves = {name: value for name, value in results.items() if name.endswith("moves") or "moves," in name}
    assert min(moves.values()) > 0.001, moves
    apart = {name: value for name, value in results.items() if isinstance(value, float) and name not in moves}
    assert len(apart) >= least, results
    assert {name: value for name, value in apart.items() if value} == {}
    assert {name for name, value in results.items() if value is False} == set()
