"""POA in a real A1111 on the CPU, against two loaded models: prints what it finds as one JSON object.

The command line has A1111's folder, a folder to work in, which `tests/sampling/test_webui_a1111.py` fills, and options
for A1111. A1111 loads the checkpoints, samples and merges LoRAs itself; its VAE is all zeros, so latents are compared.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.support import torchvision_import

A1111, WORK = (Path(word).resolve() for word in sys.argv[1:3])
# What to do instead of all else: `write` SD2.1 and SDXL in small, and then with the files that were made from these
# `geometries`.
MODE = sys.argv.pop(3) if sys.argv[3] in {"write", "geometries"} else ""
sys.argv = [
    "launch.py", "--use-cpu", "all", "--data-dir", str(WORK), "--no-download-sd-model",
    "--skip-load-model-at-start", "--do-not-download-clip", "--skip-version-check", "--skip-install",
    "--skip-torch-cuda-test", *sys.argv[3:],
]  # fmt: skip
sys.path.insert(0, str(A1111))
os.chdir(A1111)
OUT, sys.stdout = sys.stdout, sys.stderr
torchvision_import.import_torchvision()

from modules import initialize  # noqa: E402

initialize.imports()
initialize.initialize()

from fastapi import FastAPI  # noqa: E402
from modules import processing, script_callbacks, scripts, sd_models, sd_samplers_common, shared  # noqa: E402
from modules.api import models  # noqa: E402
from modules.api.api import Api  # noqa: E402
from modules.call_queue import queue_lock  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

script_callbacks.before_ui_callback()  # the Lora extension begins here

from crdiff_export.errors import CrdiffError  # noqa: E402
from crdiff_export.sampling.webui import a1111  # noqa: E402
from crdiff_export.sampling.webui.settings import Settings  # noqa: E402
from crdiff_export.sampling.webui.source import PoaFile  # noqa: E402

WEIGHT, SECOND_WEIGHT = 1.7, 3.0
LORA = "a fox <lora:style:0.8>"
SIZE, SECOND, NATIVE = (96, 64), (144, 96), (64, 64)
FILES = ("baked", "random", "obs")
HIRES: dict[str, Any] = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}
# Hooks of A1111's own on the parts of a UNet, with --lowvram.
HOOKS = 0
CASES: dict[str, dict[str, Any]] = {
    "": {},
    "lora, ": {"prompt": LORA},
    "batch of two, ": {"batch_size": 2},
    "Heun, ": {"sampler_name": "Heun"},
    "DDIM, ": {"sampler_name": "DDIM"},
}


class Hooks(scripts.Script):  # type: ignore[misc]  # it has no types
    """Calls a function where the extension puts POA on, and keeps the latents of the last pass."""

    def __init__(self, before: "Callable[[Any], Any] | None") -> None:
        self.before, self.latents = before, None
        self.filename, self.args_from, self.args_to, self.alwayson = __file__, 0, 0, True
        self.error: Exception | None = None

    def title(self) -> str:
        return "check"

    def process_before_every_sampling(self, p: Any, *_args: Any, **_kwargs: Any) -> None:
        launch = p.sampler.launch_sampling

        def keep(steps: int, function: Any) -> Any:
            self.latents = launch(steps, function)
            return self.latents

        p.sampler.launch_sampling = keep
        if self.before:
            try:
                self.before(p)
            except CrdiffError as error:
                self.error = error


def draw(before: "Callable[[Any], Any] | None" = None, size: tuple[int, int] = SIZE, **options: Any) -> Any:
    """Draw with A1111's own pipeline; the latents."""
    hooks = Hooks(before)
    runner = scripts.ScriptRunner()
    runner.alwayson_scripts = runner.scripts = [hooks]
    given = {"prompt": "a fox", "seed": 3, "steps": 4, "sampler_name": "Euler", "cfg_scale": 2.0} | options
    p = processing.StableDiffusionProcessingTxt2Img(
        width=size[0], height=size[1], do_not_save_samples=True, do_not_save_grid=True, **given
    )
    p.scripts, p.script_args = runner, []
    shared.state.begin(job="check")
    try:
        processing.process_images(p)
    finally:
        shared.state.end()
    if hooks.error:
        raise hooks.error
    return hooks.latents


def poa(name: str, weight: float | None = WEIGHT, **options: Any) -> Callable[[Any], Any]:
    """Put POA on as the extension does."""
    settings = Settings(name, weight, **options)
    return lambda p: a1111.apply(p, PoaFile.open(WORK / "files" / name), settings)


