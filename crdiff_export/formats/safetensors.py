"""The safetensors header: parsed with every rule of the format checked, and written deterministically.

Format: https://github.com/huggingface/safetensors#format. A file is an 8-byte little-endian length, that many bytes
of JSON, and the data section, which is the tensors' bytes without gaps. This module opens no file.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from crdiff_export.errors import CheckpointError
from crdiff_export.formats.strict_json import MalformedError, parse_object, show

__all__ = ["BITS", "MAX_BYTES", "METADATA", "Header", "TensorSpec", "length", "parse", "serialise", "show"]

METADATA = "__metadata__"
# The data section begins on a page, so that it can be written without the page cache and mapped into memory.
ALIGNMENT = 4096
# safetensors/src/tensor.rs: MAX_HEADER_SIZE
MAX_BYTES = 100_000_000
# NumPy's limit; torch has the same one for most operations.
MAX_DIMENSIONS = 64
_KEYS = ("dtype", "shape", "data_offsets")

# Bits of an element (safetensors/src/tensor.rs, `Dtype`). The library sorts tensors in the reverse of this order.
BITS: Mapping[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, safetensors dtype, shape, and its bytes `start:end` of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        """The number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element; only for dtypes of whole bytes."""
        return BITS[self.dtype] // 8

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header. Tensors have the order of the JSON, which can differ from that of the bytes."""

    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    data_start: int


def length(prefix: bytes, file_size: int, where: str) -> int:
    """Read the length of a header.

    Args:
        prefix: The first eight bytes of the file.
        file_size: Bytes of the file.
        where: The file, for messages.

    Returns:
        Bytes of the header's JSON.

    Raises:
        CheckpointError: The file cannot hold such a header.
    """
    if file_size == 0:
        _refuse(where, "the file is empty")
    if len(prefix) < 8:
        _refuse(where, f"the file has {file_size} bytes, too few for a header")
    (size,) = struct.unpack("<Q", prefix)
    if size > MAX_BYTES:
        _refuse(
            where, f"the header's length is given as {size} bytes, more than the {MAX_BYTES} that the format allows"
        )
    if size < 2:
        _refuse(where, f"the header's length is given as {size} bytes, too few for any JSON object")
    if 8 + size > file_size:
        _refuse(where, f"the header's length is given as {size} bytes, but the file has only {file_size}")
    return int(size)


def parse(raw: bytes, file_size: int, where: str) -> Header:
    """Parse a header and check it against the size of its file. Memory and time are bounded by the length of `raw`.

    Args:
        raw: The header's JSON, without the length before it.
        file_size: Bytes of the file.
        where: The file, for messages.

    Returns:
        The header.

    Raises:
        CheckpointError: The header breaks a rule of the format. The message names the file and the key.
    """
    entries = _load(raw, where)
    metadata = _metadata(entries.pop(METADATA, None), where)
    tensors = tuple(_tensor(name, entry, where) for name, entry in entries.items())
    data_start = 8 + len(raw)
    _check_layout(tensors, file_size - data_start, where)
    return Header(tensors, metadata, data_start)


def serialise(tensors: Iterable[TensorSpec], metadata: Mapping[str, str], room: int = 0) -> bytes:
    """Write a header: metadata first with sorted keys, tensors in the given order, padded to whole pages.

    The result does not depend on the run or the machine (safetensors#584: the library's key order is random).

    Args:
        tensors: The tensors.
        metadata: The metadata; left out if empty.
        room: The least number of bytes of the result, a multiple of `ALIGNMENT`.

    Returns:
        The length and the JSON.
    """
    entries: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    for t in tensors:
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start, t.end]}
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * max(-(8 + len(body)) % ALIGNMENT, room - 8 - len(body))
    return struct.pack("<Q", len(body)) + body


def _load(raw: bytes, where: str) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        _refuse(where, "the header does not begin with '{'")
    try:
        return parse_object(raw)
    except MalformedError as error:
        _refuse(where, f"the header {error}", error)


def _metadata(value: Any, where: str) -> dict[str, str]:
    if value is None:  # the library reads null as no metadata
        return {}
    if not isinstance(value, dict):
        _refuse(where, f"{METADATA} is not an object")
    for key, text in value.items():
        if not isinstance(text, str):
            _refuse(where, f"{METADATA} holds something other than text under {show(key)}")
    return value


def _tensor(name: str, entry: Any, where: str) -> TensorSpec:
    if not isinstance(entry, dict):
        _refuse(where, f"the entry of tensor {show(name)} is not an object")
    missing = [key for key in _KEYS if key not in entry]
    if missing:
        _refuse(where, f"tensor {show(name)} has no {missing[0]}")
    if len(entry) > len(_KEYS):
        # The format has no other key. One that a later version adds would be lost in the output.
        _refuse(where, f"tensor {show(name)} has the unknown key {show(next(k for k in entry if k not in _KEYS))}")
    dtype, shape, offsets = (entry[key] for key in _KEYS)
    if not isinstance(dtype, str) or dtype not in BITS:
        _refuse(where, f"tensor {show(name)} has the unknown dtype {show(dtype)}")
    if not _is_sizes(shape):
        _refuse(where, f"tensor {show(name)} has a shape that is not a list of sizes: {show(shape)}")
    if len(shape) > MAX_DIMENSIONS:
        _refuse(where, f"tensor {show(name)} has {len(shape)} dimensions")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(where, f"tensor {show(name)} has data_offsets that are not [start, end]: {show(offsets)}")
    return TensorSpec(name, dtype, tuple(shape), offsets[0], offsets[1])


def _is_sizes(value: Any) -> bool:
    # type() and not isinstance(): True is an int in Python, but not a size.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(tensors: tuple[TensorSpec, ...], available: int, where: str) -> None:
    """Check that each byte belongs to exactly one tensor, and that each tensor has the bytes that its shape needs."""
    position = 0
    for t in sorted(tensors, key=lambda t: (t.start, t.end)):
        if problem := _misfit(t):
            _refuse(where, f"tensor {show(t.name)} of {t.dtype} {show(list(t.shape))} {problem}")
        if t.start < position:
            _refuse(where, f"tensor {show(t.name)} overlaps the one before it (byte {t.start} of the data)")
        if t.start > position:
            _refuse(where, f"the {t.start - position} bytes before tensor {show(t.name)} belong to no tensor")
        position = t.end
    if position > available:
        _refuse(
            where,
            f"the file is truncated: the header describes {position} bytes of tensors, {available} are there",
            hint="Fetch the file again; its size should be "
            f"{position - available} bytes more, or the last download did not finish.",
        )
    if position < available:
        _refuse(
            where,
            f"{available - position} bytes after the last tensor belong to no tensor",
            hint="Save it again with the program that made it, or cut them off: "
            f"truncate -s -{available - position} FILE.",
        )


def _misfit(tensor: TensorSpec) -> str | None:
    """Return what is wrong between a tensor's shape and its bytes, or None.

    A product of sizes beyond 64 bits is wrong even if a later size is zero.
    """
    bits = 1
    for factor in (*tensor.shape, BITS[tensor.dtype]):
        bits *= factor
        if bits >= 2**64:
            return "has more elements than any file can hold"
    if bits % 8:
        return "does not fill whole bytes"
    return None if bits // 8 == tensor.nbytes else f"needs {bits // 8} bytes, has {tensor.nbytes}"


def _refuse(
    where: str,
    what: str,
    cause: Exception | None = None,
    hint: str = "The file is damaged or is not a safetensors checkpoint; fetch it again from its source.",
) -> NoReturn:
    raise CheckpointError(f"{where}: {what}", hint) from cause
