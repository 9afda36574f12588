"""Refusals of POA: sources, weights and models that do not go together; and models that pass for the dense base."""

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import safetensors.torch
import torch

from crdiff_export import CrdiffError, ExportRequest, export
from crdiff_export.errors import CheckpointError, PoaError, VerifyError
from crdiff_export.sampling import poa
from tests.support import makers
from tests.support.messages import check, raises
from tests.support.poa_cases import LAYER, SD15, SIZE, Case, lora, sd15_with
from tests.support.tiny_pipelines import KINDS, sd15, sd_pipe

W = 1.7
BIAS = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias"


def refusal(pipe: Any, source: Any, weight: Any = W, **options: Any) -> CrdiffError:
    """The error of `poa.enable`, which leaves the model as it is."""
    before = copy.deepcopy(pipe.unet.state_dict()) if hasattr(pipe, "unet") else {}
    with pytest.raises(CrdiffError) as error:
        poa.enable(pipe, source, weight, **options)
    after = pipe.unet.state_dict() if hasattr(pipe, "unet") else {}
    assert all(torch.equal(after[name], weight) for name, weight in before.items() if not weight.is_meta)
    assert not hasattr(getattr(pipe, "unet", pipe), "crdiff_poa")
    return error.value


# Arguments.


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"weight": math.nan}, "nan"), ({"weight": math.inf}, "inf"), ({"weight": "2"}, "'2'"),
        ({"weight": True}, "True"),
        ({"start": 0.5, "stop": 0.5}, "0.5 to 0.5"), ({"start": -0.1}, "-0.1"), ({"stop": 1.1}, "1.1"),
        ({"start": math.nan}, "nan"), ({"mode": "fast"}, "'fast'"), ({"source": None}, "None"), ({"source": 3}, "3"),
        ({"source": {}}, "{}"),
    ],
)  # fmt: skip
def test_arguments(options: dict[str, Any], key: str, pipe: Any, baked: Path) -> None:
    check(refusal(pipe, **{"source": baked, **options}), PoaError, key)


def test_a_function_that_gives_no_number(pipe: Any, baked: Path) -> None:
    poa.enable(pipe, baked, lambda _: math.nan)
    with raises(PoaError, "nan"):
        SD15.run(pipe)


def test_a_handle_takes_no_other_values(pipe: Any, baked: Path) -> None:
    handle = poa.enable(pipe, baked, W)
    with raises(PoaError, "1.2"):
        handle.schedule = 1.2  # type: ignore[assignment]
    with raises(PoaError, "'fast'"):
        handle.mode = "fast"


# Files.


def changed(case: Case, change: Callable[[dict[str, torch.Tensor]], None], *, hashed: bool = True) -> Path:
    """A baked file that another tool has changed, with or without its hashes."""
    tensors = safetensors.torch.load_file(case.baked())
    change(tensors)
    metadata = {key: text for key, text in makers.metadata_of(case.baked()).items() if hashed or "hash" not in key}
    path = case.folder / "changed.safetensors"
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def merge(tensors: dict[str, torch.Tensor]) -> None:
    for weight in tensors.values():
        weight.mul_(0.5)


def change_another_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LAYER.replace("attn1", "attn2") + ".weight"] *= 0.5


FILES: dict[str, tuple[Callable[[Case], Path], type[CrdiffError], str]] = {
    "no header of ours": (lambda case: case.base, CheckpointError, "not made by crdiff"),
    "prunes nothing": (lambda case: case.baked(ratio=0.0), PoaError, "0"),
    "prunes nothing, masks": (lambda case: case.baked("random", ratio=0.0), PoaError, "0"),
    "missing": (lambda case: case.folder / "none.safetensors", CheckpointError, "none.safetensors"),
    "merged": (lambda case: changed(case, merge), VerifyError, "changed.safetensors"),
    "another layer was changed": (lambda case: changed(case, change_another_layer), VerifyError, "changed.safetensors"),
    "merged, without a hash": (lambda case: changed(case, merge, hashed=False), PoaError, "changed.safetensors"),
}


@pytest.mark.parametrize("file", FILES)
def test_files(file: str, pipe: Any, case: Case) -> None:
    make, kind, key = FILES[file]
    check(refusal(pipe, make(case)), kind, key)


def test_a_file_that_does_not_know_its_base(case: Case) -> None:
    with raises(PoaError, "--no-hash"):
        poa.from_baked(case.baked(hashing=False), str(case.base))


def test_a_recipe_with_a_cast(case: Case) -> None:
    with raises(PoaError, "fp16"):
        poa.from_recipe(case.request(dtype="fp16"))


# Models.


