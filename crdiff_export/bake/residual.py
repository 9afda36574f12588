"""The residual: the weights that pruning sets to zero, kept unchanged so that the base can be restored bit for bit.

A residual needs no mask: every zero in a pruned target was pruned. It holds the pruned values in the order of the
file's bytes, each in its own dtype, and the header of the base's file. Both are plain bytes (U8), either behind all
tensors of the baked file, under names that sort last, or in a sidecar file beside it (docs/metadata.md).
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from crdiff_export.errors import FamilyError, OptionError, PlanError
from crdiff_export.formats import safetensors
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.crdiff_keys import RESIDUALS, TENSORS_HASH
from crdiff_export.formats.dtypes import DTYPES
from crdiff_export.formats.safetensors import TensorSpec
from crdiff_export.models import families
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import CASTABLE, Plan

NONE, EMBED, SIDECAR = WAYS = ("none", "embed", "sidecar")
# The value of the header key `crdiff.residual` for each of them.
RESIDUAL_KEYS = dict(zip(WAYS, RESIDUALS, strict=True))
# ComfyUI, A1111, kohya and sd.cpp read no weights from tensors of this name, dtype and position.
VALUES, HEAD = "zz_crdiff.residual", "zz_crdiff.header"
# Not .safetensors: A1111 and ComfyUI list every such file as a model.
SUFFIX = ".crdiff-residual"
OUTPUT_HASH = TENSORS_HASH
# Keys in a sidecar's header: the hash of the file that it belongs to, and the hash of its own bytes.
OWNER_HASH, SIDECAR_HASH = "crdiff.residual.of", "crdiff.residual.hash_sha256"
_BUNDLE = "model.diffusion_model."


def check_request(residual: str, criterion: CriterionChoice, *, hashing: bool) -> None:
    """Refuse options that exclude each other for any base.

    Args:
        residual: How the residual is kept, as the user writes it.
        criterion: The request's criterion.
        hashing: Hashes are written.

    Raises:
        OptionError: The residual is unknown, or does not go with the criterion or with an export without hashes.
    """
    if residual not in WAYS:
        raise OptionError(f"--residual {residual}: no way to keep one", f"Give one of: {', '.join(WAYS)}.")
    if residual != NONE and not hashing:
        raise OptionError(
            f"--residual {residual} and --no-hash do not go together",
            "A residual is bound to its weights by hash; leave one of the two out.",
        )
    if residual != NONE and criterion.moves:
        raise OptionError(
            f"--residual {residual} and {criterion.name} do not go together: weights that stay are moved, too, and a "
            "residual holds only those that go",
            "Leave --residual out, or move none (obs:compensate=off).",
        )


def check_base(checkpoint: Checkpoint, residual: str, dtype: str | None) -> None:
    """Refuse a base that a residual could not restore, or that cannot embed one.

    Args:
        checkpoint: The base's headers.
        residual: How the residual is kept, one of `WAYS`.
        dtype: The dtype to cast to, one of `formats.dtypes.DTYPES`; None to keep each tensor's.

    Raises:
        OptionError: The export would cast weights.
        PlanError: The base has the residual's names already, or loaders would refuse the file.
    """
    if residual == NONE:
        return
    path = checkpoint.path
    dtypes = {tensor.dtype for file in checkpoint.files for tensor in file.tensors}
    if dtype and any(old in CASTABLE and old != DTYPES[dtype] for old in dtypes):
        raise OptionError(
            f"--residual {residual} and --dtype do not go together: {path} would be cast, which cannot be undone",
            "Leave one of the two out.",
        )
    if names := {VALUES, HEAD} & checkpoint.shapes.keys():
        raise PlanError(f"{path}: holds {max(names)}, the residual of another export", "Export from that one's base.")
    sidecars = {sidecar_path(Path(file.name)).as_posix() for file in checkpoint.files}
    if residual == SIDECAR and (taken := sidecars & {str(name) for name in checkpoint.companions}):
        raise PlanError(f"{path}: holds {min(taken)}, where the sidecar would be", "Move it out of the base's folder.")
    if residual == EMBED and not _is_bundle(checkpoint):
        raise PlanError(
            f"{path}: loaders refuse a file with more than the model in it, unless its names begin with {_BUNDLE}",
            "Give --residual sidecar, which puts the residual into a file beside it.",
        )


def _is_bundle(checkpoint: Checkpoint) -> bool:
    """Whether loaders expect more than the model in this file; planning refuses a file of an unknown family."""
    with contextlib.suppress(FamilyError):
        match = families.detect(checkpoint.shapes)
        return checkpoint.kind == "file" and match.layout.name == "original" and match.prefix == _BUNDLE
    return any(name.startswith(_BUNDLE) for name in checkpoint.shapes)


def largest_size(plan: Plan, counts: Sequence[int]) -> int:
    """Return an upper bound, in bytes, for the residuals of a plan.

    Args:
        plan: The plan.
        counts: For each scope of the plan, how many weights are pruned.

    Returns:
        The bound.
    """
    widest = [max((t.output.itemsize for t in plan.targets if t.scope == n), default=0) for n in range(len(counts))]
    return sum(count * size for count, size in zip(counts, widest, strict=True)) + sum(
        output.source.data_start + safetensors.ALIGNMENT for output in plan.outputs
    )


def sidecar_path(path: Path) -> Path:
    """Return the path of the sidecar that belongs to the baked file at `path`."""
    return path.with_suffix(SUFFIX)


def tensor_specs(start: int, size: int, header_size: int) -> tuple[TensorSpec, ...]:
    """Describe the tensors of a residual.

    Args:
        start: Where it begins in the data section, in bytes.
        size: Bytes of pruned values.
        header_size: Bytes of the base's header; 0 where it is not kept.

    Returns:
        The tensor of the values and, where it is kept, that of the header.
    """
    end = start + size
    values = TensorSpec(VALUES, "U8", (size,), start, end)
    header = TensorSpec(HEAD, "U8", (header_size,), end, end + header_size)
    return (values, header) if header_size else (values,)


def residual_tensors(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Return those tensors of a file that are its residual."""
    return tuple(tensor for tensor in tensors if tensor.name in (VALUES, HEAD))
