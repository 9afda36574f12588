"""Put the tensors of a checkpoint into the order of other files, so that both can be compared byte by byte."""

from collections.abc import Sequence
from dataclasses import replace

from crdiff_export.errors import PlanError
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.joined_file import JoinedTensor, Piece, join
from crdiff_export.formats.safetensors import TensorSpec, show
from crdiff_export.formats.text import plural
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.models.families.model import BUNDLED


def arrange(checkpoint: Checkpoint, like: Sequence[SourceFile]) -> Checkpoint:
    """See a checkpoint as files with the tensors, the order and the names of others.

    Args:
        checkpoint: The checkpoint.
        like: The files. The result takes from them what the checkpoint does not have beside its network, such as the
            noise schedules of SD1, and its notes say so.

    Returns:
        The checkpoint in these files.

    Raises:
        PlanError: The checkpoint lacks tensors of the network.
    """
    tensors = {tensor.name: _whole(file, tensor) for file in checkpoint.files for tensor in file.by_offset}
    missing = [tensor.name for file in like for tensor in file.by_offset if tensor.name not in tensors]
    bundled = any(name.startswith(BUNDLED) for name in tensors)
    if network := next((name for name in missing if name.startswith(BUNDLED) or not bundled), None):
        raise PlanError(
            f"{like[0].path}: {show(network)} has no counterpart in {checkpoint.path}",
            "Give the base that the file was made from; `crdiff inspect` names it.",
        )
    files = tuple(
        join(
            checkpoint.path,
            file.name,
            [tensors.get(tensor.name) or _whole(file, tensor) for tensor in file.by_offset],
            checkpoint.metadata,
        )
        for file in like
    )
    count = plural(len(missing), "tensor")
    notes = (f"the base has no counterpart of {count} of the file, such as {show(missing[0])}",) if missing else ()
    return replace(checkpoint, files=files, companions=(), notes=notes, origin=checkpoint.on_disk)


def _whole(file: SourceFile, tensor: TensorSpec) -> JoinedTensor:
    """Take a tensor as it is."""
    return JoinedTensor(tensor.name, tensor.dtype, tensor.shape, (Piece(file, tensor.start, tensor.end),))
