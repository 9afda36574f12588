"""What a pruned model zeroes, for weights in memory: by layer of either layout, in whatever dtype they were loaded.

Where |w| decides, pruned weights are `where(|W| > t, W, 0)` of the dense ones, so a threshold per layer is all that has
to be held. Where something else does, it is a bit for each weight; and where weights are moved, the weights.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Self

from crdiff_export.formats import dtypes as floats
from crdiff_export.prune import layer_names
from crdiff_export.prune.criteria import Decision
from crdiff_export.prune.plan import Plan

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Makes of a weight, or of its part, the pruned one: in the second tensor if there is one, which is like the first.
Rule = Callable[["Tensor", "Tensor | None"], "Tensor"]


@dataclass(frozen=True, slots=True)
class Cut:
    """Elements `start:stop` of a weight; those of magnitude at most `bits` are zero in the pruned model.

    `bits` are float32 magnitude bits of a number of `dtype` (safetensors'), the dtype in which the weights were ranked.
    """

    start: int
    stop: int
    bits: int
    dtype: str

    def limit(self, dtype: "torch.dtype") -> float:
        """The largest magnitude that goes, for weights that were loaded as `dtype`.

        A cast to fewer bits may round weights to the threshold from both sides; they go, as from an export with
        `--dtype`. Of more bits, those go that round to what goes.
        """
        return _limit(self.bits, self.dtype, dtype)

    def rule(self, dtype: "torch.dtype") -> Rule:
        """What prunes weights of `dtype`."""
        return partial(_shrink, limit=self.limit(dtype))

    def fits(self, dense: "Tensor") -> "Tensor":
        """Where these, the dense weights by their place, may be what was set to zero."""
        return (dense.float() if dense.itemsize == 1 else dense).abs() <= self.limit(dense.dtype)

    @property
    def held(self) -> int:
        """Bytes of what it holds on the devices."""
        return 0

    def release(self) -> None:
        """Let go of what is only held to be faster."""


class Bits:
    """Elements `start:stop` of a weight; those whose bit is set are zero in the pruned model.

    `packed` (uint8, on the CPU) has one bit for each of them, from the least one of a byte on. A copy stays on the
    device where weights were pruned last, until it is released.
    """

    def __init__(self, start: int, stop: int, dtype: str, packed: "Tensor") -> None:
        self.start, self.stop, self.dtype, self._packed = start, stop, dtype, packed
        self._there = packed

    def __repr__(self) -> str:
        return f"Bits({self.start}, {self.stop}, {_digest(self._packed)})"

    def rule(self, _dtype: "torch.dtype") -> Rule:
        """What prunes weights of any dtype."""
        return self._prune

    def fits(self, dense: "Tensor") -> "Tensor":
        """Anything may have been set to zero."""
        import torch

        return torch.ones_like(dense, dtype=torch.bool)

    @property
    def held(self) -> int:
        """Bytes of what it holds on the devices."""
        return _held(self._packed, self._there)

    def release(self) -> None:
        """Let go of the copy on a device."""
        self._there = self._packed

    def _prune(self, weight: "Tensor", out: "Tensor | None" = None) -> "Tensor":
        if self._there.device != weight.device:
            self._there = _moved(self._packed, weight.device, self._packed.dtype)
        if out is None:
            gone = _spread(self._there, _bit(weight.device)).flatten()[: weight.numel()]
            return weight.masked_fill(gone.view(weight.shape), 0.0)
        return _keep(weight, self._there, out)


class Own:
    """Elements `start:stop` of a weight whose pruned ones are not the dense ones with zeros: they are all held.

    `weights` (flat, on the CPU, in `dtype`) are they. A copy in the dtype and on the device that weights were asked for
    in last stays there until it is released.
    """

    def __init__(self, start: int, stop: int, dtype: str, weights: "Tensor") -> None:
        self.start, self.stop, self.dtype, self._weights = start, stop, dtype, weights
        self._there = weights

    def __repr__(self) -> str:
        return f"Own({self.start}, {self.stop}, {_digest(self._weights)})"

    def rule(self, _dtype: "torch.dtype") -> Rule:
        """What gives the weights in any dtype: they are shared, not to be written to."""
        return self._give

    def rounded(self, dtype: "torch.dtype") -> "Own":
        """The same for a model that was loaded as `dtype` and is computed with in another: rounded as it was."""
        names = {own: name for name, own in dtypes().items()}
        return Own(self.start, self.stop, names[dtype], _moved(self._weights, self._weights.device, dtype))

    def fits(self, dense: "Tensor") -> "Tensor":
        """Anything may have been set to zero."""
        import torch

        return torch.ones_like(dense, dtype=torch.bool)

    @property
    def held(self) -> int:
        """Bytes of what it holds, on the CPU and on a device."""
        return _held(self._weights, self._there)

    def release(self) -> None:
        """Let go of the copy on a device."""
        self._there = self._weights

    def _give(self, weight: "Tensor", out: "Tensor | None" = None) -> "Tensor":
        if (self._there.device, self._there.dtype) != (weight.device, weight.dtype):
            self._there = _moved(self._weights, weight.device, weight.dtype)
        own = self._there.view(weight.shape)
        return own if out is None else out.copy_(own)


Part = Cut | Bits | Own


@dataclass(frozen=True, slots=True)
class Masks:
    """The parts of every weight that is pruned, by its name in the original layout and in diffusers', without prefix.

    What they hold besides is freed with them.
    """

    family: str
    original: Mapping[str, tuple[Part, ...]]
    diffusers: Mapping[str, tuple[Part, ...]]

    @classmethod
    def of(cls, plan: Plan, decision: Decision) -> Self:
        """The masks of what was decided for a plan."""
        original: dict[str, tuple[Part, ...]] = {}
        diffusers: dict[str, tuple[Part, ...]] = {}
        names = layer_names.by_key(plan)
        for number, target in enumerate(plan.targets):
            make = _maker(plan, decision, number)
            if make:
                (fused, part), single = names[layer_names.key(plan, target)]
                start = part * target.count
                original[fused] = (*original.get(fused, ()), make(start, start + target.count))
                diffusers[single] = (make(0, target.count),)
        return cls(plan.match.family.id, original, diffusers)

    def release(self) -> None:
        """Let go of what is only held to be faster."""
        for parts in (*self.original.values(), *self.diffusers.values()):
            for part in parts:
                part.release()


def _maker(plan: Plan, decision: Decision, number: int) -> "Callable[[int, int], Part] | None":
    """What makes the part of a target; None for one that is left alone."""
    target = plan.targets[number]
    dtype = target.output.dtype
    if decision.masks is None:
        bits = decision.thresholds[target.scope].bits
        return None if bits is None else lambda start, stop: Cut(start, stop, bits, dtype)
    mask, moved = decision.masks[number], decision.moved.get(number)
    if mask is None:
        return None
    import torch

    if moved is not None:
        weights = torch.from_numpy(moved.view("u1")).view(dtypes()[dtype])
        return lambda start, stop: Own(start, stop, dtype, weights)
    packed = torch.from_numpy(mask.bits)
    return lambda start, stop: Bits(start, stop, dtype, packed)


def prune(weight: "Tensor", parts: Sequence[Part]) -> "Tensor":
    """The weight pruned: what goes is +0.0, what is not finite stays. A new tensor, like `weight` in all else."""
    if len(parts) == 1 and parts[0].stop - parts[0].start == weight.numel():
        pruned = parts[0].rule(weight.dtype)(weight, None)
        return pruned.clone() if isinstance(parts[0], Own) else pruned
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


def _keep(weight: "Tensor", packed: "Tensor", out: "Tensor") -> "Tensor":
    """The weight without those whose bit is set, in `out`: there first all bits of what stays, and none of what goes.

    Three times as fast on a CPU as a mask that has a byte for each weight, which takes memory besides.
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
    """For each byte of a mask eight numbers: -1, which is all bits, where its bit is not set, and else 0."""
    import torch

    with torch.inference_mode(mode=False):
        return ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(bits) - 1


def _spread(packed: "Tensor", bit: "Tensor") -> "Tensor":
    """A bool for each bit, eight in a row."""
    return (packed[:, None] & bit) != 0


def _bit(device: "torch.device") -> "Tensor":
    import torch

    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def _moved(own: "Tensor", device: "torch.device", dtype: "torch.dtype") -> "Tensor":
    """A copy that serves outside of inference mode, too."""
    import torch

    if not torch.is_inference_mode_enabled():
        return own.to(device, dtype)
    with torch.inference_mode(mode=False):
        return own.to(device, dtype)


def _held(own: "Tensor", there: "Tensor") -> int:
    return own.nbytes + (0 if there is own else there.nbytes)


def _digest(data: "Tensor") -> str:
    import torch

    return hashlib.sha256(data.view(torch.uint8).numpy().data).hexdigest()


@cache
def _limit(bits: int, ranked: str, loaded: "torch.dtype") -> float:
    import torch

    threshold, source = floats.value(bits), dtypes()[ranked]
    if source == loaded or (ranked == "F32" and loaded == torch.float64):
        return threshold
    if not holds(loaded, ranked):
        return float(torch.tensor(threshold).to(loaded))
    following = int(floats.scale(ranked)[floats.limit(ranked, bits) + 1])
    if following >= floats.INFINITY:
        return threshold
    middle = torch.tensor((threshold + floats.value(following)) / 2, dtype=loaded)
    if float(middle.float().to(source)) > threshold:  # half way rounds to even, here upwards
        patterns = {2: torch.int16, 4: torch.int32, 8: torch.int64}[middle.itemsize]
        middle = (middle.view(patterns) - 1).view(loaded)
    return float(middle)


def dtypes() -> "Mapping[str, torch.dtype]":
    """torch's dtype for each of safetensors' that can be pruned."""
    import torch

    return {
        "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }  # fmt: skip


def holds(loaded: "torch.dtype", ranked: str) -> bool:
    """Whether every number of the safetensors dtype `ranked` is one of `loaded`."""
    import torch

    wider = {"F32": (), "F16": (torch.float32,), "BF16": (torch.float32,)}
    others = wider.get(ranked, (torch.float16, torch.bfloat16, torch.float32))
    return loaded in (dtypes()[ranked], torch.float64, *others)