def load(name: str) -> Any:
    """Let A1111 load a checkpoint; it keeps several in memory."""
    info = sd_models.get_closet_checkpoint_match(name)
    shared.opts.data["sd_model_checkpoint"] = info.title
    return sd_models.reload_model_weights(info=info) or shared.sd_model


def two_models(*pruned: Any, weight: float = WEIGHT, steps: "range | None" = None) -> Callable[[Any], Any]:
    """Mix the predictions of the current model with those of another loaded one: the formula itself.

    Of several models the one of the pass is taken: hires fix has two.
    """

    def before(p: Any) -> None:
        unet, other = p.sd_model.model.diffusion_model, pruned[p.is_hr_pass and -1].model.diffusion_model
        sampler = p.sampler
        launch = sampler.launch_sampling
        w_of_pass = weight if not p.is_hr_pass or len(pruned) == 1 else SECOND_WEIGHT

        def around(count: int, function: Any) -> Any:
            forward = unet.forward

            def predict(*args: Any, **kwargs: Any) -> Any:
                w = w_of_pass if steps is None or sampler.model_wrap_cfg.step in steps else 0
                first = forward(*args, **kwargs)
                if w == 0:
                    return first
                return ((1 - w) * first.float() + w * other(*args, **kwargs).float()).to(first.dtype)

            unet.forward = predict
            try:
                return launch(count, function)
            finally:
                del unet.forward

        sampler.launch_sampling = around

    return before


def far(one: Any, other: Any) -> float:
    return float((one - other).abs().max() / other.abs().max())


def weights() -> dict[str, Any]:
    """Copies of the loaded UNet's weights."""
    return {name: tensor.clone() for name, tensor in shared.sd_model.model.state_dict().items()}


def same(before: dict[str, Any]) -> bool:
    """Whether the UNet has these bytes, and nothing of ours on it."""
    unet = shared.sd_model.model.diffusion_model
    now = shared.sd_model.model.state_dict()
    unchanged = all(torch.equal(now[name].view(torch.uint8), kept.view(torch.uint8)) for name, kept in before.items())
    hooks = sum(len(module._forward_pre_hooks) for module in unet.modules())
    return unchanged and "forward" not in vars(unet) and hooks == HOOKS and now.keys() == before.keys()


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return ""


def formula(pruned: Any, file: str = "baked.safetensors") -> Iterator[tuple[str, Any]]:
    """Draw with one file, with and without a LoRA, and with several samplers."""
    for label, options in CASES.items():
        kept = weights()
        dense = draw(**options)
        drawn = draw(poa(file), **options)
        yield f"{label}two models", far(drawn, draw(two_models(pruned), **options))
        yield f"{label}moves", far(drawn, dense)
        yield f"{label}w=0", far(draw(poa(file, 0), **options), dense)
        yield f"{label}dense afterwards", far(draw(**options), dense)
        draw()  # takes the LoRA out of the weights
        yield f"{label}bytes", same(kept)


