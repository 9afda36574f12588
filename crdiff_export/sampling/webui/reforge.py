"""POA in reForge: a wrapper around `apply_model` of its `ldm_patched`, on a clone of the UNet's patcher.

reForge samples through `sampling_function`, which takes wrappers from the model options only, and clones of its patcher
keep no others.
"""

from typing import Any

from crdiff_export.sampling.webui.layers import MergedWeight, PrunedLayers, copy_lists, own_weights
from crdiff_export.sampling.webui.settings import Settings
from crdiff_export.sampling.webui.source import Applied, PoaFile, fraction_done, picture_size
from crdiff_export.sampling.webui.unet_clone import UnetClone

KEY = "crdiff_poa"


def apply(p: Any, source: PoaFile, settings: Settings) -> Applied:
    """Let the next sampling of a picture use POA.

    Args:
        p: reForge's processing object.
        source: The baked file or pack.
        settings: What the user chose.

    Returns:
        POA on a clone of the UNet's patcher.

    Raises:
        CrdiffError: The model is not the one that the file was made from.

    """
    from ldm_patched.modules.patcher_extension import WrappersMP, add_wrapper_with_key

    objects = p.sd_model.forge_objects
    unet = objects.unet
    weights = own_weights(unet.model, {key: entry.weight for key, entry in unet.backup.items()})
    pruning = source.pruning(weights, picture_size(p), settings)
    applied = UnetClone(objects, pruning.note)
    if pruning.schedule.constant == 0:
        return applied
    layers = PrunedLayers(unet.model, pruning, lambda key: _merged(objects.unet, key))

    def around_model(
        executor: Any, x: Any, t: Any, concat: Any = None, cross: Any = None, control: Any = None,
        transformer_options: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        def call() -> Any:
            return executor(x, t, concat, cross, copy_lists(control), (transformer_options or {}).copy(), **kwargs)

        return layers.predict(call, pruning.schedule.at(fraction_done(p)) if applied.is_on else 0)

    applied.put_on(layers)
    add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, around_model, objects.unet.model_options, is_model_options=True)
    return applied


def _merged(unet: Any, key: str) -> MergedWeight | None:
    """Return a weight with merged patches; None for one without, or with patches that its layer adds itself."""
    import torch
    from ldm_patched.float import stochastic_rounding
    from ldm_patched.modules.lora import calculate_weight
    from ldm_patched.modules.model_patcher import string_to_seed

    if key not in unet.backup:
        return None
    base = unet.backup[key].weight

    def merge(weight: torch.Tensor) -> torch.Tensor:
        wide = calculate_weight(unet.patches[key], weight.to(torch.float32), key)
        rounded: torch.Tensor = stochastic_rounding(wide, weight.dtype, seed=string_to_seed(key))
        return rounded

    return MergedWeight(base, merge)
