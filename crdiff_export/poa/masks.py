"""What a pruned model zeroes, for weights in memory: by layer of either layout, in whatever dtype they were loaded.

Pruned weights are `where(|W| > t, W, 0)` of the dense ones, so a threshold per layer is all that has to be held.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Self

from crdiff_export import floats, twins
from crdiff_export.plan import Plan
from crdiff_export.threshold import Threshold

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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


@dataclass(frozen=True, slots=True)
class Masks:
    """The cuts of every weight that is pruned, by its name in the original layout and in diffusers', without prefix."""

    family: str
    original: Mapping[str, tuple[Cut, ...]]
    diffusers: Mapping[str, tuple[Cut, ...]]

    @classmethod
    def of(cls, plan: Plan, thresholds: Sequence[Threshold]) -> Self:
        """The masks of a plan with the thresholds of its scopes."""
        original: dict[str, list[Cut]] = {}
        diffusers: dict[str, list[Cut]] = {}
        names = twins.by_key(plan)
        for target in plan.targets:
            bits = thresholds[target.scope].bits
            if bits is not None:
                (fused, part), single = names[twins.key(plan, target)]
                start = part * target.count
                original.setdefault(fused, []).append(Cut(start, start + target.count, bits, target.output.dtype))
                diffusers.setdefault(single, []).append(Cut(0, target.count, bits, target.output.dtype))
        return cls(
            plan.match.family.id, *({n: tuple(cuts) for n, cuts in some.items()} for some in (original, diffusers))
        )


def prune(weight: "Tensor", cuts: Sequence[Cut]) -> "Tensor":
    """The weight with its small elements at +0.0; what is not finite stays. A new tensor, like `weight` in all else."""
    from torch.nn.functional import hardshrink

    if len(cuts) == 1 and cuts[0].stop - cuts[0].start == weight.numel():
        return hardshrink(weight, cuts[0].limit(weight.dtype))
    pruned = weight.clone()
    flat = pruned.view(-1)
    for cut in cuts:
        part = flat[cut.start : cut.stop]
        part.copy_(hardshrink(part, cut.limit(weight.dtype)))
    return pruned


def _frozen(cuts: Mapping[str, list[Cut]]) -> dict[str, tuple[Cut, ...]]:
    return {name: tuple(some) for name, some in cuts.items()}


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
