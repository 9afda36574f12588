"""POA by masks: from a file's own zeros, from a recipe, from a ranking, and with moved weights; against two models."""

import copy
import gc
import hashlib
import weakref
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import CheckpointError, PoaError, VerifyError
from crdiff_export.export import plan_variant
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.models import demo
from crdiff_export.progress import Silent
from crdiff_export.prune.criteria import Decision, Mask
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.threshold import Threshold
from crdiff_export.sampling import poa
from crdiff_export.sampling.comfyui import match
from crdiff_export.sampling.comfyui.patch import PatchedLayer, PruneSwitch
from crdiff_export.sampling.poa.masks import MaskPart, Masks, ReplacedWeights, prune
from crdiff_export.verify.reopen import open_baked, read_decision
from tests.sampling.test_poa import pruned_copy, two_models
from tests.sampling.test_poa_use import lora
from tests.support import makers, masking
from tests.support.tiny_pipelines import KINDS

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' Euler with NumPy 2

W = 1.7
SIZE = Size(512, 512)
PIPES = ("sd15", "sdxl", "sd3", "flux")
SD15 = KINDS["sd15"]
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FAMILIES = {"sd15": "sd15", "sdxl": "sdxl", "sd3": "sd3-medium", "flux": "flux-dev"}


# Parts of weights.


def bits(gone: np.ndarray[Any, Any], start: int = 0, dtype: str = "F32") -> MaskPart:
    return MaskPart(start, start + gone.size, dtype, torch.from_numpy(Mask.pack(gone).bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (17, 31), (64, 40)])
