"""POA in diffusers: hooks on a UNet or transformer that predict twice with one copy of the weights, and mix.

The model's own hook is torch's, which lets wrappers of others (offloading, compilation) come and go in any order. The
layers' is a `ModelHook` of diffusers, whose forward takes the pruned weights, made on the spot, when it is told to.
"""

from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.nn.functional import hardshrink, linear

from crdiff_export.errors import PoaError
from crdiff_export.poa import batch, layers
from crdiff_export.poa.masks import Cut
from crdiff_export.poa.mix import Schedule, mix
from crdiff_export.poa.source import Source

NAME = "crdiff_poa"


class Side(Enum):
    """Which weights the layers take: dense, pruned, or each for its half of a doubled batch."""

    DENSE = 0
    PRUNED = 1
    BOTH = 2


class Switch:
    """What all layers of a model look at, and where on the CPU they put their pruned weights, one after the other.

    There the system takes three times as long to provide new memory for each layer as its pruning takes; an
    accelerator's allocator keeps what it has (benchmarks/NOTES.md).
    """

    def __init__(self) -> None:
        self.side = Side.DENSE
        self._room: dict[torch.dtype, Tensor] = {}

    @property
    def held(self) -> int:
        """Bytes of what is kept for that."""
        return sum(room.nbytes for room in self._room.values())

    def prune(self, weight: Tensor, limit: float) -> Tensor:
        """The pruned weight; on the CPU it holds until the next one is asked for."""
        if weight.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return hardshrink(weight, limit)
        room = self._room.get(weight.dtype)
        if room is None or room.numel() < weight.numel():
            room = self._room[weight.dtype] = torch.empty(weight.numel(), dtype=weight.dtype)
        pruned = room[: weight.numel()].view(weight.shape)
        torch.ops.aten.hardshrink.out(weight, limit, out=pruned)
        return pruned


