"""The names of text encoders in both layouts.

CLIP has the same names in both. OpenCLIP (SD2, SDXL's second, the refiner's) fuses q, k and v of a layer, and has the
projection of the pooled text transposed. Source: diffusers' `convert_open_clip_checkpoint`.
"""

import re
from collections.abc import Collection, Mapping

from crdiff_export.models.layouts.rename import Rename, Shapes, Tensors

_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d{1,3})\.")
_TOWER = "text_model."
# A constant, 0, 1, 2 …, which older versions of transformers saved and OpenCLIP does not have.
POSITIONS = "text_model.embeddings.position_ids"
_IN_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip


def with_tower(tensors: Tensors) -> Tensors:
    """Put `text_model.` before the names of a CLIP that was saved without it, as transformers 5 does."""
    if any(name.startswith(_TOWER) for name in tensors):
        return tensors
    bare = ("embeddings.", "encoder.", "final_layer_norm.")
    return {f"{_TOWER}{name}" if name.startswith(bare) else name: place for name, place in tensors.items()}


def without(tensors: Tensors, names: Collection[str]) -> Tensors:
    """Leave out some of the tensors."""
    return {name: place for name, place in tensors.items() if name not in names}


def clip_renames(shapes: Shapes) -> list[Rename]:
    """List the names of a CLIP text encoder, which are the same in both layouts."""
    renames = [_same(f"embeddings.{name}_embedding", (".weight",)) for name in ("token", "position")]
    renames += [_same("embeddings.position_ids", ("",), optional=True), _same("final_layer_norm")]
    paths = [*_IN_LAYER.values(), *(f"self_attn.{part}_proj" for part in "qkv")]
    return renames + [_same(f"encoder.layers.{number}.{path}") for number in _layers(shapes) for path in paths]


def _same(path: str, kinds: tuple[str, ...] = (".weight", ".bias"), *, optional: bool = False) -> Rename:
    return Rename(f"{_TOWER}{path}", (f"{_TOWER}{path}",), kinds=kinds, optional=optional)


def open_clip_renames(shapes: Shapes, *, projected: bool) -> list[Rename]:
    """List the names of an OpenCLIP text encoder in both layouts.

    Args:
        shapes: The shape of every tensor by diffusers' name.
        projected: Whether the model needs its projection of the pooled text.

    Returns:
        The names.
    """
    whole_name = ("",)
    renames = [
        Rename("positional_embedding", ("text_model.embeddings.position_embedding.weight",), kinds=whole_name),
        Rename("token_embedding", ("text_model.embeddings.token_embedding",), kinds=(".weight",)),
        Rename("ln_final", ("text_model.final_layer_norm",)),
        Rename(
            "text_projection", ("text_projection.weight",), transposed=True, kinds=whole_name, optional=not projected
        ),
        Rename("logit_scale", ("logit_scale",), kinds=whole_name, optional=True),
    ]
    for number in _layers(shapes):
        original, diffusers = f"transformer.resblocks.{number}", f"text_model.encoder.layers.{number}"
        renames += [Rename(f"{original}.{first}", (f"{diffusers}.{second}",)) for first, second in _IN_LAYER.items()]
        for kind in ("weight", "bias"):
            parts = tuple(f"{diffusers}.self_attn.{part}_proj.{kind}" for part in "qkv")
            renames.append(Rename(f"{original}.attn.in_proj_{kind}", parts, kinds=whole_name))
    return renames


def _layers(shapes: Shapes) -> range:
    return range(max((int(match[1]) for name in shapes if (match := _LAYER.match(name))), default=-1) + 1)


def layer_count(shapes: Mapping[str, object]) -> int:
    """Return how many layers a text encoder has, by diffusers' names."""
    return len({match[1] for name in shapes if (match := _LAYER.match(name))})
