"""Recognise the family of a checkpoint from the names and shapes of its tensors."""

from collections.abc import Mapping, Sequence
from math import prod

from crdiff_export.errors import FamilyError
from crdiff_export.formats.text import printable
from crdiff_export.models import demo
from crdiff_export.models.families.catalogue import installed_families
from crdiff_export.models.families.explain import explain, explain_family
from crdiff_export.models.families.fit import CONTROLNET, EMA, PREFIXES, Fit, Shapes, holds, measure
from crdiff_export.models.families.model import ANY, Family, FamilyLayer, Layout, LayoutName, Match, Special
from crdiff_export.models.families.siblings import check_siblings
from crdiff_export.models.families.structure import read_structure
from crdiff_export.models.families.table import TABLE_KEY, parse_family
from crdiff_export.models.families.unet import tensors_of

# Layers over time, whose names look like targets: AnimateDiff, Stable Video Diffusion, ModelScope's UNet3D.
_TEMPORAL = ("motion_modules.", ".temporal_transformer", ".temp_attentions.", ".time_stack.")
# The paths of a UNet's blocks in each layout.
_BLOCKS: dict[LayoutName, tuple[str, ...]] = {
    "original": ("input_blocks.", "middle_block.", "output_blocks."),
    "diffusers": ("down_blocks.", "mid_block.", "up_blocks."),
}


def detect(shapes: Shapes, family: Family | None = None) -> Match:
    """Recognise the family, layout and prefix of a checkpoint.

    Known families are never confused: every target tensor must be present, no other layer may look like a target, and
    the marks must hold. Widths are free, except for those that are marks. Any other UNet is read by its structure.

    Args:
        shapes: The shape of every tensor, by name.
        family: The family that it is to be of; None for any that is built in or installed.

    Returns:
        The match.

    Raises:
        FamilyError: No family matches; the message has the nearest one and what the checkpoint lacks of it.
    """
    if family is not None:
        fits = measure(shapes, [family])
        _refuse_two(fits, shapes)
        if match := _exact(fits, shapes):
            return match
        raise explain_family(family, fits, shapes)
    if temporal := next((name for name in shapes if any(part in name for part in _TEMPORAL)), None):
        raise FamilyError(
            f"{printable(temporal)}: a layer over time, as video models have",
            "Give a model that makes single pictures.",
        )
    fits = measure(shapes)
    _refuse_two(fits, shapes)
    if match := _exact(fits, shapes):
        return match
    if (others := installed_families()) and (match := _exact(measure(shapes, others), shapes)):
        return match
    if not any(_lacks_a_part(fit, shapes) for fit in fits) and (match := _any_unet(shapes)):
        return match
    raise explain(fits, shapes)


def detect_baked(shapes: Shapes, metadata: Mapping[str, str], where: str) -> Match:
    """Recognise a checkpoint that may be a baked file of a family that is not built in, whose table is in its header.

    Args:
        shapes: The shape of every tensor, by name.
        metadata: The header's metadata.
        where: The file, for messages.

    Returns:
        The match.

    Raises:
        FamilyError: No family matches, or the table in the header is damaged.
    """
    table = metadata.get(TABLE_KEY)
    return detect(shapes, None if table is None else parse_family(table, f"{where}: {TABLE_KEY}", foreign=True))


def _unets(shapes: Shapes) -> list[list[str]]:
    """Return the first convolution and the transformer blocks of each UNet, known or not, in either layout."""
    networks = []
    for prefix in PREFIXES:
        for layout, paths in _BLOCKS.items():
            first, _, last = tensors_of(layout)
            if prefix + first in shapes and prefix + last in shapes:
                start = tuple(prefix + path for path in paths)
                blocks = [name for name in shapes if name.startswith(start) and "transformer_blocks." in name]
                networks += [[prefix + first, *blocks]] if blocks else []
    return networks


def _networks(fits: Sequence[Fit], shapes: Shapes) -> list[list[str]]:
    """Return the tensors of each UNet, and the targets of each transformer that is known or lacks only a part.

    Names behind a prefix are also names too much of a network without prefix, so only missing targets count here.
    """
    networks = _unets(shapes)
    for fit in fits:
        if fit.signature.family.scope == "group":
            continue
        names = [name for tensor in fit.signature.tensors if (name := fit.prefix + tensor) in shapes]
        if len(names) >= 0.9 * len(fit.signature.tensors) and all(
            set(names).isdisjoint(network) for network in networks
        ):
            networks.append(names)
    return networks


def _refuse_two(fits: Sequence[Fit], shapes: Shapes) -> None:
    """Refuse a file with two networks: one would be pruned, the other stay as it is, and a loader may take either."""
    networks = _networks(fits, shapes)
    if len(networks) > 1:
        examples = ", another with ".join(printable(names[0]) for names in networks)
        hint = "Save the one that is to be pruned in a file of its own."
        raise FamilyError(f"{len(networks)} networks in one file: one with {examples}", hint)


def _lacks_a_part(fit: Fit, shapes: Shapes) -> bool:
    """Whether this is a known model that is damaged, and not a UNet without some of its attentions.

    The demos are too small for that: most of them is in other small UNets.
    """
    if fit.exact or not fit.close or fit.signature.family.id in demo.NAMES:
        return False
    paths = tuple(fit.prefix + name.partition("transformer_blocks.")[0] for name in fit.missing)
    return bool(fit.extras) or any(name.startswith(paths) for name in shapes)


