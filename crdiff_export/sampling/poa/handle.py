"""POA on a model of diffusers: it predicts twice with one copy of its weights, and the predictions are mixed.

The model has a forward hook of torch, so that other wrappers (offloading, compilation) may come and go in any order.
The pruned layers have a `ModelHook` of diffusers each, which prunes their weights when a pass needs it.
"""

import weakref
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from crdiff_export.errors import PoaError
from crdiff_export.models.families.model import Time
from crdiff_export.sampling.poa import batch, hooks, layers
from crdiff_export.sampling.poa.hooks import NAME, LayerSwitch, Side
from crdiff_export.sampling.poa.mix import Schedule, mix
from crdiff_export.sampling.poa.source import Source

MODES = ("sequential", "batched")


class ModelHandle:
    """What is on one model, which lets it predict with POA; `schedule` and `mode` may be replaced between two images.

    Attributes:
        model: The UNet or transformer.
        filled: Whether its dense weights come from a residual, so that `remove` prunes them again.
    """

    def __init__(self, pipe: Any, time: Time, schedule: Schedule, mode: str, *, keep: bool = False) -> None:
        self._pipe = weakref.ref(pipe)  # so that the model does not keep the whole pipeline alive
        self._time, self._schedule, self.mode = time, self.checked(schedule), mode
        self.model = model_of(pipe)
        self.filled = False
        self._switch = LayerSwitch(keep=keep)
        self._hooks: dict[str, hooks.LayerHook] = {}
        self._call: tuple[tuple[Any, ...], dict[str, Any], float] = ((), {}, 0.0)

    def install(self) -> None:
        """Put the hooks on the model."""
        self._handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        setattr(self.model, NAME, self)

    def remove(self) -> None:
        """Take all hooks off; the weights are as they were."""
        for handle in self._handles:
            handle.remove()
        self._switch.side = Side.DENSE
        delattr(self.model, NAME)

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        raise PoaError("a model with POA on cannot be copied or pickled", "Take POA off first: poa.disable.")

    @property
    def schedule(self) -> Schedule:
        """The POA weight at each moment of sampling."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        self._schedule = self.checked(schedule)

    @staticmethod
    def checked(schedule: Schedule) -> Schedule:
        """Return a schedule; PoaError for anything else."""
        if not isinstance(schedule, Schedule):
            raise PoaError(f"{schedule!r} is no schedule", "Give poa.Schedule(weight, start, stop).")
        return schedule

    @property
    def changes_weights(self) -> bool:
        """Whether the weights of the model are not those that were loaded."""
        return self.filled

    @property
    def mode(self) -> str:
        """`sequential`: two passes; `batched`: one pass over a doubled batch."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise PoaError(f"there is no mode {mode!r}", f"Give {' or '.join(MODES)}.")
        self._mode = mode

    @property
    def extra_bytes(self) -> int:
        """Bytes in memory beside the model's own weights, after a first use.

        A buffer for the largest pruned layer, or with `keep` the pruned weights of all layers; with masks one bit more
        for each weight of these layers; with moved weights all pruned weights instead.
        """
        return self._switch.extra_bytes + sum(hook.extra_bytes for hook in self._hooks.values())

    def _before(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Choose the weights of the model's own pass."""
        self._refuse_changes()
        weight = self._weight(args, kwargs)
        self._call = args, kwargs, weight
        if weight in (0, 1):
            self._switch.side = Side.PRUNED if weight else Side.DENSE
            return None
        if self.mode == "batched" and (doubled := batch.double(self.model, args, kwargs)):
            self._switch.side, self._switch.batch = Side.BOTH, doubled.size
            return (), doubled.arguments
        self._switch.side = Side.DENSE
        return batch.copy(args), batch.copy(kwargs)

    def _after(self, model: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        """Mix the model's prediction with the other one."""
        side, self._switch.side = self._switch.side, Side.DENSE
        (args, kwargs, weight), self._call = self._call, ((), {}, 0.0)
        if weight in (0, 1) or output is None:  # None: the pass failed
            return output
        if side is Side.BOTH:
            dense, pruned = output[0].chunk(2)
            return _with_prediction(output, mix(dense, pruned, weight))
        self._switch.side = Side.PRUNED
        try:
            other = model.forward(*args, **kwargs)
        finally:
            self._switch.side = Side.DENSE
        return _with_prediction(output, _mixed(output[0], other[0], weight))

    def _refuse_changes(self) -> None:
        """Refuse changes of the model that would falsify its predictions."""
        if getattr(self.model, "is_cache_enabled", False):
            raise PoaError(
                f"{type(self.model).__name__} has a cache on, which would take one of the two passes for the other",
                "Call its disable_cache(), or poa.disable.",
            )
        if hasattr(self.model, "peft_config") and any(getattr(m, "merged", False) for m in self.model.modules()):
            raise PoaError(
                "a LoRA was fused, so that the weights are not the base's any more", "Call pipe.unfuse_lora()."
            )

    def _weight(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        constant = self.schedule.constant
        return self.schedule.at(self._fraction(args, kwargs)) if constant is None else constant

    def _fraction(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """Return the fraction of the scheduler's steps that is done at the timestep of this call."""
        scheduler = getattr(self._pipe(), "scheduler", None)
        named = (kwargs[name] for name in ("timestep", "timesteps", "t") if name in kwargs)
        timestep = next(named, args[1] if len(args) > 1 else None)
        if scheduler is None or timestep is None or scheduler.timesteps is None:
            raise PoaError("nothing tells which step of sampling this is", "Enable POA on the pipeline, not its model.")
        now = float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)
        times = _times(scheduler, self._time)
        return int((times - now).abs().argmin()) / len(times)


class Poa(ModelHandle):
    """POA on one model, with the masks of one source."""

    def __init__(
        self, pipe: Any, source: Source, schedule: Schedule, mode: str, *, check: bool, keep: bool = False
    ) -> None:
        super().__init__(pipe, source.plan.match.family.time, schedule, mode, keep=keep)
        self.source = source
        self._layers = layers.find(self.model, source)
        for path, layer in self._layers.items():
            hooks.refuse_wrapped(path, layer)
        self.filled = (check or source.has_residual) and layers.make_dense(self._layers, source, check=check)

    def install(self) -> None:
        """Put the hooks on the model and its layers."""
        parts = self.source.masks.diffusers
        self._hooks = {name: hooks.attach(layer, self._switch, parts[name][0]) for name, layer in self._layers.items()}
        super().install()

    @torch.no_grad()
    def remove(self) -> None:
        """Remove all hooks and the residual's weights; PoaError, with nothing changed, if these are offloaded."""
        if self.filled and any(layer.weight.is_meta for layer in self._layers.values()):
            raise PoaError(
                "the weights that are to be pruned again are offloaded, layer by layer",
                "Call pipe.remove_all_hooks() first, then poa.disable.",
            )
        super().remove()
        for name, layer in self._layers.items():
            hooks.detach(layer, self._hooks[name])
            if self.filled:
                rule = self.source.masks.diffusers[name][0].rule(layer.weight.dtype)
                layer.weight.copy_(rule(layer.weight, None))
        self.source.masks.release()


def installed(pipe: Any) -> ModelHandle | None:
    """Return what a pipeline's model has on it, if it has anything."""
    handle: ModelHandle | None = getattr(model_of(pipe), NAME, None)
    return handle


def model_of(pipe: Any) -> nn.Module:
    """Return the UNet or transformer of a pipeline, or the model itself.

    Raises:
        PoaError: The pipeline has neither.

    """
    if isinstance(pipe, nn.Module):
        return pipe
    parts = (getattr(pipe, name, None) for name in ("unet", "transformer"))
    model = next((part for part in parts if part is not None), None)  # a compiled one has no truth value
    if not isinstance(model, nn.Module):
        raise PoaError(f"{type(pipe).__name__} has no UNet and no transformer", "Give a diffusers pipeline, loaded.")
    return model


def _times(scheduler: Any, time: Time) -> Tensor:
    """Return what the pipeline gives its model as the timestep of every step, float64."""
    steps: Tensor = scheduler.timesteps.cpu().double()
    if time == "timestep":
        return steps
    if time == "edm":
        sigmas: Tensor = scheduler.sigmas[: len(steps)].cpu().double()
        return sigmas / (sigmas + 1)
    fractions: Tensor = steps / scheduler.config.num_train_timesteps
    return 1 - fractions if time == "rising" else fractions


def _mixed(dense: Any, pruned: Any, weight: float) -> Any:
    """Mix two predictions: tensors, or lists of a tensor for each picture (Z-Image)."""
    if isinstance(dense, Tensor):
        return mix(dense, pruned, weight)
    return [mix(first, second, weight) for first, second in zip(dense, pruned, strict=True)]


def _with_prediction(output: Any, prediction: Any) -> Any:
    """Replace the prediction in a model's output, which is a tuple or a record of diffusers."""
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    return type(output)(prediction)
