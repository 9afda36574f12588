"""The pruned layers of a UI's UNet: for the time of a call each computes with its pruned weight, then its own is back.

A layer's weight is exchanged around its own forward, so that beside the weights only the largest layer's is in memory.
Hooks do it, which every UI's layers have.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crdiff_export.errors import PoaError
from crdiff_export.sampling.poa.masks import prune
from crdiff_export.sampling.poa.mix import mix
from crdiff_export.sampling.webui.source import PicturePruning

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class MergedWeight:
    """A weight that a UI has merged a LoRA into.

    Attributes:
        base: The weight without the LoRA.
        merge: Merges the LoRA into a weight of the same shape, as the UI did; it may change what it is given.
    """

    base: "Tensor"
    merge: "Callable[[Tensor], Tensor]"


class PrunedLayers:
    """The layers that a file prunes, in a model.

    Args:
        model: The module that has the layers by the keys of the parts.
        pruning: How it is pruned.
        merged: Returns the merged weight of a key; None for a weight that is the base's own.
    """

    def __init__(
        self, model: "nn.Module", pruning: PicturePruning, merged: Callable[[str], MergedWeight | None]
    ) -> None:
        self._model, self._pruning, self._merged = model, pruning, merged
        self._dense: dict[nn.Module, Any] = {}
        self._used = 0

    def predict(self, call: "Callable[[], Tensor]", weight: float) -> "Tensor":
        """Call the model with dense weights, pruned ones, or both, and mix: (1 - w) * dense + w * pruned.

        Args:
            call: Calls the model.
            weight: POA's w.

        Returns:
            The prediction.

        Raises:
            PoaError: No layer took its pruned weight.

        """
        dense = call() if weight != 1 else None
        if dense is not None and weight == 0:
            return dense
        with self._pruned():
            pruned = call()
        return pruned if dense is None else mix(dense, pruned, weight)

    def release(self) -> None:
        """Drop what is kept on the device."""
        for parts in self._pruning.parts.values():
            for part in parts:
                part.release()

    @contextmanager
    def _pruned(self) -> Iterator[None]:
        handles = []
        self._used = 0
        try:
            for key in self._pruning.parts:
                layer = self._model.get_submodule(key.removesuffix(".weight"))
                handles += [
                    layer.register_forward_pre_hook(self._exchange_for(key)),
                    layer.register_forward_hook(lambda layer, _args, _output: self._give_back(layer)),
                ]
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in list(self._dense):  # the call failed within these
                self._give_back(layer)
        if not self._used:
            raise PoaError(
                f"no layer that {self._pruning.label} prunes took its pruned weights",
                "Something computes this model in its own way; take it off, or take POA off.",
            )

    def _exchange_for(self, key: str) -> Callable[[Any, Any], None]:
        def exchange(layer: Any, inputs: Any) -> None:
            import torch

            device = inputs[0].device if inputs else layer.weight.device
            pruned = self._prune(key, layer.weight, device)
            self._dense[layer] = layer.weight
            self._used += 1
            layer.weight = torch.nn.Parameter(pruned, requires_grad=False)

        return exchange

    def _prune(self, key: str, weight: "Tensor", device: Any) -> "Tensor":
        """Return the pruned weight on a device in its own dtype, with the LoRA that is merged into `weight`."""
        import torch

        merged = self._merged(key)
        base = (merged.base if merged else weight).detach().to(device)
        # torch does not compute in eight bits; float32 has all of their values.
        wide = base.to(torch.float32) if base.itemsize == 1 else base
        pruned = prune(wide, self._pruning.parts[key]).to(base.dtype)
        return merged.merge(pruned) if merged else pruned

    def _give_back(self, layer: Any) -> None:
        layer.weight = self._dense.pop(layer)


def own_weights(model: "nn.Module", backup: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Return the weights of a model's UNet or transformer without what is merged into them.

    Args:
        model: The model that has it as `diffusion_model`.
        backup: The weights as they were before something was merged into them.

    Returns:
        The weights by their key.

    """
    weights: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return {key: backup.get(key, weight) for key, weight in weights.items() if key.startswith("diffusion_model.")}


def copy_lists(value: Any) -> Any:
    """Copy a dictionary and its lists for one call: a UNet takes a ControlNet's tensors out of them."""
    if not isinstance(value, dict):
        return value
    return {name: list(each) if isinstance(each, list) else each for name, each in value.items()}
