"""What tells a base in memory from other models of its family: hashes of the first weights of every layer.

A loader may have changed the names, fused or split layers, or rounded the weights, so that no hash of a file is left.
A hash by layer, in each dtype that loaders use, is: docs/metadata.md, "Packs".
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.dtypes import torch_dtypes
from crdiff_export.prune.plan import Target, open_targets

if TYPE_CHECKING:
    from torch import Tensor

# ours: another model differs in all of its layers, a merged LoRA in all weights of a layer.
FIRST: Final = 1 << 14
# Bytes of a hash: enough where chance, not malice, is to be excluded.
HASH_BYTES: Final = 8
# The dtypes, beside the stored ones, that loaders keep weights in.
ROUNDED: Final = ("F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class LayerHashes:
    """The hashes of a base's layers.

    Attributes:
        layers: The names of the layers in diffusers' layout, in ascending order.
        stored: The safetensors dtype in which the base's file has each layer.
        hashes: By dtype: HASH_BYTES for each layer, of its first weights as that dtype rounds them.
    """

    layers: tuple[str, ...]
    stored: tuple[str, ...]
    hashes: Mapping[str, bytes]

    def hash(self, layer: str, dtype: str) -> bytes | None:
        """Return the hash of a layer in a dtype.

        Args:
            layer: The layer's name in diffusers' layout.
            dtype: The safetensors dtype.

        Returns:
            HASH_BYTES, or None if there is no such hash.
        """
        if dtype not in self.hashes or layer not in self.layers:
            return None
        start = self.layers.index(layer) * HASH_BYTES
        return self.hashes[dtype][start : start + HASH_BYTES]

    def stored_as(self, layer: str) -> str | None:
        """Return the dtype of a layer in the base's file; None for a layer that is not listed."""
        return self.stored[self.layers.index(layer)] if layer in self.layers else None

    def only(self, layers: Collection[str]) -> "LayerHashes":
        """Return the identity of some of the layers alone, as `read_identity` makes it.

        Args:
            layers: Their names in diffusers' layout.

        Returns:
            Their hashes, in the dtypes that they are stored in, and in the rounded ones if they are known.
        """
        numbers = [number for number, layer in enumerate(self.layers) if layer in layers]
        stored = tuple(self.stored[number] for number in numbers)
        starts = [number * HASH_BYTES for number in numbers]
        hashes = {
            dtype: b"".join(self.hashes[dtype][start : start + HASH_BYTES] for start in starts)
            for dtype in _columns(stored, rounded=self.hashes.keys() >= set(ROUNDED))
        }
        return LayerHashes(tuple(self.layers[number] for number in numbers), stored, hashes)

    def differing(self, other: "LayerHashes") -> str | None:
        """Return the first layer of another identity whose stored weights differ from these, if there is one."""
        for layer, dtype in zip(other.layers, other.stored, strict=True):
            if self.stored_as(layer) != dtype or self.hash(layer, dtype) != other.hash(layer, dtype):
                return layer
        return None


def read_identity(checkpoint: Checkpoint, targets: Iterable[Target], *, rounded: bool = True) -> LayerHashes:
    """Hash the first weights of targets.

    Args:
        checkpoint: The base.
        targets: Its layers.
        rounded: Hash them in other dtypes than their own, too. Codes with a scale are hashed as they are alone.

    Returns:
        The identity.
    """
    by_name = {target.layer.diffusers: target for target in targets}
    layers = tuple(sorted(by_name))
    stored = tuple(by_name[layer].source.dtype for layer in layers)
    is_plain = all(target.scale is None for target in by_name.values())
    hashes: dict[str, list[bytes]] = {dtype: [] for dtype in _columns(stored, rounded=rounded and is_plain)}
    with open_targets(checkpoint) as read:
        for layer, dtype in zip(layers, stored, strict=True):
            target = by_name[layer]
            first = replace(target, stop=min(target.stop, target.start + FIRST))
            raw = read(first)
            for column, found in hashes.items():
                found.append(_hash(raw) if column == dtype else hash_weights(_convert(raw, dtype, column)))
    return LayerHashes(layers, stored, {dtype: b"".join(found) for dtype, found in hashes.items()})


def _columns(stored: Iterable[str], *, rounded: bool) -> list[str]:
    """Return the dtypes to hash in, in their order."""
    return list(dict.fromkeys((*sorted(set(stored)), *(ROUNDED if rounded else ()))))


def _convert(raw: memoryview, stored: str, dtype: str) -> "Tensor":
    import torch

    return torch.frombuffer(raw, dtype=torch_dtypes()[stored]).to(torch_dtypes()[dtype])


def _hash(raw: memoryview) -> bytes:
    return hashlib.sha256(raw).digest()[:HASH_BYTES]


def hash_weights(weights: "Tensor") -> bytes:
    """Hash the first weights of a layer as they are.

    Args:
        weights: A layer's weights, flat and on the CPU.

    Returns:
        The first HASH_BYTES of the SHA-256 of the little-endian bytes of at most FIRST weights.
    """
    import torch

    first = weights[:FIRST].contiguous()
    return _hash(first.view(torch.uint8).numpy().data)
