"""POA in company: schedules, LoRA, offloading, other dtypes and layouts, compilation; and what it refuses."""

import copy
import gc
import math
import pickle
import shutil
import weakref
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import safetensors.torch
import torch
from torch import nn

from crdiff_export import CrdiffError, ExportRequest, Size, export
from crdiff_export.errors import CheckpointError, PoaError, VerifyError
from crdiff_export.sampling import poa
from tests.support import makers
from tests.support.accelerators import accelerator, on_an_accelerator
from tests.support.tiny_pipelines import (
    KINDS,
    PIXELS,
    pooled_inputs,
    sd15,
    sd_pipe,
    sdxl_unet,
    vae,
)

W = 1.7
SD15 = KINDS["sd15"]
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's base, and what an export makes of it, in fp32 and in fp16."""
    folder = tmp_path_factory.mktemp("base")
    base = SD15.save(SD15.make(), folder)
    for name, dtype in (("baked", None), ("half", "fp16")):
        export(ExportRequest(str(base), Size(512, 512), folder / f"{name}.safetensors", ratio=0.4, dtype=dtype))
    return folder


@pytest.fixture
def baked(folder: Path) -> Path:
    return folder / "baked.safetensors"


@pytest.fixture
def pipe() -> Any:
    return SD15.make()


@pytest.fixture
def expected(baked: Path) -> torch.Tensor:
    return run_with(SD15.make(), baked)


def run_with(pipe: Any, source: Any, weight: Any = W, **options: Any) -> torch.Tensor:
    with poa.enabled(pipe, source, weight, **options):
        return SD15.run(pipe)


def other(baked: Path) -> Any:
    """A pipeline with the file's own weights."""
    pipe = SD15.make()
    pipe.unet.load_state_dict(safetensors.torch.load_file(baked))
    return pipe


# Sources.


def test_without_a_weight_it_is_the_files_own(pipe: Any, baked: Path, folder: Path) -> None:
    request = ExportRequest(str(folder / "diffusion_pytorch_model.safetensors"), Size(512, 512), ratio=0.4)
    request = ExportRequest(request.base, request.size, folder / "two.safetensors", ratio=0.4, poa_weight=2.25)
    export(request)
    assert poa.from_baked(folder / "two.safetensors").weight == 2.25
    assert torch.equal(run_with(pipe, folder / "two.safetensors", None), run_with(pipe, baked, 2.25))


def test_a_recipe_and_the_base_are_enough(pipe: Any, folder: Path, expected: torch.Tensor) -> None:
    base = folder / "diffusion_pytorch_model.safetensors"
    source = poa.from_recipe(ExportRequest(str(base), Size(512, 512), ratio=0.4))
    assert torch.equal(run_with(pipe, source), expected)


def test_a_base_is_known_by_its_hash(pipe: Any, baked: Path, folder: Path, expected: torch.Tensor) -> None:
    base = folder / "diffusion_pytorch_model.safetensors"
    assert torch.equal(run_with(pipe, poa.from_baked(baked, str(base))), expected)


def with_residual(folder: Path, tmp_path: Path, dtype: torch.dtype) -> Path:
    """A baked file of the base in `dtype`, and its residual beside it."""
    weights = safetensors.torch.load_file(folder / "diffusion_pytorch_model.safetensors")
    base = tmp_path / "base.safetensors"
    safetensors.torch.save_file({name: weight.to(dtype) for name, weight in weights.items()}, base)
    request = ExportRequest(str(base), Size(512, 512), tmp_path / "kept.safetensors", ratio=0.4, residual="sidecar")
    return export(request).written.path


@pytest.mark.parametrize("loaded", [torch.float16, torch.float32])
def test_the_file_and_its_residual_are_enough(loaded: torch.dtype, folder: Path, tmp_path: Path) -> None:
    """The pruned weights in memory become the dense ones, and again what they were."""
    kept = with_residual(folder, tmp_path, torch.float16)
    pipe, dense = other(kept), SD15.make()
    dense.unet.load_state_dict(safetensors.torch.load_file(tmp_path / "base.safetensors"))
    dense.unet.to(loaded)
    pipe.unet.to(loaded)
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    inputs = (torch.randn(1, 4, 8, 8).to(loaded), 500, torch.randn(1, 5, 768).to(loaded))
    with torch.no_grad():
        for weight in (0, 1, W):
            with poa.enabled(dense, kept, weight):
                expected = dense.unet(*inputs)[0]
            with poa.enabled(pipe, kept, weight):
                assert torch.equal(pipe.unet(*inputs)[0], expected)
    after = pipe.unet.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_fewer_bits_than_the_residual_has(folder: Path, tmp_path: Path) -> None:
    kept = with_residual(folder, tmp_path, torch.float32)
    pipe = other(kept)
    pipe.unet.to(torch.bfloat16)
    error = refusal(pipe, kept)
    assert "the residual of" in error.message
    assert "Load it in the file's own dtype" in error.hint


