"""POA in Forge and Forge Classic: a function around the model's calls, on a clone of the UNet's patcher.

Both merge a LoRA into the weights. Forge keeps the original ones in its `LoraLoader`; Forge Classic, whose patcher is
that of the first Forge (`ldm_patched`), keeps them in the patcher that has been loaded.
"""

from typing import TYPE_CHECKING, Any

from crdiff_export.sampling.webui.layers import MergedWeight, PrunedLayers, copy_lists, own_weights
from crdiff_export.sampling.webui.settings import Settings
from crdiff_export.sampling.webui.source import Applied, PoaFile, fraction_done, picture_size
from crdiff_export.sampling.webui.unet_clone import UnetClone

if TYPE_CHECKING:
    from torch import Tensor


def apply(p: Any, source: PoaFile, settings: Settings) -> Applied:
    """Let the next sampling of a picture use POA.

    Args:
        p: Forge's processing object.
        source: The baked file or pack.
        settings: What the user chose.

    Returns:
        POA on a clone of the UNet's patcher.

    Raises:
        CrdiffError: The model is not the one that the file was made from.

    """
    objects = p.sd_model.forge_objects
    unet = objects.unet
    pruning = source.pruning(own_weights(unet.model, _backup(unet)), picture_size(p), settings)
    applied = UnetClone(objects, pruning.note)
    if pruning.schedule.constant == 0:
        return applied
    layers = PrunedLayers(unet.model, pruning, lambda key: _merged(objects.unet, key))
    around = unet.model_options.get("model_function_wrapper")

    def around_model(apply_model: Any, args: dict[str, Any]) -> Any:
        def call() -> Any:
            options = {name: copy_lists(value) for name, value in args["c"].items()}
            if around:
                return around(apply_model, {**args, "c": options})
            return apply_model(args["input"], args["timestep"], **options)

        return layers.predict(call, pruning.schedule.at(fraction_done(p)) if applied.is_on else 0)

    applied.put_on(layers)
    objects.unet.set_model_unet_function_wrapper(around_model)
    return applied


def _backup(unet: Any) -> "dict[str, Tensor]":
    """Return the weights as they were before a LoRA was merged into them."""
    if hasattr(unet, "lora_loader"):
        return dict(unet.lora_loader.backup)
    from ldm_patched.modules.model_management import current_loaded_models

    patchers = [loaded.model for loaded in current_loaded_models if loaded.model.is_clone(unet)]
    return {key: weight for patcher in patchers for key, weight in patcher.backup.items()}


def _merged(unet: Any, key: str) -> MergedWeight | None:
    """Return a weight with a merged LoRA; None for one without, or with a LoRA that its layer adds itself."""
    import torch

    base = _backup(unet).get(key)
    if base is None:
        return None

    def merge(weight: "Tensor") -> "Tensor":
        merged: Tensor
        if hasattr(unet, "lora_loader"):
            from backend.patcher.lora import merge_lora_to_weight

            patches = [
                patch
                for (_, _, _, online), keys in unet.lora_patches.items()
                for patch in keys.get(key, ())
                if not online
            ]
            merged = merge_lora_to_weight(patches, weight, key, computation_dtype=torch.float32)
        else:
            merged = unet.calculate_weight(unet.patches[key], weight.to(torch.float32), key).to(weight.dtype)
        return merged

    return MergedWeight(base, merge)
