"""POA in company: schedules, LoRA, offloading, other dtypes and layouts, compilation."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import safetensors.torch
import torch
from torch import nn

from crdiff_export import ExportRequest, export
from crdiff_export.errors import PoaError
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.sampling import poa
from crdiff_export.sampling.poa.handle import Poa
from crdiff_export.sampling.poa.masks import prune
from tests.support.accelerators import accelerator, on_an_accelerator
from tests.support.messages import raises
from tests.support.poa_cases import LAYER, SD15, SIZE, Case, inputs, lora, sd15_with, two_models
from tests.support.tiny_pipelines import KINDS, PIXELS, pooled_inputs, sdxl_unet, vae

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' Euler with NumPy 2

W = 1.7
# A threshold for each layer, a bit for each weight, and moved weights.
CRITERIA = pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obs"])


@pytest.fixture(scope="module")
def expected(case: Case) -> torch.Tensor:
    return run_with(SD15.make(), case.baked())


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return SD15.run(SD15.make())


def run_with(pipe: Any, source: Any, weight: Any = W, **options: Any) -> torch.Tensor:
    with poa.enabled(pipe, source, weight, **options):
        return SD15.run(pipe)


# Sources.


def test_without_a_weight_it_is_the_files_own(pipe: Any, case: Case) -> None:
    file = case.baked(poa_weight=2.25)
    assert poa.from_baked(file).weight == 2.25
    assert torch.equal(run_with(pipe, file, None), run_with(pipe, case.baked(), 2.25))


def with_residual(case: Case, folder: Path, dtype: torch.dtype, criterion: str = "magnitude") -> Path:
    """A baked file of the base in `dtype`, and its residual beside it."""
    base = folder / "base.safetensors"
    weights = safetensors.torch.load_file(case.base)
    safetensors.torch.save_file({name: weight.to(dtype) for name, weight in weights.items()}, base)
    output = folder / "with_residual.safetensors"
    request = ExportRequest(str(base), SIZE, output, ratio=0.4, residual="sidecar", criterion=criterion)
    return export(request).written.path


@pytest.mark.parametrize(("loaded", "criterion"), [(torch.float16, "magnitude"), (torch.float32, "random")])
def test_the_file_and_its_residual_are_enough(loaded: torch.dtype, criterion: str, case: Case, tmp_path: Path) -> None:
    """The pruned weights in memory become the dense ones, and again what they were."""
    file = with_residual(case, tmp_path, torch.float16, criterion)
    pipe, dense = sd15_with(file), sd15_with(tmp_path / "base.safetensors")
    dense.unet.to(loaded)
    pipe.unet.to(loaded)
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    arguments = inputs(dtype=loaded)
    with torch.no_grad():
        for weight in (0, 1, W):
            with poa.enabled(dense, file, weight):
                expected = dense.unet(*arguments)[0]
            with poa.enabled(pipe, file, weight) as handle:
                assert handle.filled
                assert torch.equal(pipe.unet(*arguments)[0], expected)
    after = pipe.unet.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_residual_stays_in_weights_that_are_offloaded(case: Case, tmp_path: Path) -> None:
    file = with_residual(case, tmp_path, torch.float32)
    pipe = sd15_with(file)
    poa.enable(pipe, file, W)
    accelerate.cpu_offload(pipe.unet, "cpu")
    with pytest.raises(PoaError, match="offloaded, layer by layer"):
        poa.disable(pipe)
    assert hasattr(pipe.unet, "crdiff_poa")


def test_shards_are_known_by_all_of_their_hashes(tmp_path: Path) -> None:
    unet = SD15.make().unet
    unet.save_pretrained(tmp_path / "base" / "unet", max_shard_size="400KB")
    export(ExportRequest(str(tmp_path / "base"), SIZE, tmp_path / "baked", ratio=0.4))
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


def test_the_memory_of_a_source_is_freed_with_it(case: Case) -> None:
    plan = case.plan("wanda")
    source = poa.BaseRanking([plan], "base", criterion=CriterionChoice.of("wanda", case.calibration)).source(plan)
    with poa.enabled(case.pipe, source, W):
        SD15.run(case.pipe)
    part = source.masks.diffusers[f"{LAYER}.weight"][0]
    tensor = weakref.ref(part._tensor)  # type: ignore[union-attr]
    del source, part
    gc.collect()
    assert tensor() is None


def test_the_memory_that_a_handle_counts(case: Case) -> None:
    """A bit for each weight with masks, and room for one layer or for all of them."""
    weights = safetensors.torch.load_file(case.base)
    layers = [weights[name] for name in poa.from_baked(case.baked()).masks.diffusers]
    packed = sum(-(-layer.numel() // 8) for layer in layers)
    largest, every = max(layer.nbytes for layer in layers), sum(layer.nbytes for layer in layers)
    for criterion, keep, used in (
        ("magnitude", False, largest),
        ("magnitude", True, every),
        ("wanda", False, packed + largest),
        ("wanda", True, packed + every),
        ("obs", True, every),
    ):
        with poa.enabled(case.pipe, case.baked(criterion), W, keep=keep) as handle:
            assert criterion != "magnitude" or handle.extra_bytes == 0
            SD15.run(case.pipe)
            assert handle.extra_bytes == used


# When: schedules.


def weight_function(asked: list[float], stop: float = 1.0) -> Callable[[float], float]:
    """A weight that notes when it is asked for, and is 0 outside of [1 - stop, stop)."""

    def weight(fraction: float) -> float:
        asked.append(fraction)
        return W if 1 - stop <= fraction < stop else 0.0

    return weight


def test_it_starts_and_stops(pipe: Any, baked: Path) -> None:
    """With the weight as a function of the fraction, which is asked at each step and only there."""
    asked: list[float] = []
    with poa.enabled(pipe, baked, weight_function(asked, 0.75)):
        by_function = SD15.run(pipe, num_inference_steps=8)
    assert asked == [step / 8 for step in range(8)]
    calls: list[int] = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    with poa.enabled(pipe, baked, W, start=0.25, stop=0.75):
        by_bounds = SD15.run(pipe, num_inference_steps=8)
    handle.remove()
    assert torch.equal(by_function, by_bounds)
    assert len(calls) == 8 + 4


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sdxl", {}), ("sd3", {}), ("flux", {}), ("chroma", {}), ("qwen", {}), ("flux2", {}), ("img2img", {}),
        ("img2img", {"strength": 0.6}),
    ],
    ids=["sdxl", "sd3", "flux", "chroma", "qwen", "flux2", "img2img", "part of the noise is a later part of sampling"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
def test_every_scheduler_tells_the_step(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    pipe = KINDS[kind].make()
    base = KINDS[kind].save(pipe, tmp_path)
    asked: list[float] = []
    source = poa.from_recipe(ExportRequest(str(base), SIZE, ratio=0.4))
    with poa.enabled(pipe, source, weight_function(asked)):
        KINDS[kind].run(pipe, num_inference_steps=5, **options)
    passes = 2 if kind in ("flux", "chroma", "qwen") else 1  # true guidance calls the model for either prompt
    assert asked == [step / 5 for step in range(2 if options else 0, 5) for _ in range(passes)]


# In company.


@pytest.mark.parametrize(("weight", "criterion"), [(W, "magnitude"), (1, "wanda"), (W, "obs"), (1, "obs")])
def test_kept_weights_follow_the_model(weight: float, criterion: str, pipe: Any, case: Case) -> None:
    file = case.baked(criterion)
    poa.enable(pipe, file, weight, keep=True)
    first = SD15.run(pipe)
    with torch.no_grad():
        pipe.unet.get_submodule(LAYER).weight.mul_(-1)
    changed = SD15.run(pipe)
    poa.enable(pipe, file, weight, check=False)
    assert torch.equal(SD15.run(pipe), changed)
    assert torch.equal(changed, first) == (criterion == "obs" and weight == 1)


@pytest.mark.parametrize("first", ["poa", "compile"])
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]  # its place is what counts here, not its graphs
def test_a_compiled_model_in_place_of_the_model(
    first: str, pipe: Any, baked: Path, expected: torch.Tensor, plain: torch.Tensor
) -> None:
    if first == "poa":
        poa.enable(pipe, baked, W)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    if first == "compile":
        poa.enable(pipe, baked, W)
    assert torch.allclose(SD15.run(pipe), expected, atol=1e-4)
    poa.disable(pipe)
    assert not hasattr(pipe.unet, "crdiff_poa")
    assert torch.allclose(SD15.run(pipe), plain, atol=1e-4)


@CRITERIA
def test_inference_mode_and_then_gradients(criterion: str, pipe: Any, case: Case) -> None:
    poa.enable(pipe, case.baked(criterion), W)
    with torch.inference_mode():
        first = SD15.run(pipe)
    assert torch.equal(SD15.run(pipe), first)
    pipe.unet(*inputs())[0].sum().backward()
    assert pipe.unet.get_submodule(LAYER).weight.grad is not None


def test_gradients_are_those_of_two_models(pipe: Any, baked: Path) -> None:
    """The pruned pass has one for the weights that stay."""
    twin, arguments = sd15_with(baked).unet, inputs()
    weight, twins = pipe.unet.get_submodule(LAYER).weight, twin.get_submodule(LAYER).weight
    with poa.enabled(pipe, baked, W):
        pipe.unet(*arguments)[0].square().sum().backward()
    result, weight.grad = weight.grad.clone(), None
    ((1 - W) * pipe.unet(*arguments)[0] + W * twin(*arguments)[0]).square().sum().backward()
    assert torch.allclose(result, weight.grad + (twins != 0) * twins.grad, rtol=1e-3, atol=1e-4)


def test_lists_that_the_model_empties(pipe: Any, baked: Path) -> None:
    """A T2I-Adapter's features, which the model takes out of their list."""
    twin, arguments = sd15_with(baked).unet, inputs()
    features = [torch.randn(1, 8, size, size) for size in (8, 4, 2, 1)]

    def predict(model: Any) -> torch.Tensor:
        result: torch.Tensor = model(*arguments, down_intrablock_additional_residuals=list(features))[0]
        return result

    with torch.no_grad():
        expected = (1 - W) * predict(pipe.unet) + W * predict(twin)
        with poa.enabled(pipe, baked, W):
            assert torch.equal(predict(pipe.unet), expected)
        with poa.enabled(pipe, baked, W, mode="batched"):
            assert torch.allclose(predict(pipe.unet), expected, atol=1e-4)


