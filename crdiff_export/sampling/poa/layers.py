"""The pruned layers of a model in memory: found by name, compared with the checkpoint, and made dense if necessary."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crdiff_export.bake.residual import OUTPUT_HASH
from crdiff_export.errors import CheckpointError, PoaError, VerifyError
from crdiff_export.formats.dtypes import torch_dtypes
from crdiff_export.formats.hashing import hash_data
from crdiff_export.formats.safetensors import show
from crdiff_export.progress import Silent
from crdiff_export.sampling.poa.checkpoint_tensors import (
    equal,
    matches,
    other_base,
    prunes_nothing,
    read_biases,
    read_weights,
    sparse_warning,
)
from crdiff_export.sampling.poa.masks import ReplacedWeights, holds
from crdiff_export.sampling.poa.source import Source
from crdiff_export.verify import BakedCheckpoint, check_residuals, check_sidecars, dense_weights, find_residuals


def find(model: nn.Module, source: Source) -> dict[str, nn.Linear]:
    """Find every layer that the source prunes, by diffusers' name of its weight; PoaError if one cannot be pruned."""
    if not source.masks.diffusers:
        raise prunes_nothing(source.path)
    found = {name: find_layer(model, name, source.path, source.masks.family) for name in source.masks.diffusers}
    for name, parts in source.masks.diffusers.items():
        if (count := found[name].weight.numel()) != parts[0].stop:
            raise PoaError(
                f"{name.removesuffix('.weight')}: has {count} weights, that of {source.path} {parts[0].stop}",
                "Load the base that it was made from; `crdiff inspect` names it.",
            )
    return found


def find_layer(model: nn.Module, name: str, where: Path, family: str) -> nn.Linear:
    """Find one layer of a model.

    Args:
        model: The UNet or transformer.
        name: Diffusers' name of the layer's weight.
        where: The file that names it, for messages.
        family: The id of the model's family, for messages.

    Returns:
        The layer; a LoRA's own base layer, where it has one.

    Raises:
        PoaError: The model has no such layer, or it cannot be pruned in memory.
    """
    path = name.removesuffix(".weight")
    try:
        layer: Any = model.get_submodule(path)
    except AttributeError:
        layer = None
    if hasattr(layer, "get_base_layer"):  # a LoRA's (peft)
        if layer.merged:
            raise PoaError(
                f"{path}: a LoRA is fused into it, so that its weights are not the base's",
                "Call pipe.unfuse_lora() first, or load the LoRA without fusing it.",
            )
        layer = layer.get_base_layer()
    if layer is None or not hasattr(layer, "weight"):
        raise PoaError(
            f"{type(model).__name__} has no layer {path}, {where} is of the family {family}",
            "Load the base that it was made from; `crdiff inspect` names it.",
        )
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point() or layer.weight.itemsize == 1:
        raise PoaError(
            f"{path}: {type(layer).__name__} with {layer.weight.dtype} weights cannot be pruned on the fly",
            "Load the model unquantised, in fp16, bf16 or fp32.",
        )
    if layer.weight.is_meta:
        raise PoaError(
            f"{path}: its weights are offloaded, layer by layer", "Enable POA first, then sequential offloading."
        )
    if getattr(model.get_submodule(path.rpartition(".")[0]), "fused_projections", False):
        raise PoaError(f"{path}: is fused with its neighbours", "Call pipe.unfuse_qkv_projections() first.")
    return layer


class _Comparison(NamedTuple):
    """A layer's weights compared with those in the checkpoint.

    Attributes:
        dense: Whether they may be the dense weights, as far as the checkpoint tells.
        pruned: Whether they are the weights of a baked file.
        gone: How many weights of the baked file are zero.
        zeros: How many of these are zero in the layer, too.
    """

    dense: bool
    pruned: bool
    gone: int = 0
    zeros: int = 0


def make_dense(layers: Mapping[str, nn.Linear], source: Source, *, check: bool = True) -> bool:
    """Compare the layers with the source's checkpoint, and restore dense weights from its residual if they are pruned.

    Args:
        layers: The pruned layers, by diffusers' name of their weight.
        source: The source.
        check: Whether to compare pruned elements with the residual, too, and to warn of zeros.

    Returns:
        Whether dense weights were restored; pruning then gives back the weights as they were.

    Raises:
        PoaError: The weights are neither dense nor pruned.
        VerifyError: The baked file does not hash to the value in its header.

    """
    baked = source.baked
    if baked:
        _check_file(layers, source, baked)
    results = {
        name: _compare(layers[name].weight, weights, source, name, target.scale)
        for target, weights in read_weights(source.plan)
        if (name := target.layer.diffusers) in layers
    }
    are_pruned = baked is not None and all(result.pruned for result in results.values())
    not_dense = [name for name, result in results.items() if not result.dense]
    if not_dense and not are_pruned:
        raise _other(next((name for name in not_dense if not results[name].pruned), not_dense[0]), source)
    if baked is None:
        return False
    if are_pruned:
        _restore(layers, source, baked)
        return True
    if not check:
        return False
    if baked.stamp.moved:
        _check_biases(layers, source, baked)
    if source.has_residual and not source.plan.has_scales and _are_all_dense(layers, source, baked):
        return False
    gone, zeros = sum(result.gone for result in results.values()), sum(result.zeros for result in results.values())
    if text := sparse_warning(zeros, gone, baked):
        warnings.warn(text, stacklevel=4)  # the caller of `poa.enable`
    return False


