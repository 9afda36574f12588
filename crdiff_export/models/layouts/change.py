"""See a checkpoint in the other layout: a file or folder that does not exist yet, whose bytes are the base's.

To the original layout a diffusers folder becomes one file with network, text encoders and VAE, as its authors' code
saves it; of SD3 and FLUX.1 the transformer alone. To diffusers the UNet or transformer becomes a folder with its
`config.json`. Nothing is computed: tensors are renamed, and rows of fused ones put behind each other or taken apart.
"""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crdiff_export.errors import PlanError
from crdiff_export.formats.checkpoint import Checkpoint, open_component, variant_of
from crdiff_export.formats.joined_file import JoinedTensor, file_order, join
from crdiff_export.formats.safetensors import show
from crdiff_export.formats.strict_json import MalformedError, parse_object
from crdiff_export.formats.text import plural
from crdiff_export.models.families import Family, LayoutName, Match, quantisation
from crdiff_export.models.families.fit import EMA
from crdiff_export.models.families.model import BUNDLED, TextEncoder
from crdiff_export.models.layouts import network_config
from crdiff_export.models.layouts.rename import Rename, Shapes, Tensors, rename
from crdiff_export.models.layouts.text_encoder_names import (
    POSITIONS,
    clip_renames,
    layer_count,
    open_clip_renames,
    with_tower,
    without,
)
from crdiff_export.models.layouts.transformer_names import flux_renames, sd3_renames
from crdiff_export.models.layouts.unet_names import CLASS, POOLED, read_blocks, unet_renames
from crdiff_export.models.layouts.vae_names import vae_renames
from crdiff_export.models.prediction import Prediction, by_marks, by_scheduler
from crdiff_export.sizes import Size

VAE = "first_stage_model."
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
# Layers of SD2's text encoder in the original layout, of which the last one is never used.
_OPEN_CLIP_H = 24
# How the names of the other parts of a checkpoint begin, and of its noise schedules.
_BESIDE = (
    "cond_stage_model.", "conditioner.", "text_encoders.", "vae.", "alphas_", "betas", "sqrt_", "log_one_minus_",
    "posterior_", "logvar", "v_pred", "ztsnr", "global_step",
)  # fmt: skip
# What is true of a layout, and untrue in the other.
_OF_LAYOUT = ("modelspec.implementation",)


