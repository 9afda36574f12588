"""Whether a model in ComfyUI is the one that a baked file was made from, and its masks by ComfyUI's names."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crdiff_export.errors import CrdiffError, PoaError
from crdiff_export.formats import dtypes
from crdiff_export.formats.dtypes import torch_dtypes
from crdiff_export.formats.safetensors import show
from crdiff_export.prune.plan import Plan
from crdiff_export.sampling.poa.checkpoint_tensors import (
    equal,
    other_base,
    prunes_nothing,
    read_biases,
    read_weights,
    sparse_warning,
)
from crdiff_export.sampling.poa.masks import MaskPart, Masks, Part, ReplacedWeights, holds
from crdiff_export.verify import BakedCheckpoint, open_baked, read_decision

if TYPE_CHECKING:
    from torch import Tensor

# ComfyUI's prefix of a tensor's name in the original layout.
PREFIX = "diffusion_model."
# Elements of each layer that are compared; another model differs in all of its layers.
SAMPLE = 1 << 14
_log = logging.getLogger(__name__)

# The parts of every pruned weight by its key in ComfyUI's model.
Parts = dict[str, tuple[Part, ...]]


class PrunedError(PoaError):
    """The model is the pruned one already."""


def find(weights: Mapping[str, Any], files: Iterable[Path]) -> tuple[BakedCheckpoint, Parts]:
    """Find the one baked file that was made from a model, and the model's parts; PoaError if not exactly one was."""
    fitting = []
    for file in files:
        try:
            baked = open_baked(file)
            if not baked.stamp.moved:  # only its biases are compared, and other models may have the same
                fitting.append((baked, model_parts(weights, baked)))
        except PrunedError:
            raise
        except CrdiffError:  # damaged, or made from another model
            continue
    if len(fitting) != 1:
        names = ", ".join(baked.checkpoint.path.name for baked, _ in fitting)
        raise PoaError(
            f"{len(fitting)} of ComfyUI's models were made from the loaded one by crdiff: {names}"
            if fitting else "none of ComfyUI's models was made from the loaded one by crdiff",
            "Choose one by its name." if fitting else "Make one with `crdiff export`, or load the base of one.",
        )  # fmt: skip
    return fitting[0]


def model_parts(weights: Mapping[str, Any], baked: BakedCheckpoint) -> Parts:
    """Make the parts of every pruned weight for a model as it was loaded.

    Args:
        weights: The model's own weights, without patches.
        baked: The baked file.

    Returns:
        The parts by the weight's key in the model.

    Raises:
        PoaError: The weights are not those of the file's base. Where weights were moved, only biases are compared.

    """
    sizes, scales = _sizes(baked.plan), {t.layer.original[0]: t.scale for t in baked.plan.targets}
    if not sizes:
        raise prunes_nothing(baked.checkpoint.path)
    loaded = {name: _weight(weights, name, size, scales[name], baked) for name, size in sizes.items()}
    reads_all = baked.stamp.masked or baked.plan.has_scales
    thresholds = None if reads_all else Masks.of(baked.plan, read_decision(baked))
    _check(weights, baked, thresholds)
    masks = thresholds or Masks.of(baked.plan, read_decision(baked))  # reads all of a file, so only if it fits
    return {
        PREFIX + name: tuple(_as_loaded(part, loaded[name]) for part in parts) for name, parts in masks.original.items()
    }


def _sizes(plan: Plan) -> dict[str, int]:
    """Return the pruned weights by their name in the original layout, and how many elements each has at least."""
    sizes: dict[str, int] = {}
    for target in plan.targets:
        if plan.scopes[target.scope].rank:
            name = target.layer.original[0]
            sizes[name] = max(sizes.get(name, 0), target.layer.original_start(target.count) + target.count)
    return sizes


def _is_plain(weight: Any) -> bool:
    """Whether this is a float tensor; subclasses are quantised tensors of other nodes."""
    import torch

    return type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.dtype in (
        *torch_dtypes().values(), torch.float64,
    )  # fmt: skip


def _is_scaled(weight: Any, scale: float) -> bool:
    """Whether this is ComfyUI's own tensor of fp8 codes with this scale (comfy_kitchen's `QuantizedTensor`)."""
    codes, own = _codes(weight), getattr(getattr(weight, "_params", None), "scale", None)
    return codes is not None and own is not None and own.numel() == 1 and float(own) == scale


def _codes(weight: Any) -> "Tensor | None":
    """Return the codes of a quantised tensor of ComfyUI; None for other weights."""
    codes: Tensor | None = getattr(weight, "_qdata", None)
    return codes


