"""What a pruned layer does while sampling: take its weights as they are, pruned, or either for half of a batch."""

from contextlib import suppress
from enum import Enum
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.nn.functional import linear

from crdiff_export.errors import PoaError
from crdiff_export.sampling.poa.masks import Own, Part, Rule

NAME = "crdiff_poa"


class Side(Enum):
    """Which weights the layers take: dense, pruned, or each for its half of a doubled batch."""

    DENSE = 0
    PRUNED = 1
    BOTH = 2


class Switch:
    """What all layers of a model look at, and where on the CPU they put their pruned weights, one after the other.

    `batch` is the size of a doubled batch. With `keep` every layer holds on to its pruned weights instead.

    There the system takes three times as long to provide new memory for each layer as its pruning takes; an
    accelerator's allocator keeps what it has (benchmarks/NOTES.md).
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.side = Side.DENSE
        self.batch = 0
        self.keep = keep
        self._room: dict[torch.dtype, Tensor] = {}

    @property
    def held(self) -> int:
        """Bytes of that room."""
        return sum(room.nbytes for room in self._room.values())

    def prune(self, weight: Tensor, rule: Rule) -> Tensor:
        """The pruned weight; on the CPU it holds until the next one is asked for."""
        if weight.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return rule(weight, None)
        room = self._room.get(weight.dtype)
        if room is None or room.numel() < weight.numel():
            with torch.inference_mode(mode=False):  # what is made in that mode cannot be written outside of it
                room = self._room[weight.dtype] = torch.empty(weight.numel(), dtype=weight.dtype)
        return rule(weight, room[: weight.numel()].view(weight.shape))


class LayerHook(ModelHook):  # type: ignore[misc]  # it has no types
    """Takes the pruned weights of a linear layer when the switch says so."""

    def __init__(self, switch: Switch, part: Part, dtype: torch.dtype) -> None:
        super().__init__()
        self.forward: Any = None
        self.follow(switch, part, dtype)

    def follow(self, switch: Switch, part: Part, dtype: torch.dtype) -> None:
        """Look at this switch from now on."""
        self.switch = switch
        self.part: Part | None = part
        self._rules: dict[torch.dtype, Rule] = {dtype: part.rule(dtype)}
        self._kept: tuple[tuple[int, int, torch.dtype], Tensor] | None = None

    def let_go(self) -> None:
        """Hold nothing any more; a hook that cannot be taken off stays, dense."""
        self.switch, self.part, self._rules, self._kept = Switch(), None, {}, None

    @property
    def held(self) -> int:
        """Bytes of the pruned weights that are kept, and of what they are made with."""
        return (self.part.held if self.part else 0) + (self._kept[1].nbytes if self._kept else 0)

    def new_forward(self, module: nn.Linear, hidden: Tensor) -> Tensor:
        """The layer's output for hidden states `(batch, …, in_features)`."""
        if self.switch.side is Side.DENSE:
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
        if isinstance(self.part, Own):  # they are held as it is
            return rule(weight, None)
        if not self.switch.keep or torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.is_inference():
            return self.switch.prune(weight, rule)
        # torch counts changes in place; a weight that was moved lies elsewhere.
        state = weight.data_ptr(), weight._version, weight.dtype  # noqa: SLF001  # its public name is this one
        if self._kept is None or self._kept[0] != state:
            self._kept = state, rule(weight, None)
        return self._kept[1]

    def _dense(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.fn_ref.original_forward(hidden)
        return output

    def _rule(self, dtype: torch.dtype) -> Rule:
        if dtype not in self._rules:  # the model was cast in the meantime
            assert self.part
            self._rules[dtype] = self.part.rule(dtype)
        return self._rules[dtype]


def attach(layer: nn.Linear, switch: Switch, part: Part) -> LayerHook:
    """Put a hook on a layer, or have the one that is still there follow another switch."""
    registry = HookRegistry.check_if_exists_or_initialize(layer)
    hook = registry.get_hook(NAME)
    if isinstance(hook, LayerHook):
        hook.follow(switch, part, layer.weight.dtype)
        return hook
    made = LayerHook(switch, part, layer.weight.dtype)
    registry.register_hook(made, NAME)
    made.forward = layer.forward
    return made


def detach(layer: nn.Linear, hook: LayerHook) -> None:
    """Take a hook off its layer. One that somebody has wrapped since would take the wrapper along; it stays."""
    hook.let_go()
    if layer.forward is not hook.forward:
        return
    HookRegistry.check_if_exists_or_initialize(layer).remove_hook(NAME, recurse=False)
    if _is_plain(layer):
        with suppress(AttributeError):
            del layer.forward  # diffusers leaves the method behind, bound


def refuse_wrapped(path: str, layer: nn.Linear) -> None:
    """PoaError for a layer whose forward is another's already; ours would take the weights from behind its back."""
    registered = HookRegistry.check_if_exists_or_initialize(layer).get_hook(NAME) is not None
    if not registered and not _is_plain(layer):
        raise PoaError(
            f"{path.removesuffix('.weight')}: something else has a hook on it, such as offloading or layerwise casting",
            "Enable POA first, then that.",
        )


def _is_plain(layer: nn.Linear) -> bool:
    return getattr(layer.forward, "__func__", None) is nn.Linear.forward