@dataclass(slots=True)
class _Parts:
    """The tensors of a checkpoint in another layout, and what the user should know of them."""

    tensors: list[JoinedTensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def change_layout(checkpoint: Checkpoint, match: Match, to: LayoutName, native: Size | None = None) -> Checkpoint:
    """See a checkpoint in a layout.

    Args:
        checkpoint: The checkpoint; of a diffusers folder, its text encoders and VAE are read, too.
        match: Its family and layout.
        to: The layout to change to.
        native: The size that it was trained for, for diffusers' configuration; None takes the family's.

    Returns:
        The checkpoint in that layout: itself if it has it already.

    Raises:
        PlanError: The layouts of this model do not correspond, or a tensor has no counterpart.
        CheckpointError: A component cannot be read.
    """
    if match.layout.name == to:
        return checkpoint
    _refuse_quantised(checkpoint, match)
    parts = _to_original(checkpoint, match) if to == "original" else _to_diffusers(checkpoint, match)
    metadata = {key: text for key, text in checkpoint.metadata.items() if key not in _OF_LAYOUT}
    notes, path, tensors = (*checkpoint.notes, *parts.notes), checkpoint.path, file_order(parts.tensors)
    if to == "original":
        file = join(path, f"{checkpoint.stem}.safetensors", tensors, metadata)
        return Checkpoint(path, "file", (file,), (), notes, origin=checkpoint)
    file = join(path, WEIGHTS, tensors, metadata)
    config = {CONFIG: network_file({tensor.name: tensor.shape for tensor in tensors}, match.family, native)}
    return Checkpoint(path, "folder", (file,), notes=notes, generated=config, origin=checkpoint)


def network_file(shapes: Shapes, family: Family, native: Size | None) -> bytes:
    """Write the `config.json` of a network.

    Args:
        shapes: The shape of every tensor by diffusers' name.
        family: Its family.
        native: The size that it was trained for; None takes the family's.

    Returns:
        The file's content.
    """
    return (json.dumps(_config(shapes, family, native), indent=2, sort_keys=True) + "\n").encode()


def _refuse_quantised(checkpoint: Checkpoint, match: Match) -> None:
    """Refuse codes with a scale, which diffusers does not have beside its layers."""
    for file in checkpoint.files:
        names = (tensor.name for tensor in file.tensors if tensor.name.startswith(match.prefix))
        if quantised := quantisation(names, file.metadata):
            raise PlanError(
                f"{checkpoint.path}: quantised weights {quantised}, which only this layout has",
                "Keep the layout of the base: `crdiff export` without --layout.",
            )


def _network(checkpoint: Checkpoint, match: Match) -> Tensors:
    """Return the tensors of the network by name, without the prefix."""
    prefix = match.prefix
    return {
        tensor.name[len(prefix) :]: (file, tensor)
        for file in checkpoint.files
        for tensor in file.by_offset
        if tensor.name.startswith(prefix)
    }


def _renames(shapes: Shapes, match: Match, where: Path) -> list[Rename]:
    """List the names of a network in both layouts."""
    family, layout = match.family, match.layout.name
    if family.scope == "group":
        return unet_renames(read_blocks(shapes, layout), _vector(shapes, match))
    pipeline = family.pipelines.get("")
    if pipeline and pipeline.network == "FluxTransformer2DModel":
        return flux_renames(shapes, layout)
    if pipeline and pipeline.network == "SD3Transformer2DModel":
        return sd3_renames(shapes, layout)
    raise PlanError(
        f"{where}: the layouts of {family.title} are not changed into each other",
        "That is done for UNets of Stable Diffusion, SD3, SD3.5 and FLUX.1; leave --layout out.",
    )


def _vector(shapes: Shapes, match: Match) -> str:
    """Return what diffusers calls the embedding of the vector beside the text."""
    if match.layout.name == "diffusers":
        return POOLED if f"{POOLED}.linear_1.weight" in shapes else CLASS
    pipeline = match.family.pipelines.get("")
    return POOLED if pipeline and "XL" in pipeline.pipeline else CLASS


def _to_original(checkpoint: Checkpoint, match: Match) -> _Parts:
    network, where = _network(checkpoint, match), str(checkpoint.path)
    shapes = {name: tensor.shape for name, (_, tensor) in network.items()}
    of_unet = match.family.scope == "group"
    prefix = BUNDLED if of_unet or match.family.pipelines[""].network == "SD3Transformer2DModel" else ""
    renames = _renames(shapes, match, checkpoint.path)
    parts = _Parts([_prefixed(prefix, each) for each in rename(network, renames, "original", where)])
    if not of_unet:
        parts.notes.append("the output is the transformer alone: text encoders and VAE are loaded beside it")
        return parts
    parts.tensors += _marks(checkpoint)
    if any(tensor.name == "v_pred" for tensor in parts.tensors) and not match.family.vector:
        parts.notes.append(
            "it predicts v, which programs do not see in such a file: set it there, or lay a .yaml beside"
        )
    variant = variant_of(checkpoint.files[0].name)
    folders = ["vae", *(encoder.folder for encoder in match.family.text_encoders)]
    if checkpoint.kind != "folder" or not any((checkpoint.home / folder).is_dir() for folder in folders):
        parts.notes.append("the output is the UNet alone: text encoders and VAE are loaded beside it")
        return parts
    used = {Path(file.name).parent.as_posix() for file in checkpoint.files}
    if not match.family.text_encoders:
        title = match.family.title
        parts.notes.append(f"which text encoders a {title} has is not known here: they are not in the output")
    for encoder in match.family.text_encoders:
        _add_text_encoder(parts, checkpoint, encoder, variant)
        used.add(encoder.folder)
    _add_vae(parts, checkpoint, variant)
    components = sorted({name.parts[0] for name in checkpoint.companions if len(name.parts) > 1})
    weights = [name for name in components if name not in {*used, "vae"} and open_component(checkpoint.home / name)]
    if weights:
        parts.notes.append(f"left out, as the original layout has no place for it: {', '.join(weights)}")
    return parts


def _prefixed(prefix: str, tensor: JoinedTensor) -> JoinedTensor:
    return JoinedTensor(prefix + tensor.name, tensor.dtype, tensor.shape, tensor.pieces)


def _component(parts: _Parts, checkpoint: Checkpoint, folder: str, variant: str | None) -> Tensors:
    """Read a component, and note where it does not have the variant that was chosen."""
    files = open_component(checkpoint.home / folder, variant)
    if variant and files and not any(f".{variant}" in file.path.name for file in files):
        parts.notes.append(f"{checkpoint.home / folder}: has no {variant} weights; {files[0].path.name} is taken")
    return {tensor.name: (file, tensor) for file in files for tensor in file.by_offset}


def _add_text_encoder(parts: _Parts, checkpoint: Checkpoint, encoder: TextEncoder, variant: str | None) -> None:
    tensors = with_tower(_component(parts, checkpoint, encoder.folder, variant))
    where = checkpoint.home / encoder.folder
    if not tensors:
        parts.notes.append(f"{where}: no weights, so the output has none of this text encoder; load one beside it")
        return
    shapes = {name: tensor.shape for name, (_, tensor) in tensors.items()}
    if encoder.names == "clip":
        unused = [name for name in ("text_projection.weight", "logit_scale") if name in tensors]
        parts.notes += [f"{where}: {name} is not in the output: the original layout has none" for name in unused]
        tensors, renames = without(tensors, unused), clip_renames(shapes)
    else:
        # SD2 uses the text itself; SDXL and its refiner use the projection of the pooled text, too.
        projected = encoder.prefix.startswith("conditioner.")
        tensors, renames = without(tensors, [POSITIONS]), open_clip_renames(shapes, projected=projected)
    if encoder.prefix == "cond_stage_model.model." and layer_count(shapes) == _OPEN_CLIP_H - 1:
        parts.notes.append(
            f"{where}: has 23 layers, the original layout 24; the last one, which no picture uses, is left out "
            "(docs/loaders.md says what programs make of it)"
        )
    parts.tensors += [_prefixed(encoder.prefix, each) for each in rename(tensors, renames, "original", str(where))]


def _add_vae(parts: _Parts, checkpoint: Checkpoint, variant: str | None) -> None:
    where, tensors = checkpoint.home / "vae", _component(parts, checkpoint, "vae", variant)
    if not tensors:
        parts.notes.append(f"{where}: no weights, so the output has no VAE; load one beside it")
        return
    renames = vae_renames({name: tensor.shape for name, (_, tensor) in tensors.items()})
    parts.tensors += [_prefixed(VAE, each) for each in rename(tensors, renames, "original", str(where))]


def _marks(checkpoint: Checkpoint) -> list[JoinedTensor]:
    """Make the empty tensors by which programs recognise what a model in the original layout predicts.

    Raises:
        PlanError: It predicts something whose marks a folder does not have.
    """
    prediction = _folder_prediction(checkpoint)
    if prediction is None or prediction.kind == "epsilon":
        return []
    if prediction.kind != "v":
        raise PlanError(
            f"{checkpoint.path}: predicts as {prediction}, whose marks in the original layout a folder does not have",
            "Keep the layout of the base: `crdiff export` without --layout.",
        )
    return [JoinedTensor(name, "F32", (0,)) for name in ("v_pred", *(("ztsnr",) if prediction.zero_snr else ()))]


def _folder_prediction(checkpoint: Checkpoint) -> Prediction | None:
    """Tell what a folder's scheduler says that its model predicts; None if it says nothing."""
    if checkpoint.kind == "folder":
        with contextlib.suppress(OSError, MalformedError):
            content = (checkpoint.home / "scheduler" / "scheduler_config.json").read_bytes()
            config = parse_object(content, fractions=True)
            return by_scheduler(config) or (Prediction("other") if config.get("prediction_type") else None)
    return None


def _to_diffusers(checkpoint: Checkpoint, match: Match) -> _Parts:
    network = _network(checkpoint, match)
    shapes = {name: tensor.shape for name, (_, tensor) in network.items()}
    renames = _renames(shapes, match, checkpoint.path)
    if match.family.config is None:
        raise PlanError(
            f"{checkpoint.path}: how many attention heads {match.family.title} has is not known, and no weight tells",
            "Take the UNet from a diffusers folder of the model, or write `config` into a family (docs/families.md).",
        )
    parts = _Parts(rename(network, renames, "diffusers", str(checkpoint.path)))
    what = "UNet" if match.family.scope == "group" else "transformer"
    pipeline = match.family.pipelines.get(match.special.id if match.special else "") or match.family.pipelines.get("")
    source = f", which diffusers takes from {pipeline.config}" if pipeline else ""
    parts.notes.append(f"the output is the {what} alone, without text encoders and VAE{source}")
    prediction = by_marks(checkpoint.shapes, checkpoint.metadata)
    if prediction and prediction.kind != "epsilon":
        parts.notes.append(f"it predicts as {prediction}, which in diffusers only the scheduler's configuration says")
    if match.ema_tensors:
        parts.notes.append(f"{match.ema_tensors} tensors of an EMA copy (model_ema.*) are not in the output")
    bundle = (match.prefix, EMA, VAE, *_BESIDE) if match.prefix else ("",)
    if others := [name for name in checkpoint.shapes if not name.startswith(bundle)]:
        parts.notes.append(f"{plural(len(others), 'other tensor')}, such as {show(others[0])}, not in the output")
    return parts


def _config(shapes: Shapes, family: Family, native: Size | None) -> dict[str, Any]:
    """Describe a network for diffusers."""
    width = native.width if native else (family.native or (512, 512))[0]
    side = width // family.cell
    if family.scope == "group":
        return network_config.unet_config(shapes, read_blocks(shapes, "diffusers"), family, side)
    if family.pipelines[""].network == "FluxTransformer2DModel":
        return network_config.flux_config(shapes, family)
    return network_config.sd3_config(shapes, family, side)
