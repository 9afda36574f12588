"""POA in a real ComfyUI, on the CPU: run by tests/sampling/test_comfyui_real.py with ComfyUI's Python, and by hand.

    python -m tests.support.comfyui_check COMFYUI WORK

WORK holds what tests/sampling/test_comfyui_real.py puts there. Prints one JSON object: how far each result is from
what it should be.
"""

import asyncio
import contextlib
import gc
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tests.support.comfyui_start import BAKED, COMFYUI, WEIGHT, WORK, far, follow, mixed, poa, said

# isort: split
import comfy.controlnet
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models as supported
import folder_paths
import nodes
import safetensors.torch
import torch

GIVEN = safetensors.torch.load_file(WORK / "reference.safetensors")
SHAPE = json.loads((WORK / "unet.json").read_text(encoding="utf-8"))
DENSE, OTHER = "demo.safetensors", "other.safetensors"
# Pruned by masks, the last of them with moved weights; and one that holds its residual, made like the first.
MASKS = ("random.safetensors", "wanda.safetensors", "obs.safetensors")
EMBEDDED = "embedded.safetensors"
SCALED = "scaled.safetensors"
# Packs: for each of their sizes, by the sides of its latent, the exported file and the weight.
THRESHOLDS = "thresholds.crdiff"
PACKS = {
    THRESHOLDS: {(8, 12): (BAKED, WEIGHT), (12, 8): ("tall.safetensors", 3.0)},
    "masks.crdiff": {(8, 12): ("masked.safetensors", WEIGHT), (12, 8): ("masked-tall.safetensors", 1.0)},
}
FOUND = "(loaded model)"
DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)


class Demo(supported.SD15):  # type: ignore[misc]
    """The demo base, for ComfyUI's own detection: SD1.5 in another width, with fewer heads."""

    unet_config = {  # noqa: RUF012
        **supported.SD15.unet_config,
        "context_dim": SHAPE["cross_attention_dim"],
        "model_channels": SHAPE["block_out_channels"][0],
    }
    # diffusers calls the number of heads so.
    unet_extra_config = {**supported.SD15.unet_extra_config, "num_heads": SHAPE["attention_head_dim"]}  # noqa: RUF012


supported.models.append(Demo)
folder_paths.add_model_folder_path("checkpoints", str(WORK / "checkpoints"))


def load(name: str = DENSE, **options: Any) -> Any:
    """A model as ComfyUI's loader gives it. What it knows has 32 groups in every norm, the demo base 16."""
    model = comfy.sd.load_checkpoint_guess_config(
        folder_paths.get_full_path_or_raise("checkpoints", name),
        output_vae=False,
        output_clip=False,
        model_options=options,
    )[0]
    for module in model.model.diffusion_model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = SHAPE["norm_num_groups"]
    return model


def conditioning(name: str, **more: Any) -> Any:
    return [[GIVEN[name], more]]


def sample(
    model: Any, *, sampler: str = "euler", callback: Any = None, noise: Any = None, sides: Any = None, **more: Any
) -> Any:
    """Sample with ComfyUI's own sampler, guidance and noise scaling; `sides` are those of another latent."""
    noise = GIVEN["noise"] if noise is None else noise
    if sides:
        noise = torch.randn(1, 4, *sides, generator=torch.Generator().manual_seed(2))
    return comfy.sample.sample_custom(
        model, noise, 2.0, comfy.samplers.sampler_object(sampler), GIVEN["sigmas"], conditioning("cond", **more),
        conditioning("uncond", **more), torch.zeros_like(noise), disable_pbar=True, seed=1,
        callback=callback,
    )  # fmt: skip


def always(_sigma: float) -> float:
    return WEIGHT


def constantly(weight: float) -> Callable[[float], float]:
    return lambda _sigma: weight


