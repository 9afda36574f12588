"""POA while sampling, against two models and the formula, for every kind of pipeline."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from crdiff_export import ExportRequest, Size, export
from crdiff_export.sampling import poa
from tests.support.tiny_pipelines import KINDS, Kind

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' Euler with NumPy 2

W = 1.7
RATIO = 0.4


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def pipe(kind: Kind) -> Any:
    return kind.make()


@pytest.fixture(scope="module")
def baked(kind: Kind, pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return bake(kind.save(pipe, folder), folder)


@pytest.fixture(autouse=True)
def _nothing_left(pipe: Any) -> Iterator[None]:
    yield
    poa.disable(pipe)


def bake(base: Path, folder: Path, **asked: Any) -> Path:
    return export(
        ExportRequest(str(base), Size(512, 512), folder / "baked.safetensors", ratio=RATIO, **asked)
    ).written.path


def model_of(kind: Kind, pipe: Any) -> torch.nn.Module:
    model: torch.nn.Module = getattr(pipe, kind.part)
    return model


def pruned_copy(model: torch.nn.Module, baked: Path) -> torch.nn.Module:
    """A second model, with the file's weights; an adapter's are the model's own."""
    other = copy.deepcopy(model)
    weights = safetensors.torch.load_file(baked)
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("_ip" in name or "image_proj" in name for name in missing)
    return other


def two_models(model: torch.nn.Module, other: torch.nn.Module, weight: float) -> Callable[..., Any]:
    """The public code's way (POAUnetWrapper): both predict, the formula mixes."""
    dense = type(model).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        ours = dense(model, *copy.copy(args), **copy.copy(kwargs))[0]
        theirs = dense(other, *args, **kwargs)[0]
        return ((1 - weight) * ours + weight * theirs,)

    return forward


def test_it_is_the_formula_of_two_models(kind: Kind, pipe: Any, baked: Path) -> None:
    model = model_of(kind, pipe)
    other = pruned_copy(model, baked)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    plain = kind.run(pipe, 2)
    for batch, options in ((2, {}), (1, kind.unguided)):
        poa.enable(pipe, baked, W)
        found = kind.run(pipe, batch, **options)
        poa.disable(pipe)
        model.forward = two_models(model, other, W)
        expected = kind.run(pipe, batch, **options)
        del model.forward
        assert torch.equal(found, expected)
        assert batch == 1 or not torch.equal(found, plain)
    assert torch.equal(kind.run(pipe, 2), plain)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not any(len(m._forward_hooks) or len(m._forward_pre_hooks) for m in model.modules())
    assert not any("forward" in vars(m) or vars(m).get("crdiff_poa") for m in model.modules())


def test_weight_0_is_the_dense_model_and_1_the_baked_file(kind: Kind, pipe: Any, baked: Path) -> None:
    model = model_of(kind, pipe)
    plain = kind.run(pipe)
    poa.enable(pipe, baked, 0)
    assert torch.equal(kind.run(pipe), plain)
    poa.enable(pipe, baked, 1)
    found = kind.run(pipe)
    poa.disable(pipe)
    other = pruned_copy(model, baked)
    model.forward = lambda *args, **kwargs: type(model).forward(other, *args, **kwargs)
    expected = kind.run(pipe)
    del model.forward
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("weight", [1, W])
def test_kept_weights_give_the_same_and_follow_the_model(kind: Kind, pipe: Any, baked: Path, weight: float) -> None:
    model = model_of(kind, pipe)
    poa.enable(pipe, baked, weight)
    expected = kind.run(pipe)
    on = poa.enable(pipe, baked, weight, keep=True)
    assert torch.equal(kind.run(pipe), expected)
    pruned: list[Any] = [model.get_submodule(name.removesuffix(".weight")) for name in on.source.masks.diffusers]
    assert on.extra_bytes == sum(layer.weight.nbytes for layer in pruned)
    with torch.no_grad():  # whoever changes a weight in the meantime gets what it gives pruned
        pruned[0].weight.mul_(-1)
    changed = kind.run(pipe)
    poa.enable(pipe, baked, weight, check=False)
    assert torch.equal(kind.run(pipe), changed)
    assert not torch.equal(changed, expected)
    with torch.no_grad():
        pruned[0].weight.mul_(-1)
    poa.disable(pipe)


def test_batched_it_is_the_same_but_for_rounding(kind: Kind, pipe: Any, baked: Path) -> None:
    calls: list[int] = []
    names = ("time_embedding", "time_text_embed.timestep_embedder")
    embedding = next(module for name, module in model_of(kind, pipe).named_modules() if name in names)
    handle = embedding.register_forward_hook(lambda *_: calls.append(1))
    poa.enable(pipe, baked, W)
    expected = kind.run(pipe, 2)
    once = len(calls)
    poa.enable(pipe, baked, W, mode="batched")
    found = kind.run(pipe, 2)
    handle.remove()
    assert (len(calls) - once) * 2 == once
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
