"""The pruned layers of a model in memory: found by name, held against the checkpoint, made dense where they are not."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crdiff_export.bake.residual import OUTPUT_HASH
from crdiff_export.errors import CheckpointError, PoaError, VerifyError
from crdiff_export.formats.hashing import hash_data
from crdiff_export.formats.safetensors import show
from crdiff_export.progress import Silent
from crdiff_export.prune.layer_names import diffusers_name
from crdiff_export.prune.plan import Target
from crdiff_export.sampling.poa import stored
from crdiff_export.sampling.poa.masks import Own, Part, dtypes, holds
from crdiff_export.sampling.poa.source import Source
from crdiff_export.verify.reopen import BakedCheckpoint
from crdiff_export.verify.residual_reader import check_residuals, check_sidecars, dense_weights, find_residuals


def find(model: nn.Module, source: Source) -> dict[str, nn.Linear]:
    """Every layer that the source prunes, by diffusers' name for its weight; PoaError where the model has no such."""
    if not source.masks.diffusers:
        raise PoaError(
            f"{source.path}: prunes nothing, as all of its ratios are 0",
            "Its pruned model is the dense one; take a file or a recipe that prunes something.",
        )
    return {name: _layer(model, name, parts[0], source) for name, parts in source.masks.diffusers.items()}


def _layer(model: nn.Module, name: str, part: Part, source: Source) -> nn.Linear:
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
            f"{type(model).__name__} has no layer {path}, {source.path} is of the family {source.masks.family}",
            "Load the base that it was made from; `crdiff inspect` names it.",
        )
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point() or layer.weight.itemsize == 1:
        raise PoaError(
            f"{path}: {type(layer).__name__} with {layer.weight.dtype} weights cannot be pruned on the fly",
            "Load the model unquantised, in fp16, bf16 or fp32.",
        )
    if layer.weight.numel() != part.stop:
        raise PoaError(
            f"{path}: has {layer.weight.numel()} weights, that of {source.path} {part.stop}",
            "Load the base that it was made from; `crdiff inspect` names it.",
        )
    if layer.weight.is_meta:
        raise PoaError(
            f"{path}: its weights are offloaded, layer by layer", "Enable POA first, then sequential offloading."
        )
    if getattr(model.get_submodule(path.rpartition(".")[0]), "fused_projections", False):
        raise PoaError(f"{path}: is fused with its neighbours", "Call pipe.unfuse_qkv_projections() first.")
    return layer


class _State(NamedTuple):
    """Whether a layer holds the dense weights, as far as those stored tell, and whether it holds just those stored.

    Of the stored weights that may have been pruned, `gone`, as many are zero in the layer, too.
    """

    dense: bool
    pruned: bool
    gone: int
    zeros: int


def make_dense(layers: Mapping[str, nn.Linear], source: Source, *, check: bool = True) -> bool:
    """Hold the layers against the source's checkpoint, and fill them from its residual if they are the pruned ones.

    True if they were filled; pruning then gives back what they were. Without `check`, which is then for those that may
    have to be filled, what was pruned away is not held against the residual, nor looked at for zeros. PoaError if they
    are neither dense nor pruned, VerifyError for a file that does not hash to what its header says: it was merged or
    altered since.
    """
    if source.baked:
        _check_file(layers, source, source.baked)
    states = {
        name: _state(layers[name].weight, weights, source, name)
        for target, weights in stored.weights(source.plan)
        if (name := diffusers_name(source.plan, target)) in layers
    }
    wrong = next((name for name, state in states.items() if not (state.dense or state.pruned)), None)
    are_pruned = source.baked is not None and all(state.pruned for state in states.values())
    if wrong or not (are_pruned or all(state.dense for state in states.values())):
        raise _other(wrong or next(name for name, state in states.items() if not state.dense), source)
    if source.baked is None:
        return False
    if are_pruned:
        _fill(layers, source)
        return True
    if not check:
        return False
    if source.baked.stamp.moved:
        _check_biases(layers, source, source.baked)
    if source.has_residual and _are_all_dense(layers, source, source.baked):
        return False
    gone, zeros = sum(state.gone for state in states.values()), sum(state.zeros for state in states.values())
    if text := stored.sparse(zeros, gone, source.baked):
        warnings.warn(text, stacklevel=_level())
    return False


def _level() -> int:
    """How far up from who asks the caller is who is neither of this package nor what opens a `with` block."""
    inside = str(Path(__file__).parents[2]), contextlib.__file__
    asking = inspect.currentframe()
    frame, level = asking and asking.f_back, 1
    while frame and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


def _other(name: str, source: Source) -> PoaError:
    path = name.removesuffix(".weight")
    return PoaError(
        f"the weights of {path} are not those of {show(source.base)}, which {source.path} was made from"
        if source.baked else f"the weights of {path} are not those of {source.path}",
        "Load that base, unfused and as it was published, then enable POA.",
    )  # fmt: skip


