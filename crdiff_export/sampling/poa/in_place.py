"""Prune the weights of a model where they are, and give them back bit by bit.

A model that is pruned in place computes as fast as the dense one. Beside it only the values that became zero are kept,
and one bit for each weight of the pruned layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crdiff_export.errors import PoaError
from crdiff_export.sampling.poa.masks import Part, ReplacedWeights

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a pruned layer was: its values, one after another, and a bit for each weight that was one of them."""

    values: Tensor
    bits: Tensor
    is_zero: bool

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.bits.nbytes


class InPlace:
    """The layers of a model that are pruned in place, if any are."""

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self._layers = layers
        self._kept: dict[str, _Kept] = {}

    @property
    def extra_bytes(self) -> int:
        """Bytes that are kept beside the model."""
        return sum(kept.nbytes for kept in self._kept.values())

    @property
    def is_pruned(self) -> bool:
        """Whether the model is pruned now."""
        return bool(self._kept)

    @torch.no_grad()
    def prune(self, parts: Mapping[str, Part]) -> None:
        """Prune a dense model.

        Args:
            parts: The part of each layer that is pruned, by diffusers' name of its weight.

        Raises:
            PoaError: Weights are offloaded, layer by layer; nothing is changed.
        """
        self._refuse_offloaded()
        for name, part in parts.items():
            weight = self._layers[name].weight
            with torch.inference_mode(mode=weight.is_inference()):
                flat = weight.detach().view(-1)
                pruned = part.rule(weight.dtype)(flat, None)
                gone = _bits(pruned) != _bits(flat)  # -0.0 becomes 0.0, too
                # Kept before the weights change, so that an interrupt at any moment loses nothing.
                self._kept[name] = _Kept(flat[gone], _pack(gone), not isinstance(part, ReplacedWeights))
                flat.copy_(pruned)
            part.release()

    @torch.no_grad()
    def restore(self) -> None:
        """Make the model dense again; a dense one stays as it is.

        Raises:
            PoaError: Weights are offloaded, layer by layer, or something has changed them; nothing is restored.
        """
        if not self._kept:
            return
        self._refuse_offloaded()
        for name, kept in self._kept.items():
            if kept.is_zero and not self._can_restore(self._layers[name].weight, kept):
                raise PoaError(
                    f"{name.removesuffix('.weight')}: its pruned weights were changed since, as by a fused LoRA",
                    "Take that back first (pipe.unfuse_lora()), or load the model anew.",
                )
        for name, kept in list(self._kept.items()):
            weight = self._layers[name].weight
            with torch.inference_mode(mode=weight.is_inference()):
                # A model that was cast meanwhile gets what its dense weights would be then.
                values = kept.values.to(weight.device, weight.dtype)
                weight.detach().view(-1)[_unpack(kept.bits, weight)] = values
            del self._kept[name]

    @staticmethod
    def _can_restore(weight: Tensor, kept: _Kept) -> bool:
        """Whether the weights that were pruned are still zero, or dense again, as after an interrupt."""
        now = weight.detach().view(-1)[_unpack(kept.bits, weight)]
        return not now.any() or torch.equal(_bits(now), _bits(kept.values.to(weight.device, weight.dtype)))

    def _refuse_offloaded(self) -> None:
        if name := next((name for name, layer in self._layers.items() if layer.weight.is_meta), None):
            raise PoaError(
                f"{name.removesuffix('.weight')}: its weights are offloaded, layer by layer",
                "Give poa.prune a size before sequential offloading is turned on; before poa.disable or another size, "
                "call pipe.remove_all_hooks().",
            )


def _bits(numbers: Tensor) -> Tensor:
    """View floats as integers, which compare by every bit."""
    return numbers.view(_BITS[numbers.itemsize])


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _pack(flags: Tensor) -> Tensor:
    """Pack a flat bool tensor into uint8, the first in the lowest bit."""
    rest = -len(flags) % 8
    padded = torch.nn.functional.pad(flags, (0, rest)) if rest else flags
    shifted: Tensor = padded.view(-1, 8).to(torch.uint8) << _places(flags.device)
    return shifted.sum(1, dtype=torch.uint8)


def _unpack(bits: Tensor, weight: Tensor) -> Tensor:
    """Return a bool for each element of a weight, on its device."""
    packed = bits.to(weight.device)
    flags = (packed[:, None] >> _places(weight.device)) & 1
    return flags.view(-1)[: weight.numel()].bool()
