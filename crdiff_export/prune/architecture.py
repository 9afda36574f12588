"""Find the architecture and the native size of a checkpoint where its family allows several.

SD2.1 for 512 (epsilon) and SD2.1 for 768 (v-prediction) have the same names and shapes, and a loader that confuses them
draws noise. The checkpoint's own metadata has priority. Otherwise ComfyUI's rule decides (`comfy/supported_models.py`,
`SD20.model_type`): the 768 model has four input channels, and one small tensor that is never pruned has a standard
deviation above 0.09. ComfyUI calls that a guess ("not sure how well this will actually work"), so it decides the
architecture, which must be written, but not `modelspec.prediction_type`, which is written only where the base itself
says what it predicts (`models/prediction.py`).

Models of one family are trained at several sizes, too: SDXL-Turbo has SDXL's names and shapes, and was trained at 512.
The size is what the base says of itself, in its header or in its diffusers configuration, and else its family's.
"""

import contextlib
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from crdiff_export.errors import PlanError, RecipeError
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.strict_json import MalformedError, parse_object
from crdiff_export.models.families import Family, Match, Twin
from crdiff_export.models.prediction import SIGMAS, Prediction, are_sigmas, by_marks, by_scheduler
from crdiff_export.prune.plan import CASTABLE, Plan
from crdiff_export.sizes import MAX_SIDE, Size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STATED = "modelspec.architecture"
STATED_SIZE = "modelspec.resolution"
GIVEN = "given"
# Pixels for each number of a latent, in both directions: the VAEs of the known families halve the sides three times.
_VAE_FACTOR = 8
# ours: native sizes differ by less in area and aspect; SDXL's buckets have 0.9 to 1.0 of the native area.
_NEAR = 1.12
# src: SDXL (arXiv:2307.01952), appendix I: buckets up to 4 times as wide as high; SD3 (arXiv:2403.03206), too
_BUCKET_ASPECT = 4
# The tensor has 320 numbers; do not read one of gigabytes.
_MOST_NUMBERS = 1 << 16


@dataclass(frozen=True, slots=True)
class Architecture:
    """A ModelSpec architecture id, and the native size of the model.

    Attributes:
        id: The ModelSpec id; empty for a model of no known family that has none of its own.
        native: The size that the model was trained for.
        native_source: What says so: `modelspec.resolution`, `config.json`, `family`, or `given` by the user.
        special: The id of a `Special` of the family, `base` for the family's twin, or nothing.
        prediction: What the model predicts; None if nothing marks it.
    """

    id: str
    native: Size
    native_source: str = "family"
    special: str = ""
    prediction: Prediction | None = None


def find(plan: Plan) -> Architecture:
    """Find the architecture of a plan's base; reads one tensor of a few hundred numbers if necessary."""
    return of_checkpoint(plan.checkpoint, plan.match, plan.native)


def of_checkpoint(checkpoint: Checkpoint, match: Match, given: Size | None = None) -> Architecture:
    """Find the architecture of a checkpoint; reads one tensor of a few hundred numbers if necessary.

    Args:
        checkpoint: The checkpoint.
        match: Its family and layout.
        given: The size that the user says it was trained for; None to look for it.

    Returns:
        The architecture.

    Raises:
        PlanError: Nothing says for which size it was trained.
    """
    family = match.family
    stated = next((text for f in checkpoint.on_disk.files if (text := f.metadata.get(STATED))), None)
    twin, special = family.twin, match.special
    architecture, native, kind = family.architecture, Size(*family.native) if family.native else None, ""
    if twin and (stated == twin.architecture or (stated != family.architecture and _is_twin(checkpoint, match, twin))):
        architecture, native, kind = twin.architecture, Size(*twin.native), "base"
    if special:
        architecture, kind = special.architecture, special.id
    size, source = (given, GIVEN) if given else stated_native(checkpoint, family) or (native, "family")
    if size is None:
        raise unknown_native(checkpoint)
    return Architecture(stated or architecture, size, source, kind, _prediction(checkpoint.on_disk, match))


def unknown_native(checkpoint: Checkpoint) -> PlanError:
    """Return the error for a model of no known family that does not say what it was trained for."""
    hint = "Give it to `crdiff export` with --native WxH, or save it into the file as modelspec.resolution."
    return PlanError(f"{checkpoint.path}: nothing says for which size this model was trained", hint)


