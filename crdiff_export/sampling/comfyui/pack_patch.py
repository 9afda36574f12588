"""A pack on a model of ComfyUI: the size of the latent that is sampled decides what is pruned, and POA's weight.

The size is read once a sampling, from the latent itself: area conditioning and tiles call the model with crops.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from crdiff_export.packs import Pack
from crdiff_export.sampling.comfyui.match import Parts
from crdiff_export.sampling.comfyui.patch import KEY, PoaPatch, take_off
from crdiff_export.sampling.poa.masks import Part, prune
from crdiff_export.sampling.poa.mix import Schedule
from crdiff_export.sampling.poa.packed import choose
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)


class PackPatch:
    """A pack on a model and on the clones that other nodes make of it.

    Args:
        pack: The pack.
        weight: w for every size; None for each size's own.
        parts: Makes the parts of every weight that a size prunes.
    """

    def __init__(self, pack: Pack, weight: float | None, parts: Callable[[Size], Parts]) -> None:
        self._pack, self._weight, self._parts_of = pack, weight, parts
        self._patches: dict[Size, PoaPatch] = {}
        self._current: PoaPatch | None = None
        self._noted: set[str] = set()

    def put_on(self, model: Any) -> Any:
        """Clone a ModelPatcher and let the clone follow the size of its latents, in place of another POA."""
        from comfy.patcher_extension import WrappersMP

        clone = take_off(model)
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.around_sampling)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.around_model)
        return clone

    def around_sampling(self, executor: Any, noise: "Tensor", latent: "Tensor", *args: Any, **kwargs: Any) -> Any:
        """Sample with what the latent's size needs."""
        patcher = executor.class_obj.model_patcher
        shapes = kwargs.get("latent_shapes") or [latent.shape]  # of several latents in one, the first is the picture
        self._current, before = self._patch_for(shapes[0], patcher), self._current
        try:
            if self._current is None:
                return executor(noise, latent, *args, **kwargs)
            return self._current.around_sampling(executor, noise, latent, *args, **kwargs)
        finally:
            self._current = before

    def around_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict as the current size asks for."""
        if self._current is None:
            return executor(*args, **kwargs)
        return self._current.around_model(executor, *args, **kwargs)

    def _patch_for(self, shape: Sequence[int], patcher: Any) -> PoaPatch | None:
        """Make the patch for the shape of a latent, or take the one that was made before; None for the dense model."""
        pixels = getattr(patcher.model.latent_format, "spacial_downscale_ratio", self._pack.family.cell)
        size = Size(shape[-1] * pixels, shape[-2] * pixels)
        chosen = choose(self._pack, size)
        if chosen.note and chosen.note not in self._noted:
            self._noted.add(chosen.note)
            _log.warning("crdiff: %s", chosen.note)
        if chosen.size is None:
            return None
        if chosen.size not in self._patches:
            self._patches[chosen.size] = self._make(chosen.size)
        return self._patches[chosen.size]

    def _make(self, size: Size) -> PoaPatch:
        stamp = self._pack.variants[size]
        weight = stamp.poa_weight if self._weight is None else self._weight
        kind = PrunedPatch if weight == 1 and not stamp.scaled else PoaPatch
        return kind(self._parts_of(size), Schedule(weight), f"{self._pack.path.name} for {size}")


class PrunedPatch(PoaPatch):
    """The pruned model alone: ComfyUI prunes each layer once, when it loads it, as it adds a LoRA.

    With dynamic VRAM layers are cast for every call, and are pruned then as by `PoaPatch`.
    """

    def around_sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Sample with a patcher in the guider that has the pruned layers as patches."""
        guider = executor.class_obj
        patcher = guider.model_patcher
        self._loads = not (hasattr(patcher, "is_dynamic") and patcher.is_dynamic())
        if not self._loads:
            return super().around_sampling(executor, *args, **kwargs)
        guider.model_patcher = self._pruned(patcher)
        try:
            return executor(*args, **kwargs)
        finally:
            guider.model_patcher = patcher
            for part in (part for parts in self._parts.values() for part in parts):
                part.release()

    def around_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict with the weights as they are loaded."""
        return executor(*args, **kwargs) if self._loads else super().around_model(executor, *args, **kwargs)

    def _pruned(self, original: Any) -> Any:
        """Clone a patcher whose patches of pruned layers begin with ours; see `PoaPatch._patcher` on the clone."""
        clone = self.clone_without_poa(original)
        for key, parts in self._parts.items():
            adapter = _adapter()(set(), (_Pruning(parts, original.model, key),))
            clone.patches[key] = [(1.0, adapter, 1.0, None, None), *clone.patches.get(key, ())]
        return clone


class _Pruning:
    """How one layer is pruned: its parts, and where its own weight is."""

    def __init__(self, parts: Sequence[Part], model: Any, key: str) -> None:
        self._parts, self._model, self._key = parts, model, key

    def __call__(self, weight: "Tensor") -> "Tensor":
        """Return the pruned weight in the dtype of `weight`, which ComfyUI may have rounded to add patches to it."""
        import comfy.utils
        import torch

        own = comfy.utils.get_attr(self._model, self._key)
        source = own if own.device == weight.device and own.shape == weight.shape else weight
        wide = source.to(torch.float32) if source.itemsize == 1 else source
        return prune(wide, self._parts).to(weight.dtype)


@cache
def _adapter() -> type[Any]:
    """Return the class of our patches, which is ComfyUI's own kind of patch."""
    from comfy.weight_adapter import WeightAdapterBase

    class PrunedWeight(WeightAdapterBase):  # type: ignore[misc]  # it has no types
        """A patch that prunes a weight."""

        name = "crdiff"

        def __init__(self, loaded_keys: set[str], weights: tuple[_Pruning]) -> None:
            self.loaded_keys, self.weights = loaded_keys, weights

        def calculate_weight(self, weight: "Tensor", *_args: Any, **_kwargs: Any) -> "Tensor":
            """Return the pruned weight."""
            return self.weights[0](weight)

    return PrunedWeight
