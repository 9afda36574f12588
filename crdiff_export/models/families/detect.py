"""Which family a checkpoint belongs to, from names and shapes alone."""

from crdiff_export.errors import FamilyError
from crdiff_export.models.families.explain import explain
from crdiff_export.models.families.fit import EMA, Fit, Shapes, holds, measure
from crdiff_export.models.families.model import Layer, Match


def detect(shapes: Shapes) -> Match:
    """The family, layout and prefix of a checkpoint, or a FamilyError that names the nearest one and what it lacks.

    No false positives among the known families: every target tensor is there, no further layer looks like a target,
    and the marks hold. Widths are free, except for those that are marks.
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
        inpainting=layout.inpainting is not None and holds(layout.inpainting, fit.prefix, shapes),
        ema_tensors=sum(name.startswith(EMA) for name in shapes),
    )


def _check_shape(layer: Layer, key: str, shape: tuple[int, ...]) -> None:
    """Refuse a target that is no matrix, or that has no square block of rows where a fused layer should be."""
    hint = "The file is damaged, packed by a quantiser, or of a model that only shares its names with a known one."
    match shape:
        case (rows, columns) if rows and columns:
            if layer.part is not None and (rows % columns or rows // columns <= layer.part):
                wanted = f"a fused layer has {layer.part + 1} or more blocks of {columns} rows"
                raise FamilyError(f"{key} has shape {list(shape)}, where {wanted}", hint)
        case _:
            raise FamilyError(f"{key} has shape {list(shape)}, where a linear layer has [rows, columns]", hint)