def test_a_residual_that_was_altered(folder: Path, tmp_path: Path) -> None:
    kept = with_residual(folder, tmp_path, torch.float16)
    with kept.with_suffix(".crdiff-residual").open("r+b") as file:
        file.seek(-1000, 2)
        file.write(b"\x11\x12")
    pipe = other(kept)
    pipe.unet.half()
    assert isinstance(refusal(pipe, kept), VerifyError)


# When: schedules.


def test_it_starts_and_stops(pipe: Any, baked: Path) -> None:
    """With the weight as a function of the fraction, which is asked at each step and only there."""
    asked: list[float] = []

    def weight(fraction: float) -> float:
        asked.append(fraction)
        return W if 0.25 <= fraction < 0.75 else 0.0

    with poa.enabled(pipe, baked, weight):
        by_function = SD15.run(pipe, num_inference_steps=8)
    assert asked == [step / 8 for step in range(8)]
    calls: list[int] = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    with poa.enabled(pipe, baked, W, start=0.25, stop=0.75):
        by_bounds = SD15.run(pipe, num_inference_steps=8)
    handle.remove()
    assert torch.equal(by_function, by_bounds)
    assert len(calls) == 8 + 4


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux", "img2img"])
@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_every_scheduler_tells_the_step(kind: str, tmp_path: Path) -> None:
    pipe = KINDS[kind].make()
    base = KINDS[kind].save(pipe, tmp_path)
    asked: list[float] = []

    def weight(fraction: float) -> float:
        asked.append(fraction)
        return W

    source = poa.from_recipe(ExportRequest(str(base), Size(512, 512), ratio=0.4))
    with poa.enabled(pipe, source, weight):
        KINDS[kind].run(pipe, num_inference_steps=5)
    passes = 2 if kind == "flux" else 1  # its true guidance calls the model for either prompt
    assert asked == [step / 5 for step in range(5) for _ in range(passes)]


def test_part_of_the_noise_is_a_later_part_of_sampling(baked: Path) -> None:
    kind = KINDS["img2img"]
    asked: list[float] = []

    def weight(fraction: float) -> float:
        asked.append(fraction)
        return W

    pipe = kind.make()
    with poa.enabled(pipe, baked, weight):
        kind.run(pipe, num_inference_steps=10, strength=0.3)
    assert asked == [0.7, 0.8, 0.9]


def test_the_schedule_may_change_between_images(pipe: Any, baked: Path, expected: torch.Tensor) -> None:
    handle = poa.enable(pipe, baked, 0.5)
    first = SD15.run(pipe)
    handle.schedule = poa.Schedule(W)
    assert torch.equal(SD15.run(pipe), expected)
    assert not torch.equal(first, expected)


# In company.


@pytest.mark.parametrize("first", ["poa", "compile"])
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]  # its place is what counts here, not its graphs
def test_a_compiled_model_in_place_of_the_model(first: str, pipe: Any, baked: Path, expected: torch.Tensor) -> None:
    plain = SD15.run(pipe)
    if first == "poa":
        poa.enable(pipe, baked, W)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    if first == "compile":
        poa.enable(pipe, baked, W)
    assert torch.allclose(SD15.run(pipe), expected, atol=1e-4)
    poa.disable(pipe)
    assert not hasattr(pipe.unet, "crdiff_poa")
    assert torch.allclose(SD15.run(pipe), plain, atol=1e-4)


def test_inference_mode_and_then_not(pipe: Any, baked: Path, expected: torch.Tensor) -> None:
    poa.enable(pipe, baked, W)
    with torch.inference_mode():
        first = SD15.run(pipe)
    assert torch.equal(first, expected)
    assert torch.equal(SD15.run(pipe), expected)


def test_gradients_are_those_of_two_models(pipe: Any, baked: Path) -> None:
    """The pruned pass has one for the weights that stay."""
    twin, inputs = other(baked).unet, (torch.randn(1, 4, 8, 8), 500, torch.randn(1, 5, 768))
    weight, twins = pipe.unet.get_submodule(LAYER).weight, twin.get_submodule(LAYER).weight
    with poa.enabled(pipe, baked, W):
        pipe.unet(*inputs)[0].square().sum().backward()
    found, weight.grad = weight.grad.clone(), None
    ((1 - W) * pipe.unet(*inputs)[0] + W * twin(*inputs)[0]).square().sum().backward()
    assert torch.allclose(found, weight.grad + (twins != 0) * twins.grad, rtol=1e-3, atol=1e-4)