def of(change: Callable[[Any], object]) -> Callable[[], Any]:
    """A pipeline whose UNet was changed."""

    def make() -> Any:
        pipe = SD15.make()
        change(pipe)
        return pipe

    return make


def fuse_lora(pipe: Any) -> None:
    pipe.load_lora_weights(lora())
    pipe.fuse_lora()


def cast_layers(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def hook_layer(pipe: Any) -> None:
    accelerate.hooks.add_hook_to_module(pipe.unet.get_submodule(LAYER), accelerate.hooks.ModelHook())


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "another family": (KINDS["sdxl"].make, "down_blocks.0"),
    "another width": (lambda: sd_pipe(diffusers.StableDiffusionPipeline, sd15(block_out_channels=(16,) * 4)), "256"),
    "no model": (object, "object"),
    "a fused LoRA": (of(fuse_lora), "LoRA"),
    "fused projections": (of(lambda pipe: pipe.unet.fuse_qkv_projections()), "attn1"),
    "offloaded": (of(lambda pipe: accelerate.cpu_offload(pipe.unet, "cpu")), "offloaded"),
    "layerwise casting": (of(cast_layers), "float8_e4m3fn"),
    "a foreign hook": (of(hook_layer), LAYER),
}


@pytest.mark.parametrize("model", MODELS)
def test_models(model: str, baked: Path) -> None:
    make, key = MODELS[model]
    pipe = make()
    with raises(PoaError, key):
        poa.enable(pipe, baked, W)
    assert not hasattr(getattr(pipe, "unet", pipe), "crdiff_poa")


def test_halves_that_cannot_be_compared(pipe: Any, case: Case) -> None:
    pipe.unet.to(torch.bfloat16)
    check(refusal(pipe, case.baked(dtype="fp16")), PoaError, "F16", "bfloat16")


