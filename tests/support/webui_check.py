"""POA in a real reForge, Forge or Forge Classic, on the CPU: run by tests/sampling/test_webui_real.py with the UI's
Python, and by hand.

    python -m tests.support.webui_check UI WORK [PART ...] [--FLAG-OF-THE-UI ...]

WORK holds what tests/sampling/test_webui_real.py puts there, and is the UI's data folder. Pictures are drawn with the
UI's own API, loader, LoRA extension and samplers; the latents of the last pass are compared. Prints one JSON object.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.support import torchvision_import

UI, WORK = (Path(word).resolve() for word in sys.argv[1:3])
PARTS = [word for word in sys.argv[3:] if not word.startswith("--")]
FLAGS = [word for word in sys.argv[3:] if word.startswith("--")] or ["--all-in-fp32"]
CHECKPOINTS = WORK / "models" / "Stable-diffusion"
BASE, OTHER, BAKED, RANDOM, PACK = "base", "other", "baked.safetensors", "random.safetensors", "base.crdiff"
TALL = "tall.safetensors"
WIDE_SIZE, TALL_SIZE, SMALL_SIZE = (128, 64), (64, 128), (64, 64)
WEIGHT = 1.7
LORA = " <lora:lora:0.8>"
STEPS = 4


def start() -> None:
    """Import the UI in the order of its `webui.py`, and load the base."""
    os.chdir(UI)
    sys.path.insert(0, str(UI))
    torchvision_import.import_torchvision()
    sys.argv = [
        "webui.py", *FLAGS, "--always-cpu", "--skip-version-check", "--no-hashing", "--disable-nan-check",
        "--no-download-sd-model", "--data-dir", str(WORK), "--ckpt", str(CHECKPOINTS / f"{BASE}.safetensors"),
    ]  # fmt: skip
    from modules_forge.initialization import initialize_forge

    initialize_forge()
    from modules import initialize

    initialize.imports()
    initialize.initialize()
    from modules import script_callbacks, shared

    shared.opts.data |= {"live_previews_enable": False, "save_write_log_csv": False, "samples_save": False}
    script_callbacks.before_ui_callback()


class State:
    """What the script of this check is told and has seen."""

    before: Callable[[Any], None] | None = None
    latents: list[Any] = []  # noqa: RUF012
    processing: Any = None
    result: Any = None


def watch() -> None:
    """Add a script that sees each pass, and its latents."""
    from modules import scripts

    class Watcher(scripts.Script):  # type: ignore[misc]
        sorting_priority = 200

        def title(self) -> str:
            return "crdiff check"

        def show(self, _is_img2img: bool) -> Any:
            return scripts.AlwaysVisible

        def process_before_every_sampling(self, p: Any, *_args: Any, **_: Any) -> None:
            State.processing = p
            if State.before:
                State.before(p)

        def post_sample(self, _p: Any, ps: Any, *_args: Any) -> None:
            # After hires fix the samples are pictures already.
            samples = ps.samples if torch.is_tensor(ps.samples) else torch.stack(list(ps.samples))
            State.latents.append(samples.detach().float().cpu().clone())

    scripts.scripts_data.append(scripts.ScriptClassData(Watcher, __file__, str(Path(__file__).parent), None))


def values(file: str = BAKED, weight: float | None = None, begin: float = 0.0, end: float = 1.0) -> list[Any]:
    """The values of the accordion."""
    return [file, weight is None, 1.5 if weight is None else weight, begin, end]


def draw(
    accordion: list[Any] | None = None, *, prompt: str = "a fox", size: tuple[int, int] = WIDE_SIZE,
    checkpoint: str = BASE, sampler: str = "Euler", before: Callable[[Any], None] | None = None, picture: str = "",
    **more: Any,
) -> list[Any]:  # fmt: skip
    """Draw with the UI's API and return the latents; with a picture in img2img."""
    from modules.api import models

    select(checkpoint)
    options = {"init_images": [picture], "denoising_strength": 0.75} if picture else {}
    kind = models.StableDiffusionImg2ImgProcessingAPI if picture else models.StableDiffusionTxt2ImgProcessingAPI
    request = kind(
        prompt=prompt, negative_prompt="bad", steps=STEPS, width=size[0], height=size[1], sampler_name=sampler,
        cfg_scale=5.0, seed=3, alwayson_scripts={"CR-Diff": {"args": accordion}} if accordion else {},
        save_images=False, **options, **more,
    )  # fmt: skip
    State.before, State.latents = before, []
    try:
        State.result = api().img2imgapi(request) if picture else api().text2imgapi(request)
    finally:
        State.before = None
    return State.latents


