"""Recognise the family of a checkpoint from the names and shapes of its tensors."""

from crdiff_export.errors import FamilyError
from crdiff_export.models.families.explain import explain
from crdiff_export.models.families.fit import EMA, Fit, Shapes, holds, measure
from crdiff_export.models.families.model import ANY, FamilyLayer, Match, Special


def detect(shapes: Shapes) -> Match:
    """Recognise the family, layout and prefix of a checkpoint.

    Known families are never confused: every target tensor must be present, no other layer may look like a target, and
    the marks must hold. Widths are free, except for those that are marks.

    Args:
        shapes: The shape of every tensor, by name.

    Returns:
        The match.

    Raises:
        FamilyError: No family matches; the message has the nearest one and what the checkpoint lacks of it.
    """
    fits = measure(shapes)
    for fit in fits:
        if fit.exact and all(holds(mark, fit.prefix, shapes) for mark in fit.signature.layout.marks):
            return _match(fit, shapes)
    raise explain(fits, shapes)


def _match(fit: Fit, shapes: Shapes) -> Match:
    layout = fit.signature.layout
    for layer in layout.layers:
        _check_shape(layer, fit.prefix + layer.tensor, shapes[fit.prefix + layer.tensor])
    return Match(
        family=fit.signature.family,
        layout=layout,
        prefix=fit.prefix,
        special=_special(fit, shapes),
        ema_tensors=sum(name.startswith(EMA) for name in shapes),
    )


def _special(fit: Fit, shapes: Shapes) -> Special | None:
    """Tell from in-channels and extra projections whether a model takes something else in than its family's first."""
    family, layout = fit.signature.family, fit.signature.layout

    def width(tensor: str) -> int | None:
        shape = shapes.get(fit.prefix + tensor, ())
        return shape[1] if len(shape) > 1 else None

    channels = width(layout.first) or family.channels
    if channels != family.channels:
        special = next((special for special in family.specials if special.channels == channels), None)
        other = f"{channels}-channels"
        return special or Special(other, f"with {channels} input channels", f"{family.architecture}/{other}", channels)
    vector = next((size for tensor in layout.vectors if (size := width(tensor))), None)
    if layout.vectors and vector != family.vector:
        fitting = (special for special in family.specials if special.vector in (ANY, vector) and special.vector)
        other = f"vector-{vector}"
        title = f"with a vector of width {vector} beside the text" if vector else "without its vector embedding"
        return next(fitting, None) or Special(other, title, f"{family.architecture}/{other}", vector=vector)
    return None


def _check_shape(layer: FamilyLayer, key: str, shape: tuple[int, ...]) -> None:
    """Check that a target is a matrix, and that a fused target has the block of rows of its layer."""
    hint = "The file is damaged, packed by a quantiser, or of a model that only shares its names with a known one."
    match shape:
        case (rows, columns) if rows and columns:
            if layer.part is not None and (rows % columns or rows // columns <= layer.part):
                wanted = f"a fused layer has {layer.part + 1} or more blocks of {columns} rows"
                raise FamilyError(f"{key} has shape {list(shape)}, where {wanted}", hint)
        case _:
            raise FamilyError(f"{key} has shape {list(shape)}, where a linear layer has [rows, columns]", hint)
