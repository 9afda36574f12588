"""POA in SD.Next, whose models are those of diffusers: torch's hooks on the model and on its pruned layers.

SD.Next offloads with hooks that replace the forward of every layer while it draws, where the hooks of
`crdiff_export.poa` get lost. It merges a LoRA into the weights when a picture begins, and keeps the weights as they
were in the layers' `network_weights_backup`, unless it is told to fuse.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from crdiff_export.errors import PoaError
from crdiff_export.packs import SUFFIX, Pack, open_pack
from crdiff_export.sampling.poa import handle, layers, packed
from crdiff_export.sampling.poa.hooks import Side
from crdiff_export.sampling.poa.masks import Part, prune
from crdiff_export.sampling.poa.mix import Schedule
from crdiff_export.sampling.poa.picture_size import Cells, cells_of, picture_size
from crdiff_export.sampling.poa.source import Source as BakedSource
from crdiff_export.sampling.poa.source import from_baked
from crdiff_export.sampling.webui.settings import Settings
from crdiff_export.sampling.webui.source import Applied, PoaFile

_log = logging.getLogger(__name__)
# The files that each model has been compared with, by path and time; a file is read whole for that.
_compared: "WeakKeyDictionary[nn.Module, set[tuple[Path, int]]]" = WeakKeyDictionary()
_on: list["ModelPoa"] = []


def apply(p: Any, source: PoaFile, settings: Settings) -> Applied:
    """Let the model draw with POA until SD.Next has finished this picture, however that ends.

    Args:
        p: SD.Next's processing object.
        source: The baked file or pack.
        settings: What the user chose.

    Returns:
        POA on the model.

    Raises:
        CrdiffError: The model is not the one that the file was made from, or cannot be pruned on the fly.

    """
    from modules import script_callbacks, shared

    if shared.opts.diffusers_offload_mode == "sequential":
        raise PoaError(
            "the weights are offloaded, layer by layer", "Choose another Model offload mode in the settings."
        )
    if shared.opts.lora_fuse_native and any("<lora:" in prompt for prompt in p.all_prompts):
        raise _fused()
    _remove_all()
    changed = source.path.stat().st_mtime_ns
    poa = ModelPoa(_open(source.path, changed), settings)
    files = _compared.setdefault(poa.model, set())
    if (source.path, changed) not in files:
        poa.compare()
        files.add((source.path, changed))
    poa.install()
    _on.append(poa)
    script_callbacks.remove_callbacks_for_function(_remove_all)
    script_callbacks.on_after_process(_remove_all)
    return poa


class CurrentPipeline:
    """The pipeline that SD.Next uses at the moment: it makes others of the same parts, as for hires fix."""

    def __getattr__(self, name: str) -> Any:
        from modules import shared

        return getattr(getattr(shared.sd_model, "pipe", shared.sd_model), name)


class ModelPoa(handle.ModelHandle):
    """POA on SD.Next's model, which follows the size of its pictures if the file is a pack.

    Args:
        file: The baked file's source, or the pack.
        settings: What the user chose.
    """

    def __init__(self, file: BakedSource | Pack, settings: Settings) -> None:
        self._pipeline = CurrentPipeline()
        self._file, self._settings, self.note = file, settings, ""
        self._family = file.family if isinstance(file, Pack) else file.plan.match.family
        recommended = 1.0 if isinstance(file, Pack) else file.weight
        super().__init__(self._pipeline, self._family.time, self._schedule_for(recommended), "sequential")
        _refuse(self.model)
        self._parts: Mapping[str, Part] = {}
        if isinstance(file, Pack):
            self._layers = packed.find_layers(self.model, file)
        else:
            self._layers = layers.find(self.model, file)
            self._parts = {name: parts[0] for name, parts in file.masks.diffusers.items()}
        self._cells: Cells | None = None
        self._own: dict[nn.Module, Any] = {}

    def compare(self) -> None:
        """Compare the model with the file; PoaError if it is another one, or was pruned already."""
        found: dict[str, Any] = {
            name: SimpleNamespace(weight=_without_networks(layer), bias=layer.bias)
            for name, layer in self._layers.items()
        }
        if isinstance(self._file, Pack):
            packed.check_base(found, self._file)
            return
        if self._file.has_residual:  # the comparison fills pruned weights
            found = {
                name: SimpleNamespace(weight=layer.weight.detach().clone(), bias=layer.bias)
                for name, layer in found.items()
            }
        if layers.make_dense(found, self._file):
            raise PoaError(f"the model holds the pruned weights of {self._file.path} already", "Load its base.")

    def install(self) -> None:
        """Put the hooks on the model and its layers."""
        super().install()
        for name, layer in self._layers.items():
            self._handles += [
                layer.register_forward_pre_hook(lambda layer, inputs, name=name: self._exchange(name, layer, inputs)),
                layer.register_forward_hook(lambda layer, *_: self._give_back(layer), always_call=True),
            ]

    def remove(self) -> None:
        """Take all hooks off; a second call does nothing."""
        if handle.installed(self.model) is self:
            super().remove()
            for part in self._parts.values():
                part.release()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(self._file, Pack):
            self._follow(self._file, args, kwargs)
        return super()._before(model, args, kwargs)

    def _follow(self, pack: Pack, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Take the parts and the weight for the size that the model is called for."""
        cells = cells_of(args, kwargs)
        if cells == self._cells and cells is not None:
            return
        if cells is None:
            raise PoaError("nothing tells the size of the picture that is drawn", "Take a baked file for it.")
        chosen = packed.choose(pack, picture_size(cells, self._family, self._pipeline))
        if chosen.note:
            _log.warning("CR-Diff: %s", chosen.note)
        counts = {name: layer.weight.numel() for name, layer in self._layers.items()}
        self._parts = packed.parts(pack, chosen.size, counts) if chosen.size else {}
        self.schedule = self._schedule_for(pack.variants[chosen.size].poa_weight) if chosen.size else Schedule(0.0)
        self._cells = cells

    def _schedule_for(self, recommended: float) -> Schedule:
        weight = self._settings.weight
        return Schedule(recommended if weight is None else weight, self._settings.start, self._settings.stop)

    def _exchange(self, name: str, layer: nn.Linear, inputs: Sequence[Any]) -> None:
        """Give a layer its pruned weight for the time of its forward."""
        if self._switch.side is not Side.PRUNED or name not in self._parts:
            return
        base = _without_networks(layer)
        pruned = prune(base.detach().to(inputs[0].device), (self._parts[name],))
        self._own[layer] = layer.weight
        merged = _has_networks(layer)
        layer.weight = nn.Parameter(pruned, requires_grad=False)
        if merged:
            layer.weight = nn.Parameter(_with_networks(layer), requires_grad=False)

    def _give_back(self, layer: nn.Module) -> None:
        if layer in self._own:
            layer.weight = self._own.pop(layer)


