"""Torch checkpoints (`.ckpt`, `.pt`, `.pth`, `.bin`), presented as safetensors files, without torch.

Since torch 1.6 such a file is an uncompressed zip archive: `NAME/data.pkl` describes the tensors, and each
`NAME/data/KEY` holds the bytes of one storage. https://github.com/pytorch/pytorch/blob/main/torch/serialization.py
"""

import io
import math
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from crdiff_export.errors import CheckpointError
from crdiff_export.formats import sniff
from crdiff_export.formats.safetensors import BITS, MAX_DIMENSIONS, METADATA, TensorSpec, show
from crdiff_export.formats.strict_json import is_text
from crdiff_export.formats.unpickle import ForeignError, StridedTensor, UnpickleError, unpickle
from crdiff_export.formats.weight_file import FileBytes, SourceFile

# Stable Diffusion with its EMA weights has 0.4 MB.
MAX_PICKLE = 32 << 20
# The archive's list of files; 10,000 storages need 1 MB.
MAX_DIRECTORY = 8 << 20
# Keys under which trainers nest a model's weights, from the outside in.
_WRAPPERS = ("state_dict", "model_state_dict", "module", "params")
_AGAIN = "Get the model as .safetensors, or save it again with a current torch."
_DAMAGED = "The file is damaged, or the last download did not finish; fetch it again."


@dataclass(frozen=True, slots=True)
class _ArchiveTensor:
    """A tensor in the archive: `size` bytes from byte `start` on, or scattered by `strides` (in bytes)."""

    start: int
    size: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None


# The archive's files: name inside its only folder -> (first byte, size).
_Entries = Mapping[str, tuple[int, int]]


def open_pickle(path: Path) -> SourceFile:
    """Read the tensors of a torch checkpoint, in the order of the safetensors library. Nothing in the file is executed.

    Args:
        path: The file.

    Returns:
        A file of weights that reads like a safetensors file.

    Raises:
        CheckpointError: The file is damaged, or holds something else than weights.
    """
    info = path.stat()
    with path.open("rb") as file:
        _refuse_other_kinds(file.read(sniff.SIZE), path)
    with _Clamped(path) as archive:
        entries = _entries(archive, path)
    tensors = _tensors(_value(entries, path), path)
    order = list(BITS)
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name))
    specs, sources, position = [], [], 0
    for name in names:
        tensor = tensors[name]
        located = _locate(tensor, entries, f"{path}: {show(name)}")
        specs.append(TensorSpec(name, tensor.dtype, tensor.shape, position, position + located.size))
        sources.append(located)
        position += located.size
    reader = partial(_PickledBytes, path, [spec.start for spec in specs], sources)
    return SourceFile(path, path.with_suffix(".safetensors").name, tuple(specs), {}, 0, info, reader)


def _refuse_other_kinds(start: bytes, path: Path) -> None:
    if start.startswith(b"PK"):
        return
    if not start:
        raise CheckpointError(f"{path}: the file is empty", _DAMAGED)
    if sniff.is_pickle(start):
        raise CheckpointError(f"{path}: a bare pickle, as torch saved before 1.6; it is not read", _AGAIN)
    if sniff.is_safetensors(start):
        raise CheckpointError(f"{path}: a safetensors file under another name", "Rename it to .safetensors.")
    sniff.refuse_other(start, path)
    raise CheckpointError(f"{path}: not a torch checkpoint, which begins with 'PK'", _AGAIN)