def _prediction(checkpoint: Checkpoint, match: Match) -> Prediction | None:
    """Tell what the base predicts; flow matching, which all transformers use, has no marks."""
    if match.family.scope != "group":
        return None
    if checkpoint.kind == "folder":
        with contextlib.suppress(OSError, MalformedError):
            config = (checkpoint.home / "scheduler" / "scheduler_config.json").read_bytes()
            return by_scheduler(parse_object(config, fractions=True))
    prediction = by_marks(checkpoint.shapes, checkpoint.metadata)
    if prediction and prediction.kind == "edm-v":
        read = [numbers for name in SIGMAS if (numbers := _numbers(checkpoint, name)) is not None]
        sigmas = [float(number) for numbers in read for number in numbers]
        return replace(prediction, sigmas=(sigmas[0], sigmas[1])) if are_sigmas(sigmas) else Prediction("other")
    return prediction


def stated_native(checkpoint: Checkpoint, family: Family) -> tuple[Size, str] | None:
    """Return the size that a base says it was trained for, and what says so; None if nothing does."""
    checkpoint = checkpoint.on_disk
    for file in checkpoint.files:
        with contextlib.suppress(RecipeError):
            return Size.parse(file.metadata.get(STATED_SIZE, "")), STATED_SIZE
    if checkpoint.kind != "folder" or not family.sample_size:
        return None
    with contextlib.suppress(OSError, MalformedError):
        config = checkpoint.home / PurePosixPath(checkpoint.files[0].name).parent / "config.json"
        side = parse_object(config.read_bytes(), fractions=True).get("sample_size")
        factor = _vae_factor(checkpoint)
        if type(side) is int and 0 < side * factor <= MAX_SIDE:
            return Size(side * factor, side * factor), "config.json"
    return None


def _vae_factor(checkpoint: Checkpoint) -> int:
    """Return the pixels for each number of a latent: one level of the folder's VAE keeps the size, others halve it."""
    with contextlib.suppress(OSError, MalformedError):
        config = parse_object((checkpoint.home / "vae/config.json").read_bytes(), fractions=True)
        levels = config.get(
            "block_out_channels", config.get("encoder_block_out_channels")
        )  # the second is AutoencoderDC
        if isinstance(levels, list) and 0 < len(levels) < 8:
            return int(2 ** (len(levels) - 1))
    return _VAE_FACTOR


def native_note(plan: Plan) -> str | None:
    """Return a note for a target size at or near those that the base was trained at; None for other sizes."""
    family, size = plan.match.family, plan.size
    stated_size = stated_native(plan.checkpoint, family)
    of_family = [Size(*native) for native in (family.native, family.twin and family.twin.native) if native]
    natives = [plan.native] if plan.native else [stated_size[0]] if stated_size else of_family
    for native in natives:
        if not is_native(size, native, family):
            continue
        advice = "the method is for other sizes, and here pruning is expected to cost quality"
        owner = "the base" if len(natives) == 1 else f"some {family.title} models"
        if size == native:
            return f"{size} is the native size of {owner}: {advice}"
        return f"{size} is near the native size of {owner}, {native}: {advice}"
    return None


def is_native(size: Size, native: Size, family: Family) -> bool:
    """Tell whether a size is the native one, or as near to it as those that such a model was trained at.

    Args:
        size: The size.
        native: The size that the model was trained for.
        family: Its family, which may have been trained at many shapes of the same area.

    Returns:
        Whether it counts as native.
    """
    area = size.pixels / native.pixels
    aspect = size.width / size.height / (native.width / native.height)
    return max(area, 1 / area) <= _NEAR and max(aspect, 1 / aspect) <= (_BUCKET_ASPECT if family.buckets else _NEAR)


def _is_twin(checkpoint: Checkpoint, match: Match, twin: Twin) -> bool:
    if match.special and match.special.channels:
        return True
    numbers = _numbers(checkpoint, match.prefix + twin.tensors[match.layout.name])
    return numbers is not None and not float(numbers.std()) > twin.limit


def _numbers(checkpoint: Checkpoint, name: str) -> "NDArray[np.float64] | None":
    """Read a small tensor; None if it is absent, or the file is sparse."""
    import numpy as np

    from crdiff_export.prune.kernels.cast import cast

    for number, tensor in checkpoint.tensors():
        file = checkpoint.files[number]
        fits = tensor.name == name and tensor.dtype in CASTABLE and 0 < tensor.count <= _MOST_NUMBERS
        if fits and not file.is_sparse:
            raw = memoryview(bytearray(tensor.nbytes))
            with contextlib.closing(file.open()) as source:
                source.read_into(tensor.start, raw)
            return np.frombuffer(cast(raw, tensor.dtype, "F32"), np.float32).astype(np.float64)
    return None