def _exact(fits: Sequence[Fit], shapes: Shapes) -> Match | None:
    for fit in fits:
        if fit.exact and all(holds(mark, fit.prefix, shapes) for mark in fit.signature.layout.marks):
            return _match(fit.signature.family, fit.signature.layout, fit.prefix, shapes)
    return None


def _any_unet(shapes: Shapes) -> Match | None:
    """Read a UNet of no known family by its structure; None if the file has no UNet."""
    for prefix in PREFIXES:
        if not any(prefix + tensors_of(layout)[0] in shapes for layout in _BLOCKS):
            continue
        inner = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        try:
            structure = read_structure(inner)
        except FamilyError as error:  # its message begins with a tensor
            raise FamilyError(prefix + error.message, error.hint) from error
        if structure:
            _, vectors, _ = tensors_of(structure.layout)
            vector = next((size for tensor in vectors if (size := _size(inner, tensor, 1))), None)
            family = parse_family(structure.table(vector), "UNet", foreign=True)
            layout = next(layout for layout in family.layouts if layout.name == structure.layout)
            return _match(family, layout, prefix, shapes)
    return None


def _match(family: Family, layout: Layout, prefix: str, shapes: Shapes) -> Match:
    layers = [layer for layer in layout.layers if not _is_packed(prefix + layer.tensor, shapes)]
    for layer in layers:
        _check_shape(layer, prefix + layer.tensor, shapes[prefix + layer.tensor])
    check_siblings(layers, prefix, shapes)
    return Match(
        family=family,
        layout=layout,
        prefix=prefix,
        special=_special(family, layout, prefix, shapes),
        ema_tensors=sum(name.startswith(EMA) for name in shapes),
    )


def _sizes(layout: Layout) -> tuple[str, ...]:
    """Return the tensors whose sizes tell special models apart."""
    return (layout.first, *layout.vectors, layout.last)


def _special(family: Family, layout: Layout, prefix: str, shapes: Shapes) -> Special | None:
    """Tell from channels and extra layers whether a model needs something else than its family's first."""
    sizes = {name: shapes.get(prefix + name, ()) for name in _sizes(layout)}
    ways = (
        *(special for special in family.specials if any(prefix + name in shapes for name in special.tensors)),
        _by_vector(family, layout, sizes),
        _by_channels(family, layout, sizes),
        _by_layers(family, layout, sizes, shapes),
    )
    parts = list(dict.fromkeys(part for part in ways if part))
    if not parts:
        return None
    first, *others = parts
    names = "".join(f"-{part.id}" for part in others)
    return Special(
        id=f"{first.id}{names}",
        title=", ".join(part.title for part in parts),
        architecture=f"{first.architecture}{names}" if family.architecture else "",
        channels=next((part.channels for part in parts if part.channels), None),
        vector=next((part.vector for part in parts if part.vector), None),
    )


def _by_channels(family: Family, layout: Layout, sizes: Shapes) -> Special | None:
    channels = _size(sizes, layout.first, 1) or family.channels
    if channels == family.channels:
        return None
    special = next((special for special in family.specials if special.channels == channels), None)
    other = f"{channels}-channels"
    return special or Special(other, f"with {channels} input channels", f"{family.architecture}/{other}", channels)


def _by_vector(family: Family, layout: Layout, sizes: Shapes) -> Special | None:
    vector = next((size for tensor in layout.vectors if (size := _size(sizes, tensor, 1))), None)
    if not layout.vectors or vector == family.vector:
        return None
    fitting = (special for special in family.specials if special.vector in (ANY, vector) and special.vector)
    other = f"vector-{vector}" if vector else "no-vector"
    title = f"with a vector of width {vector} beside the text" if vector else "without its vector embedding"
    return next(fitting, None) or Special(other, title, f"{family.architecture}/{other}", vector=vector)


def _by_layers(family: Family, layout: Layout, sizes: Shapes, shapes: Shapes) -> Special | None:
    """Tell a model by layers that its family does not have, or by the channels of its output."""
    if any(name.startswith(CONTROLNET) for name in shapes):
        return Special("controlnet", "with a ControlNet in the same file", f"{family.architecture}/controlnet")
    outputs = _size(sizes, layout.last, 0) or family.channels
    other = f"{outputs}-outputs"
    if layout.last and outputs != family.channels:
        return Special(other, f"with {outputs} output channels", f"{family.architecture}/{other}")
    return None


def _size(shapes: Shapes, tensor: str, axis: int) -> int | None:
    shape = shapes.get(tensor, ())
    return shape[axis] if len(shape) > 1 else None


def _is_packed(key: str, shapes: Shapes) -> bool:
    """Whether a weight has scales for its blocks, as nvfp4, whose shape is that of its bytes; a plan refuses it."""
    return prod(shapes.get(f"{key.removesuffix('.weight')}.weight_scale", ())) > 1


def _check_shape(layer: FamilyLayer, key: str, shape: tuple[int, ...]) -> None:
    """Check that a target is a matrix, and that a fused target has the block of rows of its layer."""
    hint = "The file is damaged, packed by a quantiser, or of a model that only shares its names with a known one."
    match shape:
        case (rows, columns) if rows and columns:
            if not (part := layer.part):
                return
            if part.of and rows % part.of:
                raise FamilyError(f"{key} has shape {list(shape)}, where the rows are {part.of} equal blocks", hint)
            if not part.of and (rows % columns or rows // columns < part.stop):
                wanted = f"a fused layer has {part.stop} or more blocks of {columns} rows"
                raise FamilyError(f"{key} has shape {list(shape)}, where {wanted}", hint)
        case _:
            raise FamilyError(f"{key} has shape {list(shape)}, where a linear layer has [rows, columns]", hint)
