"""POA on a model that was dequantised from scaled fp8: the mask is the file's, whatever the loader rounded to."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from crdiff_export import ExportRequest, Size, export
from crdiff_export.errors import PoaError
from crdiff_export.sampling import poa
from tests.support.messages import raises
from tests.support.poa_cases import two_models
from tests.support.tiny_pipelines import KINDS

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' Euler with NumPy 2

SD15, SIZE, W = KINDS["sd15"], Size(512, 512), 1.7
TARGETS = ("attn1.", "ff.net.")


class Case:
    """A pipeline with the dequantised weights of a scaled fp8 file, and exports of that file."""

    def __init__(self, folder: Path) -> None:
        self.pipe = SD15.make()
        stored: dict[str, torch.Tensor] = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
        self.loaded: dict[str, torch.Tensor] = {}
        for name, weight in self.pipe.unet.state_dict().items():
            if not (any(part in name for part in TARGETS) and name.endswith(".weight")):
                stored[name] = self.loaded[name] = weight
                continue
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[f"{name.removesuffix('.weight')}.scale_weight"] = scale
            self.loaded[name] = (stored[name].to(torch.bfloat16) * scale.to(torch.bfloat16)).float()
        self.base, self.codes = folder / "base.safetensors", stored
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in stored.items()}, self.base)
        self.pipe.unet.load_state_dict(self.loaded)
        self.baked = {
            way: export(ExportRequest(str(self.base), SIZE, folder / f"{way}.safetensors", ratio=0.4, residual=way))
            .written.path
            for way in ("none", "sidecar")
        }  # fmt: skip

    def pruned(self) -> Any:
        """A copy of the UNet without the weights whose code is zero in the file."""
        other = copy.deepcopy(self.pipe.unet)
        zeros = safetensors.torch.load_file(self.baked["none"])
        weights = {
            name: weight.masked_fill(zeros[name].float() == 0, 0.0) if zeros[name].itemsize == 1 else weight
            for name, weight in self.loaded.items()
        }
        other.load_state_dict(weights)
        return other


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("scaled"))


@pytest.fixture(autouse=True)
def _as_before(case: Case) -> Iterator[None]:
    yield
    poa.disable(case.pipe)
    case.pipe.unet.load_state_dict(case.loaded)


@pytest.mark.parametrize("way", ["none", "sidecar"])
def test_it_is_the_formula_of_two_models(way: str, case: Case) -> None:
    with two_models(case.pipe.unet, case.pruned(), W):
        expected = SD15.run(case.pipe)
    dense = SD15.run(case.pipe)
    poa.enable(case.pipe, case.baked[way], W)
    assert torch.equal(SD15.run(case.pipe), expected)
    assert not torch.equal(expected, dense)
    poa.enable(case.pipe, poa.from_recipe(ExportRequest(str(case.base), SIZE, ratio=0.4)), W)
    assert torch.equal(SD15.run(case.pipe), expected)


@pytest.mark.parametrize("way", ["none", "sidecar"])
def test_the_pruned_model_and_others_are_refused(way: str, case: Case) -> None:
    """No residual makes a dequantised model dense again."""
    case.pipe.unet.load_state_dict(case.pruned().state_dict())
    with raises(PoaError, f"{way}.safetensors"):
        poa.enable(case.pipe, case.baked[way], W)
    other = {name: weight * (1.02 if "attn1.to_q" in name else 1.0) for name, weight in case.loaded.items()}
    case.pipe.unet.load_state_dict(other)
    with raises(PoaError, "attn1.to_q", f"{way}.safetensors"):
        poa.enable(case.pipe, case.baked[way], W)


def test_codes_in_memory_are_refused(case: Case) -> None:
    """A model whose weights are the codes themselves is another one."""
    codes = {name: case.codes[name].float() for name in case.loaded}
    case.pipe.unet.load_state_dict(codes)
    with raises(PoaError, "base.safetensors"):
        poa.enable(case.pipe, case.baked["none"], W)