class _Clamped(io.FileIO):
    """A file whose reads are limited to the size of an archive's directory, which zipfile reads whole."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(MAX_DIRECTORY if size is None or size < 0 else min(size, MAX_DIRECTORY)) or b""


def _entries(archive: io.FileIO, path: Path) -> _Entries:
    """What the archive holds; nothing of it may be compressed, so that it is not larger than the file."""
    try:
        listed = zipfile.ZipFile(archive).infolist()
    # NotImplementedError is zipfile's for an archive of a version that it does not know.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: a damaged or truncated zip archive", _DAMAGED) from error
    folders = [entry.filename.removesuffix("data.pkl") for entry in listed if entry.filename.endswith("/data.pkl")]
    if len(folders) != 1 or folders[0].count("/") != 1:
        raise CheckpointError(f"{path}: a zip archive, but not one that torch saves", _AGAIN)
    names = [entry.filename.removeprefix(folders[0]) for entry in listed]
    if "constants.pkl" in names:
        raise CheckpointError(f"{path}: a TorchScript program, and programs are not run", _AGAIN)
    if len(set(names)) < len(names):
        raise CheckpointError(f"{path}: a zip archive that holds a file twice", _DAMAGED)
    size = archive.seek(0, io.SEEK_END)
    wanted = {
        n: e for n, e in zip(names, listed, strict=True) if n in ("data.pkl", "byteorder") or n.startswith("data/")
    }
    return {name: _content(archive, entry, size, path) for name, entry in wanted.items()}


def _content(archive: io.FileIO, entry: zipfile.ZipInfo, archive_size: int, path: Path) -> tuple[int, int]:
    """Return the first byte and the size of a file in the archive; its header is 30 bytes, name and extra field."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise CheckpointError(f"{path}: {show(entry.filename)} in it is compressed, which torch never does", _AGAIN)
    archive.seek(entry.header_offset)
    local = archive.read(30)
    if len(local) < 30 or not local.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{path}: a damaged or truncated zip archive", _DAMAGED)
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:]))
    if start + entry.file_size > archive_size:
        raise CheckpointError(f"{path}: a damaged or truncated zip archive", _DAMAGED)
    return start, entry.file_size


def _value(entries: _Entries, path: Path) -> object:
    if entries["data.pkl"][1] > MAX_PICKLE:
        raise CheckpointError(f"{path}: its data.pkl is larger than that of any checkpoint", _AGAIN)
    if "byteorder" in entries and _read(path, *entries["byteorder"]) != b"little":
        raise CheckpointError(f"{path}: saved on a big-endian machine", _AGAIN)
    try:
        return unpickle(_read(path, *entries["data.pkl"]))
    except ForeignError as error:
        raise CheckpointError(
            f"{path}: holds more than weights: its pickle {error}, and code in a checkpoint is not run",
            "Get the model as .safetensors; if you trust its origin, convert it with the tool that made it.",
        ) from error
    except UnpickleError as error:
        raise CheckpointError(f"{path}: its data.pkl {error}", _AGAIN) from error


