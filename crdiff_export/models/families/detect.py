"""Recognise the family of a checkpoint from the names and shapes of its tensors."""

from crdiff_export.errors import FamilyError
from crdiff_export.models.families.explain import explain
from crdiff_export.models.families.fit import EMA, Fit, Shapes, holds, measure
from crdiff_export.models.families.model import ANY, FamilyLayer, Match, Special

# Layers over time, whose names look like targets.
_TEMPORAL = ("motion_modules.", ".temporal_transformer.")


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
    if temporal := next((name for name in shapes if any(part in name for part in _TEMPORAL)), None):
        raise FamilyError(
            f"{temporal}: a layer over time, as in AnimateDiff", "Export the model that makes single pictures."
        )
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
    """Tell from channels and extra layers whether a model needs something else than its family's first."""
    parts = [part for part in (_by_vector(fit, shapes), _by_channels(fit, shapes), _by_layers(fit, shapes)) if part]
    if len(parts) < 2:
        return parts[0] if parts else None
    first, *others = parts
    names = "-".join(part.id for part in others)
    return Special(
        id=f"{first.id}-{names}",
        title=", ".join(part.title for part in parts),
        architecture=f"{first.architecture}-{names}",
        channels=next((part.channels for part in parts if part.channels), None),
        vector=first.vector,
    )


def _by_channels(fit: Fit, shapes: Shapes) -> Special | None:
    family, layout = fit.signature.family, fit.signature.layout
    channels = _size(fit, shapes, layout.first, 1) or family.channels
    if channels == family.channels:
        return None
    special = next((special for special in family.specials if special.channels == channels), None)
    other = f"{channels}-channels"
    return special or Special(other, f"with {channels} input channels", f"{family.architecture}/{other}", channels)


def _by_vector(fit: Fit, shapes: Shapes) -> Special | None:
    family, layout = fit.signature.family, fit.signature.layout
    vector = next((size for tensor in layout.vectors if (size := _size(fit, shapes, tensor, 1))), None)
    if not layout.vectors or vector == family.vector:
        return None
    fitting = (special for special in family.specials if special.vector in (ANY, vector) and special.vector)
    other = f"vector-{vector}"
    title = f"with a vector of width {vector} beside the text" if vector else "without its vector embedding"
    return next(fitting, None) or Special(other, title, f"{family.architecture}/{other}", vector=vector)


def _by_layers(fit: Fit, shapes: Shapes) -> Special | None:
    """Tell a model by layers that its family does not have, or by the channels of its output."""
    family, layout = fit.signature.family, fit.signature.layout
    if any(name.startswith("control_model.") for name in shapes):
        return Special("controlnet", "with a ControlNet in the same file", f"{family.architecture}/controlnet")
    outputs = _size(fit, shapes, layout.last, 0) or family.channels
    other = f"{outputs}-outputs"
    if layout.last and outputs != family.channels:
        return Special(other, f"with {outputs} output channels", f"{family.architecture}/{other}")
    return None


def _size(fit: Fit, shapes: Shapes, tensor: str, axis: int) -> int | None:
    shape = shapes.get(fit.prefix + tensor, ())
    return shape[axis] if len(shape) > 1 else None


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
