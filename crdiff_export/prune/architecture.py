"""Find the architecture and the native size of a checkpoint where its family allows several.

SD2.1 for 512 (epsilon) and SD2.1 for 768 (v-prediction) have the same names and shapes, and a loader that confuses them
draws noise. The checkpoint's own metadata has priority. Otherwise ComfyUI's rule decides (`comfy/supported_models.py`,
`SD20.model_type`): the 768 model has four input channels, and one small tensor that is never pruned has a standard
deviation above 0.09. ComfyUI calls that a guess ("not sure how well this will actually work"), so it decides the
architecture, which must be written, but not `modelspec.prediction_type`, which need not be.

Models of one family are trained at several sizes, too: SDXL-Turbo has SDXL's names and shapes, and was trained at 512.
The size is what the base says of itself, in its header or in its diffusers configuration, and else its family's.
"""

import contextlib
from dataclasses import dataclass
from pathlib import PurePosixPath

from crdiff_export.errors import RecipeError
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.strict_json import MalformedError, parse_object
from crdiff_export.models.families import Twin
from crdiff_export.prune.plan import CASTABLE, Plan
from crdiff_export.sizes import MAX_SIDE, Size

STATED = "modelspec.architecture"
STATED_SIZE = "modelspec.resolution"
# Pixels for each number of a latent, in both directions: every family's VAE halves the sides three times.
_VAE_FACTOR = 8
# ours: native sizes differ by less in area and aspect; SDXL's buckets have 0.9 to 1.0 of the native area.
_NEAR = 1.12
# src: SDXL (arXiv:2307.01952), appendix I: buckets up to 4 times as wide as high; SD3 (arXiv:2403.03206), too
_BUCKET_ASPECT = 4
# Inpainting and depth models have more.
_CHANNELS = 4
# The tensor has 320 numbers; do not read one of gigabytes.
_MOST_NUMBERS = 1 << 16


@dataclass(frozen=True, slots=True)
class Architecture:
    """A ModelSpec architecture id, and the native size of the model.

    Attributes:
        id: The ModelSpec id.
        native: The size that the model was trained for.
        native_source: What says so: `modelspec.resolution`, `config.json`, or `family`.
    """

    id: str
    native: Size
    native_source: str = "family"


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
    own = stated_native(plan.checkpoint)
    return Architecture(stated or architecture, *(own or (native, "family")))


def stated_native(checkpoint: Checkpoint) -> tuple[Size, str] | None:
    """Return the size that a base says it was trained for, and what says so; None if nothing does."""
    for file in checkpoint.files:
        with contextlib.suppress(RecipeError):
            return Size.parse(file.metadata.get(STATED_SIZE, "")), STATED_SIZE
    if checkpoint.kind != "folder":
        return None
    with contextlib.suppress(OSError, MalformedError):
        config = checkpoint.home / PurePosixPath(checkpoint.files[0].name).parent / "config.json"
        side = parse_object(config.read_bytes(), fractions=True).get("sample_size")
        if type(side) is int and 0 < side * _VAE_FACTOR <= MAX_SIDE:
            return Size(side * _VAE_FACTOR, side * _VAE_FACTOR), "config.json"
    return None


def native_note(plan: Plan) -> str | None:
    """Return a note for a target size at or near those that the base was trained at; None for other sizes."""
    family, size = plan.match.family, plan.size
    own = stated_native(plan.checkpoint)
    natives = [own[0]] if own else [Size(*family.native), *([Size(*family.twin.native)] if family.twin else [])]
    for native in natives:
        area = size.width * size.height / (native.width * native.height)
        aspect = size.width / size.height / (native.width / native.height)
        if max(area, 1 / area) > _NEAR or max(aspect, 1 / aspect) > (_BUCKET_ASPECT if family.buckets else _NEAR):
            continue
        advice = "the method is for other sizes, and here pruning is expected to cost quality"
        of_which = "the base" if len(natives) == 1 else f"some {family.title} models"
        if size == native:
            return f"{size} is the native size of {of_which}: {advice}"
        return f"{size} is near the native size of {of_which}, {native}: {advice}"
    return None


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
