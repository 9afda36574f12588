"""How a pruned model follows from weights in memory: by layer of either layout, for every dtype that they may have.

With magnitude, pruned weights are `where(|W| > t, W, 0)` of the dense ones, so one threshold per layer is enough. Other
criteria need one bit for each weight; with moved weights, the pruned weights themselves are needed.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

from crdiff_export.formats import dtypes
from crdiff_export.formats.dtypes import Encoding, torch_dtypes
from crdiff_export.prune.criteria import Decision, Mask
from crdiff_export.prune.plan import Plan, Target, open_targets

if TYPE_CHECKING:
    from typing import Self

    import torch
    from torch import Tensor

# Prunes a weight or a part of it; writes into the second tensor, which is like the first, if there is one.
Rule = Callable[["Tensor", "Tensor | None"], "Tensor"]


@dataclass(frozen=True, slots=True)
class ThresholdPart:
    """Elements `start:stop` of a weight; those of magnitude at most `bits` are zero in the pruned model.

    `bits` are the float32 magnitude bits of a number of `dtype` (safetensors'), in which the weights were ranked.
    """

    start: int
    stop: int
    bits: int
    dtype: str

    def limit(self, dtype: "torch.dtype") -> float:
        """Return the largest magnitude that is pruned, for weights that were loaded as `dtype`.

        A cast to fewer bits may round weights to the threshold from both sides; all of these are pruned, as in an
        export with `--dtype`. With more bits, weights are pruned that round to a pruned one.
        """
        return _limit(self.bits, self.dtype, dtype)

    def rule(self, dtype: "torch.dtype") -> Rule:
        """Return the function that prunes weights of `dtype`."""
        return partial(_shrink, limit=self.limit(dtype))

    def moved_to(self, start: int, stop: int) -> "Self":
        """Return the same part for other elements of a weight."""
        return replace(self, start=start, stop=stop)

    def fits(self, dense: "Tensor") -> "Tensor":
        """Return a bool for each of these dense weights: whether it may have been pruned."""
        return (dense.float() if dense.itemsize == 1 else dense).abs() <= self.limit(dense.dtype)

    @property
    def extra_bytes(self) -> int:
        """Bytes in memory: none."""
        return 0

    def release(self) -> None:
        """Do nothing: no copy is cached."""


class LayerLimit:
    """All weights of a layer, of which those of at most a magnitude are pruned that changes with the size of a picture.

    A compiled graph reads the magnitude from a tensor, so that it serves every size.
    """

    def __init__(self, count: int) -> None:
        self.start, self.stop = 0, count
        self._limits: dict[torch.dtype, Tensor] = {}
        self._part: ThresholdPart | None = None

    def set(self, part: ThresholdPart | None) -> None:
        """Prune as this part does from now on; None prunes nothing."""
        self._part = part
        for dtype, limit in self._limits.items():
            limit.fill_(self._limit(dtype))

    def rule(self, dtype: "torch.dtype") -> Rule:
        """Return the function that prunes weights of `dtype`."""
        import torch

        if dtype not in self._limits:
            with torch.inference_mode(mode=False):  # a tensor of that mode could not be set outside of it
                self._limits[dtype] = torch.tensor(self._limit(dtype), dtype=dtype)
        return partial(self._prune, limit=self._limits[dtype])

    def _limit(self, dtype: "torch.dtype") -> float:
        return self._part.limit(dtype) if self._part else -1.0

    def _prune(self, weight: "Tensor", out: "Tensor | None" = None, *, limit: "Tensor") -> "Tensor":
        import torch

        if torch.compiler.is_compiling():
            return torch.where(weight.abs() <= limit.to(weight.device), 0, weight)
        if self._part is None:
            return weight
        return self._part.rule(weight.dtype)(weight, out)

    @property
    def dtype(self) -> str:
        """The dtype that the magnitude was found in."""
        return self._part.dtype if self._part else ""

    @property
    def extra_bytes(self) -> int:
        """Bytes in memory beside the weights."""
        return 0

    def release(self) -> None:
        """Do nothing: no copy is cached."""


class StoredPart(ABC):
    """Elements `start:stop` of a weight, and a tensor on the CPU that says how to prune them.

    A copy of the tensor stays on the device (and in the dtype) of the last weights until it is released.
    """

    def __init__(self, start: int, stop: int, dtype: str, tensor: "Tensor") -> None:
        self.start, self.stop, self.dtype, self._tensor = start, stop, dtype, tensor
        self._copy = tensor

    def __repr__(self) -> str:
        import torch

        digest = hashlib.sha256(self._tensor.view(torch.uint8).numpy().data).hexdigest()
        return f"{type(self).__name__}({self.start}, {self.stop}, {digest})"

    def rule(self, _dtype: "torch.dtype") -> Rule:
        """Return the function that prunes weights of any dtype."""
        return self._prune

    def moved_to(self, start: int, stop: int) -> "Self":
        """Return the same part for other elements of a weight."""
        return type(self)(start, stop, self.dtype, self._tensor)

    @abstractmethod
    def _prune(self, weight: "Tensor", out: "Tensor | None") -> "Tensor": ...

    def _on(self, device: "torch.device", dtype: "torch.dtype") -> "Tensor":
        """Return the tensor on a device in a dtype."""
        if (self._copy.device, self._copy.dtype) != (device, dtype):
            self._copy = _convert(self._tensor, device, dtype)
        return self._copy

    def fits(self, dense: "Tensor") -> "Tensor":
        """Return True for each weight: any of them may have been pruned."""
        import torch

        return torch.ones_like(dense, dtype=torch.bool)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the tensor and of its copy."""
        return self._tensor.nbytes + (0 if self._copy is self._tensor else self._copy.nbytes)

    def release(self) -> None:
        """Drop the copy."""
        self._copy = self._tensor


class MaskPart(StoredPart):
    """Elements `start:stop` of a weight; those whose bit is set are zero in the pruned model.

    The tensor (uint8) has one bit for each element, beginning with the lowest bit of a byte.
    """

    def _prune(self, weight: "Tensor", out: "Tensor | None" = None) -> "Tensor":
        import torch

        packed = self._on(weight.device, torch.uint8)
        if out is not None:
            return _clear(weight, packed, out)
        bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=weight.device)
        pruned = ((packed[:, None] & bits) != 0).flatten()[: weight.numel()]
        return weight.masked_fill(pruned.view(weight.shape), 0.0)


