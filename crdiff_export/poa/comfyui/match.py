"""Whether a model in ComfyUI is the one that a baked file was made from, and its cuts by ComfyUI's names."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crdiff_export import floats
from crdiff_export.baked import BakedCheckpoint, open_baked
from crdiff_export.errors import CrdiffError, PoaError
from crdiff_export.header import show
from crdiff_export.poa.masks import Cut, Masks, dtypes, holds
from crdiff_export.twins import original_place

if TYPE_CHECKING:
    from torch import Tensor

# What ComfyUI puts before a tensor's name in the original layout.
PREFIX = "diffusion_model."
# Elements of each layer that are compared; another model differs in all of its layers.
SAMPLE = 1 << 14


Cuts = dict[str, tuple[Cut, ...]]


class PrunedError(PoaError):
    """A model that is the pruned one already."""


def find(weights: Mapping[str, Any], files: Iterable[Path]) -> tuple[BakedCheckpoint, Cuts]:
    """The one among baked files that was made from a model, and its cuts; PoaError if there is none, or several."""
    fitting = []
    for file in files:
        try:
            baked = open_baked(file)
            fitting.append((baked, cuts(weights, baked)))
        except PrunedError:
            raise
        except CrdiffError:  # another model's, or damaged
            continue
    if len(fitting) != 1:
        names = ", ".join(baked.checkpoint.path.name for baked, _ in fitting)
        raise PoaError(
            f"{len(fitting)} of ComfyUI's models were made from the loaded one by crdiff: {names}"
            if fitting else "none of ComfyUI's models was made from the loaded one by crdiff",
            "Choose one by its name." if fitting else "Make one with `crdiff export`, or load the base of one.",
        )  # fmt: skip
    return fitting[0]


def cuts(weights: Mapping[str, Any], baked: BakedCheckpoint) -> Cuts:
    """The cuts of every weight that is pruned, by its key in the model, for weights as they are loaded.

    `weights` are the model's own, without patches. PoaError if they are not those of the file's base.
    """
    masks = Masks.of(baked.plan, baked.thresholds)
    if not masks.original:
        raise PoaError(
            f"{baked.checkpoint.path}: has no threshold, as all of its ratios are 0",
            "Its pruned model is the dense one; take a file that prunes something.",
        )
    found = {}
    for name, own in masks.original.items():
        weight = _weight(weights, name, own, baked)
        found[PREFIX + name] = tuple(_as_loaded(cut, weight) for cut in own)
    _check(weights, baked, masks)
    return found


def _weight(weights: Mapping[str, Any], name: str, own: tuple[Cut, ...], baked: BakedCheckpoint) -> "Tensor":
    import torch

    weight: Any = weights.get(PREFIX + name)
    if weight is None:
        raise PoaError(
            f"the model has no layer {name.removesuffix('.weight')}, {baked.checkpoint.path} is of the family "
            f"{baked.stamp.family}",
            f"Load the base that it was made from, {show(baked.stamp.source_name)}.",
        )
    # A subclass is a quantised tensor of some node's.
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.dtype not in (
        *dtypes().values(), torch.float64,
    ):  # fmt: skip
        raise PoaError(
            f"{name}: is a {type(weight).__name__} of {getattr(weight, 'dtype', 'unknown dtype')}, which cannot be "
            "pruned on the fly",
            "Load the model unquantised.",
        )
    if weight.numel() < max(cut.stop for cut in own):
        raise PoaError(
            f"{name}: has {weight.numel()} weights, that of {baked.checkpoint.path} {max(cut.stop for cut in own)}",
            f"Load the base that it was made from, {show(baked.stamp.source_name)}.",
        )
    assert isinstance(weight, torch.Tensor)
    return weight


def _as_loaded(cut: Cut, weight: "Tensor") -> Cut:
    """The cut for weights that were rounded when they were loaded, and are computed with in another dtype again."""
    names = {dtype: name for name, dtype in dtypes().items()}
    if holds(weight.dtype, cut.dtype):
        return cut
    return replace(cut, bits=floats.bits(cut.limit(weight.dtype)), dtype=names[weight.dtype])


def _check(weights: Mapping[str, Any], baked: BakedCheckpoint, masks: Masks) -> None:
    """PoaError unless the model holds the dense weights, as far as the pruned ones in the file tell."""
    pruned, zeros = True, False
    for name, start, stored in _stored(baked, masks):
        weight = weights[PREFIX + name]
        if weight.is_meta:
            continue
        cut = next((cut for cut in masks.original[name] if cut.start == start), None)
        part = weight.detach().reshape(-1)[start : start + len(stored)].cpu()
        is_dense, is_pruned = _compare(part, stored, cut)
        if not (is_dense or is_pruned):
            raise PoaError(
                f"the weights of {name.removesuffix('.weight')} are not those of {show(baked.stamp.source_name)}, "
                f"which {baked.checkpoint.path} was made from",
                "Load that base, as it was published.",
            )
        pruned, zeros = pruned and is_pruned, zeros or bool((stored.double() == 0).any())
    if pruned and zeros:
        again = ", which `crdiff restore` makes from it," if baked.stamp.residual != "none" else ""
        raise PrunedError(
            f"the model holds the pruned weights of {baked.checkpoint.path} already, POA needs the dense ones",
            f"Load its base, {show(baked.stamp.source_name)},{again[1:]} and choose the baked file in this node.",
        )


def _stored(baked: BakedCheckpoint, masks: Masks) -> Iterator[tuple[str, int, "Tensor"]]:
    """The beginning of every pruned layer in the file: its name and place in the original layout, and its weights."""
    import torch

    readers = [file.open() for file in baked.checkpoint.files]
    try:
        for target in baked.plan.targets:
            name, part = original_place(baked.plan, target)
            if name not in masks.original:  # its ratio is 0
                continue
            start, stop = target.span(target.source)
            data = bytearray(min(stop - start, SAMPLE * target.source.itemsize))
            readers[target.file].read_into(start, memoryview(data))
            yield name, part * target.count, torch.frombuffer(data, dtype=dtypes()[target.source.dtype])
    finally:
        for reader in readers:
            reader.close()


def _compare(own: "Tensor", stored: "Tensor", cut: Cut | None) -> tuple[bool, bool]:
    """Whether a layer holds the dense weights, as far as the stored ones tell, and whether it holds just those."""
    import torch

    # In the dtype with fewer bits: either may have been rounded to it. Eight bits are compared as what they stand for.
    names = {dtype: name for name, dtype in dtypes().items()}
    narrow = stored.dtype if holds(own.dtype, names[stored.dtype]) else own.dtype
    theirs, mine = stored.to(narrow).double(), own.to(narrow).double()
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    limit = cut.limit(own.dtype) if cut else 0.0
    return bool(torch.where(theirs == 0, own.double().abs() <= limit, same).all()), bool(same.all())