@pytest.mark.parametrize("stays", [True, False], ids=["a weight that stays", "one that is pruned"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_weights_of_another_model(criterion: str, stays: bool, case: Case) -> None:
    """A mask tells nothing of the weights that it prunes; a recipe knows the base."""
    pipe, file = SD15.make(), case.baked(criterion)
    pruned = safetensors.torch.load_file(file)[f"{LAYER}.weight"]
    index = (pruned != 0 if stays else pruned == 0).nonzero()[0]
    with torch.no_grad():
        pipe.unet.get_submodule(LAYER).weight[tuple(index)] += 1
    check(refusal(pipe, poa.from_recipe(case.request(criterion))), PoaError, LAYER)
    if stays or criterion == "magnitude":
        check(refusal(pipe, file), PoaError, LAYER)
    else:
        poa.enable(pipe, file)


@pytest.mark.parametrize("criterion", ["magnitude", "obs"])
def test_weights_that_are_pruned_already(criterion: str, case: Case) -> None:
    file = case.baked(criterion)
    check(refusal(sd15_with(file), file), PoaError, "pruned weights already")


def test_weights_that_are_trusted(pipe: Any, baked: Path) -> None:
    """The file's threshold prunes the changed weights."""
    pruned = sd15_with(baked)
    own, expected = (model.unet.get_submodule(LAYER).weight for model in (pipe, pruned))
    with torch.no_grad():
        own += 1  # far above the threshold, so that all weights of this layer stay
        expected.copy_(own)
    poa.enable(pipe, baked, 1, check=False)
    assert torch.equal(SD15.run(pipe), SD15.run(pruned))


def test_a_cache(tmp_path: Path) -> None:
    kind = KINDS["flux"]
    pipe = kind.make()
    base = kind.save(pipe, tmp_path)
    poa.enable(pipe, poa.from_recipe(ExportRequest(str(base), SIZE, ratio=0.4)), W)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with raises(PoaError, "FluxTransformer2DModel"):
        kind.run(pipe)


def test_what_is_refused_leaves_what_is_on(pipe: Any, baked: Path, tmp_path: Path) -> None:
    poa.enable(pipe, baked, W)
    expected = SD15.run(pipe)
    kind = KINDS["sdxl"]
    other_base = kind.save(kind.make(), tmp_path)
    for wrong in (tmp_path / "none", poa.from_recipe(ExportRequest(str(other_base), SIZE, ratio=0.4))):
        with pytest.raises(CrdiffError):
            poa.enable(pipe, wrong, 0.5)
    assert torch.equal(SD15.run(pipe), expected)


def test_a_copy(pipe: Any, baked: Path) -> None:
    poa.enable(pipe, baked, W)
    with raises(PoaError, "pickled"):
        copy.deepcopy(pipe.unet)
    with raises(PoaError, "pickled"):
        pickle.dumps(pipe.unet)


def test_a_lora_that_is_fused_later(pipe: Any, baked: Path) -> None:
    poa.enable(pipe, baked, W)
    pipe.load_lora_weights(lora())
    SD15.run(pipe)
    pipe.fuse_lora()
    with raises(PoaError, "LoRA"):
        SD15.run(pipe)


@pytest.mark.filterwarnings("ignore")
def test_a_batch_that_the_model_takes_apart(pipe: Any, baked: Path) -> None:
    """Perturbed-attention guidance gives a part of it to each layer."""
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    pag = diffusers.StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers=["up"])
    pag.set_progress_bar_config(disable=True)
    with poa.enabled(pag, baked, W, mode="batched"), raises(PoaError, "batch"):
        SD15.run(pag)
    plain = SD15.run(pag)
    with poa.enabled(pag, baked, W):
        result = SD15.run(pag)
    assert result.isfinite().all()
    assert not torch.equal(result, plain)


# Residuals.


@pytest.fixture
def residual(case: Case, tmp_path: Path) -> Path:
    """A file that was made with a residual."""
    request = replace(case.request(residual="sidecar"), output=tmp_path / "file.safetensors")
    return export(request).written.path


def test_fewer_bits_than_the_residual_has(residual: Path) -> None:
    pipe = sd15_with(residual)
    pipe.unet.to(torch.bfloat16)
    check(refusal(pipe, residual), PoaError, "file.safetensors", "bfloat16", "F32")


def test_a_residual_that_was_altered(residual: Path) -> None:
    with residual.with_suffix(".crdiff-residual").open("r+b") as file:
        file.seek(-1000, 2)
        file.write(b"\x11\x12")
    check(refusal(sd15_with(residual), residual), VerifyError, "file.crdiff-residual")


# The dense base, as far as a file tells.


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obs"])
def test_a_smaller_mask_is_seen_by_its_zeros(criterion: str, case: Case) -> None:
    smaller = sd15_with(case.baked(criterion, ratio=0.1))
    baked = case.baked(criterion)
    with pytest.warns(UserWarning, match=r"2\d% of the weights that .* prunes are zero in the model already") as warned:
        poa.enable(smaller, baked)
    assert warned[0].filename == __file__
    poa.enable(smaller, baked, check=False)
    poa.enable(SD15.make(), baked)


def test_a_base_that_is_sparse_itself_can_be_used(case: Case, tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(case.base)
    pruned = {
        name: torch.where(w.abs() < w.abs().median(), 0, w) if "attn1" in name else w for name, w in weights.items()
    }
    safetensors.torch.save_file(pruned, tmp_path / "sparse.safetensors")
    pipe = sd15_with(tmp_path / "sparse.safetensors")
    request = replace(case.request("random:seed=7"), base=str(tmp_path / "sparse.safetensors"))
    baked = export(replace(request, output=tmp_path / "baked.safetensors")).written.path
    with pytest.warns(UserWarning, match="Unless these zeros are its base's own"):
        poa.enable(pipe, baked)


def test_with_a_residual_every_weight_is_known(case: Case, pipe: Any, tmp_path: Path) -> None:
    file = case.baked("random", residual="sidecar")
    other = sd15_with(case.baked("random", ratio=0.1))
    check(refusal(other, file), PoaError, "the weights of")
    poa.enable(other, file, check=False)
    gone = safetensors.torch.load_file(file)[f"{LAYER}.weight"] == 0
    poa.enable(pipe, file)
    poa.disable(pipe)
    with torch.no_grad():
        pipe.unet.get_submodule(LAYER).weight[tuple(gone.nonzero()[0])] += 1
    check(refusal(pipe, file), PoaError, f"the weights of {LAYER}")
    elsewhere = tmp_path / "file.safetensors"
    elsewhere.write_bytes(file.read_bytes())
    poa.enable(pipe, elsewhere)
    elsewhere.with_suffix(".crdiff-residual").write_bytes(b"damaged")
    poa.enable(pipe, elsewhere)


@pytest.mark.parametrize(
    ("dtype", "cast"), [(torch.float32, None), (torch.float16, None), (torch.bfloat16, None), (torch.float32, "fp16")]
)
def test_of_moved_weights_the_biases_tell(dtype: torch.dtype, cast: str | None, case: Case, pipe: Any) -> None:
    file = case.baked("obs", dtype=cast)
    pipe.unet.to(dtype)
    poa.enable(pipe, file)
    poa.disable(pipe)
    with torch.no_grad():
        pipe.unet.get_parameter(BIAS)[0] += 1
    check(refusal(pipe, file), PoaError, BIAS.removesuffix(".bias"))
    poa.enable(pipe, case.baked("wanda"))
