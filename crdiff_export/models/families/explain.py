"""Explain in one line why no family matches: the nearest one and what is missing, or what the file is instead."""

from collections import defaultdict
from collections.abc import Sequence

from crdiff_export.errors import FamilyError
from crdiff_export.formats.text import printable
from crdiff_export.models import demo
from crdiff_export.models.families.fit import Fit, Shapes, holds
from crdiff_export.models.families.model import Family, Mark

_SUPPORTED = (
    "`crdiff families` lists what is supported, finetunes and other UNets included; "
    "for any other model, write its table (`crdiff docs families`) and give it with --family."
)
_SHOWN = 3
_LONGEST = 80
_SAMPLE = 1000

# A file is of this kind if most of its names have one of these parts (kohya, PEFT, LyCORIS; CLIP, OpenCLIP, T5).
_OTHERS = {
    "this is a LoRA, not a checkpoint": (
        *("lora_unet_", "lora_te", "lora_transformer_", ".lora_A.", ".lora_B.", ".lora_up.", ".lora_down."),
        *("lora.up.", "lora.down.", ".lokr_w", ".hada_w"),
    ),
    "this is a ControlNet, not a checkpoint": ("control_model.", "controlnet_"),
    "this is a text encoder, not a diffusion model": ("text_model.", "transformer.resblocks.", "encoder.block."),
    "this is a VAE, not a diffusion model": ("encoder.down", "encoder.mid", "decoder.up", "decoder.mid"),
    "this is a textual inversion, not a checkpoint": ("emb_params", "clip_l", "clip_g", "string_to_param"),
    "this is a language model, not a diffusion model": ("model.layers.", "lm_head."),
}


# Other diffusion models, by tensors that each of them has, whatever prefix is before them. src: SwarmUI
# (`T2IModelClassSorter.cs`), ComfyUI (`comfy/model_detection.py`), the names of diffusers.
_MODELS = (
    ("ControlNet", ("controlnet_cond_embedding.",)),
    ("FLUX.2", ("double_stream_modulation_img.",)),
    ("Chroma", ("distilled_guidance_layer.",)),
    ("Qwen-Image", ("transformer_blocks.0.img_mlp.", "txt_norm.weight")),
    ("Wan", ("blocks.0.ffn.", "blocks.0.cross_attn.", "patch_embedding.")),
    ("Wan", ("blocks.0.ffn.", "blocks.0.attn2.", "patch_embedding.")),
    ("FLUX.3", ("early_stream_modulations.",)),
    ("Qwen-Image 2.1", ("txt_in.text_norm.",)),
    ("Krea 2", ("txtfusion.projector.",)),
    ("Krea 2", ("text_fusion.projector.",)),
    ("HunyuanVideo", ("txt_in.individual_token_refiner.",)),
    ("LTX-Video", ("transformer_blocks.0.scale_shift_table", "patchify_proj.")),
    ("Stable Cascade", ("clip_txt_mapper.",)),
    ("Stable Video Diffusion", ("time_stack.",)),
    ("Hunyuan-DiT", ("mlp_t5.",)),
    ("Mochi", ("attn.k_norm_x.",)),
    ("Cosmos", ("x_embedder.proj.1.weight", "blocks.block0.")),
)


def explain(fits: Sequence[Fit], shapes: Shapes) -> FamilyError:
    """Return the error for a file that matches no family.

    Args:
        fits: The result of `measure`.
        shapes: The shape of every tensor, by name.

    Returns:
        The error to raise.
    """
    # No real model is a variation of a demo, which is so small that much of it is found in all of them.
    real = [fit for fit in fits if fit.exact or fit.signature.family.id not in demo.NAMES] or fits
    nearest = max(real, key=lambda fit: (fit.score, _holding(fit, shapes)), default=None)
    is_damaged = nearest is not None and nearest.close and not nearest.exact
    if not is_damaged and (model := _other_model(shapes)):
        reason = f"no known model family: this is a model of the kind {model}"
    elif nearest is None:
        reason = _something_else(shapes)
    elif nearest.exact:
        reason = _wrong_marks([fit for fit in fits if fit.exact and fit.prefix == nearest.prefix], shapes)
    elif nearest.close:
        reason = _wrong_names(nearest)
    elif nearest.signature.family.scope == "group" and (ends := _missing_ends(nearest, shapes)):
        reason = f"no known model family: it has blocks of a UNet, but {' and '.join(ends)} is missing"
    elif nearest.similar:
        reason = _wrong_names(nearest)
    else:
        reason = f"no known model family: its {len(shapes)} tensors are of another model, e.g. {_some(tuple(shapes))}"
    return FamilyError(reason, _SUPPORTED)


