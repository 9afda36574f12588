"""Measure how well the tensor names of a file fit each family, in each layout and with each prefix."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from crdiff_export.models.families.catalogue import all_families
from crdiff_export.models.families.model import Family, Layout, Mark

Shapes = Mapping[str, tuple[int, ...]]

# Prefixes before the model's own names in whole checkpoints and in files of the transformer alone (ComfyUI's
# `unet_prefix_from_state_dict`, kohya and diffusers one-file exports). Longer ones first; no target fits two of them.
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
"""The prefix of an averaged copy of the UNet that training stores; loaders ignore it (LDM's `LitEma`)."""


@dataclass(frozen=True, slots=True)
class Signature:
    """The target tensors of a family in one layout, and their `tails`: the parts of the names after the block index."""

    family: Family
    layout: Layout
    tensors: tuple[str, ...]
    tails: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """The fit of a file: `found` targets of a signature with a prefix, and `extra` names that only end like targets."""

    signature: Signature
    prefix: str
    found: int
    extra: int

    @property
    def exact(self) -> bool:
        """Whether every target is present, and no name that looks like a target of a larger model."""
        return self.found == len(self.signature.tensors) and not self.extra

    @property
    def score(self) -> float:
        """Tensors in common over all tensors of both: 1 for an exact fit, 0 for nothing in common."""
        return self.found / (len(self.signature.tensors) + self.extra)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the targets that are not among the names, without prefix, in the family's order."""
        present = frozenset(names)
        return [tensor for tensor in self.signature.tensors if self.prefix + tensor not in present]

    def extras(self, names: Iterable[str]) -> list[str]:
        """Return the names that end like a target but are not targets, without prefix, in the file's order."""
        targets = {self.prefix + tensor for tensor in self.signature.tensors}
        alike = (name for name in names if name.startswith(self.prefix) and name.endswith(self.signature.tails))
        return [name.removeprefix(self.prefix) for name in alike if name not in targets and not name.startswith(EMA)]


def measure(shapes: Shapes) -> list[Fit]:
    """Return every fit with at least one target in common, in the order of prefixes and families."""
    tails = tuple({tail: None for signature in _signatures() for tail in signature.tails})
    alike = [name for name in shapes if name.endswith(tails) and not name.startswith(EMA)]
    return [fit for prefix in PREFIXES for fit in _behind(prefix, [n for n in alike if n.startswith(prefix)])]


def _behind(prefix: str, alike: Sequence[str]) -> list[Fit]:
    """Return the fits with one prefix; `alike` are the names that start with it and end like a target of any family."""
    if not alike:
        return []
    names = frozenset(name.removeprefix(prefix) for name in alike)
    counts = [(signature, sum(tensor in names for tensor in signature.tensors)) for signature in _signatures()]
    tails = {signature.tails for signature, number in counts if number}
    alike_by_tails = {some: sum(name.endswith(some) for name in alike) for some in tails}
    return [Fit(signature, prefix, n, alike_by_tails[signature.tails] - n) for signature, n in counts if n]


def holds(mark: Mark, prefix: str, shapes: Shapes) -> bool:
    """Whether a mark holds for a file.

    Args:
        mark: The mark.
        prefix: The prefix of the model's names.
        shapes: The shape of every tensor, by name.

    Returns:
        Whether the tensor is present, or absent, or has the size, as the mark demands.
    """
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
