"""Measure how well the tensor names of a file fit each family, in each layout and with each prefix."""

import re
from collections.abc import Mapping, Sequence
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
CONTROLNET = ("control_model.", "controlnet.")
"""The prefixes of a ControlNet beside the model, whose layers are called like those of the model."""


@dataclass(frozen=True, slots=True)
class Signature:
    """The target tensors of a family in one layout, and their `tails`: the parts of the names after the block index."""

    family: Family
    layout: Layout
    tensors: Mapping[str, None]
    tails: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """The fit of a file to a signature behind a prefix; names are without prefix.

    Attributes:
        signature: The signature.
        prefix: The prefix.
        missing: Targets that the file lacks, in the family's order.
        extras: Names that end like a target but are none, as in a larger model, in the file's order.
    """

    signature: Signature
    prefix: str
    missing: tuple[str, ...]
    extras: tuple[str, ...]

    @property
    def found(self) -> int:
        """How many targets are present."""
        return len(self.signature.tensors) - len(self.missing)

    @property
    def exact(self) -> bool:
        """Whether the targets are present, and nothing else that looks like one."""
        return not (self.missing or self.extras)

    @property
    def score(self) -> float:
        """Tensors in common over all tensors of both: 1 for an exact fit, 0 for nothing in common."""
        return self.found / (len(self.signature.tensors) + len(self.extras))

    @property
    def close(self) -> bool:
        """Whether this is the family's model, perhaps with a part missing or too much."""
        return self.score >= 0.9

    @property
    def similar(self) -> bool:
        """Whether this may be a model of the same design: of more or fewer blocks, but with layers of every kind."""
        names = [f".{tensor}" for tensor in self.signature.tensors if tensor not in self.missing]
        return self.score >= 0.5 and all(any(name.endswith(tail) for name in names) for tail in self.signature.tails)


def measure(shapes: Shapes, families: Sequence[Family] | None = None) -> list[Fit]:
    """Measure how well a file fits families.

    Args:
        shapes: The shape of every tensor, by name.
        families: The families; None for the built-in ones.

    Returns:
        Every fit with at least one target in common, in the order of prefixes and families.
    """
    signatures = _signatures() if families is None else _signatures_of(families)
    tails = tuple({tail: None for signature in signatures for tail in signature.tails})
    alike = [name for name in shapes if f".{name}".endswith(tails) and not name.startswith((EMA, *CONTROLNET))]
    fits = []
    for prefix in PREFIXES:
        names = dict.fromkeys(name.removeprefix(prefix) for name in alike if name.startswith(prefix))
        for signature in signatures if names else ():
            missing = tuple(tensor for tensor in signature.tensors if tensor not in names)
            if len(missing) < len(signature.tensors):
                ends_alike = (name for name in names if f".{name}".endswith(signature.tails))
                others = (name for name in ends_alike if name not in signature.tensors)
                extras = tuple(name for name in others if not name.startswith(signature.layout.others))
                fits.append(Fit(signature, prefix, missing, extras))
    return fits


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
    return not mark.sizes or (mark.axis < len(shape) and shape[mark.axis] in mark.sizes)


@cache
def _signatures() -> tuple[Signature, ...]:
    return _signatures_of(all_families())


def _signatures_of(families: Sequence[Family]) -> tuple[Signature, ...]:
    return tuple(_signature(family, layout) for family in families for layout in family.layouts)


def _signature(family: Family, layout: Layout) -> Signature:
    tensors = dict.fromkeys(layer.tensor for layer in layout.layers)
    tails = dict.fromkeys(_tail(tensor) for tensor in tensors)
    return Signature(family, layout, tensors, tuple(tails))


def _tail(tensor: str) -> str:
    """Return the part of a target's name after the number of its block, with the dot before it."""
    parts = re.split(r"blocks\.\d+\.", tensor)
    if len(parts) == 1:
        parts = re.split(r"(?:^|\.)\d+\.", tensor, maxsplit=1)
    return f".{parts[-1]}"
