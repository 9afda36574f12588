"""What POA takes from a pack: the layers of a model in memory, their parts for each size, and which size is taken."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crdiff_export.errors import PoaError
from crdiff_export.formats import dtypes
from crdiff_export.formats.dtypes import torch_dtypes
from crdiff_export.models.recipe import nearest_size
from crdiff_export.packs import Pack
from crdiff_export.prune.architecture import is_native
from crdiff_export.prune.criteria import Mask
from crdiff_export.prune.identity import FIRST, hash_weights
from crdiff_export.sampling.poa.masks import MaskPart, Part, ThresholdPart, holds
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from torch import Tensor, nn


def find_layers(model: "nn.Module", pack: Pack) -> "dict[str, nn.Linear]":
    """Find the layers that any size of a pack prunes, by diffusers' name of their weight.

    Raises:
        PoaError: The pack is of codes with a scale, or a layer is missing or cannot be pruned in memory.
    """
    from crdiff_export.sampling.poa.layers import find_layer

    if any(stamp.scaled for stamp in pack.variants.values()):
        raise PoaError(
            f"{pack.path}: its base has fp8 codes with a scale, which a model in memory has not",
            "Export a file from the pack (crdiff export --pack), and give that.",
        )
    names = {layer.diffusers for stamp in pack.variants.values() for layer in pack.layers(stamp.targets)}
    return {name: find_layer(model, name, pack.path, pack.family.id) for name in sorted(names)}


def check_base(layers: "Mapping[str, nn.Linear]", pack: Pack) -> None:
    """Compare the first weights of layers, and how many weights they have, with a pack's base.

    Args:
        layers: The layers of a model as it was loaded.
        pack: The pack.

    Raises:
        PoaError: The model is not the base.
    """
    for name, layer in layers.items():
        if not is_base(layer.weight.detach().view(-1)[:FIRST], name, pack):
            raise other_model(name, pack)
    for size, stamp in pack.variants.items():
        counts = dict.fromkeys(stamp.groups, 0)
        for each in pack.layers(stamp.targets):
            counts[each.group] += layers[each.diffusers].weight.numel()
        for group, count in counts.items():
            if count != stamp.groups[group].total:
                raise PoaError(
                    f"{group} has {count} weights, for {size} of {pack.path} {stamp.groups[group].total}",
                    f"Load the base of the pack, {pack.common.source_name}.",
                )


def is_base(weights: "Tensor", layer: str, pack: Pack) -> bool:
    """Whether these are the first weights of a layer of a pack's base, in the dtype in which they were loaded.

    Args:
        weights: The first FIRST weights of the layer, flat.
        layer: Diffusers' name of the layer's weight.
        pack: The pack.

    Returns:
        Whether their hash is the base's.
    """
    import torch

    stored = pack.identity.stored_as(layer)
    if stored is None:
        return False
    names = {dtype: name for name, dtype in torch_dtypes().items()}
    loaded = weights.cpu()
    if holds(loaded.dtype, stored):  # nothing was lost, so the file's own numbers are in there
        original = loaded.to(torch_dtypes()[stored])
        again, expected = (
            each.to(torch.float32).nan_to_num() if each.itemsize == 1 else each.nan_to_num()  # not for eight bits
            for each in (original.to(loaded.dtype), loaded)
        )
        if not torch.equal(again, expected):
            return False
        return hash_weights(original) == pack.identity.hash(layer, stored)
    hashed = pack.identity.hash(layer, names.get(loaded.dtype, ""))
    return hashed is not None and hash_weights(loaded) == hashed


def other_model(layer: str, pack: Pack) -> PoaError:
    """Make the error for a model that is not a pack's base."""
    return PoaError(
        f"the weights of {layer.removesuffix('.weight')} are not those of {pack.common.source_name}, which {pack.path} "
        "was made from",
        "Load that base as it was published, without a fused LoRA.",
    )


@dataclass(frozen=True, slots=True)
class Chosen:
    """The size of a pack that serves a picture, and a note for the user; without a size the model stays dense."""

    size: Size | None
    note: str = ""


def choose(pack: Pack, size: Size) -> Chosen:
    """Choose a pack's size for a picture: its own, else none near the native size, else the nearest as recipes do."""
    if size in pack.variants:
        return Chosen(size)
    native = pack.common.native
    if is_native(size, native, pack.family):
        where = "the native size" if size == native else f"near the native size, {native},"
        return Chosen(None, f"{size} is {where} of {pack.common.source_name}: the model stays dense")
    near = nearest_size(pack.variants, size)
    if near is None:
        return Chosen(None, f"{pack.path} has no size near {size}: the model stays dense")
    return Chosen(near, f"{pack.path} has no {size}; it takes that for {near}, a starting point")


def parts(
    pack: Pack, size: Size, counts: Mapping[str, int], scaled: Callable[[str, float], Mask | None] | None = None
) -> dict[str, Part]:
    """Make the parts of the layers that a size prunes, by diffusers' name of their weight.

    Args:
        pack: The pack.
        size: One of its sizes.
        counts: How many weights each layer has.
        scaled: Gives the mask of a layer of codes with a scale for a threshold, and None for a plain layer.

    Returns:
        A threshold for all weights of each layer, or its mask.

    Raises:
        PackError: The masks are damaged.
    """
    import torch

    stamp = pack.variants[size]

    def ranked(name: str) -> str:
        return stamp.cast or pack.identity.stored_as(name) or ""

    if stamp.masked:
        masks: dict[str, Part] = {}
        for name, data in pack.read_masks(size):
            if len(data) != -(-counts[name] // 8):
                raise other_model(name, pack)
            masks[name] = MaskPart(0, counts[name], ranked(name), torch.frombuffer(data, dtype=torch.uint8))
        return masks
    found: dict[str, Part] = {}
    for name, value in pack.thresholds(size).items():
        if value is None:
            continue
        if scaled and (mask := scaled(name, value)):
            found[name] = MaskPart(0, counts[name], ranked(name), torch.from_numpy(mask.bits))
        else:
            found[name] = ThresholdPart(0, counts[name], dtypes.floor_bits(value), ranked(name))
    return found