def _weight(weights: Mapping[str, Any], name: str, size: int, scale: float | None, baked: BakedCheckpoint) -> "Tensor":
    weight: Any = weights.get(PREFIX + name)
    hint = f"Load the base that it was made from, {show(baked.stamp.source_name)}."
    if weight is None:
        layer = name.removesuffix(".weight")
        raise PoaError(
            f"the model has no layer {layer}, {baked.checkpoint.path} is of the family {baked.stamp.family}", hint
        )
    kind, dtype = type(weight).__name__, getattr(weight, "dtype", "unknown dtype")
    if scale is not None and not _is_scaled(weight, scale):
        raise PoaError(
            f"{name}: is a {kind} of {dtype}, {baked.checkpoint.path} prunes fp8 with the scale {scale:g}", hint
        )
    if scale is None and not _is_plain(weight):
        raise PoaError(
            f"{name}: is a {kind} of {dtype}, which cannot be pruned on the fly", "Load the model unquantised."
        )
    if weight.numel() < size:
        raise PoaError(f"{name}: has {weight.numel()} weights, that of {baked.checkpoint.path} {size}", hint)
    tensor: Tensor = weight
    return tensor


def _as_loaded(part: Part, weight: "Tensor") -> Part:
    """Round a part like the weight, which was rounded when it was loaded and may be converted to another dtype."""
    if isinstance(part, MaskPart) or holds(weight.dtype, part.dtype):
        return part
    if isinstance(part, ReplacedWeights):
        return part.round(weight.dtype)
    names = {dtype: name for name, dtype in torch_dtypes().items()}
    return replace(part, bits=dtypes.bits(part.limit(weight.dtype)), dtype=names[weight.dtype])


def _check(weights: Mapping[str, Any], baked: BakedCheckpoint, masks: Masks | None) -> None:
    """Compare the model with the file: the weights that stay, or where weights were moved, the biases."""
    pruned, gone, zeros = True, 0, 0
    for target, stored in read_weights(baked.plan, SAMPLE):
        name, start = target.layer.original[0], target.layer.original_start(target.count)
        loaded = _slice(weights, name, start, stored)
        if loaded is None:
            continue
        part = next((part for part in masks.original[name] if part.start == start), None) if masks else None
        is_dense, is_pruned = _compare(loaded, stored, part)
        if not (is_dense or is_pruned or baked.stamp.moved):
            raise other_base(name, baked.checkpoint.path, baked.stamp.source_name)
        is_zero = stored.double() == 0
        pruned, gone = pruned and is_pruned, gone + int(is_zero.sum())
        if 1 not in (loaded.itemsize, stored.itemsize):  # eight bits round small weights to zero
            zeros += int(((loaded == 0) & is_zero).sum())
    if pruned and gone:
        restore = " which `crdiff restore` makes from it," if baked.stamp.residual != "none" else ""
        raise PrunedError(
            f"the model holds the pruned weights of {baked.checkpoint.path} already, POA needs the dense ones",
            f"Load its base, {show(baked.stamp.source_name)},{restore} and choose the baked file in this node.",
        )
    if baked.stamp.moved:
        _check_biases(weights, baked)
    if text := sparse_warning(zeros, gone, baked):
        _log.warning("crdiff: %s", text)


def _check_biases(weights: Mapping[str, Any], baked: BakedCheckpoint) -> None:
    for target, stored in read_biases(baked.plan):
        name, start = target.layer.original[0], target.layer.original_start(len(stored))
        bias = _slice(weights, f"{name.removesuffix('weight')}bias", start, stored)
        if bias is not None and not _compare(bias, stored, None)[1]:
            raise other_base(name, baked.checkpoint.path, baked.stamp.source_name)


def _slice(weights: Mapping[str, Any], name: str, start: int, like: "Tensor") -> "Tensor | None":
    """Return as many elements of a model's weight as `like` has; None if it is missing, quantised or offloaded."""
    weight: Any = weights.get(PREFIX + name)
    whole = weight if _is_plain(weight) else _codes(weight)
    if whole is None or whole.is_meta:
        return None
    part: Tensor = whole.detach().reshape(-1)[start : start + len(like)].cpu()
    return part if len(part) == len(like) else None


def _compare(loaded: "Tensor", stored: "Tensor", part: Part | None) -> tuple[bool, bool]:
    """Whether a layer may have the dense weights, as far as the file tells, and whether it has the file's."""
    import torch

    # In the narrower dtype, because either may have been rounded to it.
    names = {dtype: name for name, dtype in torch_dtypes().items()}
    narrow = stored.dtype if holds(loaded.dtype, names[stored.dtype]) else loaded.dtype
    expected = stored.to(narrow).double()
    same = equal(loaded.to(narrow).double(), expected)
    may_be_pruned = part.fits(loaded) if part else torch.ones_like(same)
    return bool(torch.where(expected == 0, may_be_pruned, same).all()), bool(same.all())