def _read(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(min(size, MAX_PICKLE))


def _tensors(value: object, path: Path) -> dict[str, StridedTensor]:
    for _ in range(8):
        if isinstance(value, dict) and "string_to_param" in value:
            raise CheckpointError(f"{path}: a textual inversion, not a checkpoint", "Give a model's checkpoint.")
        inner = _wrapped(value)
        if inner is None:
            break
        value = inner
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no named weights", "Give a model's checkpoint.")
    tensors = {name: tensor for name, tensor in value.items() if isinstance(tensor, StridedTensor)}
    if not tensors:
        keys = ", ".join(show(key) for key in list(value)[:5])
        raise CheckpointError(
            f"{path}: holds no tensors" + (f", only {keys}" if keys else ""),
            f"Give a model's checkpoint. Weights are expected at the top, under {', '.join(_WRAPPERS)}, or in the only "
            "dictionary with tensors.",
        )
    if name := next((name for name in tensors if name == METADATA or not is_text(name)), None):
        raise CheckpointError(f"{path}: no safetensors file can hold a tensor called {show(name)}", _AGAIN)
    return tensors


def _wrapped(value: object) -> dict[str, object] | None:
    """Return the dictionary inside another one: under a trainer's key, or the only one, or the only with tensors."""
    if not isinstance(value, dict):
        return None
    inner = next((value[key] for key in _WRAPPERS if isinstance(value.get(key), dict)), None)
    if inner is None and not any(isinstance(item, StridedTensor) for item in value.values()):
        dicts = [item for item in value.values() if isinstance(item, dict)]
        if len(dicts) > 1:
            dicts = [item for item in dicts if any(isinstance(tensor, StridedTensor) for tensor in item.values())]
        inner = dicts[0] if len(dicts) == 1 else None
    return inner


def _locate(tensor: StridedTensor, entries: _Entries, where: str) -> _ArchiveTensor:
    """Locate a tensor's bytes, and check that the archive has all of them."""
    storage, itemsize = tensor.storage, BITS[tensor.dtype] // 8
    entry = entries.get(f"data/{storage.key}")
    if entry is None:
        raise CheckpointError(f"{where} has no bytes in the archive", _DAMAGED)
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{where} has {len(tensor.shape)} dimensions", _DAMAGED)
    start, available = entry
    if storage.count * (BITS[storage.dtype] // 8 if storage.dtype else 1) > available:
        raise CheckpointError(f"{where} should have more bytes than the archive has", _DAMAGED)
    count = math.prod(tensor.shape)
    if not count:
        return _ArchiveTensor(start, 0, itemsize, tensor.shape)
    axes = [(size, stride) for size, stride in zip(tensor.shape, tensor.strides, strict=True) if size > 1]
    last = tensor.offset + sum((size - 1) * stride for size, stride in axes)
    if (last + 1) * itemsize > available:
        raise CheckpointError(f"{where} lies outside the bytes that the archive has for it", _DAMAGED)
    if count * itemsize > available:
        raise CheckpointError(f"{where} repeats its weights (an expanded tensor)", _AGAIN)
    start += tensor.offset * itemsize
    sizes = tuple(size for size, _ in axes)
    if _is_contiguous(axes):
        return _ArchiveTensor(start, count * itemsize, itemsize, sizes)
    return _ArchiveTensor(start, count * itemsize, itemsize, sizes, tuple(stride * itemsize for _, stride in axes))


def _is_contiguous(axes: Sequence[tuple[int, int]]) -> bool:
    expected = 1
    for size, stride in reversed(axes):
        if stride != expected:
            return False
        expected *= size
    return True


class _PickledBytes:
    """Reads the tensors, which begin at `starts`, as one data section."""

    def __init__(self, path: Path, starts: Sequence[int], tensors: Sequence[_ArchiveTensor]) -> None:
        self._path, self._starts, self._tensors = path, starts, tensors
        self._file = FileBytes(path, 0)

    def read_into(self, offset: int, target: memoryview) -> None:
        done, index = 0, bisect_right(self._starts, offset) - 1
        while done < len(target):
            tensor = self._tensors[index]
            inside = offset + done - self._starts[index]
            part = target[done : done + tensor.size - inside]
            if tensor.strides is None:
                self._file.read_into(tensor.start + inside, part)
            else:
                _gather(self._path, tensor, tensor.strides, inside, part)
            done += len(part)
            index += 1

    def close(self) -> None:
        self._file.close()


def _gather(path: Path, tensor: _ArchiveTensor, strides: tuple[int, ...], offset: int, target: memoryview) -> None:
    """Copy bytes of a scattered tensor from `offset` on; only the rows that hold them are read."""
    import numpy as np

    row = tensor.size // tensor.shape[0]
    first, stop = offset // row, -(-(offset + len(target)) // row)
    start = tensor.start + first * strides[0]
    shape = (stop - first, *tensor.shape[1:])
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + tensor.itemsize
    mapped = np.memmap(path, np.uint8, "r", start, (span,))
    rows = np.lib.stride_tricks.as_strided(mapped.view(f"<u{tensor.itemsize}"), shape, strides)
    inside = offset - first * row
    target[:] = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data[inside : inside + len(target)]
