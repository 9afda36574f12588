"""POA in A1111: the UNet's forward is wrapped for the time of one sampling.

A1111's Lora extension merges into a layer's weight when the layer computes next, and keeps the weight as it was in the
layer's `network_weights_backup`.
"""

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from crdiff_export.errors import PoaError
from crdiff_export.sampling.poa.masks import prune
from crdiff_export.sampling.webui.layers import MergedWeight, PrunedLayers, own_weights
from crdiff_export.sampling.webui.settings import Settings
from crdiff_export.sampling.webui.source import Applied, PicturePruning, PoaFile, fraction_done, picture_size

if TYPE_CHECKING:
    from torch import Tensor, nn


def apply(p: Any, source: PoaFile, settings: Settings) -> Applied:
    """Let the sampling that begins next use POA; to be called in `process_before_every_sampling`.

    Args:
        p: A1111's processing object, which has its sampler already.
        source: The baked file or pack.
        settings: What the user chose.

    Returns:
        POA on the sampler.

    Raises:
        CrdiffError: The model is not the one that the file was made from, or another UNet computes in its place.

    """
    from modules import sd_unet

    if sd_unet.current_unet is not None:
        raise PoaError(
            "another UNet computes in place of the checkpoint's own (TensorRT)", "Choose None under Settings > SD Unet."
        )
    model = p.sd_model.model
    pruning = source.pruning(own_weights(model, dict(_backups(model))), picture_size(p), settings)
    return SamplerWrapper(p, pruning)


class SamplerWrapper:
    """POA on a sampler, which puts it on the UNet while it samples; the UNet's weights never change.

    Args:
        p: A1111's processing object.
        pruning: How the UNet is pruned.
    """

    def __init__(self, p: Any, pruning: PicturePruning) -> None:
        self.note = pruning.note
        self._p, self._pruning, self._checkpoint = p, pruning, p.sd_model.sd_checkpoint_info
        self._unet = p.sd_model.model.diffusion_model
        self._layers = PrunedLayers(p.sd_model.model, pruning, self._merged)
        self._sampler = p.sampler
        self._launch: Callable[..., Any] = p.sampler.launch_sampling
        self._is_on = pruning.schedule.constant != 0
        if self._is_on:
            self._sampler.launch_sampling = self._around_sampling

    def remove(self) -> None:
        """Take POA off the sampler; a sampling that has begun goes on dense."""
        self._is_on = False
        if vars(self._sampler).get("launch_sampling") == self._around_sampling:
            self._sampler.launch_sampling = self._launch

    def _around_sampling(self, steps: int, function: Callable[[], Any]) -> Any:
        """Sample with the UNet's forward wrapped; also after an error or an interrupt it is as before."""
        before = vars(self._unet).get("forward")
        self._unet.forward = self._around_unet(self._unet.forward)
        try:
            return self._launch(steps, function)
        finally:
            del self._unet.forward
            if before is not None:
                self._unet.forward = before
            self._layers.release()

    def _around_unet(self, forward: "Callable[..., Tensor]") -> "Callable[..., Tensor]":
        def predict(*args: Any, **kwargs: Any) -> "Tensor":
            # The refiner may have loaded another checkpoint into this very UNet.
            is_base = self._p.sd_model.sd_checkpoint_info is self._checkpoint
            weight = self._pruning.schedule.at(fraction_done(self._p)) if self._is_on and is_base else 0.0
            restart_tiles = _tiles()

            def call() -> "Tensor":
                restart_tiles()
                return forward(*args, **kwargs)

            return self._layers.predict(call, weight)

        return predict

    def _merged(self, key: str) -> MergedWeight | None:
        """Let the Lora extension merge into a layer now, which it would do when the layer computes."""
        layer = self._p.sd_model.model.get_submodule(key.removesuffix(".weight"))
        networks = sys.modules.get("networks")
        if not hasattr(networks, "network_apply_weights") or not hasattr(layer, "network_layer_name"):
            return None
        assert networks
        if _adds_in_forward():
            networks.network_restore_weights_from_backup(layer)
            networks.network_reset_cached_weight(layer)
            return None
        networks.network_apply_weights(layer)
        if not getattr(layer, "network_current_names", ()):
            return None

        def merge(pruned: "Tensor") -> "Tensor":
            # What the extension would merge into if a model with the pruned weight had been loaded.
            fresh = SimpleNamespace(
                network_layer_name=layer.network_layer_name, weight=pruned, network_weights_backup=pruned
            )
            if hasattr(layer, "fp16_weight"):  # beside weights in fp8, for LoRA
                wide = layer.fp16_weight.to(pruned.device)
                fresh.fp16_weight = prune(wide, self._pruning.parts[key])
            networks.network_apply_weights(fresh)
            merged: Tensor = fresh.weight
            return merged

        return MergedWeight(layer.network_weights_backup.to(layer.weight.dtype), merge)


def _backups(model: "nn.Module") -> "Iterator[tuple[str, Tensor]]":
    """Yield the weights without LoRA that the Lora extension keeps, by their key in the model."""
    for name, layer in model.named_modules():
        backup: Any = getattr(layer, "network_weights_backup", None)
        weight: Any = getattr(layer, "weight", None)  # attention modules of torch have none
        if backup is not None and weight is not None:
            yield f"{name}.weight", backup.to(weight.dtype)


def _adds_in_forward() -> bool:
    """Whether the Lora extension adds its share to what a layer gives, and merges nothing (an option of it)."""
    from modules import shared

    return bool(getattr(shared.opts, "lora_functional", False))


def _tiles() -> Callable[[], None]:
    """Return a function that lets Hypertile choose the tiles of this moment again: two predictions need the same."""
    generator = getattr(sys.modules.get("hypertile"), "RNG_INSTANCE", None)
    if generator is None:
        return lambda: None
    state = generator.getstate()

    def restart() -> None:
        generator.setstate(state)

    return restart
