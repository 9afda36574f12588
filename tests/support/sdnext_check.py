"""POA in a real SD.Next on the CPU, against two loaded models: prints what it finds as one JSON object.

The command line has SD.Next's folder and a folder to work in, which `tests/sampling/test_webui_sdnext.py` fills.
SD.Next loads the models, draws, and merges LoRAs itself; the UNet's last input and output are compared.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.support import torchvision_import

SDNEXT, WORK = (Path(word).resolve() for word in sys.argv[1:3])
sys.argv = [
    "launch.py", "--data-dir", str(WORK), "--models-dir", str(WORK / "models"), "--use-cpu", "all", "--no-half",
]  # fmt: skip
sys.path.insert(0, str(SDNEXT))
os.chdir(SDNEXT)
OUT, sys.stdout = sys.stdout, sys.stderr
torchvision_import.import_torchvision()

import webui  # noqa: E402

webui.initialize()

import gradio as gr  # noqa: E402
from modules import (  # noqa: E402
    modeldata,
    processing,
    processing_diffusers,
    scripts_manager,
    sd_checkpoint,
    sd_models,
    shared,
)  # fmt: skip

from crdiff_export.errors import CrdiffError  # noqa: E402
from crdiff_export.sampling.webui import sdnext  # noqa: E402
from crdiff_export.sampling.webui.settings import Settings  # noqa: E402
from crdiff_export.sampling.webui.source import PoaFile  # noqa: E402

WEIGHT, SECOND_WEIGHT = 1.7, 3.0
LORA = "a fox <lora:style:0.8>"
SIZE, SECOND, NATIVE = (96, 64), (144, 96), (64, 64)
FILES = ("baked", "random", "obs")
HIRES: dict[str, Any] = {
    "enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent Nearest", "hr_resize_mode": 1, "hr_force": True,
    "denoising_strength": 0.7, "hr_denoising_strength": 0.7, "hr_second_pass_steps": 4,
}  # fmt: skip
Draw = Callable[[Any], Any]


class Hooks(scripts_manager.Script):  # type: ignore[misc]  # it has no types
    """Calls a function where the extension puts POA on, and keeps the last call of the UNet."""

    def __init__(self, before: Draw | None) -> None:
        self.before, self.note = before, ""
        self.last: torch.Tensor | None = None
        self.filename, self.args_from, self.args_to, self.alwayson = __file__, 0, 1, True
        self.error: CrdiffError | None = None
        self.handle: Any = None

    def title(self) -> str:
        return "check"

    def process(self, p: Any, *_args: Any) -> None:
        if self.before:
            try:
                self.before(p)
            except CrdiffError as error:
                self.error = error
        self.handle = shared.sd_model.unet.register_forward_hook(self.keep)

    def keep(self, _unet: Any, args: Any, output: Any) -> None:
        self.last = torch.cat((args[0].flatten(), output[0].flatten()))


def draw(before: Draw | None = None, size: tuple[int, int] = SIZE, **options: Any) -> Any:
    """Draw with SD.Next's own pipeline; the UNet's last input and output."""
    hooks = Hooks(before)
    runner = scripts_manager.ScriptRunner()
    runner.alwayson_scripts = runner.scripts = [hooks]
    given = {"prompt": "a fox", "seed": 3, "steps": 4, "sampler_name": "Euler", "cfg_scale": 2.0} | options
    p = processing.StableDiffusionProcessingTxt2Img(
        width=size[0], height=size[1], do_not_save_samples=True, do_not_save_grid=True, **given
    )
    p.scripts, p.script_args, p.per_script_args = runner, [None], {}
    shared.state.interrupted = False
    shared.state.begin("check")
    try:
        processing.process_images(p)
    finally:
        shared.state.end()
        if hooks.handle:
            hooks.handle.remove()
    if hooks.error:
        raise hooks.error
    return hooks.last


def poa(name: str, weight: float | None = WEIGHT, **options: Any) -> Draw:
    """Put POA on as the extension does."""
    settings = Settings(name, weight, **options)
    return lambda p: sdnext.apply(p, PoaFile.open(WORK / "files" / name), settings)


def load(name: str) -> Any:
    """Let SD.Next load a model."""
    title = next(each for each in sd_checkpoint.checkpoints_list if each.rpartition("/")[2] == name)
    shared.opts.data["sd_model_checkpoint"] = title
    sd_models.reload_model_weights()
    return shared.sd_model


def two_models(*pruned: Any, weight: float = WEIGHT, steps: "range | None" = None) -> Draw:
    """Mix the UNet's predictions with those of another UNet: the formula itself.

    Of several UNets the second is for the larger pictures of hires fix.
    """

    def before(_p: Any) -> None:
        calls = iter(range(1000))

        def mix(_unet: Any, args: Any, kwargs: Any, output: Any) -> Any:
            is_second = len(pruned) > 1 and args[0].shape[-1] == SECOND[0] // 8
            w = SECOND_WEIGHT if is_second else weight
            if steps is not None and next(calls) not in steps:
                return None
            other = pruned[-1 if is_second else 0](*args, **kwargs)[0]
            return ((1 - w) * output[0] + w * other, *output[1:])

        MIXING.append(shared.sd_model.unet.register_forward_hook(mix, with_kwargs=True))

    return before


MIXING: list[Any] = []


def formula(*args: Any, **options: Any) -> Any:
    """Draw with two models."""
    try:
        return draw(*args, **options)
    finally:
        MIXING.pop().remove()


def far(one: Any, other: Any) -> float:
    return float((one - other).abs().max() / other.abs().max())


def weights() -> dict[str, Any]:
    """Copies of the loaded UNet's weights."""
    return {name: tensor.clone() for name, tensor in shared.sd_model.unet.state_dict().items()}


