"""POA from a pack: the size of every picture decides what is pruned and how much it is amplified."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import safetensors.torch
import torch
from torch import nn

from crdiff_export import Size
from crdiff_export.errors import PackError, PoaError
from crdiff_export.hub import download
from crdiff_export.hub.location import HubLocation
from crdiff_export.models.families import by_id
from crdiff_export.packs import open_pack
from crdiff_export.sampling import poa
from crdiff_export.sampling.poa import in_place
from crdiff_export.sampling.poa.in_place import InPlace
from crdiff_export.sampling.poa.masks import ThresholdPart
from crdiff_export.sampling.poa.packed import Chosen, choose
from crdiff_export.sampling.poa.picture_size import Cells, cells_of, picture_size
from tests.support import makers
from tests.support.messages import raises
from tests.support.pack_cases import NATIVE, NUMBERS, SIZES, PackCase, bits, write_pack
from tests.support.poa_cases import LAYER, SD15, inputs, lora, pruned_copy
from tests.support.tiny_pipelines import KINDS

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # diffusers' Euler with NumPy 2
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated"),  # by Chroma in diffusers itself
    pytest.mark.filterwarnings("error:.*the model stays dense"),
]

SMALL, WIDE, LARGE = SIZES
FAMILIES = [
    "sd15",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "unet", "chroma", "sd21", "sdxs", "qwen")),
    "sd3", "flux", "flux2",
]  # fmt: skip


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> PackCase:
    return PackCase("sd15", tmp_path_factory.mktemp("pack"))


@pytest.fixture
def pipe(case: PackCase) -> Any:
    return case.make()


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_in_turn_are_the_formula_and_then_the_dense_model(name: str, tmp_path: Path) -> None:
    """Bit by bit, with each size's own weight and with the pruned model alone."""
    case = PackCase(name, tmp_path)
    pipe = case.make()
    model, dense = case.model(pipe), case.run(pipe, SMALL)
    before = bits(model)
    for weight in (None, 1.0):
        expected = {size: case.expected(size, weight) for size in SIZES}
        poa.enable(pipe, str(case.pack), weight)
        for size in (SMALL, LARGE, WIDE, SMALL):
            assert torch.equal(case.run(pipe, size), expected[size]), (weight, size)
        poa.disable(pipe)
        assert bits(model) == before
    assert torch.equal(case.run(pipe, SMALL), dense)


@pytest.mark.parametrize("criterion", ["random", pytest.param("random:compare=row", marks=pytest.mark.slow)])
def test_masks(criterion: str, tmp_path: Path) -> None:
    case = PackCase("sd15", tmp_path, criterion)
    pipe = case.make()
    for weight in (None, 1.0):
        poa.enable(pipe, case.pack, weight)
        for size in (SMALL, LARGE, SMALL):
            assert torch.equal(case.run(pipe, size), case.expected(size, weight))
        poa.disable(pipe)


@pytest.mark.parametrize("mode", ["sequential", "batched"])
@pytest.mark.parametrize("keep", [False, True])
def test_modes(mode: Any, keep: bool, case: PackCase, pipe: Any) -> None:
    poa.enable(pipe, case.pack, mode=mode, keep=keep)
    for size in (SMALL, LARGE, SMALL):
        assert torch.allclose(case.run(pipe, size), case.expected(size), atol=1e-4)


def test_a_pruned_model_keeps_what_became_zero_and_a_bit_for_each_weight(case: PackCase, pipe: Any) -> None:
    handle = poa.prune(pipe, case.pack, "64x64")
    pruned = safetensors.torch.load_file(case.baked[SMALL])
    assert all(torch.equal(value, pruned[name]) for name, value in pipe.unet.state_dict().items())
    stamp = open_pack(case.pack).variants[SMALL]
    gone = sum(group.pruned for group in stamp.groups.values())
    weights = sum(group.total for group in stamp.groups.values())
    assert handle.extra_bytes == 4 * gone + weights // 8
    assert not any(hasattr(module, "_diffusers_hook") for module in pipe.unet.modules())
    poa.disable(pipe)
    assert not hasattr(pipe.unet, "crdiff_poa")