def test_a_bit_decides(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """The same in new memory, in memory that is there, and by NumPy; signs, infinities and NaN of what stays, too."""
    rng = np.random.default_rng(shape)
    weight = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    flat = weight.view(-1)
    flat[0], flat[-1] = float("nan"), float("-inf")
    gone = rng.random(shape) < 0.4
    for first, last in ((False, False), (True, True)):
        gone.flat[0], gone.flat[-1] = first, last
        part = bits(gone)
        expected = torch.from_numpy(np.where(gone, 0.0, weight.double().numpy())).to(dtype)
        room = torch.full(shape, 7.0, dtype=dtype)
        for found in (part.rule(dtype)(weight, None), part.rule(dtype)(weight, room), prune(weight, (part,))):
            assert found.equal(expected) or (found.isnan() == expected.isnan()).all()
            assert torch.equal(found.nan_to_num(), expected.nan_to_num())
            assert (
                found.view(-1).view(torch.uint8).view(-1, weight.itemsize)[torch.from_numpy(gone).view(-1)] == 0
            ).all()
        assert part.rule(dtype)(weight, room) is room


def test_a_mask_on_a_weight_that_is_not_contiguous() -> None:
    weight = torch.randn(12, 8).t()
    gone = np.random.default_rng(0).random((8, 12)) < 0.5
    expected = torch.where(torch.from_numpy(gone), 0.0, weight)
    assert torch.equal(bits(gone).rule(torch.float32)(weight, None), expected)
    assert torch.equal(bits(gone).rule(torch.float32)(weight, torch.empty(8, 12)), expected)


def test_parts_of_a_fused_weight() -> None:
    weight = torch.randn(9, 3)
    gone = np.random.default_rng(1).random((3, 9)) < 0.5
    own = torch.randn(9)
    parts = (bits(gone[0].ravel()), ReplacedWeights(9, 18, "F32", own))
    found = prune(weight, parts)
    assert torch.equal(found[:3], torch.where(torch.from_numpy(gone[0].reshape(3, 3)), 0.0, weight[:3]))
    assert torch.equal(found[3:6].reshape(-1), own)
    assert torch.equal(found[6:], weight[6:])
    alone = prune(weight[:3], (ReplacedWeights(0, 9, "F32", own),))
    alone += 1
    assert not torch.equal(alone.reshape(-1), own), "what prune gives is a new tensor"


def test_gradients_go_through_a_mask() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    gone = np.random.default_rng(2).random((4, 6)) < 0.5
    (grad,) = torch.autograd.grad(bits(gone).rule(torch.float32)(weight, None).sum(), weight)
    assert torch.equal(grad, (~torch.from_numpy(gone)).float())


def test_a_mask_is_known_by_what_it_holds() -> None:
    gone = np.random.default_rng(3).random(100) < 0.5
    other = gone.copy()
    other[50] ^= True
    assert repr(bits(gone)) == repr(bits(gone.copy())) != repr(bits(other))
    one, two = torch.zeros(4), torch.ones(4)
    assert (
        repr(ReplacedWeights(0, 4, "F32", one))
        == repr(ReplacedWeights(0, 4, "F32", one.clone()))
        != repr(ReplacedWeights(0, 4, "F32", two))
    )


# While sampling.


def calibrate(kind: str, base: Path, folder: Path) -> Path:
    """A calibration of random numbers for a pipeline's base."""
    kinds = ("ff", "attn") if kind in ("sd3", "flux") else ("attn", "ff")
    planned = plan_variant(ExportRequest(str(base), SIZE, ratio=0.3, targets=kinds), open_checkpoint(base))
    content = makers.read(base)
    statistics, digests = {}, {}
    for number, target in enumerate(planned.targets):
        name = target.source.name  # diffusers' layout
        rows, columns = target.source.shape
        statistics[name] = masking.layer_statistics(number, rows, columns)
        digests[name] = hashlib.sha256(content[name][2]).hexdigest()[:16]
    return masking.write_calibration(folder / "calibration.safetensors", statistics, digests, FAMILIES[kind])


class Made:
    """A pipeline, its base, and exports of it by every criterion that matters."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.kind = name, folder, KINDS[name]
        self.pipe = self.kind.make()
        self.base = self.kind.save(self.pipe, folder)
        self.calibration = calibrate(name, self.base, folder)
        self._made: dict[str, Path] = {}

    @property
    def model(self) -> nn.Module:
        model: nn.Module = getattr(self.pipe, self.kind.part)
        return model

    def request(self, criterion: str, **options: Any) -> ExportRequest:
        calibration = None if "random" in criterion else self.calibration
        given = {"ratio": 0.4, "calibration": calibration, **options}
        return ExportRequest(str(self.base), SIZE, criterion=criterion, **given)

    def baked(self, criterion: str, **options: Any) -> Path:
        key = f"{criterion} {options}"
        if key not in self._made:
            output = self.folder / f"baked-{len(self._made)}.safetensors"
            request = self.request(criterion, **options)
            self._made[key] = export(ExportRequest(**{**vars_of(request), "output": output})).written.path
        return self._made[key]


def vars_of(request: ExportRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__slots__}


@pytest.fixture(scope="module", params=PIPES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made("sd15", tmp_path_factory.mktemp("alone"))


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("made", "sd15"):
        if name in request.fixturenames:
            poa.disable(request.getfixturevalue(name).pipe)


@pytest.mark.parametrize(
    ("made", "criterion"),
    [*product(PIPES, ["wanda:compare=row", "obs"]), ("sd15", "wanda"), ("sd15", "random:compare=row")],
    indirect=["made"],
)
def test_it_is_the_formula_of_two_models(criterion: str, made: Made) -> None:
    """And weight 0 is the dense model, 1 the file's, kept or not, in one pass or two."""
    kind, pipe, model = made.kind, made.pipe, made.model
    baked = made.baked(criterion)
    other = pruned_copy(model, baked)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    plain = kind.run(pipe, 2)
    found = {}
    for weight in (0, 1, W):
        for keep in (False, True):
            poa.enable(pipe, baked, weight, keep=keep)
            found[weight, keep] = kind.run(pipe, 2)
        poa.disable(pipe)
        assert torch.equal(found[weight, False], found[weight, True])
    assert torch.equal(found[0, False], plain)
    model.forward = two_models(model, other, W)
    expected = kind.run(pipe, 2)
    model.forward = lambda *args, **kwargs: type(model).forward(other, *args, **kwargs)
    alone = kind.run(pipe, 2)
    del model.forward
    assert torch.equal(found[W, False], expected)
    assert torch.equal(found[1, False], alone)
    assert not torch.equal(alone, plain)
    poa.enable(pipe, baked, W, mode="batched")
    batched = kind.run(pipe, 2)
    poa.disable(pipe)
    assert torch.allclose(batched, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    after = model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not any("forward" in vars(m) or vars(m).get("crdiff_poa") for m in model.modules())


@pytest.mark.parametrize(
    ("made", "criterion"),
    [*product(PIPES, ["random:seed=5", "obs"]), ("sd15", "wanda:compare=row")],
    indirect=["made"],
)
def test_a_recipe_and_a_ranking_give_what_an_export_does(criterion: str, made: Made) -> None:
    kind, pipe = made.kind, made.pipe
    poa.enable(pipe, made.baked(criterion), W)
    expected = kind.run(pipe)
    poa.enable(pipe, poa.from_recipe(made.request(criterion)), W)
    assert torch.equal(kind.run(pipe), expected)
    ranked = CriterionChoice.of(criterion, None if "random" in criterion else made.calibration)
    plan = plan_variant(made.request(criterion), open_checkpoint(made.base))
    other = plan_variant(made.request(criterion, ratio=0.1), open_checkpoint(made.base))
    counted = poa.BaseRanking([plan], "base", Silent(), criterion=ranked, device="cpu")
    for asked in (other, plan, other):
        poa.enable(pipe, counted.source(asked, W))
        assert torch.equal(kind.run(pipe), expected) == (asked is plan)


def test_a_ranking_without_more_is_magnitude(sd15: Made) -> None:
    plan = plan_variant(sd15.request("magnitude", calibration=None), open_checkpoint(sd15.base))
    poa.enable(sd15.pipe, sd15.baked("magnitude", calibration=None), W)
    expected = SD15.run(sd15.pipe)
    poa.enable(sd15.pipe, poa.BaseRanking([plan], "base").source(plan), W)
    assert torch.equal(SD15.run(sd15.pipe), expected)


def test_what_a_source_holds_goes_with_it(sd15: Made) -> None:
    plan = plan_variant(sd15.request("obs"), open_checkpoint(sd15.base))
    for criterion in ("obs", "wanda"):
        counted = poa.BaseRanking([plan], "base", criterion=CriterionChoice.of(criterion, sd15.calibration))
        source = counted.source(plan)
        poa.enable(sd15.pipe, source, W)
        SD15.run(sd15.pipe)
        part = source.masks.diffusers[f"{LAYER}.weight"][0]
        held = part._tensor  # type: ignore[union-attr]
        gone = weakref.ref(held)
        poa.disable(sd15.pipe)
        del source, part, held
        gc.collect()
        assert gone() is None


def test_what_is_held(sd15: Made) -> None:
    """A bit for each weight, and room for one layer; or all pruned layers."""
    weights = safetensors.torch.load_file(sd15.base)
    names = poa.from_baked(sd15.baked("wanda")).masks.diffusers
    packed = sum(-(-weights[name].numel() // 8) for name in names)
    largest = max(weights[name].nbytes for name in names)
    every = sum(weights[name].nbytes for name in names)
    for criterion, keep, held in (
        ("wanda", False, packed + largest),
        ("wanda", True, packed + every),
        ("obs", True, every),
    ):
        handle = poa.enable(sd15.pipe, sd15.baked(criterion), W, keep=keep)
        SD15.run(sd15.pipe)
        assert handle.extra_bytes == held


def test_kept_weights_follow_the_model(sd15: Made) -> None:
    poa.enable(sd15.pipe, sd15.baked("wanda"), W, keep=True)
    first = SD15.run(sd15.pipe)
    weight: Any = sd15.model.get_submodule(LAYER).weight
    with torch.no_grad():
        weight.mul_(-1)
    changed = SD15.run(sd15.pipe)
    poa.enable(sd15.pipe, sd15.baked("wanda"), W, check=False)
    assert torch.equal(SD15.run(sd15.pipe), changed)
    assert not torch.equal(changed, first)
    with torch.no_grad():
        weight.mul_(-1)


@pytest.mark.parametrize("criterion", ["wanda", "obs"])
@pytest.mark.parametrize("first", ["poa", "lora"])
def test_a_lora_is_added_to_the_pruned_base(first: str, criterion: str, sd15: Made) -> None:
    baked = sd15.baked(criterion)
    pruned = SD15.make()
    pruned.unet.load_state_dict(safetensors.torch.load_file(baked))
    pruned.load_lora_weights(lora())
    pipe = SD15.make()
    if first == "poa":
        poa.enable(pipe, baked, 1)
    pipe.load_lora_weights(lora())
    if first == "lora":
        poa.enable(pipe, baked, 1)
    assert torch.equal(SD15.run(pipe), SD15.run(pruned))
    poa.disable(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(SD15.run(pipe), SD15.run(SD15.make()))


@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_offloading(criterion: str, sd15: Made) -> None:
    """Of the model, of groups, and layer by layer, from weights that are nowhere between two calls."""
    baked = sd15.baked(criterion)
    poa.enable(sd15.pipe, baked, W)
    expected = SD15.run(sd15.pipe)
    pipe = SD15.make()
    accelerate.cpu_offload_with_hook(pipe.unet, "cpu")
    poa.enable(pipe, baked, W)
    assert torch.equal(SD15.run(pipe), expected)
    pipe = SD15.make()
    poa.enable(pipe, baked, W)
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")
    assert torch.equal(SD15.run(pipe), expected)
    pipe = SD15.make()
    inputs = (torch.randn(1, 4, 8, 8), 500, torch.randn(1, 5, 768))
    with torch.no_grad():
        dense = pipe.unet(*inputs)[0]
        poa.enable(pipe, baked, W)
        mixed = pipe.unet(*inputs)[0]
        accelerate.cpu_offload(pipe.unet, "cpu")
        assert pipe.unet.get_submodule(LAYER).weight.is_meta
        assert torch.equal(pipe.unet(*inputs)[0], mixed)
        poa.disable(pipe)
        assert torch.equal(pipe.unet(*inputs)[0], dense)


@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_inference_mode_and_then_gradients(criterion: str, sd15: Made) -> None:
    pipe = SD15.make()
    poa.enable(pipe, sd15.baked(criterion), W)
    with torch.inference_mode():
        first = SD15.run(pipe)
    assert torch.equal(SD15.run(pipe), first)
    pipe.unet(torch.randn(1, 4, 8, 8), 500, torch.randn(1, 5, 768))[0].sum().backward()
    assert pipe.unet.get_submodule(LAYER).weight.grad is not None


@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_compiled(criterion: str, sd15: Made) -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    pipe = SD15.make()
    poa.enable(pipe, sd15.baked(criterion), W)
    expected = SD15.run(pipe)
    pipe.unet.get_submodule(LAYER.removesuffix(".attn1.to_q")).compile(backend=backend)
    assert torch.allclose(SD15.run(pipe), expected, atol=1e-4)
    once = len(graphs)
    assert once > 0
    assert torch.allclose(SD15.run(pipe), expected, atol=1e-4)
    assert len(graphs) == once
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_in_half_precision_the_mask_is_the_same(criterion: str, dtype: torch.dtype, sd15: Made) -> None:
    pipe, baked = SD15.make(), sd15.baked(criterion)
    pipe.unet.to(dtype)
    pruned = copy.deepcopy(pipe.unet)
    pruned.load_state_dict(safetensors.torch.load_file(baked))
    inputs = (torch.randn(2, 4, 8, 8).to(dtype), 500, torch.randn(2, 5, 768).to(dtype))
    with torch.no_grad():
        ours, theirs = pipe.unet(*inputs)[0], pruned(*inputs)[0]
        for weight, expected in ((1, theirs), (W, ((1 - W) * ours.float() + W * theirs.float()).to(dtype))):
            with poa.enabled(pipe, baked, weight):
                assert torch.equal(pipe.unet(*inputs)[0], expected)
    poa.enable(pipe, baked, 1)
    pipe.unet.float()  # cast in the meantime
    with torch.no_grad():
        pipe.unet(*(x.float() if isinstance(x, torch.Tensor) else x for x in inputs))


def test_a_file_that_was_cast(sd15: Made) -> None:
    baked = sd15.baked("wanda", dtype="fp16")
    pruned = safetensors.torch.load_file(baked)
    pipe = SD15.make()
    handle = poa.enable(pipe, baked, 1)
    for name, parts in handle.source.masks.diffusers.items():
        weight = pipe.unet.get_parameter(name)
        expected = torch.where(pruned[name] == 0, 0.0, weight)
        assert torch.equal(prune(weight, parts), expected)


@pytest.mark.parametrize("loaded", [torch.float16, torch.float32])
def test_the_file_and_its_residual_are_enough(loaded: torch.dtype, sd15: Made, tmp_path: Path) -> None:
    half = {name: weight.half() for name, weight in safetensors.torch.load_file(sd15.base).items()}
    safetensors.torch.save_file(half, tmp_path / "base.safetensors")
    kept = export(
        ExportRequest(str(tmp_path / "base.safetensors"), SIZE, tmp_path / "kept.safetensors", ratio=0.4,
                      criterion="random", residual="sidecar")
    ).written.path  # fmt: skip
    pipe, dense = SD15.make(), SD15.make()
    pipe.unet.load_state_dict(safetensors.torch.load_file(kept))
    dense.unet.load_state_dict(half)
    pipe.unet.to(loaded)
    dense.unet.to(loaded)
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    inputs = (torch.randn(1, 4, 8, 8).to(loaded), 500, torch.randn(1, 5, 768).to(loaded))
    with torch.no_grad():
        for weight in (0, 1, W):
            with poa.enabled(dense, kept, weight):
                expected = dense.unet(*inputs)[0]
            with poa.enabled(pipe, kept, weight) as on:
                assert on.filled
                assert torch.equal(pipe.unet(*inputs)[0], expected)
    after = pipe.unet.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


# Refusals.


def refusal(pipe: Any, source: Any) -> Any:
    with pytest.raises((PoaError, VerifyError, CheckpointError)) as caught:
        poa.enable(pipe, source)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("kept", [True, False], ids=["a weight that stays", "one that goes"])
def test_weights_of_another_model(kept: bool, sd15: Made) -> None:
    """Where the file is zero anything may have been; a recipe knows the base."""
    pipe, baked = SD15.make(), sd15.baked("wanda")
    pruned = safetensors.torch.load_file(baked)[f"{LAYER}.weight"]
    place = (pruned != 0 if kept else pruned == 0).nonzero()[0]
    with torch.no_grad():
        pipe.unet.get_submodule(LAYER).weight[tuple(place)] += 1
    recipe = poa.from_recipe(sd15.request("wanda"))
    for source in (baked, recipe) if kept else (recipe,):
        assert f"the weights of {LAYER} are not those of" in refusal(pipe, source).message
    if not kept:
        poa.enable(pipe, baked)


@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_weights_that_are_pruned_already(criterion: str, sd15: Made) -> None:
    pipe = SD15.make()
    pipe.unet.load_state_dict(safetensors.torch.load_file(sd15.baked(criterion)))
    assert "holds the pruned weights already" in refusal(pipe, sd15.baked(criterion)).message


def test_of_moved_weights_a_base_is_known_by_its_hash_alone(sd15: Made, tmp_path: Path) -> None:
    other = SD15.make()
    with torch.no_grad():
        other.unet.get_submodule(LAYER).weight += 1
    poa.enable(other, sd15.baked("obs"))
    other.unet.save_pretrained(tmp_path)
    with pytest.raises(PoaError, match="hashes to 0x"):
        poa.from_baked(sd15.baked("obs"), str(tmp_path / "diffusion_pytorch_model.safetensors"))
    assert poa.from_baked(sd15.baked("obs"), str(sd15.base)).weight == 1.5


def test_another_family(sd15: Made) -> None:
    assert "has no layer down_blocks.0" in refusal(KINDS["sdxl"].make(), sd15.baked("wanda")).message


def test_a_merged_file(sd15: Made, tmp_path: Path) -> None:
    baked = sd15.baked("wanda")
    tensors = {name: weight * 0.5 for name, weight in safetensors.torch.load_file(baked).items()}
    safetensors.torch.save_file(tensors, tmp_path / "merged.safetensors", makers.metadata_of(baked))
    assert "its bytes hash to 0x" in refusal(SD15.make(), tmp_path / "merged.safetensors").message


def test_a_file_that_prunes_nothing(sd15: Made) -> None:
    nothing = sd15.baked("random", ratio=0.0)
    assert Stamp.from_metadata(makers.metadata_of(nothing), "file").masked
    assert "prunes nothing, as all of its ratios are 0" in refusal(SD15.make(), nothing).message


# ComfyUI.

COMFY = {"sd15.original": ("attn", "ff"), "flux-dev.original-transformer": ("ff", "attn")}


@pytest.fixture(scope="module")
def bakes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[masking.Base, Path]]:
    bases: dict[str, masking.Base] = {}
    made: dict[tuple[str, str], Path] = {}

    def get(table: str, criterion: str) -> tuple[masking.Base, Path]:
        if table not in bases:
            bases[table] = masking.base(tmp_path_factory.mktemp("comfyui"), table)
        base = bases[table]
        if (table, criterion) not in made:
            output = base.path.with_name(f"{len(made)}.safetensors")
            made[table, criterion] = export(base.request(output, criterion)).written.path
        return base, made[table, criterion]

    return get


def in_comfyui(path: Path, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """A model's weights by ComfyUI's names."""
    prefix = "model.diffusion_model."
    weights = safetensors.torch.load_file(path)
    inside = any(name.startswith(prefix) for name in weights)
    return {
        match.PREFIX + name.removeprefix(prefix): weight.to(dtype)
        for name, weight in weights.items()
        if name.startswith(prefix) or not inside
    }


@pytest.mark.parametrize("table", COMFY)
@pytest.mark.parametrize("criterion", ["wanda", "obs"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_a_layer_in_comfyui_takes_the_masked_weights(
    table: str, criterion: str, dtype: torch.dtype, bakes: Callable[[str, str], tuple[masking.Base, Path]]
) -> None:
    base, output = bakes(table, criterion)
    weights, pruned = in_comfyui(base.path, dtype), in_comfyui(output, dtype)
    switch = PruneSwitch()
    cuts = match.model_parts(weights, open_baked(output))
    changed = {name for name in weights if not torch.equal(weights[name], pruned[name])}
    assert changed == cuts.keys()
    for key, parts in cuts.items():
        layer = PatchedLayer(switch, key, parts, ())
        assert layer(weights[key]) is weights[key]
        switch.pruned = True
        before = pruned[key].clone()
        assert torch.equal(layer(weights[key]), pruned[key])
        assert torch.equal(pruned[key], before)
        switch.pruned = False


def test_comfyui_tells_models_apart(bakes: Callable[[str, str], tuple[masking.Base, Path]]) -> None:
    base, output = bakes("sd15.original", "wanda")
    baked = open_baked(output)
    with pytest.raises(match.PrunedError, match="holds the pruned weights of"):
        match.model_parts(in_comfyui(output), baked)
    weights = in_comfyui(base.path)
    name = next(iter(match.model_parts(weights, baked)))
    with pytest.raises(PoaError, match="are not those of"):
        match.model_parts({**weights, name: weights[name] * 1.01}, baked)
    with pytest.raises(PoaError, match="has 8 weights"):
        match.model_parts({**weights, name: weights[name].reshape(-1)[:8]}, baked)
    with pytest.raises(PoaError, match="the model has no layer"):
        match.model_parts({key: weight for key, weight in weights.items() if key != name}, baked)
    moved = bakes("sd15.original", "obs")[1]
    with pytest.raises(match.PrunedError, match="holds the pruned weights of"):
        match.model_parts(in_comfyui(moved), open_baked(moved))
    assert match.model_parts({**weights, name: weights[name] * 1.01}, open_baked(moved)), "which nothing tells apart"


def test_comfyui_finds_the_file_by_its_zeros(bakes: Callable[[str, str], tuple[masking.Base, Path]]) -> None:
    """Not one with moved weights, which would fit any model."""
    base, output = bakes("sd15.original", "wanda")
    moved, other = bakes("sd15.original", "obs")[1], bakes("flux-dev.original-transformer", "wanda")[1]
    baked, cuts = match.find(in_comfyui(base.path), [other, moved, output])
    assert baked.checkpoint.path == output
    assert all(isinstance(part, MaskPart) for parts in cuts.values() for part in parts)


def test_masks_are_released(bakes: Callable[[str, str], tuple[masking.Base, Path]]) -> None:
    """What is held on another device or in another dtype is let go of."""
    _, output = bakes("sd15.original", "obs")
    baked = open_baked(output)
    masks = Masks.of(baked.plan, read_decision(baked))
    (part,) = next(iter(masks.original.values()))
    assert isinstance(part, ReplacedWeights)
    alone = part.extra_bytes
    part.rule(torch.float32)(torch.empty(part.stop), None)
    assert part.extra_bytes == 3 * alone
    masks.release()
    assert part.extra_bytes == alone


def test_nothing_is_made_of_layers_that_stay() -> None:
    """A decision has None for them."""
    plan = plan_variant(ExportRequest("demo", Size(96, 64), ratios={"down": 0.0, "mid": 0.5, "up": 0.0}),
                        open_checkpoint(demo.path()))  # fmt: skip
    rng = np.random.default_rng(0)
    masks = tuple(
        Mask.pack(rng.random(target.count) < 0.5) if target.group == "mid" else None for target in plan.targets
    )
    found = Masks.of(plan, Decision(tuple(Threshold(None, 0, s.count) for s in plan.scopes), masks))
    assert {name.partition(".")[0] for name in found.diffusers} == {"mid_block"}
    assert len(found.original) == sum(target.group == "mid" for target in plan.targets)