def lora(strength: float = 1.0) -> Callable[[Any], Any]:
    """What a LoRA loader makes of a model: on pruned layers and on others."""
    loaded = safetensors.torch.load_file(WORK / "lora.safetensors")
    return lambda model: comfy.sd.load_lora_for_models(model, None, loaded, strength, 0)[0]


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Has ComfyUI leave the weights where they are and cast a copy of each as it goes, as with --novram."""
    before = management.vram_state, management.is_device_cpu
    management.vram_state, management.is_device_cpu = management.VRAMState.NO_VRAM, lambda _device: False
    try:
        management.unload_all_models()
        yield
    finally:
        management.vram_state, management.is_device_cpu = before
        management.unload_all_models()


class Control(comfy.controlnet.ControlBase):  # type: ignore[misc]
    """A ControlNet's place: the same tensors at every call, which the UNet takes out of their lists."""

    def get_control(self, x: Any, *_: Any) -> Any:
        generator = torch.Generator().manual_seed(3)
        shape = (x.shape[0], SHAPE["block_out_channels"][-1], x.shape[2] // 2, x.shape[3] // 2)
        return {"middle": [torch.randn(shape, generator=generator)], "output": [], "input": []}


def plain(model: Any) -> Any:
    return model


def against_two_models(prefix: str, with_lora: Callable[[Any], Any], file: str = BAKED) -> Iterator[tuple[str, float]]:
    dense, pruned, model = with_lora(load()), with_lora(load(file)), load()
    before, after = with_lora(poa(model, file)), poa(with_lora(model), file)
    expected = sample(mixed(dense, pruned, always))
    yield f"{prefix}mixed", far(sample(before), expected)
    yield f"{prefix}mixed, node after", far(sample(after), expected)
    yield f"{prefix}mixed, again", far(sample(before), expected)
    loaded = next(m for m in management.current_loaded_models if m.model.is_clone(before))
    loaded.model.partially_unload(torch.device("cpu"), 1 << 20)
    yield f"{prefix}mixed, after a partial unload", far(sample(before), expected)
    yield f"{prefix}w=0", far(sample(poa(with_lora(model), file, weight=0)), sample(dense))
    yield f"{prefix}w=1", far(sample(poa(with_lora(model), file, weight=1)), sample(pruned))
    yield f"{prefix}off again", far(sample(with_lora(model)), sample(dense))
    yield f"{prefix}the model itself", far(sample(model), sample(load()))


def alone() -> Iterator[tuple[str, Any]]:
    dense, pruned, model = load(), load(BAKED), load()
    yield "diffusers dense", far(sample(dense), GIVEN["dense"])
    yield "diffusers poa", far(sample(poa(model)), GIVEN["poa"])
    yield "diffusers poa, start and stop", far(sample(poa(model, start=0.25, stop=0.75)), GIVEN["part"])
    yield "poa moves the result", far(sample(poa(model)), sample(dense))
    inner = GIVEN["sigmas"][1:3].tolist()
    part = mixed(dense, pruned, lambda sigma: WEIGHT if min(inner) * 0.99 < sigma < max(inner) * 1.01 else 0)
    yield "start and stop", far(sample(poa(model, start=0.25, stop=0.75)), sample(part))
    both = mixed(dense, pruned, always)
    yield "second order", far(sample(poa(model), sampler="dpm_2"), sample(both, sampler="dpm_2"))
    yield "found", far(sample(poa(model, FOUND)), sample(poa(model)))
    yield "twice", far(sample(poa(poa(model, weight=3), weight=WEIGHT)), sample(poa(model)))
    hooks: Any = {"control": Control(), "control_apply_to_uncond": True}
    controlled = sample(both, **hooks)
    yield "controlnet", far(sample(poa(model), **hooks), controlled)
    yield "controlnet moves the result", far(sample(poa(model)), controlled)
    yield "perturbed attention", far(sample(guided(poa(model))), sample(guided(both)))


def guided(model: Any) -> Any:
    node = nodes.NODE_CLASS_MAPPINGS["PerturbedAttentionGuidance"]
    return node.execute(model, 1.5).result[0] if hasattr(node, "execute") else node().patch(model, 1.5)[0]


def masks() -> Iterator[tuple[str, Any]]:
    """Files without thresholds: their zeros decide, or their weights."""
    for file in MASKS:
        name, model = file.partition(".")[0], load()
        for weight in (0.5, WEIGHT, 3.0):
            yield f"diffusers {name} {weight}", far(sample(poa(model, file, weight)), GIVEN[f"{name} {weight}"])
        part = sample(poa(model, file, start=0.25, stop=0.75))
        yield f"diffusers {name}, start and stop", far(part, GIVEN[f"{name} part"])
        yield f"{name} moves the result", far(sample(poa(model, file)), sample(poa(model)))
    model, pruned = load(), load(MASKS[0])
    expected = sample(mixed(model, pruned, always))
    yield "embedded residual, mixed", far(sample(poa(model, EMBEDDED)), expected)
    yield "embedded residual, loaded", far(sample(load(EMBEDDED)), sample(pruned))


def packs() -> Iterator[tuple[str, Any]]:
    """Sizes in turn, and back to the dense model, with one loaded model."""
    yield "packs", nodes.NODE_CLASS_MAPPINGS["CrdiffPack"].INPUT_TYPES()["required"]["pack"][0]
    for pack, files in PACKS.items():
        for name, with_lora in (("", plain), (", lora", lora())):
            yield from following(f"{pack}{name}", pack, files, with_lora)
    with little_memory():
        yield from following("little memory, thresholds.crdiff, lora", THRESHOLDS, PACKS[THRESHOLDS], lora())
    for dtype in DTYPES:
        model = load(dtype=dtype)
        for weight in (1.0, WEIGHT):
            wanted = sample(poa(load(dtype=dtype), weight=weight))
            yield f"{dtype} {THRESHOLDS}, w={weight}", far(sample(follow(model, THRESHOLDS, weight)), wanted)
    yield "pack, other model", said(lambda: follow(load(OTHER), THRESHOLDS))
    yield "pack, pruned model", said(lambda: follow(load(BAKED), THRESHOLDS))
    yield "pack, none", said(lambda: follow(load(), "gone.crdiff"))
    yield "pack, native", said(lambda: sample(follow(load(), THRESHOLDS), sides=(8, 8)))
    yield "pack, far", said(lambda: sample(follow(load(), THRESHOLDS), sides=(8, 40)))
    yield "pack, near", said(lambda: sample(follow(load(), THRESHOLDS), sides=(8, 13)))


def following(name: str, pack: str, files: Any, with_lora: Callable[[Any], Any]) -> Iterator[tuple[str, float]]:
    """One model in many sizes against two models for each."""
    model, dense = with_lora(load()), with_lora(load())
    own, one = with_lora(follow(load(), pack)), follow(model, pack, 1.0)
    other = follow(model, pack, 3.0)
    plain_results = {sides: sample(dense, sides=sides) for sides in (*files, (8, 8))}
    wanted: dict[Any, Any] = {}
    for sides, (file, weight) in files.items():
        pruned = with_lora(load(file))
        wanted[sides, "own"] = sample(mixed(dense, pruned, constantly(weight)), sides=sides)
        wanted[sides, "1"] = sample(pruned, sides=sides)
        wanted[sides, "3"] = sample(mixed(dense, pruned, constantly(3.0)), sides=sides)
    for turn in ("first", "second"):
        for sides in files:
            for label, on in (("own", own), ("1", one), ("3", other)):
                yield f"{name}, {sides}, w={label}, {turn}", far(sample(on, sides=sides), wanted[sides, label])
            yield f"{name}, {sides}, off again, {turn}", far(sample(model, sides=sides), plain_results[sides])
        yield f"{name}, native stays dense, {turn}", far(sample(one, sides=(8, 8)), plain_results[8, 8])
    first = next(iter(files))
    yield f"{name} moves the result", far(wanted[first, "own"], plain_results[first])
    yield f"{name}, pruned moves the result", far(wanted[first, "1"], plain_results[first])


def packs_dynamically() -> Iterator[tuple[str, float]]:
    """Without a LoRA, as in `dynamically`."""
    for pack, files in PACKS.items():
        with_own, wanted = load(), {}
        for sides, (file, weight) in files.items():
            pruned = load(file)
            wanted[sides] = (
                sample(mixed(with_own, pruned, constantly(weight)), sides=sides), sample(pruned, sides=sides)
            )  # fmt: skip
        with dynamic_memory():
            model = load()
            for turn in ("first", "second"):
                for sides in files:
                    label = f"dynamic memory, {pack}, {sides}, {turn}"
                    yield f"{label}, mixed", far(sample(follow(model, pack), sides=sides), wanted[sides][0])
                    yield f"{label}, w=1", far(sample(follow(model, pack, 1.0), sides=sides), wanted[sides][1])


def graph() -> Iterator[tuple[str, float]]:
    """Several nodes on one loaded model: side by side, one behind the other, and on clones."""
    model, files = load(), (BAKED, *MASKS)
    on = {file: poa(model, file) for file in files}
    expected = {file: sample(mixed(load(), load(file), always)) for file in files}
    for turn in ("first", "second"):
        for file in files:
            yield f"side by side, {file}, {turn}", far(sample(on[file]), expected[file])
    for one, other in ((BAKED, MASKS[0]), (MASKS[0], BAKED), (MASKS[0], MASKS[1]), (MASKS[2], MASKS[0])):
        yield f"{other} behind {one}", far(sample(poa(poa(model, one), other)), expected[other])
    for file in files:
        with_lora = sample(mixed(lora()(load()), lora()(load(file)), always))
        yield f"a clone with a lora, {file}", far(sample(lora()(on[file].clone())), with_lora)
        yield f"the one that was cloned, {file}", far(sample(on[file]), expected[file])


def left_behind() -> Iterator[tuple[str, float]]:
    """What is still there after sampling; all of it is to be nothing."""
    from crdiff_export.sampling.comfyui.patch import KEY, PatchedLayer, PoaPatch
    from crdiff_export.sampling.poa.masks import MaskPart, ReplacedWeights

    def masks_alive() -> int:
        gc.collect()
        return sum(type(found) in (MaskPart, ReplacedWeights) for found in gc.get_objects())

    for with_lora in (plain, lora()):
        for file in (BAKED, *MASKS):
            name = f"{file}{', lora' if with_lora is not plain else ''}"
            others, model = masks_alive(), load(dtype=torch.float16)
            own = {key: weight.clone() for key, weight in model.model.state_dict().items()}
            on = poa(with_lora(model), file)
            wrapper: PoaPatch = next(iter(on.wrappers["outer_sample"][KEY])).__self__
            parts = [part for every in wrapper._parts.values() for part in every]
            held, masked = sum(part.extra_bytes for part in parts), file != BAKED
            during: list[tuple[int, int]] = []

            def look(*_: Any, parts: Any = parts, during: Any = during) -> None:
                during.append((sum(part.extra_bytes for part in parts), masks_alive()))

            sample(on, callback=look)
            assert len(during) == len(GIVEN["sigmas"]) - 1
            yield f"{name}: copies of its masks", float(during[-1][1] - others - masked * len(parts))
            # Of moved weights in fp16 a copy is in the computation's float32.
            grown = 2 * held if file == MASKS[2] else 0
            yield f"{name}: more memory than it should", float(during[-1][0] - held - grown)
            yield f"{name}: memory held after sampling", float(sum(part.extra_bytes for part in parts) - held)
            yield f"{name}: weights changed while loaded", changed(model, own) if with_lora is plain else 0.0
            sample(model)
            layers = [
                f for m in model.model.modules() for f in getattr(m, "weight_function", ()) if type(f) is PatchedLayer
            ]
            yield f"{name}: functions on the weights", float(len(layers))
            yield f"{name}: weights changed", changed(model, own)
            yield f"{name}: still pruned", float(vars(model.model)[KEY].pruned)
            del on, wrapper, parts, look, layers
            yield f"{name}: masks alive", float(masks_alive() - others)


def changed(model: Any, own: dict[str, Any]) -> float:
    found = model.model.state_dict()
    assert found.keys() == own.keys()
    return float(sum(not torch.equal(found[key].view(torch.uint8), own[key].view(torch.uint8)) for key in own))


def dtypes() -> Iterator[tuple[str, float]]:
    """A model loaded in fewer bits is pruned as those bits rank: what rounds to the threshold goes."""
    with safetensors.safe_open(folder_paths.get_full_path_or_raise("checkpoints", BAKED), "pt") as file:
        header = file.metadata()
    for dtype in DTYPES:
        pruned = load(dtype=dtype)
        for key, weight in pruned.model.diffusion_model.named_parameters():
            group = {"input": "down", "middl": "mid", "outpu": "up"}.get(key[:5])
            if group and key.endswith(".weight") and (".attn1." in key or ".ff." in key):
                assert weight.dtype == dtype
                threshold = torch.tensor(float.fromhex(header[f"crdiff.threshold.{group}"])).to(dtype).double()
                weight.data = torch.where(weight.double().abs() <= threshold, 0, weight.double()).to(dtype)
        yield from in_fewer_bits(dtype, BAKED, pruned)


def masks_in_fewer_bits() -> Iterator[tuple[str, float]]:
    """What a mask takes out is the same in every dtype; moved weights are rounded like the model's own."""
    for dtype in DTYPES:
        for file in MASKS:
            yield from in_fewer_bits(dtype, file, load(file, dtype=dtype))


def in_fewer_bits(dtype: Any, file: str, pruned: Any) -> Iterator[tuple[str, float]]:
    name = f"{str(dtype).removeprefix('torch.')}{'' if file == BAKED else f' {file}'}"
    yield f"{name} w=1", far(sample(poa(load(dtype=dtype), file, weight=1)), sample(pruned))
    yield f"{name} mixed", far(sample(poa(load(dtype=dtype), file)), sample(mixed(load(dtype=dtype), pruned, always)))
    model, dense, other = lora()(load(dtype=dtype)), lora()(load(dtype=dtype)), lora()(pruned)
    yield f"{name} lora, mixed, rounded", far(sample(poa(model, file)), sample(mixed(dense, other, always)))
    with little_memory():
        expected = sample(mixed(dense, other, always))
        yield f"{name} lora, mixed, little memory", far(sample(poa(model, file)), expected)


class Buffer:
    """Stands for a buffer of pinned memory, which only a GPU has."""

    def __init__(self, *_: Any) -> None:
        self.size = 0


@contextlib.contextmanager
def dynamic_memory() -> Iterator[None]:
    """Has ComfyUI load models with dynamic VRAM, its way on a GPU: small layers for good, others for each call."""
    import comfy.model_patcher as patchers
    import comfy_aimdo.host_buffer

    class Dynamic(patchers.ModelPatcherDynamic):  # type: ignore[misc]
        def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:
            return object.__new__(cls)  # ComfyUI's own goes back to the usual patcher on a CPU

        def partially_unload(self, *_args: Any, **_kwargs: Any) -> Any:
            return self.restore_loaded_backups()  # all that is loaded where no memory is a GPU's

    before = patchers.CoreModelPatcher, comfy_aimdo.host_buffer.HostBuffer
    management.unload_all_models()
    patchers.CoreModelPatcher, comfy_aimdo.host_buffer.HostBuffer = Dynamic, Buffer
    try:
        yield
    finally:
        management.unload_all_models()
        patchers.CoreModelPatcher, comfy_aimdo.host_buffer.HostBuffer = before


def dynamically(file: str) -> Iterator[tuple[str, float]]:
    """Every pruned layer is pruned in every step, those that get no functions from ComfyUI as well.

    Without a LoRA: on a CPU such a ComfyUI leaves it out of large layers, whoever samples.
    """
    dense, pruned = load(), load(file)
    expected = {"mixed": sample(mixed(dense, pruned, always)), "w=1": sample(pruned), "off again": sample(dense)}
    with dynamic_memory():
        model = load()
        assert model.is_dynamic()
        for turn in ("first", "second"):
            label = f"dynamic memory, {file}, {turn}"
            yield f"{label}, mixed", far(sample(poa(model, file)), expected["mixed"])
            yield f"{label}, w=1", far(sample(poa(model, file, weight=1)), expected["w=1"])
            yield f"{label}, off again", far(sample(model), expected["off again"])
        left = [module for module in model.model.modules() if getattr(module, "weight_function", None)]
        yield f"dynamic memory, {file}, functions left behind", float(len(left))


def errors() -> Iterator[tuple[str, str]]:
    yield "pruned model", said(lambda: poa(load(BAKED)))
    yield "other model", said(lambda: poa(load(OTHER)))
    yield "none fits", said(lambda: poa(load(OTHER), FOUND))
    yield "pruned model, found", said(lambda: poa(load(BAKED), FOUND))
    again = WORK / "checkpoints" / "again.safetensors"
    again.write_bytes(again.with_name(BAKED).read_bytes())
    yield "two fit", said(lambda: poa(load(), FOUND))
    again.unlink()
    yield "not baked", said(lambda: poa(load(), DENSE))
    yield "no file", said(lambda: poa(load(), "gone.safetensors"))
    yield "bad start", said(lambda: poa(load(), start=0.5, stop=0.5))
    model = poa(load())
    options = {"wrappers": model.wrappers}
    management.load_models_gpu([model])
    yield (
        "no guider",
        said(
            lambda: model.model.apply_model(
                GIVEN["noise"], GIVEN["sigmas"][:1], c_crossattn=GIVEN["cond"], transformer_options=options
            )
        ),
    )


def mask_errors() -> Iterator[tuple[str, str]]:
    for file in (*MASKS, EMBEDDED):
        for what, loaded in {"pruned model": file, "other model": OTHER, "pruned by magnitude": BAKED}.items():
            yield f"{file}, {what}", said(partial(poa, load(loaded), file))
    yield "several fit", said(lambda: poa(load(), FOUND))


def info() -> Iterator[tuple[str, Any]]:
    yield "choices", nodes.NODE_CLASS_MAPPINGS["CrdiffPoa"].INPUT_TYPES()["required"]["checkpoint"][0]
    yield "info", nodes.NODE_CLASS_MAPPINGS["CrdiffInfo"]().show(BAKED)["result"][0]


def scaled_fp8() -> Iterator[tuple[str, Any]]:
    """Codes with a scale, against two models of the same numbers in float32."""
    model, dense, pruned = load(SCALED), load(f"wide-{SCALED}"), load(f"wide-baked-{SCALED}")
    file = f"baked-{SCALED}"
    expected = sample(mixed(dense, pruned, always))
    yield "scaled fp8, mixed", far(sample(poa(model, file)), expected)
    yield "scaled fp8, found", far(sample(poa(model, FOUND)), expected)
    yield "scaled fp8, w=1", far(sample(poa(model, file, weight=1)), sample(pruned))
    with_lora = sample(mixed(lora()(dense), lora()(pruned), always))
    yield "scaled fp8, lora", far(sample(poa(lora()(model), file)), with_lora)
    yield "scaled fp8, lora after", far(sample(lora()(poa(model, file))), with_lora)
    yield "scaled fp8 moves the result", far(sample(poa(model, file)), sample(dense))
    yield "scaled fp8, pruned model", said(lambda: poa(load(file), file))
    yield "scaled fp8, other model", said(lambda: poa(load(), file))


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {"loaded": asyncio.run(nodes.load_custom_node(str(WORK / "custom_nodes" / "crdiff")))}
    extras = COMFYUI / "comfy_extras" / "nodes_pag.py"
    results["extras"] = asyncio.run(nodes.load_custom_node(str(extras), module_parent="comfy_extras"))
    with torch.inference_mode():
        results |= alone()
        results |= against_two_models("", plain)
        results |= against_two_models("lora, ", lora())
        results |= dtypes()
        with little_memory():
            results |= against_two_models("little memory, ", plain)
            results |= against_two_models("little memory, lora, ", lora())
        dynamic = hasattr(comfy.model_patcher, "ModelPatcherDynamic")
        if dynamic:
            results |= dynamically(BAKED)
        results |= errors()
        folder_paths.add_model_folder_path("checkpoints", str(WORK / "packs"))
        results |= packs()
        if dynamic:
            results |= packs_dynamically()
        folder_paths.folder_names_and_paths["checkpoints"][0].remove(str(WORK / "packs"))
        results |= info()
        if hasattr(comfy.ops, "mixed_precision_ops"):
            folder_paths.add_model_folder_path("checkpoints", str(WORK / "scaled"))
            results |= scaled_fp8()
        # From here on there are several that fit.
        folder_paths.add_model_folder_path("checkpoints", str(WORK / "masks"))
        results |= masks()
        for file in MASKS:
            if dynamic:
                results |= dynamically(file)
            results |= against_two_models(f"{file}, ", plain, file)
            results |= against_two_models(f"{file}, lora, ", lora(), file)
            with little_memory():
                results |= against_two_models(f"little memory, {file}, ", plain, file)
                results |= against_two_models(f"little memory, {file}, lora, ", lora(), file)
        results |= masks_in_fewer_bits()
        results |= graph()
        results |= left_behind()
        results |= mask_errors()
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
