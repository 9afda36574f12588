"""POA on a model of ComfyUI: wrappers around sampling and around the model, and functions on the pruned weights.

ComfyUI adds a LoRA to the weights, or to a copy of each layer's weights if memory is short. POA needs the weights as
they were published, so while it samples, it adds the patches of pruned layers itself: `prune(W) + delta`. For these
layers that is ComfyUI's own way with little memory.
"""

import hashlib
import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crdiff_export.errors import PoaError
from crdiff_export.sampling.poa.masks import Part, prune
from crdiff_export.sampling.poa.mix import Schedule, mix

if TYPE_CHECKING:
    from torch import Tensor

KEY = "crdiff_poa"
_log = logging.getLogger(__name__)
_NAMESPACE = uuid.UUID("6c6d2d86-5fb0-4d8a-a4be-1f8d1f1ac9a5")
# Tolerance for samplers that compute a step's sigma from its logarithm.
_NEAR = 1e-4


class PruneSwitch:
    """Whether the layers of one model take pruned weights; `used` are the keys of those that have done so."""

    def __init__(self) -> None:
        self.pruned = False
        self.used: set[str] = set()


class PatchedLayer:
    """A function for `ModelPatcher.add_weight_wrapper`: it prunes a layer's weight and adds its patches."""

    def __init__(self, switch: PruneSwitch, key: str, parts: Sequence[Part], patches: Sequence[Any]) -> None:
        self._switch, self.key, self._parts, self._patches = switch, key, parts, list(patches)

    def __call__(self, weight: "Tensor") -> "Tensor":
        """Return the weight, pruned if the switch says so, with its patches; `weight` itself does not change."""
        import torch

        if not (self._switch.pruned or self._patches):
            return weight
        # torch does not compute in eight bits; float32 has all of their values.
        result = weight.to(torch.float32 if weight.itemsize == 1 else weight.dtype)
        if self._switch.pruned:
            self._switch.used.add(self.key)
            result = prune(result, self._parts)
        if self._patches:
            import comfy.lora

            if result is weight:
                result = weight.clone()
            result = comfy.lora.calculate_weight(self._patches, result, self.key, intermediate_dtype=result.dtype)
        return result.to(weight.dtype)