def test_every_bit_comes_back() -> None:
    """Zeros of both signs, weights that are no numbers, and a layer whose weights do not fill bytes."""
    layer = nn.Linear(7, 3, bias=False)
    values = torch.tensor([0.0, -0.0, 1e-9, -1e-9, float("nan"), float("inf"), 0.5, *([2.0] * 14)])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        layer.weight.data = values.reshape(3, 7).to(dtype)
        before = layer.weight.detach().clone()
        place = InPlace({"x.weight": layer})
        place.prune({"x.weight": ThresholdPart(0, 21, 0x3F000000, "F32")})
        flat = layer.weight.detach().flatten()
        assert not flat[[0, 1, 2, 3, 6]].any()
        assert not flat[:4].signbit().any()
        place.restore()
        shape = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        assert torch.equal(layer.weight.detach().view(shape), before.view(shape))
        assert place.extra_bytes == 0


@pytest.mark.parametrize("moment", [0, 3, 7, 11])
@pytest.mark.parametrize("function", ["_pack", "_unpack"])
def test_an_interrupted_change_of_size_loses_nothing(
    function: str, moment: int, case: PackCase, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next picture is right, whichever it is, and the dense model comes back."""
    before = bits(pipe.unet)
    poa.prune(pipe, case.pack)
    case.run(pipe, SMALL)
    usual, calls = getattr(in_place, function), iter(range(1000))

    def interrupted(*args: Any) -> Any:
        if next(calls) == moment:
            raise KeyboardInterrupt
        return usual(*args)

    monkeypatch.setattr(in_place, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        case.run(pipe, LARGE)
    monkeypatch.undo()
    assert torch.equal(case.run(pipe, SMALL), case.expected(SMALL, 1.0))
    poa.disable(pipe)
    assert bits(pipe.unet) == before


@pytest.mark.parametrize("weight", [None, 1.0])
def test_inference_mode_at_one_size_alone(weight: float | None, case: PackCase, pipe: Any) -> None:
    poa.enable(pipe, case.pack, weight)
    with torch.inference_mode():
        case.run(pipe, SMALL)
    for size in (LARGE, SMALL):
        assert torch.equal(case.run(pipe, size), case.expected(size, weight))


def test_weights_of_inference_mode(case: PackCase) -> None:
    with torch.inference_mode():
        pipe = case.make()
    before = bits(pipe.unet)
    poa.prune(pipe, case.pack)
    assert torch.equal(case.run(pipe, LARGE), case.expected(LARGE, 1.0))
    poa.disable(pipe)
    assert bits(pipe.unet) == before


def test_dense_weights_that_were_loaded_meanwhile(case: PackCase, pipe: Any) -> None:
    before, dense = bits(pipe.unet), copy.deepcopy(pipe.unet.state_dict())
    poa.prune(pipe, case.pack, SMALL)
    pipe.unet.load_state_dict(dense)
    poa.disable(pipe)
    assert bits(pipe.unet) == before


def test_a_handle_that_was_taken_off_changes_nothing(case: PackCase, pipe: Any) -> None:
    before = bits(pipe.unet)
    handle = poa.enable(pipe, case.pack, 2.0)
    case.run(pipe, SMALL)
    poa.disable(pipe)
    handle.schedule = poa.Schedule(1.0)
    assert bits(pipe.unet) == before
    with raises(PoaError, "poa.prune"):
        poa.prune(pipe, case.baked[SMALL]).schedule = poa.Schedule(0.0)


# Which size.


def test_the_nearest_size_is_taken_and_said_once(case: PackCase, pipe: Any) -> None:
    poa.enable(pipe, case.pack)
    with pytest.warns(UserWarning, match="72x64"):
        near = case.run(pipe, Size(72, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(case.run(pipe, Size(72, 64)), near)
        case.run(pipe, SMALL)
        case.run(pipe, Size(72, 64))
    twin = case.make()
    poa.enable(twin, case.pack, size=SMALL)
    assert torch.equal(case.run(twin, Size(72, 64)), near)


@pytest.mark.parametrize("size", [Size(256, 256), Size(64, 160)])
@pytest.mark.parametrize("weight", [None, 1.0])
def test_far_sizes_stay_dense(size: Size, weight: float | None, case: PackCase, pipe: Any) -> None:
    dense = case.run(pipe, size)
    poa.enable(pipe, case.pack, weight)
    case.run(pipe, SMALL)
    with pytest.warns(UserWarning, match=f"{size}.*the model stays dense"):
        assert torch.equal(case.run(pipe, size), dense)
    assert torch.equal(case.run(pipe, SMALL), case.expected(SMALL, weight))


def test_the_native_size_stays_dense_and_others_take_the_nearest(case: PackCase) -> None:
    opened = open_pack(case.pack)
    assert opened.common.native == NATIVE
    assert choose(opened, Size(1024, 1024)).size is None
    assert "near the native size" in choose(opened, Size(1040, 1008)).note
    assert choose(opened, Size(144, 128)).size == LARGE
    assert choose(opened, Size(144, 128)).note
    assert choose(opened, LARGE) == Chosen(LARGE)
    with_native = replace(opened, variants={**opened.variants, NATIVE: opened.common})
    assert choose(with_native, NATIVE) == Chosen(NATIVE)


IDS = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(6.0), torch.arange(9.0), indexing="ij"), -1).reshape(
    -1, 3
)
REFERENCE = IDS + torch.tensor([1, 0, 40])
FLUX2 = torch.cat([IDS, torch.zeros(54, 1)], 1)
OTHER = FLUX2 + torch.tensor([10, 3, 3, 0])
PACKED = torch.zeros(1, 54, 64)


@pytest.mark.parametrize(
    ("args", "kwargs", "family", "factor", "expected"),
    [
        ((torch.zeros(2, 4, 8, 12),), {}, "sdxl", None, "96x64"),
        ((), {"sample": torch.zeros(2, 4, 8, 12)}, "sdxl", 8, "96x64"),
        ((), {"hidden_states": torch.zeros(1, 32, 16, 20)}, "sana-1600m", 32, "640x512"),
        ((), {"hidden_states": torch.zeros(1, 32, 16, 20)}, "sana-1600m", None, "640x512"),
        ((), {"hidden_states": torch.zeros(1, 16, 1, 8, 12)}, "cosmos2-2b", 8, "96x64"),
        ((), {"x": [torch.zeros(16, 1, 8, 12)], "t": 1}, "z-image", 8, "96x64"),
        (([torch.zeros(16, 1, 8, 12)],), {}, "z-image", None, "96x64"),
        ((), {"hidden_states": PACKED, "img_ids": IDS}, "flux-dev", 8, "144x96"),
        ((), {"hidden_states": PACKED, "img_ids": IDS}, "flux-dev", None, "144x96"),
        ((), {"hidden_states": PACKED, "img_ids": torch.cat([IDS, REFERENCE])}, "flux-dev", 8, "144x96"),
        ((), {"hidden_states": PACKED, "img_ids": FLUX2[None]}, "flux-2-dev", 8, "144x96"),
        ((), {"hidden_states": PACKED, "img_ids": torch.cat([FLUX2, OTHER])[None]}, "flux-2-dev", None, "144x96"),
        ((), {"hidden_states": PACKED, "img_shapes": [[(1, 6, 9)]] * 2}, "qwen-image", 8, "144x96"),
        ((), {"hidden_states": PACKED, "img_shapes": [[(1, 6, 9), (1, 20, 20)]]}, "qwen-image", None, "144x96"),
        ((), {"hidden_states": PACKED, "img_shapes": [(1, 6, 9)]}, "qwen-image", None, "144x96"),
        ((), {"hidden_states": torch.zeros(1, 16, 8, 12), "img_ids": IDS}, "hidream-i1", 8, "96x64"),
    ],
)
def test_the_size_is_that_of_the_whole_picture(
    args: Any, kwargs: Any, family: str, factor: int | None, expected: str
) -> None:
    """Without the reference pictures of edit models; a latent's cell is as large as the pipeline's VAE makes it."""

    class Pipe:
        vae_scale_factor = factor

    cells = cells_of(args, kwargs)
    assert cells
    assert str(picture_size(cells, by_id(family), Pipe())) == expected


def test_what_tells_no_size() -> None:
    assert cells_of((), {"hidden_states": PACKED}) is None
    assert cells_of((), {}) is None
    assert cells_of((torch.zeros(1, 4, 8, 8),), {}) == Cells(8, 8)


# Other sources.


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obs"])
def test_the_pruned_model_of_any_source(criterion: str, case: PackCase, pipe: Any) -> None:
    before = bits(pipe.unet)
    for source in (case.case.baked(criterion), poa.from_recipe(case.case.request(criterion))):
        twin = pruned_copy(SD15.make().unet, case.case.baked(criterion))
        handle = poa.prune(pipe, source)
        assert bits(pipe.unet) == bits(twin)
        assert handle.extra_bytes > 0
        poa.disable(pipe)
        assert bits(pipe.unet) == before


def test_a_pack_on_the_hub(case: PackCase, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HubLocation] = []

    def fetch(location: HubLocation, _variant: str | None) -> Path:
        asked.append(location)
        return case.pack

    monkeypatch.setattr(download, "fetch", fetch)
    poa.prune(pipe, "hf://org/name@v1/sd.crdiff")
    assert asked == [HubLocation("org/name", "sd.crdiff", "v1")]
    assert torch.equal(case.run(pipe, LARGE), case.expected(LARGE, 1.0))


def test_one_after_the_other(case: PackCase, pipe: Any) -> None:
    """Whatever is on the model, the next one compares the weights as they were loaded."""
    before = bits(pipe.unet)
    poa.prune(pipe, case.pack, SMALL)
    poa.prune(pipe, case.pack, LARGE)
    poa.enable(pipe, case.baked[SMALL], 1.5)
    poa.enable(pipe, case.pack)
    assert torch.equal(case.run(pipe, WIDE), case.expected(WIDE))
    handle = poa.enable(pipe, case.pack, 1.0)
    case.run(pipe, SMALL)
    handle.schedule = poa.Schedule(NUMBERS[SMALL][1])
    assert torch.equal(case.run(pipe, SMALL), case.expected(SMALL))
    handle.schedule = poa.Schedule(0.0)
    poa.disable(pipe)
    assert bits(pipe.unet) == before


# What is refused.


def changed(model: Any) -> None:
    model.get_submodule(LAYER).weight.view(-1)[1].add_(1e-3)


def merged(model: Any) -> None:
    weight = model.get_submodule(LAYER).weight
    weight.add_(0.001 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))


def pruned(model: Any) -> None:
    weight = model.get_submodule(LAYER).weight
    weight.masked_fill_(weight.abs() < weight.abs().mean(), 0)


@pytest.mark.parametrize("change", [changed, merged, pruned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_another_model_is_refused(change: Callable[[Any], None], dtype: torch.dtype, case: PackCase) -> None:
    """In every dtype that the base may be loaded in; the base itself is not."""
    pipe = case.make()
    change(pipe.unet)
    pipe.unet.to(dtype)
    with raises(PoaError, LAYER, case.pack.name):
        poa.prune(pipe, case.pack, SMALL)
    same = case.make()
    same.unet.to(dtype)
    poa.prune(same, case.pack, SMALL)
    assert same.unet.get_submodule(LAYER).weight.dtype == dtype


def test_other_packs_and_sizes_are_refused(case: PackCase, pipe: Any, tmp_path: Path) -> None:
    with raises(PackError, "640x640"):
        poa.enable(pipe, case.pack, size="640")
    with raises(PoaError, "64x64", "for one size"):
        poa.prune(pipe, case.baked[SMALL], SMALL)
    with raises(PoaError, "64 is no size"):
        poa.enable(pipe, case.pack, size=64)  # type: ignore[arg-type]
    nothing = write_pack(tmp_path / "nothing.crdiff", case.case.base, ratios=dict.fromkeys(("down", "mid", "up"), 0.0))
    with raises(PoaError, "prunes nothing"):
        poa.enable(pipe, nothing)
    with raises(PoaError, "is no source"):
        poa.prune(pipe, 3)  # type: ignore[arg-type]
    foreign = tmp_path / "foreign.crdiff"
    makers.write(foreign, {"a": ("F32", (1,), bytes(4))})
    with raises(PackError, "foreign.crdiff"):
        poa.enable(pipe, foreign)
    flux = KINDS["flux"].make()
    with raises(PoaError, "down_blocks", case.pack.name):
        poa.enable(flux, case.pack)
    assert not hasattr(pipe.unet, "crdiff_poa")


def test_a_call_that_tells_no_size(case: PackCase, pipe: Any) -> None:
    poa.enable(pipe, case.pack)
    with raises(PoaError, "size"):
        pipe.unet(torch.zeros(8, 8), 500, torch.zeros(1, 5, 768))


# In company.


def test_a_lora(case: PackCase, pipe: Any) -> None:
    """The pruned model and the whole LoRA, as on the exported file; fused into a pruned model it is refused."""
    pipe.load_lora_weights(lora())
    twin = case.make()
    twin.unet.load_state_dict(safetensors.torch.load_file(case.baked[SMALL]))
    twin.load_lora_weights(lora())
    poa.prune(pipe, case.pack)
    assert torch.equal(case.run(pipe, SMALL), case.run(twin, SMALL))
    pipe.fuse_lora()
    with raises(PoaError, LAYER.rpartition(".")[0]):
        poa.disable(pipe)
    pipe.unfuse_lora()


def test_a_model_that_is_cast_while_it_is_pruned(case: PackCase, pipe: Any) -> None:
    """Dense again, it is the dense model in the new dtype; and the next size prunes that."""
    poa.prune(pipe, case.pack, SMALL)
    pipe.to(torch.float16)
    poa.disable(pipe)
    twin = case.make().to(torch.float16)
    assert bits(pipe.unet) == bits(twin.unet)
    poa.prune(pipe, case.pack)
    pipe.to(torch.float32)
    poa.disable(pipe)
    assert bits(pipe.unet) == bits(twin.to(torch.float32).unet)


def test_a_lora_that_is_fused_before_the_first_step(case: PackCase, pipe: Any) -> None:
    """Nothing is pruned then."""
    poa.prune(pipe, case.pack)
    pipe.load_lora_weights(lora())
    pipe.fuse_lora()
    before = bits(pipe.unet)
    with raises(PoaError, "LoRA was fused"):
        case.run(pipe, SMALL)
    assert bits(pipe.unet) == before


def test_offloading(case: PackCase) -> None:
    """Of the whole model; layer by layer only once the size is settled."""
    expected = {size: case.expected(size, 1.0) for size in SIZES}
    for first in ("poa", "offload"):
        pipe = case.make()
        before = bits(pipe.unet)
        if first == "poa":
            poa.prune(pipe, case.pack)
        accelerate.cpu_offload_with_hook(pipe.unet, "cpu")
        if first == "offload":
            poa.prune(pipe, case.pack)
        for size in (SMALL, LARGE):
            assert torch.equal(case.run(pipe, size), expected[size])
        poa.disable(pipe)
        assert bits(pipe.unet) == before
    pipe, arguments = case.make(), inputs()
    poa.prune(pipe, case.pack, SMALL)
    with torch.no_grad():
        pruned_once = pipe.unet(*arguments)[0]
        accelerate.cpu_offload(pipe.unet, "cpu")
        assert torch.equal(pipe.unet(*arguments)[0], pruned_once)
    with raises(PoaError, "offloaded"):
        poa.disable(pipe)
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    poa.disable(pipe)
    assert bits(pipe.unet) == before
    poa.prune(pipe, case.pack)
    accelerate.cpu_offload(pipe.unet, "cpu")
    with raises(PoaError, "offloaded"):
        pipe.unet(*arguments)


@pytest.mark.parametrize("weight", [None, 1.0])
def test_group_offloading(weight: float | None, case: PackCase, pipe: Any) -> None:
    poa.enable(pipe, case.pack, weight)
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")
    for size in (SMALL, LARGE):
        assert torch.equal(case.run(pipe, size), case.expected(size, weight))


def test_a_model_that_is_pruned_or_follows_is_not_copied(case: PackCase, pipe: Any) -> None:
    for weight in (None, 1.0):
        poa.enable(pipe, case.pack, weight)
        with pytest.raises(PoaError):
            copy.deepcopy(pipe.unet)


@pytest.mark.parametrize("weight", [None, 1.0])
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_a_compiled_block_serves_every_size(weight: float | None, case: PackCase, pipe: Any) -> None:
    """Once its graphs are for any number of tokens, another size makes no new one."""
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    expected = {size: case.expected(size, weight) for size in SIZES}
    poa.enable(pipe, case.pack, weight)
    pipe.unet.get_submodule(LAYER.removesuffix(".attn1.to_q")).compile(backend=backend, dynamic=True)
    assert torch.allclose(case.run(pipe, SMALL), expected[SMALL], atol=1e-4)
    once = len(graphs)
    assert once > 0
    for size in (LARGE, WIDE, SMALL):
        assert torch.allclose(case.run(pipe, size), expected[size], atol=1e-4), size
    assert len(graphs) == once
    torch._dynamo.reset()