_API: list[Any] = []


def api() -> Any:
    if not _API:
        from fastapi import FastAPI
        from modules.api.api import Api
        from modules.call_queue import queue_lock

        _API.append(Api(FastAPI(), queue_lock))
    return _API[0]


def select(checkpoint: str) -> None:
    """Load a checkpoint as the UI's menu does."""
    from modules import sd_models, shared

    info = sd_models.get_closet_checkpoint_match(f"{checkpoint}.safetensors")
    shared.opts.data["sd_model_checkpoint"] = info.title
    data = sd_models.model_data
    if hasattr(data, "forge_loading_parameters"):
        data.forge_loading_parameters = {"checkpoint_info": info, "additional_modules": [], "unet_storage_dtype": None}
        sd_models.forge_model_reload()
    elif data.sd_model is None:
        sd_models.load_model(info)
    else:
        sd_models.reload_model_weights(info=info)


def unet() -> Any:
    """The patcher that the UI samples with."""
    from modules import shared

    return shared.sd_model.forge_objects.unet


def load_unet(file: str) -> Any:
    """The UNet of a checkpoint, loaded by the UI's own loader beside the checkpoint that is in use."""
    path = str(CHECKPOINTS / file)
    try:
        from backend.loader import forge_loader
    except ImportError:
        from modules_forge.forge_loader import load_checkpoint_guess_config

        content: Any = path
        if not is_reforge():  # Forge Classic's takes the tensors
            from safetensors.torch import load_file

            content = load_file(path)
        return load_checkpoint_guess_config(content, output_vae=False, output_clip=False).unet
    return forge_loader(path).forge_objects.unet


def is_reforge() -> bool:
    return (UI / "ldm_patched" / "modules" / "patcher_extension.py").exists()


def management() -> Any:
    try:
        from backend import memory_management
    except ImportError:
        from ldm_patched.modules import model_management

        return model_management
    return memory_management


def two_models(pruned: Any, weight: Callable[[int], float]) -> Callable[[Any], None]:
    """Sample with two models, each with its own weights and the same LoRA: what POA has to be equal to."""

    def before(p: Any) -> None:
        objects = p.sd_model.forge_objects
        dense = objects.unet
        other = pruned.clone()
        for name in ("patches", "lora_patches", "patches_uuid"):
            if hasattr(dense, name):
                setattr(other, name, getattr(dense, name))
        if hasattr(other, "lora_loader"):
            other.refresh_loras()
        management().load_models_gpu([other])
        both = dense.clone()

        def ask(apply_model: Any, args: Any) -> Any:
            first = apply_model(args["input"], args["timestep"], **args["c"])
            second = other.model.apply_model(args["input"], args["timestep"], **args["c"])
            w = weight(p.sampler.model_wrap_cfg.step)
            return first if w == 0 else second if w == 1 else (1 - w) * first + w * second

        both.set_model_unet_function_wrapper(ask)
        objects.unet = both

    return before