class ReplacedWeights(StoredPart):
    """Elements `start:stop` of a weight whose pruned values are not the dense ones with zeros.

    The tensor (flat, in `dtype`) has all pruned values. A rule gives them without a copy, so they must not be changed.
    """

    def round(self, dtype: "torch.dtype") -> "ReplacedWeights":
        """Round the values like a model that was loaded as `dtype`, but computes in another dtype."""
        names = {value: name for name, value in torch_dtypes().items()}
        tensor = _convert(self._tensor, self._tensor.device, dtype)
        return ReplacedWeights(self.start, self.stop, names[dtype], tensor)

    def _prune(self, weight: "Tensor", out: "Tensor | None" = None) -> "Tensor":
        values = self._on(weight.device, weight.dtype).view(weight.shape)
        return values if out is None else out.copy_(values)


Part = ThresholdPart | MaskPart | ReplacedWeights


@dataclass(frozen=True, slots=True)
class Masks:
    """The parts of every pruned weight.

    Attributes:
        family: The id of the model's family.
        original: The parts by the weight's name in the original layout, without prefix; fused weights have several.
        diffusers: The parts by the name in diffusers' layout; each weight has one.
    """

    family: str
    original: Mapping[str, tuple[Part, ...]]
    diffusers: Mapping[str, tuple[Part, ...]]

    @classmethod
    def of(cls, plan: Plan, decision: Decision) -> "Self":
        """Make the masks of a decision for a plan."""
        original: dict[str, tuple[Part, ...]] = {}
        diffusers: dict[str, tuple[Part, ...]] = {}
        with open_targets(plan.checkpoint) as read:
            for index, target in enumerate(plan.targets):
                make = _maker(plan, decision, index, read)
                if make:
                    fused, single = target.layer.original[0], target.layer.diffusers
                    start = target.layer.original_start(target.count)
                    original[fused] = (*original.get(fused, ()), make(start, start + target.count))
                    diffusers[single] = (make(0, target.count),)
        return cls(plan.match.family.id, original, diffusers)

    def release(self) -> None:
        """Drop all copies on devices."""
        for parts in (*self.original.values(), *self.diffusers.values()):
            for part in parts:
                part.release()


def _maker(
    plan: Plan, decision: Decision, index: int, read: Callable[[Target], memoryview]
) -> "Callable[[int, int], Part] | None":
    """Return a function that makes the part of a target; None for one that is not pruned."""
    target = plan.targets[index]
    dtype = target.output.dtype
    if decision.masks is None:
        value = decision.thresholds[target.scope].value
        if value is None:
            return None
        if target.scale is not None:
            return _mask_maker(_mask_of_codes(target, value, read), dtype)
        bits = dtypes.floor_bits(value)
        return lambda start, stop: ThresholdPart(start, stop, bits, dtype)
    mask, moved = decision.masks[index], decision.moved.get(index)
    if mask is None:
        return None
    import torch

    if moved is not None:
        weights = torch.from_numpy(moved.view("u1")).view(torch_dtypes()[dtype])
        return lambda start, stop: ReplacedWeights(start, stop, dtype, weights)
    return _mask_maker(mask, dtype)


