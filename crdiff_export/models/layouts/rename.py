"""The names of a network's tensors in both layouts, and which rows of a tensor are whose."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from crdiff_export.errors import PlanError
from crdiff_export.formats.joined_file import JoinedTensor, Piece
from crdiff_export.formats.safetensors import TensorSpec, show
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.models.families import LayoutName

Shapes = Mapping[str, tuple[int, ...]]
# Parts of a fused tensor that have the same shape: q, k and v.
_QKV = 3
# A tensor and the file that it is in.
Tensors = Mapping[str, tuple[SourceFile, TensorSpec]]


@dataclass(frozen=True, slots=True)
class Rename:
    """A tensor in both layouts, or all tensors below a path.

    Attributes:
        original: Its name in the original layout, or a path, such as `middle_block.1`.
        diffusers: Its names in diffusers, one after the other for a tensor that the original layout fuses.
        heights: Rows of each part of a fused tensor; empty where all have the same number.
        swapped: Whether the two halves of its rows are the other way round in diffusers.
        transposed: Whether the matrix is transposed in diffusers.
        squeezed: Whether the original is a convolution of 1x1 where diffusers has a matrix.
        kinds: How the names of the tensors below a path end; empty for a path whose tensors are not known here, and ''
            for a tensor's own name.
        optional: Whether a model may have none of them.
    """

    original: str
    diffusers: tuple[str, ...]
    heights: tuple[int, ...] = ()
    swapped: bool = False
    transposed: bool = False
    squeezed: bool = False
    kinds: tuple[str, ...] = (".weight", ".bias")
    optional: bool = False

    def paths(self, layout: LayoutName) -> tuple[str, ...]:
        """Return its names in a layout."""
        return (self.original,) if layout == "original" else self.diffusers


def rename(tensors: Tensors, renames: Sequence[Rename], to: LayoutName, where: str) -> list[JoinedTensor]:
    """Give every tensor of a network the names and rows of the other layout.

    Args:
        tensors: The tensors by name, without prefix.
        renames: The network's names in both layouts.
        to: The layout to change to.
        where: The file or folder, for messages.

    Returns:
        The tensors in the new layout.

    Raises:
        PlanError: A tensor has no counterpart, a part of a fused one is missing, or parts do not go together.
    """
    source: LayoutName = "diffusers" if to == "original" else "original"
    refuse_missing(tensors, renames, source, where)
    by_path = {path: (each, number) for each in renames for number, path in enumerate(each.paths(source))}
    joined: dict[str, JoinedTensor] = {}
    for name in tensors:
        path = next((path for path in _heads(name) if path in by_path), None)
        if path is None:
            raise PlanError(
                f"{where}: {show(name)} has no counterpart in the {to} layout",
                "Keep the layout of the base: `crdiff export` without --layout.",
            )
        each, _ = by_path[path]
        rest = name[len(path) :]
        if to == "original":
            if (made := each.original + rest) not in joined:
                joined[made] = _fuse(made, [part + rest for part in each.diffusers], each, tensors, where)
        else:
            for tensor in _split(name, [part + rest for part in each.diffusers], each, tensors, where):
                joined[tensor.name] = tensor
    return list(joined.values())


def refuse_missing(tensors: Collection[str], renames: Sequence[Rename], source: LayoutName, where: str) -> None:
    """Refuse a network that lacks a tensor, as a download without one of its shards does.

    Args:
        tensors: The names of its tensors, without prefix.
        renames: The network's names in both layouts.
        source: The layout of the names.
        where: The file or folder, for messages.

    Raises:
        PlanError: A tensor is missing.
    """
    for each in renames:
        names = [path + kind for kind in each.kinds for path in each.paths(source)]
        missing = [name for name in names if name not in tensors]
        if missing and not (each.optional and len(missing) == len(names)):
            raise PlanError(
                f"{where}: {show(missing[0])} is missing",
                "The model is damaged, or a part of it was not fetched; fetch it again.",
            )


def _heads(name: str) -> Iterator[str]:
    """Yield the name, and the paths that it is below, longest first."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _fuse(made: str, parts: Sequence[str], each: Rename, tensors: Tensors, where: str) -> JoinedTensor:
    """Make one tensor of the original layout."""
    (_, first), *others = found = [tensors[part] for part in parts]
    for _, other in others:
        alike = other.shape == first.shape if len(parts) == _QKV else other.shape[1:] == first.shape[1:]
        if other.dtype != first.dtype or not alike:
            raise PlanError(
                f"{where}: {show(other.name)} is {other.dtype} {list(other.shape)}, {show(first.name)} is "
                f"{first.dtype} {list(first.shape)}, and the original layout has both in one tensor",
                "Save the model in one dtype.",
            )
    shape = first.shape
    if others:
        shape = (sum(tensor.shape[0] for _, tensor in found), *shape[1:])
    if each.squeezed and len(shape) == 2:
        shape = (*shape, 1, 1)
    pieces = tuple(piece for file, tensor in found for piece in _pieces(file, tensor, each))
    return JoinedTensor(made, first.dtype, tuple(reversed(shape)) if each.transposed else shape, pieces)


def _split(name: str, parts: Sequence[str], each: Rename, tensors: Tensors, where: str) -> Iterator[JoinedTensor]:
    """Make the tensors of diffusers' layout from one of the original layout."""
    file, tensor = tensors[name]
    if len(parts) == 1:
        shape = tuple(reversed(tensor.shape)) if each.transposed else tensor.shape
        yield JoinedTensor(parts[0], tensor.dtype, shape, tuple(_pieces(file, tensor, each)))
        return
    rows = tensor.shape[0] if tensor.shape else 0
    heights = each.heights or (rows // len(parts),) * len(parts)
    if sum(heights) != rows or not rows:
        raise PlanError(
            f"{where}: {show(name)} has {rows} rows, which are not those of {len(parts)} layers",
            "The model is damaged or of another kind; fetch it again.",
        )
    start, row = tensor.start, tensor.nbytes // rows
    for part, height in zip(parts, heights, strict=True):
        stop = start + height * row
        yield JoinedTensor(part, tensor.dtype, (height, *tensor.shape[1:]), (Piece(file, start, stop),))
        start = stop


def _pieces(file: SourceFile, tensor: TensorSpec, each: Rename) -> Iterator[Piece]:
    """Yield the pieces of a whole tensor, in the order of the other layout."""
    if each.swapped:
        middle = tensor.start + tensor.nbytes // 2
        yield Piece(file, middle, tensor.end)
        yield Piece(file, tensor.start, middle)
    elif each.transposed and len(tensor.shape) == 2:
        yield Piece(file, tensor.start, tensor.end, (tensor.shape[0], tensor.shape[1]))
    else:
        yield Piece(file, tensor.start, tensor.end)
