"""Whether a model in ComfyUI is the one that a baked file was made from, and its cuts by ComfyUI's names."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crdiff_export.errors import CrdiffError, PoaError
from crdiff_export.formats import dtypes as floats
from crdiff_export.formats.safetensors import show
from crdiff_export.prune.layer_names import original_place
from crdiff_export.prune.plan import Plan
from crdiff_export.sampling.poa import stored
from crdiff_export.sampling.poa.masks import (
    Bits,
    Masks,
    Own,
    Part,
    dtypes,
    holds,
)
from crdiff_export.verify.reopen import BakedCheckpoint, open_baked, read_decision

if TYPE_CHECKING:
    from torch import Tensor

# What ComfyUI puts before a tensor's name in the original layout.
PREFIX = "diffusion_model."
# Elements of each layer that are compared; another model differs in all of its layers.
SAMPLE = 1 << 14
_log = logging.getLogger(__name__)


Cuts = dict[str, tuple[Part, ...]]


class PrunedError(PoaError):
    """A model that is the pruned one already."""


def find(weights: Mapping[str, Any], files: Iterable[Path]) -> tuple[BakedCheckpoint, Cuts]:
    """The one among baked files that was made from a model, and its cuts; PoaError if there is none, or several."""
    fitting = []
    for file in files:
        try:
            baked = open_baked(file)
            if not baked.stamp.moved:  # its biases may be those of other models, too
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

    `weights` are the model's own, without patches. PoaError if they are not those of the file's base; where weights
    were moved, only the biases of their layers tell.
    """
    stops = _stops(baked.plan)
    if not stops:
        raise PoaError(
            f"{baked.checkpoint.path}: prunes nothing, as all of its ratios are 0",
            "Its pruned model is the dense one; take a file that prunes something.",
        )
    loaded = {name: _weight(weights, name, stop, baked) for name, stop in stops.items()}
    thresholds = None if baked.stamp.masked else Masks.of(baked.plan, read_decision(baked))
    _check(weights, baked, thresholds)
    masks = thresholds or Masks.of(baked.plan, read_decision(baked))  # of one that fits alone all zeros are read
    return {
        PREFIX + name: tuple(_as_loaded(part, loaded[name]) for part in own) for name, own in masks.original.items()
    }


def _stops(plan: Plan) -> dict[str, int]:
    """The weights that are pruned by their name in the original layout, and how many elements each has at least."""
    stops: dict[str, int] = {}
    for target in plan.targets:
        if plan.scopes[target.scope].rank:
            name, part = original_place(plan, target)
            stops[name] = max(stops.get(name, 0), (part + 1) * target.count)
    return stops


def _weight(weights: Mapping[str, Any], name: str, stop: int, baked: BakedCheckpoint) -> "Tensor":
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
    if weight.numel() < stop:
        raise PoaError(
            f"{name}: has {weight.numel()} weights, that of {baked.checkpoint.path} {stop}",
            f"Load the base that it was made from, {show(baked.stamp.source_name)}.",
        )
    assert isinstance(weight, torch.Tensor)
    return weight


def _as_loaded(part: Part, weight: "Tensor") -> Part:
    """The part for weights that were rounded when they were loaded, and are computed with in another dtype again."""
    if isinstance(part, Bits) or holds(weight.dtype, part.dtype):
        return part
    if isinstance(part, Own):
        return part.rounded(weight.dtype)
    names = {dtype: name for name, dtype in dtypes().items()}
    return replace(part, bits=floats.bits(part.limit(weight.dtype)), dtype=names[weight.dtype])


def _check(weights: Mapping[str, Any], baked: BakedCheckpoint, masks: Masks | None) -> None:
    """PoaError unless the model holds the dense weights, as far as the pruned ones in the file tell.

    Where weights were moved, the biases of their layers tell.
    """
    pruned, gone, zeros = True, 0, 0
    for target, kept in stored.weights(baked.plan, SAMPLE):
        name, part = original_place(baked.plan, target)
        start = part * target.count
        own = _own(weights, name, start, kept)
        if own is None:
            continue
        cut = next((cut for cut in masks.original[name] if cut.start == start), None) if masks else None
        is_dense, is_pruned = _compare(own, kept, cut)
        if not (is_dense or is_pruned or baked.stamp.moved):
            raise _other(name, baked)
        pruned, went = pruned and is_pruned, kept.double() == 0
        gone += int(went.sum())
        if 1 not in (own.itemsize, kept.itemsize):  # where small ones are zero, too
            zeros += int(((own == 0) & went).sum())
    if pruned and gone:
        again = ", which `crdiff restore` makes from it," if baked.stamp.residual != "none" else ""
        raise PrunedError(
            f"the model holds the pruned weights of {baked.checkpoint.path} already, POA needs the dense ones",
            f"Load its base, {show(baked.stamp.source_name)},{again[1:]} and choose the baked file in this node.",
        )
    if baked.stamp.moved:
        _check_biases(weights, baked)
    if text := stored.sparse(zeros, gone, baked):
        _log.warning("crdiff: %s", text)


def _check_biases(weights: Mapping[str, Any], baked: BakedCheckpoint) -> None:
    for target, kept in stored.biases(baked.plan):
        name, part = original_place(baked.plan, target)
        own = _own(weights, f"{name.removesuffix('weight')}bias", part * len(kept), kept)
        if own is not None and not _compare(own, kept, None)[1]:
            raise _other(name, baked)


def _own(weights: Mapping[str, Any], name: str, start: int, like: "Tensor") -> "Tensor | None":
    """As many of a model's weights as there are in `like`; None where they are nowhere, or in a form of their own."""
    import torch

    whole: Any = weights.get(PREFIX + name)
    known = (*dtypes().values(), torch.float64)
    if type(whole) not in (torch.Tensor, torch.nn.Parameter) or whole.is_meta or whole.dtype not in known:
        return None
    own: Tensor = whole.detach().reshape(-1)[start : start + len(like)].cpu()
    return own if len(own) == len(like) else None


def _other(name: str, baked: BakedCheckpoint) -> PoaError:
    return PoaError(
        f"the weights of {name.removesuffix('.weight')} are not those of {show(baked.stamp.source_name)}, "
        f"which {baked.checkpoint.path} was made from",
        "Load that base, as it was published.",
    )


def _compare(own: "Tensor", kept: "Tensor", cut: Part | None) -> tuple[bool, bool]:
    """Whether a layer holds the dense weights, as far as the file's tell, and whether it holds just those."""
    import torch

    # In the dtype with fewer bits: either may have been rounded to it. Eight bits are compared as what they stand for.
    names = {dtype: name for name, dtype in dtypes().items()}
    narrow = kept.dtype if holds(own.dtype, names[kept.dtype]) else own.dtype
    theirs, mine = kept.to(narrow).double(), own.to(narrow).double()
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    may_go = cut.fits(own) if cut else torch.ones_like(same)
    return bool(torch.where(theirs == 0, may_go, same).all()), bool(same.all())
