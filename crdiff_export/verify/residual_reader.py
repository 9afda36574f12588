"""Read residuals: find them by the headers, check their hashes, and give their values back in order."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crdiff_export.bake.residual import (
    EMBED,
    HEAD,
    NONE,
    OUTPUT_HASH,
    OWNER_HASH,
    RESIDUAL_KEYS,
    SIDECAR_HASH,
    VALUES,
    residual_tensors,
    sidecar_path,
    tensor_specs,
)  # fmt: skip
from crdiff_export.errors import CheckpointError, PlanError, VerifyError
from crdiff_export.formats import dtypes, safetensors
from crdiff_export.formats.checkpoint import read_file
from crdiff_export.formats.hashing import hash_data
from crdiff_export.formats.safetensors import TensorSpec, show
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.progress import Progress
from crdiff_export.prune.plan import Target, open_targets
from crdiff_export.verify.reopen import NEWER, REPAIR, BakedCheckpoint

if TYPE_CHECKING:
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

_BASE = "Use the base itself; `crdiff inspect` names it."
_CHANGED = f"It was changed since. {_BASE}"
_DAMAGED = f"It was merged, altered or damaged, and cannot be restored. {_BASE}"


@dataclass(frozen=True, slots=True)
class Residual:
    """The residual of one baked file.

    Attributes:
        baked: The baked file.
        file: The file that holds the residual: the baked file itself, or its sidecar.
        values: The pruned values.
        head: The header of the base's file; None where the base was not a safetensors file.
        base_size: Bytes of the base's own tensors.
    """

    baked: SourceFile
    file: SourceFile
    values: TensorSpec
    head: TensorSpec | None
    base_size: int


def find_residuals(baked: BakedCheckpoint) -> tuple[Residual, ...]:
    """Find the residual of each file of a baked checkpoint, from headers alone.

    Raises:
        PlanError: The checkpoint has no residual.
        CheckpointError: A sidecar is missing or cannot be read.
        VerifyError: A sidecar belongs to another file, or another tool has changed the file.
    """
    way, path = baked.stamp.residual, baked.checkpoint.path
    if way == RESIDUAL_KEYS[NONE]:
        name = show(baked.stamp.source_name)
        raise PlanError(f"{path}: has no residual (crdiff.residual is none)", f"Use the base itself, {name}.")
    if way not in RESIDUAL_KEYS.values():
        raise VerifyError(f"{path}: crdiff.residual is {show(way)}, which is not known here", NEWER)
    for file in baked.checkpoint.files:
        if OUTPUT_HASH not in file.metadata:
            raise VerifyError(
                f"{file.path}: its header has no {OUTPUT_HASH}, so nothing tells whether it is whole", _BASE
            )
    read = _read_embedded if way == RESIDUAL_KEYS[EMBED] else _read_sidecar
    return tuple(read(file) for file in baked.checkpoint.files)


def _read_embedded(file: SourceFile) -> Residual:
    names = {tensor.name for tensor in residual_tensors(file.tensors)}
    if VALUES not in names:
        raise VerifyError(
            f"{file.path}: has no tensor {VALUES}, its header says that it embeds one",
            f"Another tool has left it out. {_BASE}",
        )
    size = max((t.end for t in file.tensors if t.name not in names), default=0)
    return _residual(file, file, size, size)


def _read_sidecar(file: SourceFile) -> Residual:
    path = sidecar_path(file.path)
    try:
        sidecar = read_file(path, path.name)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such file, where the residual of {file.path.name} should be", f"Put it there. {_BASE}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", "Check its permissions.") from error
    if OWNER_HASH not in sidecar.metadata:
        raise VerifyError(
            f"{path}: not a residual (no {OWNER_HASH} in its header)", f"Put the right one there. {_BASE}"
        )
    owner, actual = sidecar.metadata[OWNER_HASH], file.metadata[OUTPUT_HASH]
    if owner != actual:
        raise VerifyError(
            f"{path}: belongs to a file that hashes to {show(owner)}, the header of {file.path.name} says {actual}",
            f"Put the right one there. {_BASE}",
        )
    return _residual(file, sidecar, 0, file.data_size)


def _residual(baked: SourceFile, file: SourceFile, start: int, base_size: int) -> Residual:
    tensors = {tensor.name: tensor for tensor in residual_tensors(file.tensors)}
    values, head = tensors.get(VALUES), tensors.get(HEAD)
    if values is None or tuple(tensors.values()) != tensor_specs(start, values.nbytes, head.nbytes if head else 0):
        raise VerifyError(f"{file.path}: its residual is not where crdiff puts it", _CHANGED)
    return Residual(baked, file, values, head, base_size)


def check_residuals(baked: BakedCheckpoint, progress: Progress) -> None:
    """Hash the baked files and their residuals.

    Args:
        baked: The baked checkpoint.
        progress: Is told how far the work is, and may interrupt it.

    Raises:
        VerifyError: A file has changed since it was written; also what `find_residuals` raises.
    """
    residuals = find_residuals(baked)
    check_hashes(baked.checkpoint.files, OUTPUT_HASH, progress)
    check_sidecars(residuals, progress)


def check_sidecars(residuals: Sequence[Residual], progress: Progress) -> None:
    """Hash the sidecars among residuals.

    Args:
        residuals: The residuals; embedded ones are skipped.
        progress: Is told how far the work is, and may interrupt it.

    Raises:
        VerifyError: A sidecar has changed since it was written.
    """
    check_hashes(
        [residual.file for residual in residuals if residual.file is not residual.baked], SIDECAR_HASH, progress
    )


def check_hashes(files: Sequence[SourceFile], key: str, progress: Progress, hint: str = _DAMAGED) -> None:
    """Hash the data sections of files and compare each with the hash in its header.

    Args:
        files: The files.
        key: The header key that holds the expected hash.
        progress: Is told how far the work is, and may interrupt it.
        hint: What to do with a file that has changed.

    Raises:
        VerifyError: A file has changed since it was written.
    """
    if files:
        progress.stage("hashing", sum(file.data_size for file in files))
    for file in files:
        check_hash(file, key, hash_data(file, progress), hint)


def check_hash(file: SourceFile, key: str, actual: str, hint: str = _DAMAGED) -> None:
    """Compare a hash with the one in a file's header.

    Args:
        file: The file.
        key: The header key that holds the expected hash, with `0x` before it.
        actual: The hash of the file's data section, as hex.
        hint: What to do with a file that has changed.

    Raises:
        VerifyError: They differ.
    """
    if (expected := file.metadata.get(key)) != f"0x{actual}":
        raise VerifyError(
            f"{file.path}: its bytes hash to 0x{actual}, its header says {show(expected or 'nothing')}", hint
        )


def base_header(residual: Residual) -> bytes:
    """Return the length field and header of the base's file, or make one where the base was not a safetensors file.

    Raises:
        VerifyError: The kept header cannot be read, or describes other tensors.
    """
    tensors = tuple(t for t in residual.baked.tensors if t.end <= residual.base_size and t.name not in (VALUES, HEAD))
    if residual.head is None:
        return safetensors.serialise(tensors, {"format": "pt"})
    path, raw = residual.file.path, bytearray(residual.head.nbytes)
    with contextlib.closing(residual.file.open()) as reader:
        reader.read_into(residual.head.start, memoryview(raw))
    try:
        size = safetensors.length(bytes(raw[:8]), len(raw), str(path))
        header = safetensors.parse(bytes(raw[8:]), len(raw) + residual.base_size, str(path))
    except CheckpointError as error:
        raise VerifyError(f"{path}: {HEAD} holds no valid header", _CHANGED) from error
    if size + 8 != len(raw) or set(header.tensors) != set(tensors):
        raise VerifyError(f"{path}: the header in {HEAD} describes other tensors", _CHANGED)
    return bytes(raw)


class ResidualReader:
    """Reads the values of one residual from first to last; a context manager that closes its file."""

    def __init__(self, residual: Residual) -> None:
        self._residual, self._reader = residual, residual.file.open()
        self._position = residual.values.start
        self._buffer = memoryview(b"")

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc: object) -> None:
        self._reader.close()

    def fill(self, weights: memoryview, dtype: str) -> None:
        """Replace the zeros among weights by the next values; VerifyError if the residual has too few."""
        from crdiff_export.prune.kernels.pick import put, zeros

        size = zeros(weights, dtype) * dtypes.FORMATS[dtype].itemsize
        if size > self._residual.values.end - self._position:
            raise self._mismatch("more")
        put(weights, dtype, self._read(size))

    def finish(self) -> None:
        """Raise VerifyError if the residual has more values than there were zeros."""
        if self._position != self._residual.values.end:
            raise self._mismatch("fewer")

    def compare(self, pruned: memoryview) -> None:
        """Compare the next values with weights that the base's export prunes; VerifyError if they differ."""
        if len(pruned) > self._residual.values.end - self._position or self._read(len(pruned)) != pruned:
            raise self._other_content(VALUES)

    def finish_comparison(self, header: bytes) -> None:
        """Compare the rest with the header of the base's file; VerifyError if it differs."""
        if self._position != self._residual.values.end:
            raise self._other_content(VALUES)
        size = self._residual.head.nbytes if self._residual.head else 0
        if len(header) != size or self._read(size) != header:
            raise self._other_content(HEAD)

    def _read(self, size: int) -> memoryview:
        if size > len(self._buffer):
            self._buffer = memoryview(bytearray(size))
        self._reader.read_into(self._position, self._buffer[:size])
        self._position += size
        return self._buffer[:size]

    def _mismatch(self, word: str) -> VerifyError:
        path, size = self._residual.baked.path, self._residual.values.nbytes
        return VerifyError(
            f"{path}: {word} of its weights are zero than its residual of {size} bytes has values for", _DAMAGED
        )

    def _other_content(self, name: str) -> VerifyError:
        return VerifyError(f"{self._residual.file.path}: {name} is not what was pruned away from the base", REPAIR)


def dense_weights(baked: BakedCheckpoint) -> "Iterator[tuple[Target, NDArray[np.unsignedinteger]]]":
    """Yield every target of the plan with its weights as they were before pruning, one at a time.

    Hashes are not checked; `check_residuals` does that.

    Yields:
        The target, and its weights as raw bits: a flat array of unsigned integers as wide as its dtype.
    """
    import numpy as np

    with open_targets(baked.checkpoint) as read:
        for number, residual in enumerate(find_residuals(baked)):
            with ResidualReader(residual) as values:
                for target in (t for t in baked.plan.targets if t.file == number):
                    weights = read(target)
                    if baked.plan.scopes[target.scope].rank:
                        values.fill(weights, target.source.dtype)
                    yield target, np.frombuffer(weights, f"u{target.source.itemsize}")
                values.finish()
