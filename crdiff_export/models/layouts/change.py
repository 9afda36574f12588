"""See a checkpoint in the other layout: a file or folder that does not exist yet, whose bytes are the base's.

To the original layout a diffusers folder becomes one file with network, text encoders and VAE, as its authors' code
saves it; of SD3 and FLUX.1 the transformer alone. To diffusers the UNet or transformer becomes a folder with its
`config.json`. Nothing is computed: tensors are renamed, and rows of fused ones put behind each other or taken apart.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crdiff_export.errors import PlanError
from crdiff_export.formats.checkpoint import Checkpoint, open_component, variant_of
from crdiff_export.formats.joined_file import JoinedTensor, file_order, join
from crdiff_export.formats.strict_json import MalformedError, parse_object
from crdiff_export.models.families import Family, LayoutName, Match
from crdiff_export.models.families.model import BUNDLED, TextEncoder
from crdiff_export.models.layouts import network_config
from crdiff_export.models.layouts.rename import Rename, Shapes, Tensors, rename
from crdiff_export.models.layouts.text_encoder_names import (
    POSITIONS,
    clip_renames,
    layer_count,
    open_clip_renames,
    with_tower,
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
    parts = _to_original(checkpoint, match) if to == "original" else _to_diffusers(checkpoint, match)
    metadata = {key: text for key, text in checkpoint.metadata.items() if key not in _OF_LAYOUT}
    notes, path, tensors = (*checkpoint.notes, *parts.notes), checkpoint.path, file_order(parts.tensors)
    if to == "original":
        file = join(path, f"{checkpoint.stem}.safetensors", tensors, metadata)
        return Checkpoint(path, "file", (file,), (), notes, origin=checkpoint)
    config = json.dumps(_config(match, tensors, native), indent=2, sort_keys=True) + "\n"
    file = join(path, WEIGHTS, tensors, metadata)
    return Checkpoint(path, "folder", (file,), (), notes, {CONFIG: config.encode()}, checkpoint)


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


def _component(checkpoint: Checkpoint, folder: str, variant: str | None) -> Tensors:
    files = open_component(checkpoint.home / folder, variant)
    return {tensor.name: (file, tensor) for file in files for tensor in file.by_offset}


def _add_text_encoder(parts: _Parts, checkpoint: Checkpoint, encoder: TextEncoder, variant: str | None) -> None:
    tensors = with_tower(_component(checkpoint, encoder.folder, variant))
    where = checkpoint.home / encoder.folder
    if not tensors:
        parts.notes.append(f"{where}: no weights, so the output has none of this text encoder; load one beside it")
        return
    shapes = {name: tensor.shape for name, (_, tensor) in tensors.items()}
    if encoder.names == "clip":
        renames = clip_renames(shapes)
    else:
        tensors = {name: place for name, place in tensors.items() if name != POSITIONS}
        renames = open_clip_renames(shapes)
    if encoder.prefix == "cond_stage_model.model." and layer_count(shapes) == _OPEN_CLIP_H - 1:
        parts.notes.append(
            f"{where}: has 23 layers, the original layout 24; the last one, which no picture uses, is left out "
            "(docs/loaders.md says what programs make of it)"
        )
    parts.tensors += [_prefixed(encoder.prefix, each) for each in rename(tensors, renames, "original", str(where))]


def _add_vae(parts: _Parts, checkpoint: Checkpoint, variant: str | None) -> None:
    where, tensors = checkpoint.home / "vae", _component(checkpoint, "vae", variant)
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
    if checkpoint.kind == "folder":
        with contextlib.suppress(OSError, MalformedError):
            config = (checkpoint.home / "scheduler" / "scheduler_config.json").read_bytes()
            return by_scheduler(parse_object(config, fractions=True))
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
    others = f", which diffusers takes from {pipeline.config}" if pipeline else ""
    parts.notes.append(f"the output is the {what} alone, without text encoders and VAE{others}")
    prediction = by_marks(checkpoint.shapes, checkpoint.metadata)
    if prediction and prediction.kind != "epsilon":
        parts.notes.append(f"it predicts as {prediction}, which in diffusers only the scheduler's configuration says")
    if match.ema_tensors:
        parts.notes.append(f"{match.ema_tensors} tensors of an EMA copy (model_ema.*) are not in the output")
    return parts


def _config(match: Match, tensors: Sequence[JoinedTensor], native: Size | None) -> dict[str, Any]:
    """Describe the network for diffusers."""
    family: Family = match.family
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    width = native.width if native else (family.native or (512, 512))[0]
    side = width // family.cell
    if family.scope == "group":
        return network_config.unet_config(shapes, read_blocks(shapes, "diffusers"), family, side)
    if family.pipelines[""].network == "FluxTransformer2DModel":
        return network_config.flux_config(shapes, family)
    return network_config.sd3_config(shapes, family, side)
