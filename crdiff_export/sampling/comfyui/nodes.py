"""The three nodes, in the form that ComfyUI expects: inputs, outputs and one method each."""

from typing import Any, ClassVar

from crdiff_export.models.recipe import MAX_POA_WEIGHT
from crdiff_export.packs import open_pack
from crdiff_export.sampling.comfyui import listing, match
from crdiff_export.sampling.comfyui.pack_patch import PackPatch
from crdiff_export.sampling.comfyui.patch import PoaPatch, take_off
from crdiff_export.sampling.poa.mix import Schedule, check
from crdiff_export.verify import open_baked

# The choice that finds the file which was made from the loaded model.
LOADED = "(loaded model)"
# The type of a ComfyUI node's declarations.
Inputs = dict[str, dict[str, tuple[Any, ...]]]


class CrdiffPoa:
    """Puts POA on a model."""

    CATEGORY = "model_patches/crdiff"
    DESCRIPTION = (
        "Pruned output amplification (CR-Diff, arXiv 2604.05524): (1 - w) * dense + w * pruned at every step, with one "
        "copy of the weights. Load the dense base; the pruned weights follow from the thresholds, or the zeros, in a "
        "file that crdiff made from it. Costs a second pass through the model where w is neither 0 nor 1."
    )
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """Declare the inputs."""
        part = {"min": 0.0, "max": 1.0, "step": 0.01, "round": False}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The dense base, with LoRAs or without."}),
                "checkpoint": (
                    [*listing.names(), LOADED],
                    {"tooltip": "The file that crdiff made from this base. "
                                f"{LOADED} finds it, if there is just one."},
                ),
                "weight_from_file": (
                    "BOOLEAN",
                    {"default": True, "label_on": "the file's weight", "label_off": "the weight below",
                     "tooltip": "Take the weight that the file recommends."},
                ),
                "weight": (
                    "FLOAT",
                    {"default": 1.5, "min": 0.0, "max": MAX_POA_WEIGHT, "step": 0.05, "round": False,
                     "tooltip": "0 is the dense model, 1 the pruned one, more amplifies."},
                ),
                "start": ("FLOAT", {"default": 0.0, **part, "tooltip": "From this fraction of the steps on."}),
                "stop": ("FLOAT", {"default": 1.0, **part, "tooltip": "Up to this fraction; the rest is dense."}),
            },
        }  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, checkpoint: str, **_: Any) -> int:  # noqa: N802
        """Return a number that changes with the file."""
        return 0 if checkpoint == LOADED else listing.path(checkpoint).stat().st_mtime_ns

    def patch(
        self, model: Any, checkpoint: str, weight_from_file: bool, weight: float, start: float, stop: float
    ) -> tuple[Any]:
        """Return the model with POA; PoaError if the file was made from another model."""
        weights = _weights(model)
        if checkpoint == LOADED:
            baked, parts = match.find(weights, map(listing.path, listing.names()))
        else:
            baked = open_baked(listing.path(checkpoint))
            parts = match.model_parts(weights, baked)
        schedule = Schedule(baked.stamp.poa_weight if weight_from_file else weight, start, stop)
        if schedule.constant == 0:
            return (take_off(model),)
        return (PoaPatch(parts, schedule, baked.checkpoint.path.name).put_on(model),)


class CrdiffPack:
    """Puts a pack on a model."""

    CATEGORY = CrdiffPoa.CATEGORY
    DESCRIPTION = (
        "CR-Diff (arXiv 2604.05524) by the size of the latent: load the dense base, choose the pack that crdiff made "
        "of it, and every sampling takes the masks and the weight of its own size. At the base's native size, and "
        "where the pack has no size near, the model stays dense. Weight 1 is the pruned model alone."
    )
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """Declare the inputs."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The dense base, with LoRAs or without."}),
                "pack": (listing.packs(), {"tooltip": f"A pack in models/{listing.PACKS}, or beside the checkpoints."}),
            },
            "optional": {
                "weight": (
                    "FLOAT",
                    {"forceInput": True, "tooltip": "w for every size: 0 is the dense model, 1 the pruned one, more "
                                                    "amplifies. Not connected: each size's own."},
                ),
            },
        }  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, pack: str, **_: Any) -> int:  # noqa: N802
        """Return a number that changes with the pack."""
        return listing.pack_path(pack).stat().st_mtime_ns

    def patch(self, model: Any, pack: str, weight: float | None = None) -> tuple[Any]:
        """Return the model with the pack; PoaError if the pack was made from another model."""
        weights, opened = _weights(model), open_pack(listing.pack_path(pack))
        layers = match.find_layers(weights, opened)
        if weight is not None and check(weight) == 0:
            return (take_off(model),)
        if any(stamp.scaled for stamp in opened.variants.values()):
            masks = {size: match.pack_parts(layers, opened, size, weights) for size in opened.variants}
            return (PackPatch(opened, weight, masks.__getitem__).put_on(model),)
        # The weights themselves are not kept: ComfyUI may move and replace them.
        return (PackPatch(opened, weight, lambda size: match.pack_parts(layers, opened, size, {})).put_on(model),)


class CrdiffInfo:
    """Shows the text of `crdiff inspect` for a file."""

    CATEGORY = CrdiffPoa.CATEGORY
    DESCRIPTION = "What a file that crdiff made says of its making: base, sizes, ratios, thresholds, POA weight."
    FUNCTION = "show"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES: ClassVar = ("text",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """Declare the inputs."""
        return {"required": {"checkpoint": (listing.names(), {"tooltip": "A file that crdiff made."})}}

    @classmethod
    def IS_CHANGED(cls, checkpoint: str) -> int:  # noqa: N802
        """Return a number that changes with the file."""
        return listing.path(checkpoint).stat().st_mtime_ns

    def show(self, checkpoint: str) -> dict[str, Any]:
        """Return the text for the next node and for the page."""
        text = listing.about(listing.path(checkpoint))
        return {"ui": {"text": (text,)}, "result": (text,)}


def _weights(patcher: Any) -> dict[str, Any]:
    """Return a model's weights as they were loaded, without patches.

    ComfyUI's own `ModelPatcher.get_key_patches` fails for quantised layers, whose state has keys that are no weights.
    """
    weights = dict(patcher.model.named_parameters(remove_duplicate=False))
    unpatched = {key: backup.weight for key, backup in patcher.backup.items()}
    unpatched |= {key: backup[0] for key, backup in patcher.hook_backup.items()}
    return {key: unpatched.get(key, weight) for key, weight in weights.items() if key.startswith(match.PREFIX)}


NODE_CLASS_MAPPINGS = {"CrdiffPack": CrdiffPack, "CrdiffPoa": CrdiffPoa, "CrdiffInfo": CrdiffInfo}
NODE_DISPLAY_NAME_MAPPINGS = {"CrdiffPack": "CR-Diff", "CrdiffPoa": "CR-Diff POA", "CrdiffInfo": "CR-Diff Info"}