class PoaPatch:
    """POA on a model and on the clones that other nodes make of it."""

    def __init__(self, parts: Mapping[str, Sequence[Part]], schedule: Schedule, where: str) -> None:
        self._parts, self._schedule, self._where = parts, schedule, where
        self._digest = hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()
        self._switch: PruneSwitch | None = None
        self._loaded: Any = None
        self._functions: dict[str, PatchedLayer] = {}
        self._reached: list[tuple[Any, PatchedLayer]] = []
        # The sigma of the step that is sampled, and the layers that were pruned in it.
        self._step: tuple[float, set[str]] | None = None

    def put_on(self, model: Any) -> Any:
        """Clone a ModelPatcher and let the clone sample with POA, in place of another POA."""
        from comfy.patcher_extension import WrappersMP

        clone = take_off(model)
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.around_sampling)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.around_model)
        return clone

    def around_sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Sample with a patcher in the guider that has our functions on its weights."""
        guider = executor.class_obj
        patcher = guider.model_patcher
        switch = vars(patcher.model).setdefault(KEY, PruneSwitch())
        guider.model_patcher = self._loaded = self._patcher(patcher, switch)
        before, self._switch = self._switch, switch
        try:
            result = executor(*args, **kwargs)
            self._check_step()
            return result
        finally:
            self._step = None
            for part in (part for parts in self._parts.values() for part in parts):
                part.release()
            for layer, function in self._reached:
                layer.weight_function = [other for other in layer.weight_function if other is not function]
            self._reached.clear()
            self._switch = before
            guider.model_patcher = patcher

    def _patcher(self, original: Any, switch: PruneSwitch) -> Any:
        """Clone a patcher and move its patches of pruned layers into our functions."""
        clone = self.clone_without_poa(original)
        self._functions = {
            key: PatchedLayer(switch, key, parts, clone.patches.pop(key, ())) for key, parts in self._parts.items()
        }
        for key, function in self._functions.items():
            clone.add_weight_wrapper(key, function)
        return clone

    def clone_without_poa(self, original: Any) -> Any:
        """Clone a patcher without our wrappers, for one that gets what this patch changes on the weights.

        The clone lives as long as its weights may be loaded: ComfyUI would otherwise regard `original`, which has other
        patches, as loaded. So the clone must not refer to `original`.
        """
        if any(key in self._parts for patches in original.hook_patches.values() for key in patches):
            _log.warning("crdiff: a LoRA hook changes pruned layers; they are pruned with it, not before it")
        clone = original.clone()
        clone.model_options = original.model_options
        for kind in list(clone.wrappers):
            clone.remove_wrappers_with_key(kind, KEY)
        while clone.parent is not None and clone.parent.parent is not None:
            clone.parent = clone.parent.parent
        # Equal for equal patches, because ComfyUI loads the weights again for another id.
        name = f"{original.patches_uuid} {type(self).__name__} {self._digest}"
        clone.patches_uuid = uuid.uuid5(_NAMESPACE, name)
        return clone

    def around_model(
        self, executor: Any, x: Any, t: Any, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Predict with the dense weights, the pruned ones, or both, and mix."""
        options = {} if transformer_options is None else transformer_options
        weight = self._weight(t, options)

        def predict(*, pruned: bool) -> Any:
            # A UNet takes a ControlNet's tensors out of these lists.
            lists = {k: list(v) if isinstance(v, list) else v for k, v in control.items()} if control else control
            return self._predict(executor, pruned, x, t, c_concat, c_crossattn, lists, options.copy(), **kwargs)

        if weight in (0, 1):
            return predict(pruned=weight == 1)
        return mix(predict(pruned=False), predict(pruned=True), weight)

    def _predict(self, executor: Any, pruned: bool, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        if self._switch is None:
            raise PoaError(
                "the model is sampled in a way that POA does not see",
                "Use a sampler node that goes through ComfyUI's guiders, as KSampler does.",
            )
        switch = self._switch
        self._reach_small_layers()
        switch.pruned = pruned
        switch.used.clear()
        try:
            result = executor(x, t, *args, **kwargs)
        finally:
            switch.pruned = False
        if pruned:
            self._count(float(t.reshape(-1)[0]), switch.used)
        return result

    def _count(self, sigma: float, used: set[str]) -> None:
        """Note which layers a call has pruned. One call may skip some (skip-layer guidance), all of a step may not."""
        if self._step and self._step[0] != sigma:
            self._check_step()
        self._step = self._step or (sigma, set())
        self._step[1].update(used)
        if not used:
            self._check_step()

    def _check_step(self) -> None:
        """Raise PoaError if a layer took dense weights in every call of the last step."""
        used = self._step[1] if self._step else set(self._parts)
        self._step = None
        if missed := [key for key in self._parts if key not in used]:
            shown = ", ".join(missed[:3]) + (f" and {len(missed) - 3} more" if len(missed) > 3 else "")
            raise PoaError(
                f"{len(missed)} of the {len(self._parts)} layers that {self._where} prunes did not take the pruned "
                f"weights: {shown}",
                "Something on this model skips them or computes them in its own way (EasyCache, a quantised format, "
                "several GPUs, `--fast cublas_ops`); take it off, or take POA off.",
            )

    def _reach_small_layers(self) -> None:
        """Give our functions to layers that ComfyUI has loaded without any.

        With dynamic VRAM (`ModelPatcherDynamic.load`) layers of up to 16 KiB are loaded for good, patches included, and
        get no functions; their weights are cast for each call all the same. `around_sampling` takes these back.
        """
        import comfy.utils

        for key, function in self._functions.items():
            layer = comfy.utils.get_attr(self._loaded.model, key.removesuffix(".weight"))
            functions = list(getattr(layer, "weight_function", ()))
            is_there = any(isinstance(other, PatchedLayer) and other.key == key for other in functions)
            if getattr(layer, "comfy_cast_weights", False) and not is_there:
                layer.weight_function = [*functions, function]
                self._reached.append((layer, function))

    def _weight(self, t: Any, options: Mapping[str, Any]) -> float:
        constant = self._schedule.constant
        if constant is not None:
            return constant
        sigmas = options.get("sample_sigmas")
        if sigmas is None:
            raise PoaError("nothing tells which step of sampling this is", "Let POA start at 0 and stop at 1.")
        return self._schedule.at(fraction(float(t.reshape(-1)[0]), sigmas.tolist()))


def take_off(model: Any) -> Any:
    """Clone a ModelPatcher without POA."""
    clone = model.clone()
    for kind in list(clone.wrappers):
        clone.remove_wrappers_with_key(kind, KEY)
    return clone


def fraction(sigma: float, sigmas: Sequence[float]) -> float:
    """Return the fraction of sampling that is done at the beginning of a step.

    Args:
        sigma: The noise level of the step, or one within it.
        sigmas: The noise levels of all steps, and the last one's end.

    Returns:
        A fraction from 0 to below 1.

    """
    steps = len(sigmas) - 1
    if steps < 1:
        return 0.0
    if sigmas[0] >= sigmas[-1]:
        begun = sum(start >= sigma * (1 - _NEAR) for start in sigmas[:-1])
    else:  # noise is added
        begun = sum(start <= sigma * (1 + _NEAR) for start in sigmas[:-1])
    return max(begun - 1, 0) / steps