@lru_cache(maxsize=1)
def _open(path: Path, _changed: int) -> BakedSource | Pack:
    """Open a file, whose masks are read whole."""
    return open_pack(path) if path.name.endswith(SUFFIX) else from_baked(path)


def _refuse(model: nn.Module) -> None:
    """Refuse models whose layers do not compute with weights of their own."""
    if any(hasattr(layer, "sdnq_dequantizer") for layer in model.modules()):
        raise PoaError(
            "the model is quantised by SDNQ, its weights cannot be pruned on the fly",
            "Turn quantisation off and load the checkpoint again.",
        )
    if hasattr(model, "_orig_mod"):
        raise PoaError("the model is compiled, without the hooks of POA", "Turn compilation off and load it again.")


def _has_networks(layer: nn.Module) -> bool:
    """Whether SD.Next has merged LoRAs into a layer; PoaError if it keeps no weights without them."""
    backup = getattr(layer, "network_weights_backup", None)
    if backup is None or not getattr(layer, "network_current_names", ()):
        return False
    if not isinstance(backup, Tensor):
        raise _fused()
    return True


def _fused() -> PoaError:
    return PoaError(
        "SD.Next fuses LoRAs into the weights and keeps no copy of them",
        'Turn off "LoRA native fuse with model" under Settings > Networks, and load the checkpoint again.',
    )


def _without_networks(layer: nn.Linear) -> Tensor:
    """Return a layer's weight without LoRA."""
    if not _has_networks(layer):
        return layer.weight
    backup: Any = layer.network_weights_backup
    return backup.to(layer.weight.device)  # type: ignore[no-any-return]


def _with_networks(layer: nn.Linear) -> Tensor:
    """Return a layer's weight with the LoRAs that SD.Next has loaded, merged as it does that."""
    from modules import devices
    from modules.lora.lora_apply import network_calc_weights

    share, _ = network_calc_weights(layer, layer.network_layer_name)
    weight = layer.weight.detach()
    if share is None:
        return weight
    merged: Tensor = weight.to(devices.device) + share.to(devices.device)
    return merged


def _remove_all(_p: Any = None) -> None:
    while _on:
        _on.pop().remove()
