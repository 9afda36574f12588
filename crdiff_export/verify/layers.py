"""Count the zero weights of every layer that may be pruned, whoever made the checkpoint."""

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final, NamedTuple

from crdiff_export.errors import CheckpointError, FamilyError, PlanError
from crdiff_export.formats.dtypes import FORMATS
from crdiff_export.formats.safetensors import TensorSpec, show
from crdiff_export.formats.weight_file import Bytes
from crdiff_export.models.families import FamilyLayer, Kind, Match
from crdiff_export.progress import Progress
from crdiff_export.prune.plan import quantisation
from crdiff_export.verify.inspect import Inspection
from crdiff_export.verify.weight_reader import read_pieces, refuse_holes

# The bits of an element that are all 0 in +0 and in -0, by dtype.
MAGNITUDE: Final = {"F64": (1 << 63) - 1, **{dtype: form.mask for dtype, form in FORMATS.items()}}
_BLOCK: Final = re.compile(r"(.*(?:blocks|layers)\.\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class LayerZeros:
    """The zero weights of one layer.

    Attributes:
        name: The name of its tensor, with the range of rows if it is a part of the tensor.
        group: Its group.
        kind: Its kind.
        block: The block that it is in, as diffusers names it.
        projection: Its name inside the block, as diffusers names it.
        weights: The number of its weights.
        zeros: How many of them are +0 or -0.
    """

    name: str
    group: str
    kind: Kind
    block: str
    projection: str
    weights: int
    zeros: int

    @property
    def share(self) -> float:
        """The share of its weights that are zero."""
        return self.zeros / max(self.weights, 1)


class GroupZeros(NamedTuple):
    """The zero weights of a group."""

    group: str
    layers: int
    weights: int
    zeros: int

    @property
    def share(self) -> float:
        """The share of its weights that are zero."""
        return self.zeros / max(self.weights, 1)


class _Rows(NamedTuple):
    """A layer as rows `start:stop` of a tensor in a file."""

    file: int
    tensor: TensorSpec
    layer: FamilyLayer
    start: int
    stop: int

    @property
    def name(self) -> str:
        whole = self.stop - self.start == self.tensor.shape[0]
        return self.tensor.name if whole else f"{self.tensor.name}[{self.start}:{self.stop}]"

    @property
    def span(self) -> tuple[int, int]:
        """The range of its bytes in the data section."""
        row = self.tensor.nbytes // max(self.tensor.shape[0], 1)
        return self.tensor.start + self.start * row, self.tensor.start + self.stop * row


def count_zeros(inspection: Inspection, progress: Progress) -> tuple[LayerZeros, ...]:
    """Count the zero weights of the targets of a file that crdiff made, or of all layers that its family may prune.

    Args:
        inspection: The headers of the checkpoint.
        progress: Is told how far the work is, and may interrupt it.

    Returns:
        The layers by group and block.

    Raises:
        FamilyError: The family is unknown.
        PlanError: The weights are quantised so that a zero code is not a zero weight.
        CheckpointError: The weights cannot be read, or have no zero.
    """
    checkpoint, match = inspection.checkpoint, inspection.match
    if match is None:
        raise FamilyError(
            f"{inspection.path}: {inspection.why_not}", "Without --layers, `crdiff inspect` shows any checkpoint."
        )
    quantised = quantisation(checkpoint, match.prefix)
    if quantised and not quantised.scaled:
        raise PlanError(
            f"{inspection.path}: the zeros of quantised weights ({quantised.kind}) cannot be counted",
            "Give the fp16 or bf16 checkpoint.",
        )
    layers = _find_layers(inspection, match)
    refuse_holes(checkpoint)
    progress.stage("counting", sum(stop - start for start, stop in (layer.span for layer in layers)))
    zeros: dict[str, int] = {}
    for number, file in enumerate(checkpoint.files):
        with closing(file.open()) as reader:
            for layer in sorted((layer for layer in layers if layer.file == number), key=lambda layer: layer.span):
                zeros[layer.name] = _count(reader, layer, progress)
    result = []
    for layer in layers:
        block, projection = _place(layer.layer)
        weights = layer.tensor.count // max(layer.tensor.shape[0], 1) * (layer.stop - layer.start)
        result.append(
            LayerZeros(
                layer.name, layer.layer.group, layer.layer.kind, block, projection, weights, zeros[layer.name]
            )
        )  # fmt: skip
    return tuple(_in_order(result, match.family.groups))


def group_zeros(layers: Sequence[LayerZeros]) -> list[GroupZeros]:
    """Add up the layers of each group, in the order of the layers."""
    groups: dict[str, list[LayerZeros]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    return [
        GroupZeros(name, len(some), sum(layer.weights for layer in some), sum(layer.zeros for layer in some))
        for name, some in groups.items()
    ]


def _find_layers(inspection: Inspection, match: Match) -> list[_Rows]:
    """Find the layers to count in the files, and check that their dtypes have a zero."""
    tensors = {tensor.name: (number, tensor) for number, tensor in inspection.checkpoint.tensors()}
    kinds = inspection.stamp.targets if inspection.stamp else match.family.kinds
    layers = []
    for layer in match.layout.layers:
        if layer.kind not in kinds:
            continue
        number, tensor = tensors[match.prefix + layer.tensor]
        if tensor.dtype not in MAGNITUDE:
            raise CheckpointError(
                f"{inspection.path}: {show(tensor.name)} is {tensor.dtype}, whose zeros cannot be counted",
                f"The weights may be {', '.join(MAGNITUDE)}.",
            )
        layers.append(_Rows(number, tensor, layer, *layer.rows(tensor.shape)))
    return layers


def _count(reader: Bytes, layer: _Rows, progress: Progress) -> int:
    import numpy as np

    form = np.dtype(f"<u{layer.tensor.itemsize}")
    mask = form.type(MAGNITUDE[layer.tensor.dtype])
    zeros = 0
    for piece in read_pieces(reader, *layer.span):
        bits = np.frombuffer(piece, form)
        zeros += bits.size - int(np.count_nonzero(bits & mask))
        progress.advance(len(piece))
    return zeros


def _place(layer: FamilyLayer) -> tuple[str, str]:
    """Return the block of a layer and its name inside the block; the names of diffusers have no fused tensors."""
    name = layer.diffusers.removesuffix(".weight")
    match = _BLOCK.fullmatch(name)
    return (match[1], match[2]) if match else (layer.group, name)


def _in_order(layers: Sequence[LayerZeros], groups: Sequence[str]) -> list[LayerZeros]:
    """Sort layers by group and block; blocks of one list stay together, and attention comes before feed-forward."""
    lists = {layer.block.rpartition(".")[0]: 0 for layer in layers}
    lists = {name: number for number, name in enumerate(lists)}

    def key(layer: LayerZeros) -> tuple[int, int, int, Kind]:
        name, _, number = layer.block.rpartition(".")
        return groups.index(layer.group), lists[name], int(number) if number.isdecimal() else 0, layer.kind

    return sorted(layers, key=key)
