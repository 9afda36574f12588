"""Check that the shapes of targets that belong together, as in one attention, are those of a model.

These rules hold in the blocks of every transformer and UNet of diffusers; keys and values may come from another input,
have fewer heads than queries (grouped-query attention), and a feed-forward may have a gate (GEGLU, SwiGLU).
"""

from collections.abc import Callable, Sequence

from crdiff_export.errors import FamilyError
from crdiff_export.models.families.fit import Shapes
from crdiff_export.models.families.model import FamilyLayer

_Shape = tuple[int, ...]


def _same(first: _Shape, second: _Shape) -> bool:
    return first == second


def _transposed(first: _Shape, second: _Shape) -> bool:
    """Whether the second layer takes what the first gives, and gives what it takes."""
    return second == first[::-1]


def _same_or_transposed(first: _Shape, second: _Shape) -> bool:
    return second in (first, first[::-1])


def _transposed_or_gated(first: _Shape, second: _Shape) -> bool:
    return second[0] == first[1] and first[0] in (second[1], 2 * second[1])


def _whole_heads(queries: _Shape, keys: _Shape) -> bool:
    return queries[0] % keys[0] == 0


# By the names in diffusers; they end the path of an attention or a feed-forward.
_RULES: tuple[tuple[str, str, Callable[[_Shape, _Shape], bool]], ...] = (
    ("to_q", "to_out.0", _transposed),
    ("to_q", "to_k", _whole_heads),
    ("to_k", "to_v", _same),
    ("net.0.proj", "net.2", _transposed_or_gated),
    ("linear_in", "linear_out", _transposed_or_gated),
    ("w1", "w2", _transposed),
    ("w1", "w3", _same),
    ("linear_1", "linear_2", _same_or_transposed),
    ("linear_1", "linear_3", _same),
    ("linear_1", "out_projection", _transposed),
)


def check_siblings(layers: Sequence[FamilyLayer], prefix: str, shapes: Shapes) -> None:
    """Check the shapes of whole tensors that belong together.

    Args:
        layers: The layers that may be pruned, all of them matrices.
        prefix: The prefix of the model's names.
        shapes: The shape of every tensor, by name.

    Raises:
        FamilyError: No model has two layers of such shapes together.
    """
    keys = {layer.diffusers: prefix + layer.tensor for layer in layers if layer.part is None}
    for name, key in keys.items():
        for end, other_end, fits in _RULES:
            path = name.removesuffix(f".{end}.weight")
            other = keys.get(f"{path}.{other_end}.weight")
            if path != name and other and not fits(shapes[key], shapes[other]):
                raise FamilyError(
                    f"{key} has shape {list(shapes[key])}, which does not go with {list(shapes[other])} of {other}",
                    "The file is damaged, or of a model that only shares its names with a known one.",
                )
