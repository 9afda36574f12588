"""The hook of a pruned layer: it computes with the dense weights, the pruned ones, or each for half of a batch."""

from contextlib import suppress
from enum import Enum
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.nn.functional import linear

from crdiff_export.errors import PoaError
from crdiff_export.sampling.poa.masks import LayerLimit, Part, ReplacedWeights, Rule

NAME = "crdiff_poa"


class Side(Enum):
    """Which weights the layers take: dense, pruned, or each for its half of a doubled batch."""

    DENSE = 0
    PRUNED = 1
    BOTH = 2


class LayerSwitch:
    """The state that all layers of a model share, and on the CPU one buffer for their pruned weights.

    Without that buffer the system would need three times as long for the memory of each layer as its pruning takes; an
    accelerator's allocator reuses memory itself (benchmarks/NOTES.md).

    Attributes:
        side: Which weights the layers take.
        batch: The size of a doubled batch.
        keep: Whether every layer keeps its own pruned weights instead.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.side = Side.DENSE
        self.batch = 0
        self.keep = keep
        self._buffers: dict[torch.dtype, Tensor] = {}

    @property
    def extra_bytes(self) -> int:
        """Bytes of the buffer."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def prune(self, weight: Tensor, rule: Rule) -> Tensor:
        """Return the pruned weight; on the CPU it is valid until the next call."""
        if weight.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return rule(weight, None)
        buffer = self._buffers.get(weight.dtype)
        if buffer is None or buffer.numel() < weight.numel():
            with torch.inference_mode(mode=False):  # a tensor of that mode could not be written outside of it
                buffer = self._buffers[weight.dtype] = torch.empty(weight.numel(), dtype=weight.dtype)
        return rule(weight, buffer[: weight.numel()].view(weight.shape))


class LayerHook(ModelHook):  # type: ignore[misc]  # it has no types
    """Computes a linear layer with the weights that the switch names."""

    def __init__(self, switch: LayerSwitch, part: Part | LayerLimit | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.forward: Any = None
        self.follow(switch, part, dtype)

    def follow(self, switch: LayerSwitch, part: Part | LayerLimit | None, dtype: torch.dtype) -> None:
        """Obey this switch from now on, and prune as this part does; None prunes nothing."""
        self.switch = switch
        self.part: Part | LayerLimit | None = part
        self._rules: dict[torch.dtype, Rule] = {dtype: part.rule(dtype)} if part else {}
        self._cached: tuple[tuple[int, int, torch.dtype], Tensor] | None = None

    def forget(self) -> None:
        """Drop the cached pruned weights, since the part prunes otherwise now."""
        self._cached = None

    def release(self) -> None:
        """Free everything; a hook that cannot be removed stays and computes with the dense weights."""
        self.switch, self.part, self._rules, self._cached = LayerSwitch(), None, {}, None

    @property
    def extra_bytes(self) -> int:
        """Bytes of the cached pruned weights and of the part."""
        return (self.part.extra_bytes if self.part else 0) + (self._cached[1].nbytes if self._cached else 0)

    def new_forward(self, module: nn.Linear, hidden: Tensor) -> Tensor:
        """Compute the layer's output for hidden states [batch, …, in_features]."""
        if self.switch.side is Side.DENSE or self.part is None:
            return self._dense(hidden)
        pruned = self._pruned(module.weight)
        if self.switch.side is Side.PRUNED:
            return linear(hidden, pruned, module.bias)
        if len(hidden) % self.switch.batch:
            raise PoaError(
                "the model takes its batch apart (PAG, chunked feed-forward), which one doubled batch does not allow",
                'Give mode="sequential".',
            )
        dense_half, pruned_half = hidden.chunk(2)
        return torch.cat((self._dense(dense_half), linear(pruned_half, pruned, module.bias)))

    def _pruned(self, weight: Tensor) -> Tensor:
        rule = self._rule(weight.dtype)
        if isinstance(self.part, ReplacedWeights):  # they are in memory anyway
            return rule(weight, None)
        if not self.switch.keep or torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.is_inference():
            return self.switch.prune(weight, rule)
        # torch counts changes in place; a weight that was moved has another address.
        state = weight.data_ptr(), weight._version, weight.dtype  # noqa: SLF001  # its public name is this one
        if self._cached is None or self._cached[0] != state:
            self._cached = state, rule(weight, None)
        return self._cached[1]

    def _dense(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.fn_ref.original_forward(hidden)
        return output

    def _rule(self, dtype: torch.dtype) -> Rule:
        if dtype not in self._rules:  # the model was cast in the meantime
            assert self.part
            self._rules[dtype] = self.part.rule(dtype)
        return self._rules[dtype]


def attach(layer: nn.Linear, switch: LayerSwitch, part: Part | LayerLimit | None) -> LayerHook:
    """Put a hook on a layer, or let the one that is still there obey another switch."""
    registry = HookRegistry.check_if_exists_or_initialize(layer)
    present = registry.get_hook(NAME)
    if isinstance(present, LayerHook):
        present.follow(switch, part, layer.weight.dtype)
        return present
    hook = LayerHook(switch, part, layer.weight.dtype)
    registry.register_hook(hook, NAME)
    hook.forward = layer.forward
    return hook


def detach(layer: nn.Linear, hook: LayerHook) -> None:
    """Take a hook off its layer; one that something else has wrapped since stays, to leave the wrapper in place."""
    hook.release()
    if layer.forward is not hook.forward:
        return
    HookRegistry.check_if_exists_or_initialize(layer).remove_hook(NAME, recurse=False)
    if _is_plain(layer):
        with suppress(AttributeError):
            del layer.forward  # diffusers leaves the method behind, bound


def refuse_wrapped(path: str, layer: nn.Linear) -> None:
    """Refuse a layer whose forward is wrapped already: our hook would bypass the wrapper."""
    registered = HookRegistry.check_if_exists_or_initialize(layer).get_hook(NAME) is not None
    if not registered and not _is_plain(layer):
        raise PoaError(
            f"{path.removesuffix('.weight')}: something else has a hook on it, such as offloading or layerwise casting",
            "Enable POA first, then that.",
        )


def _is_plain(layer: nn.Linear) -> bool:
    return getattr(layer.forward, "__func__", None) is nn.Linear.forward
