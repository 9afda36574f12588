"""Records that describe a model family; `unet.py` and `dit.py` fill them, `detect.py` reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["attn", "ff", "attn2"]


@dataclass(frozen=True, slots=True)
class FamilyLayer:
    """One weight that may be pruned: a whole tensor, or a square block of rows of a fused one.

    With `part = i` the layer is rows `i*D : (i+1)*D` of a tensor of shape `[n*D, D]` (fused qkv, linear1).
    """

    tensor: str
    group: str
    kind: Kind
    part: int | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A tensor that distinguishes families with the same layers, by its size along `axis` or by its presence.

    Where `size` is None only the presence counts. `what` names the size in messages.
    """

    tensor: str
    axis: int = 0
    size: int | None = None
    present: bool = True
    what: str = "size"


@dataclass(frozen=True, slots=True)
class Layout:
    """One layout of a family: its layers, the marks of the family, and the mark of its inpainting model."""

    name: Literal["original", "diffusers"]
    layers: tuple[FamilyLayer, ...]
    marks: tuple[Mark, ...] = ()
    inpainting: Mark | None = None


@dataclass(frozen=True, slots=True)
class Twin:
    """Another model with the names and shapes of a family, distinguished by its weights: see `prune/architecture.py`.

    In the twin the standard deviation of one tensor, named for each layout in `tensors`, is at most `limit`.
    """

    architecture: str
    native: tuple[int, int]
    tensors: Mapping[str, str]
    limit: float


@dataclass(frozen=True, slots=True)
class Family:
    """Everything that is known about one model family.

    Attributes:
        id: The short name, which is also the alias of its recipe.
        title: The name for people.
        architecture: The ModelSpec id.
        implementation: The ModelSpec implementation.
        native: Width and height in pixels that the model was trained at.
        grid: Image sides are multiples of this number of pixels.
        groups: The groups of blocks with a ratio of their own.
        scope: Whether a threshold is computed for a group or for each layer.
        kinds: The kinds of layers that may be pruned.
        default_kinds: The kinds that are pruned by default.
        layouts: The ways in which the model is saved.
        inpainting: The architecture id of its inpainting model.
        twin: Another model with the same names and shapes.
    """

    id: str
    title: str
    architecture: str
    implementation: str
    native: tuple[int, int]
    grid: int
    groups: tuple[str, ...]
    scope: Literal["group", "layer"]
    kinds: tuple[Kind, ...]
    default_kinds: tuple[Kind, ...]
    layouts: tuple[Layout, ...]
    inpainting: str | None = None
    twin: Twin | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """A recognised checkpoint: its family, layout, prefix, whether it is an inpainting model, and its EMA tensors."""

    family: Family
    layout: Layout
    prefix: str
    inpainting: bool = False
    ema_tensors: int = 0