def explain_family(family: Family, fits: Sequence[Fit], shapes: Shapes) -> FamilyError:
    """Return the error for a file that is not of the family that it should be of.

    Args:
        family: The family.
        fits: The result of `measure` for it.
        shapes: The shape of every tensor, by name.

    Returns:
        The error to raise.
    """
    nearest = max(fits, key=lambda fit: fit.score, default=None)
    if nearest is None:
        example = next((layer.tensor for layout in family.layouts for layer in layout.layers), "")
        reason = f"none of {len(shapes)} tensors is a target of {family.title}, such as {printable(example, _LONGEST)}"
    elif nearest.exact:
        reason = _wrong_marks([fit for fit in fits if fit.exact and fit.prefix == nearest.prefix], shapes)
    else:
        reason = _wrong_names(nearest)
    hint = "All targets of the table have to be there, and nothing else that ends like one (docs/families.md)."
    return FamilyError(reason.removeprefix("no known model family: ").removeprefix("nearest is "), hint)


def _holding(fit: Fit, shapes: Shapes) -> int:
    """Count the marks that hold; relatives with the same layers differ in them alone."""
    return sum(holds(mark, fit.prefix, shapes) for mark in fit.signature.layout.marks)


def _missing_ends(fit: Fit, shapes: Shapes) -> list[str]:
    """Return the first and the last tensor of a network, as far as the file lacks them."""
    ends = (fit.prefix + name for name in (fit.signature.layout.first, fit.signature.layout.last))
    return [name for name in ends if name not in shapes]


def _wrong_names(fit: Fit) -> str:
    parts = [f"{fit.found} of {len(fit.signature.tensors)} target tensors found"]
    if fit.missing:
        parts.append(f"missing {_some(fit.missing)}")
    if fit.extras:
        parts.append(f"and {fit.signature.family.title} has no {_some(fit.extras)}")
    return f"no known model family: nearest is {_describe(fit)}: {', '.join(parts)}"


def _wrong_marks(fits: list[Fit], shapes: Shapes) -> str:
    """Return the reason where all names fit but a mark does not hold; families with the same mark share a clause."""
    clauses: defaultdict[str, list[str]] = defaultdict(list)
    for fit in fits:
        mark = next(mark for mark in fit.signature.layout.marks if not holds(mark, fit.prefix, shapes))
        seen, wanted = _objection(mark, fit.prefix, shapes)
        clauses[seen].append(f"{fit.signature.family.title} has {wanted}")
    reasons = "; ".join(f"{seen}, {', '.join(wanted)}" for seen, wanted in clauses.items())
    return f"no known model family: the layers are those of {_describe(fits[0])}, but {reasons}"


def _objection(mark: Mark, prefix: str, shapes: Shapes) -> tuple[str, str]:
    """Return what the file has, and what the family has instead."""
    key = prefix + mark.tensor
    shape = shapes.get(key)
    if shape is None:
        return f"{key} is missing", "it"
    if not mark.present:
        return f"{key} is present", "none"
    size = str(shape[mark.axis]) if mark.axis < len(shape) else "none"
    return f"{mark.what} {size} at {key}", " or ".join(map(str, mark.sizes))


def _other_model(shapes: Shapes) -> str | None:
    """Name a diffusion model of another kind; None if its tensors tell of none."""
    for title, parts in _MODELS:
        examples = [next((name for name in shapes if part in name), None) for part in parts]
        if first := examples[0] if all(examples) else None:
            return f"{title}, e.g. {printable(first, _LONGEST)}"
    return None


def _something_else(shapes: Shapes) -> str:
    if not shapes:
        return "no known model family: the file has no tensors"
    names = tuple(shapes)
    sample = names[:: 1 + len(names) // _SAMPLE]
    for sentence, parts in _OTHERS.items():
        if 2 * sum(any(part in name for part in parts) for name in sample) > len(sample):
            return f"no known model family: {sentence}, e.g. {printable(names[0], _LONGEST)}"
    return f"no known model family: none of {len(names)} tensors is named like one of theirs, e.g. {_some(names)}"


def _describe(fit: Fit) -> str:
    return f"{fit.signature.family.title} ({fit.signature.layout.name} layout, prefix {fit.prefix!r})"


def _some(keys: Sequence[str]) -> str:
    """Return the first few names of a list."""
    shown = ", ".join(printable(key, _LONGEST) for key in keys[:_SHOWN])
    return shown if len(keys) <= _SHOWN else f"{shown} and {len(keys) - _SHOWN} more"
