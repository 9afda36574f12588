"""The size of the picture that a model of diffusers is called for, from the arguments of the call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from crdiff_export.models.families import Family
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from torch import Tensor

# What diffusers' models call their first argument.
_FIRST: Final = ("sample", "hidden_states", "x")
# Packed models take patches of two by two cells of a latent.
_PATCH: Final = 2


@dataclass(frozen=True, slots=True)
class Cells:
    """The latent of a picture: its sides in cells, or in patches where the model takes those (`packed`)."""

    width: int
    height: int
    packed: bool = False


def cells_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Cells | None:
    """Read the size of the latent from the arguments of a model's call.

    Packed models (FLUX, Qwen-Image) take a list of patches, and beside it the place of each (`img_ids`, a row and a
    column in columns 1 and 2) or the sides (`img_shapes`). Reference pictures of edit models come behind the picture
    itself, and have another number in column 0.

    Args:
        args: Positional arguments.
        kwargs: Arguments by name.

    Returns:
        The sides; None if nothing tells them.
    """
    shape: Any = kwargs.get("img_shapes")
    if shape is not None:
        while isinstance(shape[0], list | tuple):
            shape = shape[0]
        return Cells(int(shape[-1]), int(shape[-2]), packed=True)
    first: Any = args[0] if args else next((kwargs[name] for name in _FIRST if kwargs.get(name) is not None), None)
    while isinstance(first, list | tuple) and first:  # one tensor for each picture (Z-Image)
        first = first[0]
    if getattr(first, "ndim", 0) >= 4:  # [batch, channels, …, height, width]
        return Cells(first.shape[-1], first.shape[-2])
    places = kwargs.get("img_ids")
    return None if places is None else _from_places(places)


def _from_places(ids: "Tensor") -> Cells:
    places = ids[0] if ids.ndim == 3 else ids
    own = places[places[:, 0] == places[0, 0]]
    height, width = (int(number) for number in (own[:, 1:3].amax(0) - own[:, 1:3].amin(0) + 1).tolist())
    return Cells(width, height, packed=True)


def picture_size(cells: Cells, family: Family, pipe: Any) -> Size:
    """Return the size of a picture in pixels.

    Args:
        cells: The size of its latent.
        family: The model's family, for the pixels of a cell.
        pipe: The pipeline, which knows them of its own VAE; or the model alone.

    Returns:
        The size.
    """
    factor = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None)
    pixels = factor or family.cell
    if cells.packed:
        pixels = _PATCH * factor if factor else family.grid
    return Size(cells.width * pixels, cells.height * pixels)