def same(before: dict[str, Any]) -> bool:
    """Whether the UNet has these bytes, and nothing of ours on it."""
    unet = shared.sd_model.unet
    now = unet.state_dict()
    unchanged = all(torch.equal(now[name].view(torch.uint8), kept.view(torch.uint8)) for name, kept in before.items())
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in unet.modules())
    return unchanged and hooks == 0 and now.keys() == before.keys() and not hasattr(unet, "crdiff_poa")


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return ""


def files(unets: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Draw with thresholds, masks and moved weights, with and without a LoRA."""
    for name in FILES:
        file = f"{name}.safetensors"
        for lora, prompt in {"": "a fox", "lora, ": LORA}.items():
            unet, alone = unets[f"{lora}{name}"], unets[f"{lora}{name}, drawn"]
            kept, dense = weights(), draw(prompt=prompt)
            drawn = draw(poa(file), prompt=prompt)
            yield f"{name}, {lora}two models", far(drawn, formula(two_models(unet), prompt=prompt))
            yield f"{name}, {lora}moves", far(drawn, dense)
            yield f"{name}, {lora}w=0", far(draw(poa(file, 0), prompt=prompt), dense)
            yield f"{name}, {lora}w=1, the file", far(draw(poa(file, 1), prompt=prompt), alone)
            part = draw(poa(file, start=0.25, stop=0.75), prompt=prompt)
            yield f"{name}, {lora}part", far(part, formula(two_models(unet, steps=range(1, 3)), prompt=prompt))
            own = formula(two_models(unet, weight=1.5), prompt=prompt)
            yield f"{name}, {lora}own weight", far(draw(poa(file, None), prompt=prompt), own)
            draw()  # takes the LoRA out of the weights
            yield f"{name}, {lora}bytes", same(kept)


def packs(unets: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Draw with a pack at both of its sizes, and with hires fix, which goes from one to the other."""
    for lora, prompt in {"": "a fox", "lora, ": LORA}.items():
        first, second = unets[f"{lora}baked"], unets[f"{lora}second"]
        ways: dict[str, dict[str, Any]] = {"": {}, "hires fix, ": HIRES}
        for name, options in ways.items():
            kept, dense = weights(), draw(prompt=prompt, **options)
            drawn = draw(poa("sizes.crdiff", None), prompt=prompt, **options)
            yield (
                f"{lora}{name}pack, two models",
                far(drawn, formula(two_models(first, second), prompt=prompt, **options)),
            )
            yield f"{lora}{name}pack moves", far(drawn, dense)
            draw()
            yield f"{lora}{name}pack, bytes", same(kept)
        large: dict[str, Any] = {"size": SECOND, "prompt": prompt}
        expected = formula(two_models(second, weight=SECOND_WEIGHT), **large)
        yield f"{lora}pack, second size, two models", far(draw(poa("sizes.crdiff", None), **large), expected)
    yield "pack, native size is dense", far(draw(poa("sizes.crdiff"), size=NATIVE), draw(size=NATIVE))


def interrupted() -> Iterator[tuple[str, Any]]:
    """End pictures in the middle, by an error, by the button, and by another model; the weights stay."""
    kept = weights()
    block = shared.sd_model.unet.mid_block

    def fail() -> None:
        raise RuntimeError("in the middle")

    def press() -> None:
        shared.state.interrupted = True

    for lora, prompt in {"": "a fox", "lora, ": LORA}.items():
        for name, action in {"an error": fail, "an interrupt": press}.items():
            calls: Iterator[int] = iter(range(100))
            # The second call is the first one with pruned weights.
            hook = block.register_forward_hook(lambda *_, calls=calls, action=action: action() if next(calls) else None)
            raised = said(lambda prompt=prompt: draw(poa("baked.safetensors"), prompt=prompt))  # type: ignore[misc]
            hook.remove()
            yield f"{lora}calls until {name}", next(calls)
            yield f"{lora}raised by {name}", raised
            yield f"{lora}hooks after {name}", sum(len(m._forward_hooks) for m in shared.sd_model.unet.modules())
            draw()
            yield f"{lora}bytes after {name}", same(kept)


def refused() -> Iterator[tuple[str, Any]]:
    """Say why a file is not taken."""
    for name in ("other", "baked"):
        load(name)
        for file in ("baked.safetensors", "random.safetensors", "sizes.crdiff"):
            yield f"{name}, {file}", said(lambda file=file: draw(poa(file)))  # type: ignore[misc]
    load("base")
    kept = weights()
    yield "not baked", said(lambda: draw(poa("plain.safetensors")))
    yield "start after stop", said(lambda: draw(poa("baked.safetensors", start=0.5, stop=0.5)))
    shared.opts.data["lora_fuse_native"] = True
    yield "fused LoRA", said(lambda: poa("baked.safetensors")(SimpleNamespace(all_prompts=[LORA])))
    shared.opts.data["lora_fuse_native"] = False
    shared.sd_model.unet.mid_block.sdnq_dequantizer = None
    yield "SDNQ", said(lambda: draw(poa("baked.safetensors")))
    del shared.sd_model.unet.mid_block.sdnq_dequantizer
    draw(poa("baked.safetensors"))
    load("other")
    load("base")
    yield "bytes after a switch of models", same(kept)


def extension(unets: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Draw with the installed extension, whose script is in SD.Next's own runner."""
    runner = scripts_manager.scripts_txt2img
    with gr.Blocks():
        runner.initialize_scripts(is_img2img=False, is_control=False)
        inputs = runner.setup_ui("txt2img")
    script = next(each for each in runner.alwayson_scripts if each.title() == "CR-Diff")
    script_args = [0, *(getattr(component, "value", None) for component in inputs[1:])]

    def ask(*values: Any, **options: Any) -> tuple[Any, Any, str]:
        script_args[script.args_from : script.args_to] = values
        given = {"prompt": "a fox", "seed": 3, "steps": 4, "sampler_name": "Euler", "cfg_scale": 2.0, **options}
        p = processing.StableDiffusionProcessingTxt2Img(
            width=SIZE[0], height=SIZE[1], do_not_save_samples=True, do_not_save_grid=True, **given
        )
        p.scripts, p.script_args, p.per_script_args = runner, script_args, {}
        last: list[Any] = []

        def draw_all(p: Any) -> Any:
            hook = shared.sd_model.unet.register_forward_hook(
                lambda _unet, args, output: last.append(torch.cat((args[0].flatten(), output[0].flatten())))
            )
            try:
                return process_diffusers(p)
            finally:
                hook.remove()

        processing_diffusers.process_diffusers = draw_all  # after the hooks of the extension
        try:
            return p, processing.process_images(p).info, last[-1]
        finally:
            processing_diffusers.process_diffusers = process_diffusers

    process_diffusers = processing_diffusers.process_diffusers
    none = ("None", True, 1.5, 0, 1)
    _, text, drawn = ask("baked.safetensors", False, WEIGHT, 0, 1)
    yield "extension, two models", far(drawn, formula(two_models(unets["baked"])))
    yield "extension, infotext", text.partition("CR-Diff: ")[2]
    _, _, drawn = ask("sizes.crdiff", True, 0, 0, 1, **HIRES)
    expected = formula(two_models(unets["baked"], unets["second"]), **HIRES)
    yield "extension, hires fix, two models", far(drawn, expected)
    yield "extension, dense afterwards", far(ask(*none)[2], draw())
    load("other")
    p, text, drawn = ask("baked.safetensors", False, WEIGHT, 0, 1)
    yield "extension, another model stays dense", far(drawn, draw())
    yield "extension, another model's infotext", text.partition("CR-Diff: ")[2]
    yield "extension, another model, line", next(iter(p.comments))
    load("base")


def main() -> None:
    torch.set_num_threads(1)
    modeldata.model_data.locked = False
    shared.opts.data |= {"show_progress_every_n_steps": 0, "lora_fuse_native": False, "samples_save": False}
    unets: dict[str, Any] = {}
    for name in (*FILES, "second"):
        load(name)
        for lora, prompt in {"": "a fox", "lora, ": LORA}.items():
            unets[f"{lora}{name}, drawn"] = draw(prompt=prompt)
            unets[f"{lora}{name}"] = deepcopy(shared.sd_model.unet)
    load("base")
    results: dict[str, Any] = {"the LoRA moves": far(draw(prompt=LORA), draw())}
    draw()
    results |= files(unets)
    results |= packs(unets)
    results |= interrupted()
    shared.opts.data["diffusers_offload_mode"] = "balanced"
    load("other")
    load("base")
    offloaded = draw(poa("baked.safetensors"), prompt=LORA)
    results["balanced offload, two models"] = far(offloaded, formula(two_models(unets["lora, baked"]), prompt=LORA))
    again = draw(poa("baked.safetensors"), prompt=LORA)
    results["balanced offload, again"] = far(again, offloaded)
    shared.opts.data["diffusers_offload_mode"] = "none"
    results |= refused()
    results |= extension(unets)
    json.dump(results, OUT)
    OUT.write("\n")


if __name__ == "__main__":
    main()