def files(pruned: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Draw with thresholds, masks and moved weights, at w = 1 and in a part of the steps."""
    shared.opts.data["lora_functional"] = True  # an option of the Lora extension
    added = draw(poa("baked.safetensors"), prompt=LORA)
    yield "lora, added in the forward, two models", far(added, draw(two_models(pruned["baked"]), prompt=LORA))
    shared.opts.data["lora_functional"] = False
    for name, model in pruned.items():
        file = f"{name}.safetensors"
        load(name)
        alone, with_lora = draw(), draw(prompt=LORA)
        load("base")
        yield f"{name}, w=1, the file", far(draw(poa(file, 1)), alone)
        yield f"{name}, lora, w=1, the file", far(draw(poa(file, 1), prompt=LORA), with_lora)
        yield f"{name}, two models", far(draw(poa(file)), draw(two_models(model)))
        part = draw(poa(file, start=0.25, stop=0.75), prompt=LORA)
        yield f"{name}, lora, part of the steps", far(part, draw(two_models(model, steps=range(1, 3)), prompt=LORA))
        yield f"{name}, its own weight", far(draw(poa(file, None)), draw(two_models(model, weight=1.5)))


def packs(first: Any, second: Any) -> Iterator[tuple[str, Any]]:
    """Draw with a pack at both of its sizes, and with hires fix, which goes from one to the other."""
    for name, hires in {"": False, "hires fix, ": True}.items():
        options: dict[str, Any] = {"prompt": LORA}
        if hires:
            options |= HIRES
        kept, dense = weights(), draw(**options)
        drawn = draw(poa("sizes.crdiff", None), **options)
        yield f"{name}pack, two models", far(drawn, draw(two_models(first, second), **options))
        yield f"{name}pack moves", far(drawn, dense)
        draw()
        yield f"{name}pack, bytes", same(kept)
    large = {"size": SECOND}
    drawn = draw(poa("sizes.crdiff", None), **large)
    yield "pack, second size, two models", far(drawn, draw(two_models(second, weight=SECOND_WEIGHT), **large))
    yield "pack, native size is dense", far(draw(poa("sizes.crdiff"), size=NATIVE), draw(size=NATIVE))
    noted: list[str] = []
    draw(lambda p: noted.append(poa("sizes.crdiff")(p).note), size=NATIVE)
    yield "pack, native size, note", noted[0]


def interrupted() -> Iterator[tuple[str, Any]]:
    """End samplings in the middle, by an error, by the button, and by another checkpoint; the weights stay."""
    kept = weights()
    block = shared.sd_model.model.diffusion_model.middle_block

    def fail() -> None:
        raise RuntimeError("in the middle")

    for label, prompt in {"": "a fox", "lora, ": LORA}.items():
        for name, action in {"an error": fail, "an interrupt": shared.state.interrupt}.items():
            calls: Iterator[int] = iter(range(100))
            # The second call is the first one with pruned weights.
            hook = block.register_forward_hook(lambda *_, calls=calls, action=action: action() if next(calls) else None)
            raised = said(lambda prompt=prompt: draw(poa("baked.safetensors"), prompt=prompt))  # type: ignore[misc]
            hook.remove()
            yield f"{label}calls until {name}", next(calls)
            yield f"{label}raised by {name}", raised
            draw()
            yield f"{label}bytes after {name}", same(kept)
    for limit in (1, 3):
        shared.opts.data["sd_checkpoints_limit"] = limit
        draw(poa("baked.safetensors"), refiner_checkpoint="other", refiner_switch_at=0.5)
        drawn = draw(poa("baked.safetensors"), refiner_checkpoint="other", refiner_switch_at=0.5)
        load("base")
        yield f"bytes after a refiner, {limit} in memory", same(kept)
        yield f"refiner moves, {limit} in memory", far(drawn, draw(poa("baked.safetensors")))
        load("other")
        load("base")
        yield f"bytes after a switch, {limit} in memory", same(kept)


def refused() -> Iterator[tuple[str, Any]]:
    """Say why a file is not taken."""
    for name in ("other", "baked"):
        load(name)
        for file in ("baked.safetensors", "random.safetensors", "sizes.crdiff"):
            yield f"{name}, {file}", said(lambda file=file: draw(poa(file)))  # type: ignore[misc]
    load("base")
    yield "not baked", said(lambda: draw(poa("plain.safetensors")))
    yield "start after stop", said(lambda: draw(poa("baked.safetensors", start=0.5, stop=0.5)))


def extension(first: Any, second: Any) -> Iterator[tuple[str, Any]]:
    """Draw through A1111's API with the installed extension."""
    api = Api(FastAPI(), queue_lock)
    sampler = sd_samplers_common.Sampler
    launch, latents = sampler.launch_sampling, []

    def keep(self: Any, steps: int, function: Any) -> Any:
        latents.append(launch(self, steps, function))
        return latents[-1]

    def ask(*values: Any, **options: Any) -> tuple[Any, str]:
        given = {"prompt": "a fox", "seed": 3, "steps": 4, "sampler_name": "Euler", "cfg_scale": 2.0, **options}
        script = {"CR-Diff": {"args": values}} if values else {}
        request = models.StableDiffusionTxt2ImgProcessingAPI(
            width=SIZE[0], height=SIZE[1], alwayson_scripts=script, **given
        )
        info = json.loads(api.text2imgapi(request).info)
        return latents[-1], info["infotexts"][0]

    sampler.launch_sampling = keep
    try:
        drawn, text = ask("baked.safetensors", False, WEIGHT, 0, 1)
        yield "extension, two models", far(drawn, draw(two_models(first)))
        yield "extension, infotext", text.partition("CR-Diff: ")[2].partition(", Version")[0]
        drawn, _ = ask("sizes.crdiff", True, 0, 0, 1, **HIRES)
        yield "extension, hires fix, two models", far(drawn, draw(two_models(first, second), **HIRES))
        yield "extension, dense afterwards", far(ask()[0], draw())
        load("other")
        drawn, text = ask("baked.safetensors", False, WEIGHT, 0, 1)
        yield "extension, another model stays dense", far(drawn, draw())
        yield "extension, another model's infotext", text.partition("CR-Diff: ")[2]
        load("base")
    finally:
        sampler.launch_sampling = launch


def write_geometries() -> None:
    """Write SD2.1 and SDXL with few channels and random weights, with A1111's own configurations of them."""
    repositories = A1111 / "repositories"
    sd21 = OmegaConf.load(
        repositories / "stable-diffusion-stability-ai" / "configs" / "stable-diffusion" / "v2-inference-v.yaml"
    )
    sdxl = OmegaConf.load(repositories / "generative-models" / "configs" / "inference" / "sd_xl_base.yaml")
    small = {"model_channels": 32, "num_head_channels": 8, "use_fp16": False, "use_checkpoint": False}
    of_sd21, of_sdxl = sd21.model.params, sdxl.model.params
    of_sd21.unet_config.params.update(small)
    of_sdxl.network_config.params.update({**small, "spatial_transformer_attn_type": "softmax"})
    del of_sdxl.network_config.params.use_fp16
    of_sd21.cond_stage_config = {"target": "tests.support.a1111_text.Text", "params": {"width": 1024}}
    embedders = of_sdxl.conditioner_config.params.emb_models
    text = {"is_trainable": False, "input_key": "txt", "target": "tests.support.a1111_text.TextXl"}
    of_sdxl.conditioner_config.params.emb_models = [text, *embedders[2:]]
    for name, config, unet in (("sd21", sd21, of_sd21.unet_config), ("sdxl", sdxl, of_sdxl.network_config)):
        config.model.params.first_stage_config.params.ddconfig.update({"ch": 32, "attn_type": "vanilla"})
        torch.manual_seed(0)
        state = sd_models.instantiate_from_config(unet).state_dict()
        filled = {key: value if value.any() else torch.randn_like(value) / 20 for key, value in state.items()}
        path = WORK / "models" / "Stable-diffusion" / f"{name}.safetensors"
        save_file({f"model.diffusion_model.{key}": value.contiguous() for key, value in filled.items()}, path)
        for file in (name, f"baked-{name}"):
            OmegaConf.save(config, path.with_name(f"{file}.yaml"))
        layer, size = "lora_unet_input_blocks_4_1_transformer_blocks_0", 64
        lora = {}
        for target in ("attn1_to_q", "attn2_to_q"):
            lora[f"{layer}_{target}.lora_up.weight"] = torch.randn(size, 4)
            lora[f"{layer}_{target}.lora_down.weight"] = torch.randn(4, size) / 10
            lora[f"{layer}_{target}.alpha"] = torch.tensor(4.0)
        save_file(lora, WORK / "models" / "Lora" / f"{name}.safetensors")


def geometries() -> Iterator[tuple[str, Any]]:
    """Draw with SD2.1, which predicts v, and SDXL, in small."""
    for name in ("sd21", "sdxl"):
        file = f"baked-{name}.safetensors"
        pruned = load(f"baked-{name}")
        load(name)
        yield f"{name}, class", f"{type(shared.sd_model).__name__}, {shared.sd_model.parameterization}"
        for lora, prompt in {"": "a fox", "lora, ": f"a fox <lora:{name}:0.8>"}.items():
            load(f"baked-{name}")
            alone = draw(prompt=prompt)
            load(name)
            kept, dense = weights(), draw(prompt=prompt)
            drawn = draw(poa(file), prompt=prompt)
            yield f"{name}, {lora}two models", far(drawn, draw(two_models(pruned), prompt=prompt))
            yield f"{name}, {lora}moves", far(drawn, dense)
            yield f"{name}, {lora}w=1, the file", far(draw(poa(file, 1), prompt=prompt), alone)
            draw()
            yield f"{name}, {lora}bytes", same(kept)
        yield f"{name}, the LoRA moves", far(dense, draw())
        yield f"{name}, another model", said(lambda: draw(poa("baked.safetensors")))


def main() -> None:
    torch.set_num_threads(1)
    shared.opts.data["live_previews_enable"] = False  # needs a model that A1111 would download
    if MODE == "write":
        write_geometries()
        return
    if MODE == "geometries":
        shared.opts.data["sd_checkpoints_limit"] = 9
        json.dump(dict(geometries()), OUT)
        return
    shared.opts.data["sd_checkpoints_limit"] = 9
    results: dict[str, Any] = {}
    pruned = {name: load(name) for name in FILES}
    second = load("second")
    load("base")
    global HOOKS  # noqa: PLW0603
    HOOKS = sum(len(module._forward_pre_hooks) for module in shared.sd_model.model.diffusion_model.modules())
    results["the LoRA moves"] = far(draw(prompt=LORA), draw())
    results |= formula(pruned["baked"])
    if "--lowvram" not in sys.argv and "--no-half" in sys.argv:
        results |= files(pruned)
        results |= packs(pruned["baked"], second)
        results |= extension(pruned["baked"], second)
        results |= interrupted()
        results |= refused()
    json.dump(results, OUT)
    OUT.write("\n")


if __name__ == "__main__":
    main()
