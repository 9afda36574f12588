"""Which models pass for the dense base of a file, where all that the file tells is what it has kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from crdiff_export.errors import PoaError
from crdiff_export.sampling import poa
from tests.sampling.test_poa_zeros import LAYER, SD15, Made

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' Euler with NumPy 2

BIAS = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made("sd15", tmp_path_factory.mktemp("dense"))


@pytest.fixture
def pipe() -> Iterator[Any]:
    found = SD15.make()
    yield found
    poa.disable(found)


def holding(path: Path) -> Any:
    """A pipeline with the weights of a file."""
    pipe = SD15.make()
    pipe.unet.load_state_dict(safetensors.torch.load_file(path))
    return pipe


@pytest.mark.parametrize("criterion", ["magnitude", "random", "wanda", "obs"])
def test_a_smaller_mask_is_seen_by_its_zeros(criterion: str, made: Made) -> None:
    calibration = {} if criterion in ("wanda", "obs") else {"calibration": None}
    smaller = holding(made.baked(criterion, ratio=0.1, **calibration))
    baked = made.baked(criterion, **calibration)
    with pytest.warns(UserWarning, match=r"2\d% of the weights that .* prunes are zero in the model already") as said:
        poa.enable(smaller, baked)
    assert said[0].filename == __file__
    poa.disable(smaller)
    with pytest.warns(UserWarning, match="zero in the model already") as said, poa.enabled(smaller, baked):
        pass
    assert said[0].filename == __file__
    poa.enable(smaller, baked, check=False)
    poa.enable(SD15.make(), baked)


def test_a_base_that_is_sparse_itself_can_be_used(made: Made, tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(made.base)
    pruned = {
        name: torch.where(w.abs() < w.abs().median(), 0, w) if "attn1" in name else w for name, w in weights.items()
    }
    safetensors.torch.save_file(pruned, tmp_path / "sparse.safetensors")
    pipe = holding(tmp_path / "sparse.safetensors")
    base = made.base
    made.base = tmp_path / "sparse.safetensors"
    try:
        baked = made.baked("random:seed=7")
    finally:
        made.base = base
    with pytest.warns(UserWarning, match="Unless these zeros are its base's own"):
        poa.enable(pipe, baked)


def test_with_a_residual_every_weight_is_known(made: Made, pipe: Any, tmp_path: Path) -> None:
    kept = made.baked("random", calibration=None, residual="sidecar")
    other = holding(made.baked("random", calibration=None, ratio=0.1))
    with pytest.raises(PoaError, match=r"the weights of .* are not those of") as caught:
        poa.enable(other, kept)
    assert caught.value.hint
    poa.enable(other, kept, check=False)
    gone = safetensors.torch.load_file(kept)[f"{LAYER}.weight"] == 0
    poa.enable(pipe, kept)
    poa.disable(pipe)
    with torch.no_grad():
        pipe.unet.get_submodule(LAYER).weight[tuple(gone.nonzero()[0])] += 1
    with pytest.raises(PoaError, match=f"the weights of {LAYER} are not those of"):
        poa.enable(pipe, kept)
    elsewhere = tmp_path / "kept.safetensors"
    elsewhere.write_bytes(kept.read_bytes())
    poa.enable(pipe, elsewhere)
    elsewhere.with_suffix(".crdiff-residual").write_bytes(b"damaged")
    poa.enable(pipe, elsewhere)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_of_moved_weights_the_biases_tell(dtype: torch.dtype, made: Made, pipe: Any) -> None:
    pipe.unet.to(dtype)
    poa.enable(pipe, made.baked("obs"))
    poa.disable(pipe)
    with torch.no_grad():
        pipe.unet.get_parameter(BIAS)[0] += 1
    with pytest.raises(PoaError, match=f"the weights of {BIAS.removesuffix('.bias')} are not those of"):
        poa.enable(pipe, made.baked("obs"))
    poa.enable(pipe, made.baked("wanda"))


def test_the_biases_of_a_file_that_was_cast(made: Made, pipe: Any) -> None:
    poa.enable(pipe, made.baked("obs", dtype="fp16"))
    with torch.no_grad():
        pipe.unet.get_parameter(BIAS)[0] += 1
    with pytest.raises(PoaError, match="are not those of"):
        poa.enable(pipe, made.baked("obs", dtype="fp16"))