def _check_biases(layers: Mapping[str, nn.Linear], source: Source, baked: BakedCheckpoint) -> None:
    """PoaError unless the biases are the file's, which has those of its base where it has moved the weights."""
    for target, kept in stored.biases(baked.plan):
        name = diffusers_name(baked.plan, target)
        own = layers[name].bias if name in layers else None
        if own is None:
            continue
        theirs, mine = kept.to(own.device), own.detach()
        mine, theirs = (mine.to(theirs.dtype), theirs) if baked.stamp.cast else (mine, theirs.to(mine.dtype))
        if not _same(mine.float(), theirs.float()).all():
            raise _other(name, source)


def _are_all_dense(layers: Mapping[str, nn.Linear], source: Source, baked: BakedCheckpoint) -> bool:
    """Whether what was pruned away is there, too, as the residual has it: PoaError if not.

    False where nothing tells, because the residual is a sidecar that is elsewhere.
    """
    try:
        check_sidecars(find_residuals(baked), Silent())
    except (CheckpointError, VerifyError):
        return False
    for name, weight, dense in _from_residual(layers, baked):
        if not _same(weight, dense).all():
            raise _other(name, source)
    return True


def _check_file(layers: Mapping[str, nn.Linear], source: Source, baked: BakedCheckpoint) -> None:
    """Refuse what a comparison would find wrong for another reason than it says."""
    for name, layer in layers.items():
        kept = source.masks.diffusers[name][0].dtype
        if baked.stamp.cast and not holds(layer.weight.dtype, kept):
            raise PoaError(
                f"{source.path}: was cast to {kept}, the model is in {layer.weight.dtype}; they cannot be compared",
                "Load the model in the file's dtype or in fp32, or give check=False.",
            )
    for file in baked.checkpoint.files:
        said = file.metadata.get(OUTPUT_HASH)
        if said and said != (actual := f"0x{hash_data(file, Silent())}"):
            raise VerifyError(
                f"{file.path}: its bytes hash to {actual}, its header says {show(said)}",
                "It was merged, altered or damaged since; export it again from its base.",
            )


def _state(weight: Tensor, kept: Tensor, source: Source, name: str) -> _State:
    kept, own = kept.to(weight.device), weight.detach().reshape(-1)
    same = _same(own, kept.to(own.dtype))
    if source.baked is None:
        return _State(bool(same.all()), False, 0, 0)
    part, dense, gone = source.masks.diffusers[name][0], same, _are_zero(kept)
    # Of eight bits small ones are zero, too.
    zeros = 0 if kept.itemsize == 1 else int((gone & (own == 0)).sum())
    counts = int(gone.sum()), zeros
    if isinstance(part, Own):  # nothing in its weights tells what they were
        return _State(True, bool(same.all()), *counts)
    if source.baked.stamp.cast:  # of the base it has what the cast has left
        dense = own.to(kept.dtype) == kept
    return _State(bool(torch.where(gone, part.fits(own), dense).all()), bool(same.all()), *counts)


def _same(one: Tensor, other: Tensor) -> Tensor:
    return (one == other) | (one.isnan() & other.isnan())


def _are_zero(kept: Tensor) -> Tensor:
    return (kept.float() if kept.itemsize == 1 else kept) == 0


@torch.no_grad()
def _fill(layers: Mapping[str, nn.Linear], source: Source) -> None:
    """Put the dense weights from the residual into layers that hold the pruned ones."""
    assert source.baked is not None
    if not source.has_residual:
        raise PoaError(
            f"the model holds the pruned weights already, and {source.path} has no residual to make them dense",
            f"Load the base, {show(source.base)}, or export with --residual embed.",
        )
    for name, weight in ((name, layer.weight) for name, layer in layers.items()):
        if not holds(weight.dtype, kept := source.masks.diffusers[name][0].dtype):
            raise PoaError(
                f"the model is loaded in {weight.dtype}, the residual of {source.path} is {kept}",
                "Load it in the file's own dtype, or in fp32.",
            )
    check_residuals(source.baked, Silent())  # half a residual would leave the model half filled
    for _, weight, dense in _from_residual(layers, source.baked):
        weight.copy_(dense)


def _from_residual(layers: Mapping[str, nn.Linear], baked: BakedCheckpoint) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every layer's name and weights, and as the residual has them."""
    for target, dense in dense_weights(baked):
        name = diffusers_name(baked.plan, target)
        if name in layers:
            weight = layers[name].weight.detach()
            yield name, weight, _tensor(dense, target).to(weight.device, weight.dtype).view_as(weight)


def _tensor(bits: Any, target: Target) -> Tensor:
    return torch.frombuffer(bytearray(bits.tobytes()), dtype=dtypes()[target.source.dtype])
