"""What a model family is: plain records, filled by `unet.py` and `dit.py`, read by `detect.py`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["attn", "ff", "attn2"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One prunable weight: a whole tensor, or the `part`-th square block of rows of a fused one.

    With `part = i` the layer is rows `i*D : (i+1)*D` of a tensor of shape `[n*D, D]` (fused qkv, linear1).
    """

    tensor: str
    group: str
    kind: Kind
    part: int | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A tensor that tells families with equal layers apart: by its size along `axis`, or by being there at all.

    `size` None with `present` True or False asks only whether the tensor exists. `what` names the size in messages.
    """

    tensor: str
    axis: int = 0
    size: int | None = None
    present: bool = True
    what: str = "size"


@dataclass(frozen=True, slots=True)
class Layout:
    """How one way of saving the family names its prunable layers and what marks it out."""

    name: Literal["original", "diffusers"]
    layers: tuple[Layer, ...]
    marks: tuple[Mark, ...] = ()
    inpainting: Mark | None = None


@dataclass(frozen=True, slots=True)
class Twin:
    """Another model with all of a family's names and shapes, told by its content: see `architecture.py`.

    In the twin the standard deviation of one tensor, per layout in `tensors`, is at most `limit`.
    """

    architecture: str
    native: tuple[int, int]
    tensors: Mapping[str, str]
    limit: float


@dataclass(frozen=True, slots=True)
class Family:
    """Everything the tool knows about one model family. `inpainting` is the architecture id of its inpainting model."""

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
    """A checkpoint's family, the layout and key prefix it is saved with, and what else was noticed."""

    family: Family
    layout: Layout
    prefix: str
    inpainting: bool = False
    ema_tensors: int = 0