def _other(name: str, source: Source) -> PoaError:
    return other_base(name, source.path, source.base if source.baked else None)


def _check_biases(layers: Mapping[str, nn.Linear], source: Source, baked: BakedCheckpoint) -> None:
    """Compare the biases with the file's: where weights were moved, only the biases are those of the base."""
    for target, stored in read_biases(baked.plan):
        name = target.layer.diffusers
        bias = layers[name].bias if name in layers else None
        if bias is None:
            continue
        narrow = stored.dtype if baked.stamp.cast else bias.dtype
        if not equal(bias.detach().to(narrow).float(), stored.to(bias.device, narrow).float()).all():
            raise _other(name, source)


def _are_all_dense(layers: Mapping[str, nn.Linear], source: Source, baked: BakedCheckpoint) -> bool:
    """Compare all weights with the residual; False if a sidecar is missing or damaged, so that nothing is known."""
    try:
        check_sidecars(find_residuals(baked), Silent())
    except (CheckpointError, VerifyError):
        return False
    for name, weight, dense in _from_residual(layers, baked):
        if not equal(weight, dense).all():
            raise _other(name, source)
    return True


def _check_file(layers: Mapping[str, nn.Linear], source: Source, baked: BakedCheckpoint) -> None:
    """Refuse files that cannot be compared with the model, and files that were changed."""
    for name, layer in layers.items():
        dtype = source.masks.diffusers[name][0].dtype
        if baked.stamp.cast and not holds(layer.weight.dtype, dtype):
            raise PoaError(
                f"{source.path}: was cast to {dtype}, the model is in {layer.weight.dtype}; they cannot be compared",
                "Load the model in the file's dtype or in fp32, or give check=False.",
            )
    for file in baked.checkpoint.files:
        expected = file.metadata.get(OUTPUT_HASH)
        if expected and expected != (actual := f"0x{hash_data(file, Silent())}"):
            raise VerifyError(
                f"{file.path}: its bytes hash to {actual}, its header says {show(expected)}",
                "It was merged, altered or damaged since; export it again from its base.",
            )


def _compare(weight: Tensor, stored: Tensor, source: Source, name: str, scale: float | None) -> _Comparison:
    stored, loaded = stored.to(weight.device), weight.detach().reshape(-1)
    same = matches(loaded, stored, scale)
    is_same = bool(same.all())
    if source.baked is None:
        return _Comparison(dense=is_same, pruned=False)
    part, gone = source.masks.diffusers[name][0], (stored.float() if stored.itemsize == 1 else stored) == 0
    # Eight bits round small weights to zero, so zeros tell nothing.
    zeros = 0 if stored.itemsize == 1 else int((gone & (loaded == 0)).sum())
    if isinstance(part, ReplacedWeights):  # the file's weights do not tell the dense ones
        return _Comparison(True, is_same, int(gone.sum()), zeros)
    if source.baked.stamp.cast:  # the file has the base's weights as the cast rounded them
        same = loaded.to(stored.dtype) == stored
    return _Comparison(bool(torch.where(gone, part.fits(loaded), same).all()), is_same, int(gone.sum()), zeros)


@torch.no_grad()
def _restore(layers: Mapping[str, nn.Linear], source: Source, baked: BakedCheckpoint) -> None:
    """Put the dense weights of the residual into layers that have the pruned ones."""
    if not source.has_residual:
        raise PoaError(
            f"the model holds the pruned weights already, and {source.path} has no residual to make them dense",
            f"Load the base, {show(source.base)}"
            + ("." if source.plan.has_scales else ", or export with --residual embed."),
        )
    if source.plan.has_scales:
        raise PoaError(
            f"the model holds the pruned weights already, and {source.path} has a residual of fp8 codes with a scale",
            f"Load the base, {show(source.base)}.",
        )
    for name, layer in layers.items():
        if not holds(layer.weight.dtype, dtype := source.masks.diffusers[name][0].dtype):
            raise PoaError(
                f"the model is loaded in {layer.weight.dtype}, the residual of {source.path} is {dtype}",
                "Load it in the file's own dtype, or in fp32.",
            )
    check_residuals(baked, Silent())  # before the first weight changes
    for _, weight, dense in _from_residual(layers, baked):
        weight.copy_(dense)


def _from_residual(layers: Mapping[str, nn.Linear], baked: BakedCheckpoint) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each layer's name, its weights, and the dense weights of the residual, both of one shape and dtype."""
    for target, bits in dense_weights(baked):
        name = target.layer.diffusers
        if name in layers:
            weight = layers[name].weight.detach()
            dense = torch.frombuffer(bytearray(bits.tobytes()), dtype=torch_dtypes()[target.source.dtype])
            yield name, weight, dense.to(weight.device, weight.dtype).view_as(weight)