class LayerHook(ModelHook):  # type: ignore[misc]  # it has no types
    """Takes the pruned weights of a linear layer when the switch says so."""

    def __init__(self, switch: Switch, cut: Cut, dtype: torch.dtype) -> None:
        super().__init__()
        self.follow(switch, cut, dtype)

    def follow(self, switch: Switch, cut: Cut, dtype: torch.dtype) -> None:
        """Look at this switch from now on."""
        self.switch, self.cut = switch, cut
        self._limits = {dtype: cut.limit(dtype)}

    def new_forward(self, module: nn.Linear, hidden: Tensor) -> Tensor:
        """The layer's output for hidden states `(batch, …, in_features)`."""
        if self.switch.side is Side.DENSE:
            return self._dense(hidden)
        pruned = self.switch.prune(module.weight, self._limit(module.weight.dtype))
        if self.switch.side is Side.PRUNED:
            return linear(hidden, pruned, module.bias)
        dense_half, pruned_half = hidden.chunk(2)
        return torch.cat((self._dense(dense_half), linear(pruned_half, pruned, module.bias)))

    def _dense(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.fn_ref.original_forward(hidden)
        return output

    def _limit(self, dtype: torch.dtype) -> float:
        if dtype not in self._limits:  # the model was cast in the meantime
            self._limits[dtype] = self.cut.limit(dtype)
        return self._limits[dtype]


class Poa:
    """POA on one model. `weight`, `start` and `stop` are in `schedule`, which may be replaced between images."""

    def __init__(self, pipe: Any, source: Source, schedule: Schedule, mode: str, *, check: bool) -> None:
        self._pipe, self.source, self.schedule, self.mode = pipe, source, schedule, mode
        self.model = model_of(pipe)
        self._layers = layers.find(self.model, source)
        self._switch = Switch()
        for path, layer in self._layers.items():
            _refuse_wrapped(path, layer)
        self._filled = layers.make_dense(self._layers, source) if check or source.has_residual else False
        self._calls: tuple[Any, Any, float] = ((), {}, 0.0)
        self._forwards = {name: self._hook(name, layer) for name, layer in self._layers.items()}
        self._handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    @property
    def held(self) -> int:
        """Bytes held beside the model's own weights: room for its largest pruned layer, once it has been used."""
        return self._switch.held

    def _hook(self, name: str, layer: nn.Linear) -> Any:
        """Put a hook on a layer, or have an old one follow us; the forward that the layer now has."""
        registry = HookRegistry.check_if_exists_or_initialize(layer)
        cut = self.source.masks.diffusers[name][0]
        hook = registry.get_hook(NAME)
        if hook is None:
            registry.register_hook(LayerHook(self._switch, cut, layer.weight.dtype), NAME)
        else:
            hook.follow(self._switch, cut, layer.weight.dtype)
        return layer.forward

    def remove(self) -> None:
        """Take all hooks off, and the residual's weights out."""
        for handle in self._handles:
            handle.remove()
        self._switch.side = Side.DENSE
        for name, layer in self._layers.items():
            # One that somebody has wrapped since would take the wrapper along; it stays, and does nothing.
            if layer.forward is self._forwards[name]:
                HookRegistry.check_if_exists_or_initialize(layer).remove_hook(NAME, recurse=False)
                if _is_plain(layer):
                    with suppress(AttributeError):
                        del layer.forward  # diffusers leaves the method behind, bound
            if self._filled:
                cut = self.source.masks.diffusers[name][0]
                with torch.no_grad():
                    layer.weight.copy_(hardshrink(layer.weight, cut.limit(layer.weight.dtype)))

    def _before(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decide what the model's own pass is to be."""
        if getattr(self.model, "is_cache_enabled", False):
            raise PoaError(
                f"{type(self.model).__name__} has a cache on, which would take one of the two passes for the other",
                "Call its disable_cache(), or poa.disable.",
            )
        weight = self._weight(args, kwargs)
        self._calls = args, kwargs, weight
        if weight in (0, 1):
            self._switch.side = Side.PRUNED if weight else Side.DENSE
            return None
        if self.mode == "batched" and (doubled := batch.double(self.model, args, kwargs)):
            self._switch.side = Side.BOTH
            return doubled
        self._switch.side = Side.DENSE
        return batch.copied(args), batch.copied(kwargs)

    def _after(self, model: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        """Mix what the model has predicted with the other prediction."""
        side, self._switch.side = self._switch.side, Side.DENSE
        (args, kwargs, weight), self._calls = self._calls, ((), {}, 0.0)
        if weight in (0, 1) or output is None:  # None: the pass has failed
            return output
        if side is Side.BOTH:
            dense, pruned = _prediction(output).chunk(2)
            return _with_prediction(output, mix(dense, pruned, weight))
        self._switch.side = Side.PRUNED
        try:
            other = model.forward(*args, **kwargs)
        finally:
            self._switch.side = Side.DENSE
        return _with_prediction(output, mix(_prediction(output), _prediction(other), weight))

    def _weight(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        constant = self.schedule.constant
        return self.schedule.at(self._fraction(args, kwargs)) if constant is None else constant

    def _fraction(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """How much of the scheduler's steps is done at the timestep that the model was given."""
        scheduler = getattr(self._pipe, "scheduler", None)
        given = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        if scheduler is None or given is None or scheduler.timesteps is None:
            raise PoaError("nothing tells which step of sampling this is", "Enable POA on the pipeline, not its model.")
        now = float(given.reshape(-1)[0]) if isinstance(given, Tensor) else float(given)
        if self.source.masks.family.startswith("flux"):  # its pipelines give the timestep as a fraction
            now *= scheduler.config.num_train_timesteps
        distances = (scheduler.timesteps.cpu().double() - now).abs()
        return int(distances.argmin()) / len(distances)


def enable(pipe: Any, source: Source, schedule: Schedule, *, mode: str, check: bool) -> Poa:
    """Put POA on a pipeline's model, in place of one that is on it."""
    if mode not in ("sequential", "batched"):
        raise PoaError(f"there is no mode {mode!r}", "Give sequential or batched.")
    disable(pipe)
    poa = Poa(pipe, source, schedule, mode, check=check)
    setattr(poa.model, NAME, poa)
    return poa


def disable(pipe: Any) -> None:
    """Take POA off a pipeline's model."""
    model = model_of(pipe)
    poa = getattr(model, NAME, None)
    if poa is not None:
        delattr(model, NAME)
        poa.remove()


def model_of(pipe: Any) -> nn.Module:
    """The model that denoises; PoaError for what has none."""
    if isinstance(pipe, nn.Module):
        return pipe
    model = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if not isinstance(model, nn.Module):
        raise PoaError(f"{type(pipe).__name__} has no UNet and no transformer", "Give a diffusers pipeline, loaded.")
    return model


def _is_plain(layer: nn.Linear) -> bool:
    return getattr(layer.forward, "__func__", None) is nn.Linear.forward


def _refuse_wrapped(path: str, layer: nn.Linear) -> None:
    registered = HookRegistry.check_if_exists_or_initialize(layer).get_hook(NAME) is not None
    if not registered and not _is_plain(layer):
        raise PoaError(
            f"{path.removesuffix('.weight')}: something else has a hook on it, such as offloading or layerwise casting",
            "Enable POA first, then that.",
        )


def _prediction(output: Any) -> Tensor:
    prediction = output[0]
    assert isinstance(prediction, Tensor)
    return prediction


def _with_prediction(output: Any, prediction: Tensor) -> Any:
    """The model's output, a tuple or one of diffusers' records, with another prediction in the first place."""
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    return type(output)(prediction)
