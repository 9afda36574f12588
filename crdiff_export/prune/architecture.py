"""Find the architecture of a checkpoint where the names and shapes of its family allow several.

SD2.1 for 512 (epsilon) and SD2.1 for 768 (v-prediction) have the same names and shapes, and a loader that confuses them
draws noise. The checkpoint's own metadata has priority. Otherwise ComfyUI's rule decides (`comfy/supported_models.py`,
`SD20.model_type`): the 768 model has four input channels, and one small tensor that is never pruned has a standard
deviation above 0.09. ComfyUI calls that a guess ("not sure how well this will actually work"), so it decides the
architecture, which must be written, but not `modelspec.prediction_type`, which need not be.
"""

import contextlib
from dataclasses import dataclass

from crdiff_export.models.families import Twin
from crdiff_export.prune.plan import CASTABLE, Plan
from crdiff_export.sizes import Size

STATED = "modelspec.architecture"
# Inpainting and depth models have more.
_CHANNELS = 4
# The tensor has 320 numbers; do not read one of gigabytes.
_MOST_NUMBERS = 1 << 16


@dataclass(frozen=True, slots=True)
class Architecture:
    """A ModelSpec architecture id, and the native size of its models."""

    id: str
    native: Size


def find(plan: Plan) -> Architecture:
    """Find the architecture of a plan's base; reads one tensor of a few hundred numbers if necessary."""
    family = plan.match.family
    stated = next((text for f in plan.checkpoint.files if (text := f.metadata.get(STATED))), None)
    twin = family.twin
    if twin and (stated == twin.architecture or (stated != family.architecture and _is_twin(plan, twin))):
        architecture, native = twin.architecture, Size(*twin.native)
    else:
        architecture, native = family.architecture, Size(*family.native)
    if plan.match.inpainting and family.inpainting:
        architecture = family.inpainting
    return Architecture(stated or architecture, native)


def _is_twin(plan: Plan, twin: Twin) -> bool:
    match = plan.match
    first = match.layout.inpainting
    shape = plan.checkpoint.shapes.get(match.prefix + first.tensor, ()) if first else ()
    if first and len(shape) > first.axis and shape[first.axis] != _CHANNELS:
        return True
    spread = _spread(plan, match.prefix + twin.tensors[match.layout.name])
    return spread is not None and not spread > twin.limit


def _spread(plan: Plan, name: str) -> float | None:
    """Return the standard deviation of a tensor; None if it is absent or the file is sparse."""
    import numpy as np

    from crdiff_export.prune.kernels.cast import cast

    for number, tensor in plan.checkpoint.tensors():
        file = plan.checkpoint.files[number]
        fits = tensor.name == name and tensor.dtype in CASTABLE and 0 < tensor.count <= _MOST_NUMBERS
        if fits and not file.is_sparse:
            raw = memoryview(bytearray(tensor.nbytes))
            with contextlib.closing(file.open()) as source:
                source.read_into(tensor.start, raw)
            values = np.frombuffer(cast(raw, tensor.dtype, "F32"), np.float32)
            return float(np.std(values, dtype=np.float64))
    return None