def _mask_of_codes(target: Target, threshold: float, read: Callable[[Target], memoryview]) -> Mask:
    """Read which weights with a scale are at most the threshold: in a rounded dtype they would be ranked otherwise."""
    import numpy as np

    form = dtypes.FORMATS[target.source.dtype]
    codes = np.frombuffer(read(target), f"u{form.itemsize}")
    return Mask.pack(codes & form.mask <= target.encoding.limit(threshold))


def _mask_maker(mask: Mask, dtype: str) -> "Callable[[int, int], Part]":
    import torch

    packed = torch.from_numpy(mask.bits)
    return lambda start, stop: MaskPart(start, stop, dtype, packed)


def prune(weight: "Tensor", parts: Sequence[Part]) -> "Tensor":
    """Prune a weight.

    Args:
        weight: A weight of any shape.
        parts: Its parts.

    Returns:
        A new tensor, like `weight` in all else. Pruned elements are +0.0, elements that are not finite stay.

    """
    if len(parts) == 1 and parts[0].stop - parts[0].start == weight.numel():
        pruned = parts[0].rule(weight.dtype)(weight, None)
        return pruned.clone() if isinstance(parts[0], ReplacedWeights) else pruned
    pruned = weight.clone()
    flat = pruned.view(-1)
    for part in parts:
        piece = flat[part.start : part.stop]
        piece.copy_(part.rule(weight.dtype)(piece, None))
    return pruned


def _shrink(weight: "Tensor", out: "Tensor | None" = None, *, limit: float) -> "Tensor":
    import torch

    if out is None:
        return torch.nn.functional.hardshrink(weight, limit)
    torch.ops.aten.hardshrink.out(weight, limit, out=out)
    return out


def _clear(weight: "Tensor", packed: "Tensor", out: "Tensor") -> "Tensor":
    """Copy a weight to `out` without the elements whose bit is set.

    `out` first gets all bits of elements that stay and no bits of the others. On a CPU this is three times as fast as a
    mask with a byte for each weight, and needs less memory.
    """
    import torch

    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
    whole, flat = weight.numel() // 8, out.view(-1).view(bits)
    torch.index_select(_table(bits), 0, packed[:whole].int(), out=flat[: 8 * whole].view(-1, 8))
    if rest := weight.numel() - 8 * whole:
        flat[8 * whole :] = _table(bits)[int(packed[whole]), :rest]
    flat.bitwise_and_(weight.reshape(-1).view(bits))
    return out


@cache
def _table(bits: "torch.dtype") -> "Tensor":
    """Make [256, 8]: for each byte of a mask eight numbers, 0 where a bit is set, else -1, which is all bits."""
    import torch

    with torch.inference_mode(mode=False):
        return ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(bits) - 1


def _convert(tensor: "Tensor", device: "torch.device", dtype: "torch.dtype") -> "Tensor":
    """Copy to a device and a dtype, outside of inference mode, so that the copy serves everywhere."""
    import torch

    if not torch.is_inference_mode_enabled():
        return tensor.to(device, dtype)
    with torch.inference_mode(mode=False):
        return tensor.to(device, dtype)


@cache
def _limit(bits: int, ranked: str, loaded: "torch.dtype") -> float:
    import torch

    threshold, source = dtypes.value(bits), torch_dtypes()[ranked]
    if source == loaded or (ranked == "F32" and loaded == torch.float64):
        return threshold
    if not holds(loaded, ranked):
        return float(torch.tensor(threshold).to(loaded))
    following = int(dtypes.patterns(ranked)[Encoding(ranked).limit(threshold) + 1])
    if following >= dtypes.INFINITY:
        return threshold
    middle = torch.tensor((threshold + dtypes.value(following)) / 2, dtype=loaded)
    if float(middle.float().to(source)) > threshold:  # the middle rounds to even, here upwards
        patterns = {2: torch.int16, 4: torch.int32, 8: torch.int64}[middle.itemsize]
        middle = (middle.view(patterns) - 1).view(loaded)
    return float(middle)


def holds(loaded: "torch.dtype", ranked: str) -> bool:
    """Whether a torch dtype has every number of a safetensors dtype.

    Args:
        loaded: torch's dtype.
        ranked: The name of a safetensors dtype.

    Returns:
        True if a conversion loses nothing.

    """
    import torch

    wider = {"F32": (), "F16": (torch.float32,), "BF16": (torch.float32,)}
    others = wider.get(ranked, (torch.float16, torch.bfloat16, torch.float32))
    return loaded in (torch_dtypes()[ranked], torch.float64, *others)