def test_lists_that_the_model_empties(pipe: Any, baked: Path) -> None:
    """A T2I-Adapter's features, which the model takes out of their list."""
    twin, inputs = other(baked).unet, (torch.randn(1, 4, 8, 8), 500, torch.randn(1, 5, 768))
    features = [torch.randn(1, 8, size, size) for size in (8, 4, 2, 1)]

    def predict(model: Any) -> torch.Tensor:
        found: torch.Tensor = model(*inputs, down_intrablock_additional_residuals=list(features))[0]
        return found

    with torch.no_grad():
        expected = (1 - W) * predict(pipe.unet) + W * predict(twin)
        with poa.enabled(pipe, baked, W):
            assert torch.equal(predict(pipe.unet), expected)
        with poa.enabled(pipe, baked, W, mode="batched"):
            assert torch.allclose(predict(pipe.unet), expected, atol=1e-4)


def test_an_argument_that_nobody_knows_takes_two_passes(pipe: Any, baked: Path) -> None:
    inputs, calls = (torch.randn(1, 4, 8, 8), 500, torch.randn(1, 5, 768)), [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    pipe.unet.conv_in.register_forward_hook(count)
    with poa.enabled(pipe, baked, W, mode="batched"), torch.no_grad():
        pipe.unet(*inputs)
        assert calls == [1]
        pipe.unet(*inputs, cross_attention_kwargs={"mystery": torch.zeros(1)})
        assert calls == [3]


def test_the_second_pass_fails(pipe: Any, baked: Path) -> None:
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError

    poa.enable(pipe, baked, W)
    hook = pipe.unet.mid_block.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        SD15.run(pipe)
    hook.remove()
    layer, hidden = pipe.unet.get_submodule(LAYER), torch.randn(1, 3, 8)
    assert torch.equal(layer(hidden), nn.functional.linear(hidden, layer.weight))


def test_a_foreign_hook_stays_over_two_enablings(pipe: Any, baked: Path) -> None:
    calls: list[int] = []

    class Theirs(accelerate.hooks.ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return args, kwargs

    poa.enable(pipe, baked, W)
    layer = pipe.unet.get_submodule(LAYER)
    accelerate.hooks.add_hook_to_module(layer, Theirs())
    poa.disable(pipe)
    assert torch.equal(run_with(pipe, baked, 0.9), run_with(SD15.make(), baked, 0.9))
    calls.clear()
    assert torch.equal(SD15.run(pipe), SD15.run(SD15.make()))
    assert calls
    accelerate.hooks.remove_hook_from_module(layer)
    assert torch.equal(run_with(pipe, baked, 0.9), run_with(SD15.make(), baked, 0.9))
    assert "forward" not in vars(layer)


def test_a_model_does_not_keep_its_pipeline(baked: Path) -> None:
    pipe = SD15.make()
    autoencoder, model = weakref.ref(pipe.vae), pipe.unet
    poa.enable(pipe, baked, W)
    del pipe
    gc.collect()
    assert autoencoder() is None
    poa.disable(model)


def test_a_block_in_a_block(pipe: Any, baked: Path, expected: torch.Tensor) -> None:
    plain = SD15.run(pipe)
    with poa.enabled(pipe, baked, 0.5):
        with poa.enabled(pipe, baked, W):
            assert torch.equal(SD15.run(pipe), expected)
        assert torch.equal(SD15.run(pipe), plain)
    assert torch.equal(SD15.run(pipe), plain)


def test_a_residual_cannot_be_taken_out_of_weights_that_are_elsewhere(folder: Path, tmp_path: Path) -> None:
    kept = with_residual(folder, tmp_path, torch.float32)
    pipe = other(kept)
    poa.enable(pipe, kept, W)
    accelerate.cpu_offload(pipe.unet, "cpu")
    with pytest.raises(PoaError, match="offloaded, layer by layer"):
        poa.disable(pipe)
    assert hasattr(pipe.unet, "crdiff_poa")


def test_shards_are_known_by_all_of_their_hashes(tmp_path: Path) -> None:
    unet = SD15.make().unet
    unet.save_pretrained(tmp_path / "base" / "unet", max_shard_size="400KB")
    export(ExportRequest(str(tmp_path / "base"), Size(512, 512), tmp_path / "baked", ratio=0.4))
    shards = sorted((tmp_path / "base" / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    with torch.no_grad():
        inputs = (torch.randn(1, 4, 8, 8), 500, torch.randn(1, 5, 768))
        plain = unet(*inputs)[0]
        with poa.enabled(unet, poa.from_baked(tmp_path / "baked", str(tmp_path / "base")), W):
            assert not torch.equal(unet(*inputs)[0], plain)
    with shards[-1].open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(PoaError, match="hashes to 0x"):
        poa.from_baked(tmp_path / "baked", str(tmp_path / "base"))
    other_shards = tmp_path / "other"
    unet.save_pretrained(other_shards / "unet", max_shard_size="200KB")
    with pytest.raises(PoaError, match=r"hashes to 0x|files of weights"):
        poa.from_baked(tmp_path / "baked", str(other_shards))


def test_it_holds_no_more_than_the_largest_pruned_layer(pipe: Any, baked: Path) -> None:
    handle = poa.enable(pipe, baked, W)
    assert handle.extra_bytes == 0
    SD15.run(pipe)
    largest = max(weight.nbytes for name, weight in pipe.unet.state_dict().items() if ".ff.net.0.proj.weight" in name)
    assert handle.extra_bytes == largest


def test_of_two_the_second_holds(pipe: Any, baked: Path, expected: torch.Tensor) -> None:
    plain = SD15.run(pipe)
    poa.enable(pipe, baked, 0.3)
    assert torch.equal(run_with(pipe, baked), expected)
    assert torch.equal(SD15.run(pipe), plain)


def test_a_block_ends_it_whatever_happens(pipe: Any, baked: Path) -> None:
    plain = SD15.run(pipe)
    with pytest.raises(ZeroDivisionError), poa.enabled(pipe, baked):
        raise ZeroDivisionError
    assert torch.equal(SD15.run(pipe), plain)
    poa.disable(pipe)


def test_a_pass_that_fails_leaves_the_dense_model(pipe: Any, baked: Path) -> None:
    plain = SD15.run(pipe)
    poa.enable(pipe, baked, 1)
    block = pipe.unet.mid_block.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        SD15.run(pipe)
    block.remove()
    layer = pipe.unet.get_submodule(LAYER)
    hidden = torch.randn(1, 3, 8)
    assert torch.equal(layer(hidden), nn.functional.linear(hidden, layer.weight))
    poa.disable(pipe)
    assert torch.equal(SD15.run(pipe), plain)


def test_the_model_alone_will_do(pipe: Any, baked: Path, expected: torch.Tensor) -> None:
    poa.enable(pipe.unet, baked, W)
    assert torch.equal(SD15.run(pipe), expected)
    poa.disable(pipe.unet)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_mask_is_that_of_a_cast_export(dtype: torch.dtype, folder: Path, pipe: Any) -> None:
    """Weights that round to the threshold go, as in an export with --dtype; the mix is rounded once."""
    base, name = folder / "diffusion_pytorch_model.safetensors", {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    cast = export(
        ExportRequest(str(base), Size(512, 512), folder / f"cast-{name}.safetensors", ratio=0.4, dtype=name)
    ).written.path
    pipe.unet.to(dtype)
    pruned = copy.deepcopy(pipe.unet)
    pruned.load_state_dict(safetensors.torch.load_file(cast))
    inputs = (torch.randn(2, 4, 8, 8).to(dtype), 500, torch.randn(2, 5, 768).to(dtype))
    with torch.no_grad():
        ours, theirs = pipe.unet(*inputs)[0], pruned(*inputs)[0]
        for source in (folder / "baked.safetensors", cast):
            with poa.enabled(pipe, source, 1):
                assert torch.equal(pipe.unet(*inputs)[0], theirs)
            with poa.enabled(pipe, source, W):
                found = pipe.unet(*inputs)[0]
            assert found.dtype == dtype
            assert torch.equal(found, ((1 - W) * ours.float() + W * theirs.float()).to(dtype))


def test_a_file_that_was_cast_prunes_the_uncast_base_alike(folder: Path, pipe: Any) -> None:
    """In memory fp32, in the file fp16: those go whose fp16 is zero in the file."""
    poa.enable(pipe, folder / "half.safetensors", 1)
    weights = safetensors.torch.load_file(folder / "half.safetensors")
    layer = pipe.unet.get_submodule(LAYER)
    cut = layer._diffusers_hook.get_hook("crdiff_poa").part
    pruned = nn.functional.hardshrink(layer.weight, cut.limit(torch.float32))
    assert torch.equal(pruned == 0, weights[f"{LAYER}.weight"] == 0)
    assert (pruned == 0).sum() > 0


def test_a_model_may_be_cast_later(pipe: Any, baked: Path) -> None:
    poa.enable(pipe, baked, W)
    pipe.unet.to(torch.bfloat16)
    inputs = (torch.randn(1, 4, 8, 8).bfloat16(), 500, torch.randn(1, 5, 768).bfloat16())
    with torch.no_grad():
        found = pipe.unet(*inputs)[0]
        poa.enable(pipe, baked, W)
        assert torch.equal(pipe.unet(*inputs)[0], found)


def test_channels_last(pipe: Any, baked: Path) -> None:
    pipe.unet.to(memory_format=torch.channels_last)
    dense, pruned = SD15.run(pipe), run_with(pipe, baked, 1)
    pruned_pipe = other(baked)
    pruned_pipe.unet.to(memory_format=torch.channels_last)
    assert torch.equal(pruned, SD15.run(pruned_pipe))
    assert torch.equal(SD15.run(pipe), dense)


def lora(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer in (
        LAYER,
        LAYER.replace("to_q", "to_out.0"),
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    ):
        rows = 64 if "ff" in layer else 8
        made[f"unet.{layer}.lora_A.weight"] = torch.randn(2, 8, generator=generator)
        made[f"unet.{layer}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    return made


@pytest.mark.parametrize("first", ["poa", "lora"])
def test_a_lora_is_added_to_the_pruned_base(first: str, pipe: Any, baked: Path) -> None:
    """The mask is that of the published weights, not of the sum: nothing of a LoRA is pruned."""
    pruned = other(baked)
    pruned.load_lora_weights(lora())
    if first == "poa":
        poa.enable(pipe, baked, 1)
    pipe.load_lora_weights(lora())
    poa_of = poa.enable(pipe, baked, 1) if first == "lora" else pipe.unet.crdiff_poa
    with_lora = SD15.run(pipe)
    assert torch.equal(with_lora, SD15.run(pruned))
    poa_of.schedule = poa.Schedule(W)
    model = pipe.unet
    found = SD15.run(pipe)
    poa.disable(pipe)
    dense = type(model).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return ((1 - W) * dense(model, *args, **kwargs)[0] + W * dense(pruned.unet, *args, **kwargs)[0],)

    model.forward = forward
    assert torch.equal(found, SD15.run(pipe))
    del model.forward
    pipe.unload_lora_weights()
    assert torch.equal(SD15.run(pipe), SD15.run(SD15.make()))


@pytest.mark.parametrize("first", ["poa", "offload"])
def test_model_offloading(first: str, pipe: Any, baked: Path, expected: torch.Tensor) -> None:
    def offload() -> None:
        accelerate.cpu_offload_with_hook(pipe.unet, "cpu")

    if first == "offload":
        offload()
    poa.enable(pipe, baked, W)
    if first == "poa":
        offload()
    assert torch.equal(SD15.run(pipe), expected)
    poa.disable(pipe)
    assert torch.equal(SD15.run(pipe), SD15.run(SD15.make()))
    assert hasattr(pipe.unet, "_hf_hook")


def test_sequential_offloading(pipe: Any, baked: Path) -> None:
    """Layer by layer, from weights that are nowhere between two calls."""
    inputs = (torch.randn(1, 4, 8, 8), 500, torch.randn(1, 5, 768))
    with torch.no_grad():
        dense = pipe.unet(*inputs)[0]
        poa.enable(pipe, baked, W)
        expected = pipe.unet(*inputs)[0]
        accelerate.cpu_offload(pipe.unet, "cpu")
        assert pipe.unet.get_submodule(LAYER).weight.is_meta
        assert torch.equal(pipe.unet(*inputs)[0], expected)
        poa.disable(pipe)
        assert torch.equal(pipe.unet(*inputs)[0], dense)


def test_group_offloading(pipe: Any, baked: Path, expected: torch.Tensor) -> None:
    poa.enable(pipe, baked, W)
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")
    assert torch.equal(SD15.run(pipe), expected)


@pytest.mark.parametrize(
    "whole", [pytest.param(True, marks=pytest.mark.slow), False], ids=["the whole model", "one block"]
)
def test_compiled(whole: bool, pipe: Any, baked: Path, expected: torch.Tensor) -> None:
    """The graphs of dense and pruned layers are two; nothing is traced again at the next image."""
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    poa.enable(pipe, baked, W)
    part = pipe.unet if whole else pipe.unet.get_submodule(LAYER.removesuffix(".attn1.to_q"))
    part.compile(backend=backend)
    assert torch.allclose(SD15.run(pipe), expected, atol=1e-4)
    once = len(graphs)
    assert once > 0
    assert torch.allclose(SD15.run(pipe), expected, atol=1e-4)
    assert len(graphs) == once
    torch._dynamo.reset()


def test_a_modular_pipeline(tmp_path: Path) -> None:
    """Its guider calls the model for one prompt after the other; the mix commutes with what it makes of them."""
    blocks = diffusers.StableDiffusionXLAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe.update_components(unet=sdxl_unet(), vae=vae(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        sizes = {"height": PIXELS, "width": PIXELS, "num_inference_steps": 2}
        found: torch.Tensor = pipe(**pooled_inputs(2048, 1), **sizes, output="latents", generator=generator)
        return found

    plain = run()
    pipe.unet.save_pretrained(tmp_path)
    base = tmp_path / "diffusion_pytorch_model.safetensors"
    baked = export(ExportRequest(str(base), Size(512, 512), tmp_path / "baked.safetensors", ratio=0.4)).written.path
    pruned = copy.deepcopy(pipe.unet)
    pruned.load_state_dict(safetensors.torch.load_file(baked))
    with poa.enabled(pipe, baked, W):
        found = run()
    model, dense = pipe.unet, type(pipe.unet).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return ((1 - W) * dense(model, *args, **kwargs)[0] + W * dense(pruned, *args, **kwargs)[0],)

    model.forward = forward
    assert torch.equal(found, run())
    del model.forward
    assert torch.equal(run(), plain)


@on_an_accelerator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_an_accelerator(dtype: torch.dtype, pipe: Any, folder: Path) -> None:
    name = "baked.safetensors" if dtype == torch.float32 else "half.safetensors"
    pruned = other(folder / name)
    for model in (pipe.unet, pruned.unet):
        model.to(accelerator(), dtype)
    noise, text = (torch.randn(shape).to(accelerator(), dtype) for shape in ((2, 4, 8, 8), (2, 5, 768)))
    inputs = (noise, 500, text)
    with torch.no_grad():
        ours, theirs = pipe.unet(*inputs)[0].float(), pruned.unet(*inputs)[0].float()
        for mode in ("sequential", "batched"):
            with poa.enabled(pipe, folder / name, W, mode=mode):
                found = pipe.unet(*inputs)[0]
            tolerance = 1e-4 if dtype == torch.float32 else 1e-2
            assert torch.allclose(found.float(), (1 - W) * ours + W * theirs, atol=tolerance, rtol=tolerance)
        with poa.enabled(pipe, folder / name, 0):
            assert torch.equal(pipe.unet(*inputs)[0].float(), ours)


# Refusals.


def refusal(pipe: Any, source: Any, weight: Any = W, **options: Any) -> CrdiffError:
    before = copy.deepcopy(pipe.unet.state_dict()) if hasattr(pipe, "unet") else {}
    with pytest.raises(CrdiffError) as refused:
        poa.enable(pipe, source, weight, **options)
    after = pipe.unet.state_dict() if hasattr(pipe, "unet") else {}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not hasattr(getattr(pipe, "unet", pipe), "crdiff_poa")
    assert refused.value.hint
    return refused.value


@pytest.mark.parametrize("weight", [math.nan, math.inf, "2", True, None.__class__])
def test_a_weight_that_is_no_number(weight: Any, pipe: Any, baked: Path) -> None:
    assert "the POA weight is" in refusal(pipe, baked, weight).message if not callable(weight) else True


def test_a_function_that_gives_no_number(pipe: Any, baked: Path) -> None:
    poa.enable(pipe, baked, lambda _: math.nan)
    with pytest.raises(PoaError, match="the POA weight is nan"):
        SD15.run(pipe)


@pytest.mark.parametrize(("start", "stop"), [(0.5, 0.5), (-0.1, 1), (0, 1.1), (math.nan, 1)])
def test_a_part_of_sampling_that_is_none(start: float, stop: float, pipe: Any, baked: Path) -> None:
    assert "is no part of sampling" in refusal(pipe, baked, start=start, stop=stop).message


def test_a_mode_that_there_is_not(pipe: Any, baked: Path) -> None:
    assert refusal(pipe, baked, mode="fast").message == "there is no mode 'fast'"


def test_a_schedule_without_a_scheduler(pipe: Any, baked: Path) -> None:
    poa.enable(pipe.unet, baked, W, stop=0.5)
    with pytest.raises(PoaError, match="nothing tells which step"):
        SD15.run(pipe)


def test_a_file_without_our_header(pipe: Any, folder: Path) -> None:
    error = refusal(pipe, folder / "diffusion_pytorch_model.safetensors")
    assert isinstance(error, CheckpointError)
    assert "not made by crdiff" in error.message


def test_a_file_without_thresholds(pipe: Any, folder: Path) -> None:
    base = folder / "diffusion_pytorch_model.safetensors"
    export(ExportRequest(str(base), Size(512, 512), folder / "nothing.safetensors", ratio=0, force=True))
    assert "prunes nothing, as all of its ratios are 0" in refusal(pipe, folder / "nothing.safetensors").message


def test_a_file_that_is_not_there(pipe: Any, folder: Path) -> None:
    assert "no such file" in refusal(pipe, folder / "none.safetensors").message


def test_a_base_with_another_hash(folder: Path, baked: Path, tmp_path: Path) -> None:
    changed = tmp_path / "base.safetensors"
    shutil.copyfile(folder / "diffusion_pytorch_model.safetensors", changed)
    with changed.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(PoaError, match="hashes to 0x") as refused:
        poa.from_baked(baked, str(changed))
    assert "crdiff inspect" in refused.value.hint


def test_a_file_that_does_not_know_its_base(folder: Path, baked: Path) -> None:
    base = folder / "diffusion_pytorch_model.safetensors"
    export(ExportRequest(str(base), Size(512, 512), folder / "bare.safetensors", ratio=0.4, hashing=False, force=True))
    with pytest.raises(PoaError, match="no hash of its base"):
        poa.from_baked(folder / "bare.safetensors", str(base))


def test_a_recipe_with_a_cast(folder: Path) -> None:
    base = folder / "diffusion_pytorch_model.safetensors"
    with pytest.raises(PoaError, match="cast to fp16"):
        poa.from_recipe(ExportRequest(str(base), Size(512, 512), dtype="fp16"))


@pytest.mark.parametrize("kept", [True, False], ids=["a weight that stays", "one that goes"])
@pytest.mark.parametrize("form", ["baked", "recipe"])
def test_weights_of_another_model(form: str, kept: bool, pipe: Any, folder: Path, baked: Path) -> None:
    base = folder / "diffusion_pytorch_model.safetensors"
    request = ExportRequest(str(base), Size(512, 512), ratio=0.4)
    source = baked if form == "baked" else poa.from_recipe(request)
    weight = pipe.unet.get_submodule(LAYER).weight
    pruned = safetensors.torch.load_file(baked)[f"{LAYER}.weight"]
    place = (pruned != 0 if kept else pruned == 0).nonzero()[0]
    with torch.no_grad():
        weight[tuple(place)] += 1
    error = refusal(pipe, source)
    assert f"the weights of {LAYER} are not those of" in error.message


def test_weights_that_are_pruned_already(baked: Path) -> None:
    error = refusal(other(baked), baked)
    assert "holds the pruned weights already" in error.message
    assert "--residual embed" in error.hint


def test_weights_that_are_trusted(pipe: Any, baked: Path) -> None:
    """The file's threshold prunes the changed weights."""
    pruned = other(baked)
    changed, expected = (model.unet.get_submodule(LAYER).weight for model in (pipe, pruned))
    with torch.no_grad():
        changed += 1  # far above the threshold, so that all weights of this layer stay
        expected.copy_(changed)
    poa.enable(pipe, baked, 1, check=False)
    assert torch.equal(SD15.run(pipe), SD15.run(pruned))


def test_another_family(baked: Path) -> None:
    pipe = KINDS["sdxl"].make()
    error = refusal(pipe, baked)
    assert "UNet2DConditionModel has no layer down_blocks.0" in error.message
    assert "is of the family sd15" in error.message


def test_another_width(baked: Path) -> None:
    wide = sd_pipe(diffusers.StableDiffusionPipeline, sd15(block_out_channels=(16, 16, 16, 16)))
    assert "has 256 weights, that of" in refusal(wide, baked).message


def test_no_model_at_all(baked: Path) -> None:
    assert "has no UNet and no transformer" in refusal(object(), baked).message


def test_a_fused_lora(pipe: Any, baked: Path) -> None:
    pipe.load_lora_weights(lora())
    pipe.fuse_lora()
    error = refusal(pipe, baked)
    assert "a LoRA is fused into it" in error.message
    assert "unfuse_lora" in error.hint


def test_fused_projections(pipe: Any, baked: Path) -> None:
    pipe.unet.fuse_qkv_projections()
    assert "is fused with its neighbours" in refusal(pipe, baked).message


def test_weights_that_are_elsewhere(pipe: Any, baked: Path) -> None:
    accelerate.cpu_offload(pipe.unet, "cpu")
    with pytest.raises(PoaError, match="offloaded, layer by layer"):
        poa.enable(pipe, baked, W)


def test_a_cache(tmp_path: Path) -> None:
    kind = KINDS["flux"]
    pipe = kind.make()
    base = kind.save(pipe, tmp_path)
    poa.enable(pipe, poa.from_recipe(ExportRequest(str(base), Size(512, 512), ratio=0.4)), W)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(PoaError, match="has a cache on"):
        kind.run(pipe)


def test_a_layer_with_another_hook(pipe: Any, baked: Path) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(PoaError, match="unquantised"):
        poa.enable(pipe, baked, W)


def test_a_merged_file(pipe: Any, baked: Path, tmp_path: Path) -> None:
    """Another tool has averaged it with something, and kept the header."""
    tensors = safetensors.torch.load_file(baked)
    merged = {name: weight * 0.5 + torch.randn_like(weight) / 100 for name, weight in tensors.items()}
    safetensors.torch.save_file(merged, tmp_path / "merged.safetensors", makers.metadata_of(baked))
    error = refusal(pipe, tmp_path / "merged.safetensors")
    assert isinstance(error, VerifyError)
    assert "its bytes hash to 0x" in error.message


def test_a_file_that_was_altered_outside_of_what_is_pruned(pipe: Any, baked: Path, tmp_path: Path) -> None:
    """With w = 1 it would not be what the file gives."""
    tensors = safetensors.torch.load_file(baked)
    tensors[LAYER.replace("attn1", "attn2") + ".weight"] *= 0.5
    safetensors.torch.save_file(tensors, tmp_path / "altered.safetensors", makers.metadata_of(baked))
    assert "its bytes hash to 0x" in refusal(pipe, tmp_path / "altered.safetensors").message


def test_a_merged_file_without_a_hash(pipe: Any, baked: Path, tmp_path: Path) -> None:
    tensors = {name: weight * 0.5 for name, weight in safetensors.torch.load_file(baked).items()}
    metadata = {key: text for key, text in makers.metadata_of(baked).items() if "hash" not in key}
    safetensors.torch.save_file(tensors, tmp_path / "merged.safetensors", metadata)
    assert "are not those of" in refusal(pipe, tmp_path / "merged.safetensors").message


def test_halves_that_cannot_be_compared(pipe: Any, folder: Path) -> None:
    pipe.unet.to(torch.bfloat16)
    assert "was cast to F16, the model is in torch.bfloat16" in refusal(pipe, folder / "half.safetensors").message


@pytest.mark.parametrize("source", [None, 3, {}])
def test_a_source_that_is_none(source: Any, pipe: Any) -> None:
    assert "is no source for POA" in refusal(pipe, source).message


def test_a_handle_takes_no_other_values(pipe: Any, baked: Path) -> None:
    handle = poa.enable(pipe, baked, W)
    with pytest.raises(PoaError, match=r"1\.2 is no schedule"):
        handle.schedule = 1.2  # type: ignore[assignment]
    with pytest.raises(PoaError, match="there is no mode 'fast'"):
        handle.mode = "fast"


def test_what_is_refused_leaves_what_is_on(pipe: Any, baked: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    poa.enable(pipe, baked, W)
    kind = KINDS["sdxl"]
    other_base = kind.save(kind.make(), tmp_path)
    for wrong in (tmp_path / "none", poa.from_recipe(ExportRequest(str(other_base), Size(512, 512), ratio=0.4))):
        with pytest.raises(CrdiffError):
            poa.enable(pipe, wrong, 0.5)
    assert torch.equal(SD15.run(pipe), expected)


def test_a_copy(pipe: Any, baked: Path) -> None:
    poa.enable(pipe, baked, W)
    with pytest.raises(PoaError, match="cannot be copied or pickled"):
        copy.deepcopy(pipe.unet)
    with pytest.raises(PoaError, match="cannot be copied or pickled"):
        pickle.dumps(pipe.unet)


def test_a_layer_with_a_foreign_hook(pipe: Any, baked: Path) -> None:
    accelerate.hooks.add_hook_to_module(pipe.unet.get_submodule(LAYER), accelerate.hooks.ModelHook())
    assert "something else has a hook on it" in refusal(pipe, baked).message


def test_a_lora_that_is_fused_later(pipe: Any, baked: Path) -> None:
    poa.enable(pipe, baked, W)
    pipe.load_lora_weights(lora())
    SD15.run(pipe)
    pipe.fuse_lora()
    with pytest.raises(PoaError, match="a LoRA was fused"):
        SD15.run(pipe)


@pytest.mark.filterwarnings("ignore")
def test_a_batch_that_the_model_takes_apart(pipe: Any, baked: Path) -> None:
    """Perturbed-attention guidance gives a part of it to each layer."""
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    pag = diffusers.StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers=["up"])
    pag.set_progress_bar_config(disable=True)
    with poa.enabled(pag, baked, W, mode="batched"), pytest.raises(PoaError, match="takes its batch apart"):
        SD15.run(pag)
    plain, found = SD15.run(pag), run_with(pag, baked)
    assert found.isfinite().all()
    assert not torch.equal(found, plain)