def test_an_argument_that_nobody_knows_takes_two_passes(pipe: Any, baked: Path) -> None:
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    pipe.unet.conv_in.register_forward_hook(count)
    with poa.enabled(pipe, baked, W, mode="batched"), torch.no_grad():
        pipe.unet(*inputs())
        assert calls == [1]
        pipe.unet(*inputs(), cross_attention_kwargs={"mystery": torch.zeros(1)})
        assert calls == [3]


@pytest.mark.parametrize(("weight", "failing"), [(1, 1), (W, 2)], ids=["the only pass", "the second of two"])
def test_a_pass_that_fails_leaves_the_dense_model(
    weight: float, failing: int, pipe: Any, baked: Path, plain: torch.Tensor
) -> None:
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == failing:
            raise ZeroDivisionError

    poa.enable(pipe, baked, weight)
    hook = pipe.unet.mid_block.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        SD15.run(pipe)
    hook.remove()
    layer, hidden = pipe.unet.get_submodule(LAYER), torch.randn(1, 3, 8)
    assert torch.equal(layer(hidden), nn.functional.linear(hidden, layer.weight))
    poa.disable(pipe)
    assert torch.equal(SD15.run(pipe), plain)


def test_a_foreign_hook_stays_over_two_enablings(pipe: Any, baked: Path, plain: torch.Tensor) -> None:
    calls: list[int] = []
    expected = run_with(SD15.make(), baked, 0.9)

    class Theirs(accelerate.hooks.ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return args, kwargs

    poa.enable(pipe, baked, W)
    layer = pipe.unet.get_submodule(LAYER)
    accelerate.hooks.add_hook_to_module(layer, Theirs())
    poa.disable(pipe)
    assert torch.equal(run_with(pipe, baked, 0.9), expected)
    calls.clear()
    assert torch.equal(SD15.run(pipe), plain)
    assert calls
    accelerate.hooks.remove_hook_from_module(layer)
    assert torch.equal(run_with(pipe, baked, 0.9), expected)
    assert "forward" not in vars(layer)


def test_a_model_does_not_keep_its_pipeline(baked: Path) -> None:
    pipe = SD15.make()
    autoencoder, model = weakref.ref(pipe.vae), pipe.unet
    poa.enable(pipe, baked, W)
    del pipe
    gc.collect()
    assert autoencoder() is None
    poa.disable(model)


def test_blocks_and_enablings_replace_each_other(
    pipe: Any, baked: Path, expected: torch.Tensor, plain: torch.Tensor
) -> None:
    with poa.enabled(pipe, baked, 0.5):
        with poa.enabled(pipe, baked, W):
            assert torch.equal(SD15.run(pipe), expected)
        assert torch.equal(SD15.run(pipe), plain)
    poa.enable(pipe, baked, 0.3)
    assert torch.equal(run_with(pipe, baked), expected)
    with pytest.raises(ZeroDivisionError), poa.enabled(pipe, baked):
        raise ZeroDivisionError
    assert torch.equal(SD15.run(pipe), plain)
    poa.disable(pipe)


def test_the_model_alone_will_do(pipe: Any, baked: Path, expected: torch.Tensor) -> None:
    """But it has no scheduler that tells the steps."""
    poa.enable(pipe.unet, baked, W)
    assert torch.equal(SD15.run(pipe), expected)
    poa.enable(pipe.unet, baked, W, stop=0.5)
    with raises(PoaError, "step of sampling"):
        SD15.run(pipe)


@pytest.mark.parametrize(
    ("dtype", "criterion"),
    [(torch.float16, "magnitude"), (torch.bfloat16, "magnitude"), (torch.float16, "wanda"), (torch.bfloat16, "obs")],
)
def test_half_precision(dtype: torch.dtype, criterion: str, case: Case, pipe: Any) -> None:
    """A threshold is rounded as in an export with --dtype, a mask is the same; the mix is rounded once."""
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    files = [case.baked(criterion)] + ([case.baked(criterion, dtype=name)] if criterion == "magnitude" else [])
    pipe.unet.to(dtype)
    pruned = copy.deepcopy(pipe.unet)
    pruned.load_state_dict(safetensors.torch.load_file(files[-1]))
    arguments = inputs(2, dtype)
    with torch.no_grad():
        ours, theirs = pipe.unet(*arguments)[0], pruned(*arguments)[0]
        for file in files:
            for weight, expected in ((1, theirs), (W, ((1 - W) * ours.float() + W * theirs.float()).to(dtype))):
                with poa.enabled(pipe, file, weight):
                    assert torch.equal(pipe.unet(*arguments)[0], expected)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_a_file_that_was_cast_prunes_the_uncast_base_alike(criterion: str, case: Case, pipe: Any) -> None:
    """In memory fp32, in the file fp16: those are pruned whose fp16 is zero in the file."""
    file = case.baked(criterion, dtype="fp16")
    handle, stored = poa.enable(pipe, file, 1), safetensors.torch.load_file(file)
    assert isinstance(handle, Poa)
    for name, parts in handle.source.masks.diffusers.items():
        weight = pipe.unet.get_parameter(name)
        assert torch.equal(prune(weight, parts), torch.where(stored[name] == 0, 0.0, weight))


@CRITERIA
def test_a_model_may_be_cast_later(criterion: str, pipe: Any, case: Case) -> None:
    poa.enable(pipe, case.baked(criterion), W)
    pipe.unet.to(torch.bfloat16)
    arguments = inputs(dtype=torch.bfloat16)
    with torch.no_grad():
        result = pipe.unet(*arguments)[0]
        poa.enable(pipe, case.baked(criterion), W)
        assert torch.equal(pipe.unet(*arguments)[0], result)


def test_channels_last(pipe: Any, baked: Path) -> None:
    pruned = sd15_with(baked)
    for model in (pipe.unet, pruned.unet):
        model.to(memory_format=torch.channels_last)
    dense = SD15.run(pipe)
    assert torch.equal(run_with(pipe, baked, 1), SD15.run(pruned))
    assert torch.equal(SD15.run(pipe), dense)


@pytest.mark.parametrize(
    ("first", "criterion"), [("poa", "magnitude"), ("lora", "magnitude"), ("poa", "wanda"), ("lora", "obs")]
)
def test_a_lora_is_added_to_the_pruned_base(
    first: str, criterion: str, pipe: Any, case: Case, plain: torch.Tensor
) -> None:
    """The mask is that of the published weights, not of the sum: nothing of a LoRA is pruned."""
    file = case.baked(criterion)
    pruned = sd15_with(file)
    pruned.load_lora_weights(lora())
    if first == "poa":
        poa.enable(pipe, file, 1)
    pipe.load_lora_weights(lora())
    handle = poa.enable(pipe, file, 1) if first == "lora" else pipe.unet.crdiff_poa
    assert torch.equal(SD15.run(pipe), SD15.run(pruned))
    handle.schedule = poa.Schedule(W)
    result = SD15.run(pipe)
    poa.disable(pipe)
    with two_models(pipe.unet, pruned.unet, W):
        assert torch.equal(result, SD15.run(pipe))
    pipe.unload_lora_weights()
    assert torch.equal(SD15.run(pipe), plain)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_offloading(criterion: str, case: Case, plain: torch.Tensor) -> None:
    """Of the model, of groups, and layer by layer, from weights that are nowhere between two calls."""
    file = case.baked(criterion)
    expected = run_with(SD15.make(), file)
    for first in ("offload", "poa"):
        pipe = SD15.make()
        if first == "poa":
            poa.enable(pipe, file, W)
        accelerate.cpu_offload_with_hook(pipe.unet, "cpu")
        if first == "offload":
            poa.enable(pipe, file, W)
        assert torch.equal(SD15.run(pipe), expected)
        poa.disable(pipe)
        assert torch.equal(SD15.run(pipe), plain)
        assert hasattr(pipe.unet, "_hf_hook")
    pipe = SD15.make()
    poa.enable(pipe, file, W)
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")
    assert torch.equal(SD15.run(pipe), expected)
    pipe, arguments = SD15.make(), inputs()
    with torch.no_grad():
        dense = pipe.unet(*arguments)[0]
        poa.enable(pipe, file, W)
        mixed = pipe.unet(*arguments)[0]
        accelerate.cpu_offload(pipe.unet, "cpu")
        assert pipe.unet.get_submodule(LAYER).weight.is_meta
        assert torch.equal(pipe.unet(*arguments)[0], mixed)
        poa.disable(pipe)
        assert torch.equal(pipe.unet(*arguments)[0], dense)


@pytest.mark.parametrize(
    ("whole", "criterion"),
    [
        pytest.param(True, "magnitude", marks=pytest.mark.slow),
        (False, "magnitude"),
        pytest.param(False, "wanda", marks=pytest.mark.slow),
        pytest.param(False, "obs", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_compiled(whole: bool, criterion: str, pipe: Any, case: Case) -> None:
    """The graphs of dense and pruned layers are two; nothing is traced again at the next image."""
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    poa.enable(pipe, case.baked(criterion), W)
    expected = SD15.run(pipe)
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
        sizes = {"height": PIXELS, "width": PIXELS, "num_inference_steps": 1}
        result: torch.Tensor = pipe(**pooled_inputs(2048, 1), **sizes, output="latents", generator=generator)
        return result

    plain = run()
    pipe.unet.save_pretrained(tmp_path)
    base = tmp_path / "diffusion_pytorch_model.safetensors"
    baked = export(ExportRequest(str(base), SIZE, tmp_path / "baked.safetensors", ratio=0.4)).written.path
    pruned = copy.deepcopy(pipe.unet)
    pruned.load_state_dict(safetensors.torch.load_file(baked))
    with poa.enabled(pipe, baked, W):
        result = run()
    with two_models(pipe.unet, pruned, W):
        assert torch.equal(result, run())
    assert torch.equal(run(), plain)


@on_an_accelerator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_an_accelerator(dtype: torch.dtype, pipe: Any, case: Case) -> None:
    file = case.baked() if dtype == torch.float32 else case.baked(dtype="fp16")
    pruned = sd15_with(file)
    for model in (pipe.unet, pruned.unet):
        model.to(accelerator(), dtype)
    noise, step, text = inputs(2, dtype)
    arguments = noise.to(accelerator()), step, text.to(accelerator())
    with torch.no_grad():
        ours, theirs = pipe.unet(*arguments)[0].float(), pruned.unet(*arguments)[0].float()
        for mode in ("sequential", "batched"):
            with poa.enabled(pipe, file, W, mode=mode):
                result = pipe.unet(*arguments)[0]
            tolerance = 1e-4 if dtype == torch.float32 else 1e-2
            assert torch.allclose(result.float(), (1 - W) * ours + W * theirs, atol=tolerance, rtol=tolerance)
        with poa.enabled(pipe, file, 0):
            assert torch.equal(pipe.unet(*arguments)[0].float(), ours)
