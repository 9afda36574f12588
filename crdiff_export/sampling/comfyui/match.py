"""Whether a model in ComfyUI is the one that a baked file was made from, and its masks by ComfyUI's names."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crdiff_export.errors import CrdiffError, PoaError
from crdiff_export.formats import dtypes
from crdiff_export.formats.dtypes import torch_dtypes
from crdiff_export.formats.safetensors import show
from crdiff_export.models.families import FamilyLayer
from crdiff_export.packs import Pack
from crdiff_export.prune.criteria import Mask
from crdiff_export.prune.plan import Plan
from crdiff_export.sampling.poa import packed
from crdiff_export.sampling.poa.checkpoint_tensors import (
    equal,
    other_base,
    prunes_nothing,
    read_biases,
    read_weights,
    sparse_warning,
)
from crdiff_export.sampling.poa.masks import MaskPart, Masks, Part, ReplacedWeights, holds
from crdiff_export.sizes import Size
from crdiff_export.verify import BakedCheckpoint, open_baked, read_decision

if TYPE_CHECKING:
    import torch
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


def read_masks(baked: BakedCheckpoint) -> Masks:
    """Read the thresholds or the masks of a baked file; masks are all over it."""
    return Masks.of(baked.plan, read_decision(baked))


def model_parts(
    weights: Mapping[str, Any], baked: BakedCheckpoint, read: Callable[[BakedCheckpoint], Masks] = read_masks
) -> Parts:
    """Make the parts of every pruned weight for a model as it was loaded.

    Args:
        weights: The model's own weights, without patches.
        baked: The baked file.
        read: Reads its masks; a caller may keep them.

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
    thresholds = None if reads_all else read(baked)
    _check(weights, baked, thresholds)
    masks = thresholds or read(baked)  # reads all of a file, so only if it fits
    return {
        PREFIX + name: tuple(_as_loaded(part, loaded[name].dtype) for part in parts)
        for name, parts in masks.original.items()
    }


@dataclass(frozen=True, slots=True)
class LoadedLayer:
    """A layer of a pack in a model: its weight's key, its elements of that weight, and the dtype that it was loaded in.

    `dtype` is None for codes with a scale.
    """

    key: str
    start: int
    stop: int
    dtype: "torch.dtype | None"


def find_layers(weights: Mapping[str, Any], pack: Pack) -> dict[str, LoadedLayer]:
    """Find every layer that a pack prunes at any size in a model as it was loaded, and compare its first weights.

    Args:
        weights: The model's own weights, without patches.
        pack: The pack.

    Returns:
        The layers by diffusers' name of their weight.

    Raises:
        PoaError: The weights are not those of the pack's base.

    """
    kinds = dict.fromkeys(kind for stamp in pack.variants.values() for kind in stamp.targets)
    found = {}
    for layer in pack.layers(tuple(kinds)):
        start, stop = _range(weights, layer, pack)
        key = PREFIX + layer.original[0]
        weight: Any = weights[key]
        whole = weight if _is_plain(weight) else _codes(weight)
        if whole is None:
            kind, dtype = type(weight).__name__, getattr(weight, "dtype", "unknown dtype")
            raise PoaError(
                f"{layer.original[0]}: is a {kind} of {dtype}, which cannot be pruned on the fly",
                "Load the model unquantised.",
            )
        if whole is weight and weight.itemsize == 1 and any(stamp.scaled for stamp in pack.variants.values()):
            raise PoaError(
                f"{layer.original[0]}: is {weight.dtype} without its scale, by which {pack.path} prunes",
                "Load the base in a program that keeps codes and scales together, such as ComfyUI 0.33.",
            )
        first = whole.detach().reshape(-1)[start : min(stop, start + SAMPLE)]
        if not (whole.is_meta or packed.is_base(first, layer.diffusers, pack)):
            raise packed.other_model(layer.diffusers, pack)
        found[layer.diffusers] = LoadedLayer(key, start, stop, weight.dtype if whole is weight else None)
    return found


def pack_parts(layers: Mapping[str, LoadedLayer], pack: Pack, size: Size, weights: Mapping[str, Any]) -> Parts:
    """Make the parts of every weight that a size of a pack prunes.

    Args:
        layers: The layers that `find_layers` has found.
        pack: The pack.
        size: One of its sizes.
        weights: The model's own weights, for codes with a scale; empty for others.

    Returns:
        The parts by the weight's key in the model.

    Raises:
        PackError: The pack's masks are damaged.

    """

    def scaled(name: str, threshold: float) -> Mask | None:
        layer = layers[name]
        return (
            None if layer.dtype else _mask_of_codes(weights[layer.key], layer, pack.identity.stored_as(name), threshold)
        )

    counts = {name: layer.stop - layer.start for name, layer in layers.items()}
    found: dict[str, list[Part]] = {}
    for name, part in packed.parts(pack, size, counts, scaled).items():
        layer = layers[name]
        placed: Part = part.moved_to(layer.start, layer.stop)
        found.setdefault(layer.key, []).append(_as_loaded(placed, layer.dtype) if layer.dtype else placed)
    return {key: tuple(sorted(parts, key=lambda part: part.start)) for key, parts in found.items()}


def _mask_of_codes(weight: Any, layer: LoadedLayer, stored: str | None, threshold: float) -> Mask:
    """Find the codes whose product with their scale is at most a threshold."""
    import torch

    form, codes = dtypes.FORMATS[stored or ""], _codes(weight)
    assert codes is not None
    bits = codes.detach().reshape(-1)[layer.start : layer.stop].cpu().view(torch.uint8).numpy()
    limit = dtypes.Encoding(form.dtype, float(weight._params.scale)).limit(threshold)  # noqa: SLF001
    return Mask.pack(bits & form.mask <= limit)


def _range(weights: Mapping[str, Any], layer: FamilyLayer, pack: Pack) -> tuple[int, int]:
    """Return the elements of a layer in its weight in the model, which may be fused of several."""
    name, part = layer.original
    weight: Any = weights.get(PREFIX + name)
    if weight is None or weight.ndim != 2:
        raise PoaError(
            f"the model has no layer {name.removesuffix('.weight')}, {pack.path} is of the family {pack.family.id}",
            f"Load the base of the pack, {show(pack.common.source_name)}.",
        )
    rows, columns = weight.shape
    start, stop = part.rows((rows, columns)) if part else (0, rows)
    return start * columns, stop * columns


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


def _as_loaded(part: Part, loaded: "torch.dtype") -> Part:
    """Round a part like its weight, which was rounded when it was loaded and may be converted to another dtype."""
    if isinstance(part, MaskPart) or holds(loaded, part.dtype):
        return part
    if isinstance(part, ReplacedWeights):
        return part.round(loaded)
    names = {dtype: name for name, dtype in torch_dtypes().items()}
    return replace(part, bits=dtypes.bits(part.limit(loaded)), dtype=names[loaded])


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
            f"Load its base, {show(baked.stamp.source_name)},{restore} and choose the baked file for POA.",
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
