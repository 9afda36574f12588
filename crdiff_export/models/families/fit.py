"""How well the tensor names of a file fit each family, in each layout and behind each prefix: numbers, no verdict."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from crdiff_export.models.families.catalogue import all_families
from crdiff_export.models.families.model import Family, Layout, Mark

Shapes = Mapping[str, tuple[int, ...]]

# What bundles and transformer-only files put before the model's own names (ComfyUI's `unet_prefix_from_state_dict`,
# kohya and diffusers one-file exports). The longer ones first; no target fits behind two of them.
PREFIXES = (
    "model.diffusion_model.",
    "model.model.",
    "net.",
    "model.",
    "diffusion_model.",
    "unet.",
    "transformer.",
    "",
)

EMA = "model_ema."
"""A second, averaged copy of the UNet that training leaves behind; loaders ignore it (LDM's `LitEma`)."""


@dataclass(frozen=True, slots=True)
class Signature:
    """The target tensors of a family in one layout, and their `tails`: what follows the index of the block."""

    family: Family
    layout: Layout
    tensors: tuple[str, ...]
    tails: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """How many of a signature's tensors a file has behind `prefix`, and how many more end like them."""

    signature: Signature
    prefix: str
    found: int
    extra: int

    @property
    def exact(self) -> bool:
        """Every target is there, and nothing that looks like a target of a larger model."""
        return self.found == len(self.signature.tensors) and not self.extra

    @property
    def score(self) -> float:
        """Tensors in common over tensors in either: 1 for an exact fit, 0 for nothing in common."""
        return self.found / (len(self.signature.tensors) + self.extra)

    def missing(self, names: Iterable[str]) -> list[str]:
        """The targets that are not among the names, without prefix, in the family's order."""
        there = frozenset(names)
        return [tensor for tensor in self.signature.tensors if self.prefix + tensor not in there]

    def extras(self, names: Iterable[str]) -> list[str]:
        """The names that end like a target and are none, without prefix, in the file's order."""
        targets = {self.prefix + tensor for tensor in self.signature.tensors}
        alike = (name for name in names if name.startswith(self.prefix) and name.endswith(self.signature.tails))
        return [name.removeprefix(self.prefix) for name in alike if name not in targets and not name.startswith(EMA)]


def measure(shapes: Shapes) -> list[Fit]:
    """Every fit with at least one target in common, in the order of the prefixes and families."""
    tails = tuple({tail: None for signature in _signatures() for tail in signature.tails})
    alike = [name for name in shapes if name.endswith(tails) and not name.startswith(EMA)]
    return [fit for prefix in PREFIXES for fit in _behind(prefix, [n for n in alike if n.startswith(prefix)])]


def _behind(prefix: str, alike: Sequence[str]) -> list[Fit]:
    """The fits behind one prefix, from the names that start with it and end like a target of any family."""
    if not alike:
        return []
    names = frozenset(name.removeprefix(prefix) for name in alike)
    found = [(signature, sum(tensor in names for tensor in signature.tensors)) for signature in _signatures()]
    tails = {signature.tails for signature, number in found if number}
    alike_by_tails = {some: sum(name.endswith(some) for name in alike) for some in tails}
    return [Fit(signature, prefix, n, alike_by_tails[signature.tails] - n) for signature, n in found if n]


def holds(mark: Mark, prefix: str, shapes: Shapes) -> bool:
    """Whether the file bears the mark behind that prefix."""
    shape = shapes.get(prefix + mark.tensor)
    if shape is None or not mark.present:
        return (shape is not None) == mark.present
    return mark.size is None or (mark.axis < len(shape) and shape[mark.axis] == mark.size)


@cache
def _signatures() -> tuple[Signature, ...]:
    return tuple(_signature(family, layout) for family in all_families() for layout in family.layouts)


def _signature(family: Family, layout: Layout) -> Signature:
    tensors = tuple(dict.fromkeys(layer.tensor for layer in layout.layers))
    tails = dict.fromkeys("." + re.split(r"blocks\.\d+\.", tensor)[-1] for tensor in tensors)
    return Signature(family, layout, tensors, tuple(tails))