def far(one: list[Any], other: list[Any]) -> float:
    """How far pictures are from what they should be."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, other, strict=True))


def comments() -> str:
    return " | ".join(State.processing.comments)


def tensors() -> dict[str, Any]:
    return {name: tensor.detach().clone() for name, tensor in unet().model.state_dict().items()}


def changed(own: dict[str, Any]) -> float:
    now = unet().model.state_dict()
    assert now.keys() == own.keys()
    return float(sum(not torch.equal(now[name].view(torch.uint8), own[name].view(torch.uint8)) for name in own))


def against_two_models() -> Iterator[tuple[str, Any]]:
    for name, file in (("thresholds", BAKED), ("mask", RANDOM)):
        pruned = load_unet(file)
        for kind, prompt in (("", "a fox"), (", LoRA", f"a fox{LORA}")):
            label = f"{name}{kind}"
            dense = draw(prompt=prompt)
            own = tensors()
            mixed = draw(prompt=prompt, before=two_models(pruned, lambda _step: WEIGHT))
            poa = draw(values(file), prompt=prompt)
            yield f"{label}: mixed", far(poa, mixed)
            yield f"{label}: tensors changed", changed(own)
            yield f"{label}: again", far(draw(values(file), prompt=prompt), mixed)
            yield f"{label}: w=0", far(draw(values(file, 0.0), prompt=prompt), dense)
            w1 = draw(values(file, 1.0), prompt=prompt)
            yield f"{label}: w=1", far(w1, draw(prompt=prompt, before=two_models(pruned, lambda _step: 1.0)))
            yield f"{label}: dense again", far(draw(prompt=prompt), dense)
            yield f"{label}: tensors changed at the end", changed(own)
            yield f"{label}: POA moves the picture", far(poa, dense)
            yield (
                f"{label}: w=1 against the file as checkpoint",
                far(w1, draw(prompt=prompt, checkpoint=file.removesuffix(".safetensors"))),
            )
        later = draw(before=two_models(pruned, lambda step: WEIGHT if step >= STEPS // 2 else 0.0))
        yield f"{name}: start 0.5", far(draw(values(file, begin=0.5)), later)
        earlier = draw(before=two_models(pruned, lambda step: WEIGHT if step < STEPS // 2 else 0.0))
        yield f"{name}: stop 0.5", far(draw(values(file, end=0.5)), earlier)


def samplers() -> Iterator[tuple[str, Any]]:
    """A sampler that asks twice a step, and img2img."""
    mixed = draw(before=two_models(load_unet(BAKED), lambda _step: WEIGHT), sampler="Heun")
    yield "Heun", far(draw(values(), sampler="Heun"), mixed)
    picture = State.result.images[0]
    mixed = draw(before=two_models(load_unet(BAKED), lambda _step: WEIGHT), picture=picture)
    yield "img2img: mixed", far(draw(values(), picture=picture), mixed)
    yield "LoRA moves the picture", far(draw(prompt=f"a fox{LORA}"), draw())


def packs() -> Iterator[tuple[str, Any]]:
    yield "pack: wide", far(draw(values(PACK)), draw(values(BAKED)))
    yield "pack: tall", far(draw(values(PACK), size=TALL_SIZE), draw(values(TALL), size=TALL_SIZE))
    dense = draw(size=SMALL_SIZE)
    yield "pack: small is dense", far(draw(values(PACK), size=SMALL_SIZE), dense)
    yield "pack: small, comment", comments()
    second: dict[str, Any] = {
        "size": SMALL_SIZE, "enable_hr": True, "hr_resize_x": WIDE_SIZE[0], "hr_resize_y": WIDE_SIZE[1],
        "hr_upscaler": "Latent", "denoising_strength": 0.7,
    }  # fmt: skip
    if (UI / "backend").is_dir():
        second["hr_additional_modules"] = []
    pruned, passes = load_unet(BAKED), []

    def reference(p: Any) -> None:
        passes.append(bool(p.is_hr_pass))
        if p.is_hr_pass:
            two_models(pruned, lambda _step: WEIGHT)(p)

    mixed = draw(before=reference, **second)
    yield "pack: passes of hires fix", sorted(set(passes)) == [False, True]
    yield "pack: hires fix", far(draw(values(PACK), **second), mixed)
    yield "pack: hires fix moves the picture", far(draw(**second), mixed)


def broken() -> Iterator[tuple[str, Any]]:
    """Errors and interrupts while layers are pruned."""
    from modules import shared

    for kind, prompt in (("", "a fox"), (", LoRA", f"a fox{LORA}")):
        dense = draw(prompt=prompt)
        own = tensors()
        calls: list[int] = []
        layer = unet().model.diffusion_model.get_submodule("output_blocks.5.1.transformer_blocks.0.ff.net.2")

        def fail(*_: Any, calls: list[Any] = calls) -> None:
            calls.append(0)
            if len(calls) == 6:
                raise RuntimeError("this check ends the sampling here")

        handle = layer.register_forward_hook(fail)
        try:
            draw(values(), prompt=prompt)
            yield f"error{kind}: raised", "no"
        except Exception as error:  # noqa: BLE001
            yield f"error{kind}: raised", str(error)
        handle.remove()
        yield f"error{kind}: tensors changed", changed(own)
        yield f"error{kind}: dense again", far(draw(prompt=prompt), dense)

        def interrupt(*_: Any, calls: list[Any] = calls) -> None:
            calls.append(0)
            if len(calls) == 12:
                shared.state.interrupted = True

        handle = layer.register_forward_hook(interrupt)
        stopped = draw(values(), prompt=prompt)
        handle.remove()
        yield f"interrupt{kind}: stopped", shared.state.interrupted or far(stopped, dense) > 0
        yield f"interrupt{kind}: tensors changed", changed(own)
        shared.state.interrupted = False
        yield f"interrupt{kind}: dense again", far(draw(prompt=prompt), dense)
        yield (
            f"interrupt{kind}: hooks left",
            float(
                sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet().model.modules())
            ),
        )


def refusals() -> Iterator[tuple[str, Any]]:
    for label, checkpoint, file in (
        ("other model", OTHER, BAKED), ("other model, pack", OTHER, PACK), ("pruned model", "baked", BAKED),
    ):  # fmt: skip
        dense = draw(checkpoint=checkpoint)
        own = tensors()
        refused = draw(values(file), checkpoint=checkpoint)
        yield f"{label}: comment", comments()
        yield f"{label}: dense", far(refused, dense)
        yield f"{label}: tensors changed", changed(own)
        yield f"{label}: infotext", "CR-Diff" in json.loads(State.result.info)["infotexts"][0]
    draw(values("gone.safetensors"))
    yield "no file: comment", comments()
    draw(values(begin=0.5, end=0.5))
    yield "bad start: comment", comments()


def switch() -> Iterator[tuple[str, Any]]:
    """Another checkpoint after POA, and back."""
    dense = draw()
    own = tensors()
    draw(values())
    other = draw(checkpoint=OTHER)
    draw(values(), checkpoint=OTHER)
    yield "switch: other, again", far(draw(checkpoint=OTHER), other)
    yield "switch: back", far(draw(), dense)
    yield "switch: tensors changed", changed(own)


def page() -> Iterator[tuple[str, Any]]:
    """Infotext and the XYZ plot."""
    from modules import infotext_utils, scripts

    import crdiff_export

    yield "package", str(Path(crdiff_export.__file__).relative_to(WORK))

    draw(values(BAKED, 2.25, 0.25, 0.75))
    text = json.loads(State.result.info)["infotexts"][0]
    yield "infotext", text[text.index("CR-Diff") :]
    entries = infotext_utils.parse_generation_parameters(text)
    runner = scripts.scripts_txt2img
    script = next(script for script in runner.scripts if script.title() == "CR-Diff")
    read = [key(entries) if callable(key) else entries[key] for _, key in script.infotext_fields]
    yield "infotext, read back", [*read[:2], float(read[2]), *read[3:]]
    plain = infotext_utils.parse_generation_parameters("a fox\nSteps: 4")
    yield "infotext of another picture", [key(plain) for _, key in script.infotext_fields if callable(key)]
    plot = next(script for script in runner.selectable_scripts if script.title().lower() == "x/y/z plot")
    labels = [option.label for option in plot.current_axis_options]
    yield "axes", [label for label in labels if "CR-Diff" in label]
    options = [control.value for control in plot.controls]
    options[:2] = labels.index("[CR-Diff] weight"), "0, 1, file"
    options[3:5] = labels.index("[CR-Diff] file"), ""
    options[5:7] = [BAKED, RANDOM], labels.index("Nothing")
    options[9] = False  # the legend, which some UIs draw with a Pillow of their time
    grid = draw(values(), script_name=plot.title(), script_args=options)
    cells = [draw(values(file, weight)) for file in (BAKED, RANDOM) for weight in (0.0, 1.0, None)]
    yield "plot", far(grid, [latent for cell in cells for latent in cell])


def main() -> None:
    torch.set_num_threads(int(os.environ.get("CRDIFF_CHECK_THREADS", "1")))
    stdout = sys.stdout
    sys.stdout = sys.stderr  # the UIs print much
    start()
    watch()
    results: dict[str, Any] = {}
    for part in (against_two_models, samplers, packs, broken, refusals, switch, page):
        for name, value in part() if part.__name__ in (PARTS or [part.__name__]) else ():
            results[name] = value
            sys.stderr.write(f"CHECK {name}: {value}\n")
    stdout.write(json.dumps(results) + "\n")
    stdout.flush()
    os._exit(0)  # the UIs' threads go on


if __name__ == "__main__":
    main()
