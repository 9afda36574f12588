"""Makers of checkpoints for tests: narrow ones of every family, and one maker per thing that can be wrong."""

import json
import math
import struct
import zlib
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from crdiff_export.models.families import by_id
from tests.support.family_rows import ROWS
from tests.support.geometry_tables import load

SIZES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
Shape = tuple[int, ...]
Tensors = Mapping[str, tuple[str, Shape, bytes]]
# Sizes that tell UNets apart stay, as do those that the table of a transformer names; all others become a fraction.
FIXED = ("attn2.to_k.weight", "attn2.to_v.weight", "add_embedding.linear_1.weight", "conv_in.weight", ".0.0.weight")
FRACTION, OF_DEMO, OF_WIDE = 64, 8, 128


def narrow(table: str, fraction: int | None = None) -> dict[str, tuple[str, Shape]]:
    """A real model's names and dtypes with narrow shapes."""
    family = table.partition(".")[0]
    part = fraction or (OF_DEMO if family == "demo" else OF_WIDE if ROWS[family].wide else FRACTION)

    def shrink(name: str, shape: Shape) -> Shape:
        fixed = name.endswith(_fixed(table))
        return tuple(size if (fixed and axis == 1) or size < part else size // part for axis, size in enumerate(shape))

    return {name: (dtype, shrink(name, shape)) for name, (dtype, shape) in load(table).items()}


@cache
def _fixed(table: str) -> tuple[str, ...]:
    family, _, kind = table.partition(".")
    if "transformer" not in kind:
        return FIXED
    layout = next(layout for layout in by_id(family).layouts if kind.startswith(layout.name))
    keys = [mark.tensor for mark in layout.marks if mark.sizes]
    values = [key.replace("k_proj", "v_proj").replace("to_k", "to_v") for key in keys]  # of the same text
    return (layout.first, *keys, *values)


def weights(name: str, dtype: str, shape: Shape, seed: int = 0) -> bytes:
    """Bell-shaped random content of a scale of its own, as bytes of `dtype`."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])  # the name itself takes ten times as long
    count = math.prod(shape)
    if dtype in ("I64", "I32", "U8", "BOOL"):
        return bytes(rng.integers(0, 2, count * SIZES[dtype], np.uint8))
    values = rng.standard_normal(count) * (0.5 + rng.random()) / 8
    if dtype in ("F64", "F32", "F16"):
        return bytes(values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes())
    if dtype == "BF16":
        return bytes((values.astype("<f4").view("<u4") >> 16).astype("<u2"))
    magnitudes = rng.integers(0, 0x78, count, np.uint8)
    return bytes((magnitudes | (rng.integers(0, 2, count, np.uint8) << 7)).astype("u1"))


def tiny(
    table: str, dtype: str | None = None, prefix: str | None = None, seed: int = 0
) -> dict[str, tuple[str, Shape, bytes]]:
    """A narrow checkpoint of a real model's layers with random weights; floats in `dtype` if given.

    A dict that a test may change.
    """
    return dict(_tiny(table, dtype, prefix, seed))


@lru_cache(maxsize=32)  # of some MB each
def _tiny(table: str, dtype: str | None, prefix: str | None, seed: int) -> dict[str, tuple[str, Shape, bytes]]:
    made = {}
    for name, (own, shape) in narrow(table).items():
        kind = dtype if dtype and own in ("F16", "BF16", "F32") else own
        made[(prefix or "") + name] = (kind, shape, weights(name, kind, shape, seed))
    return made


def header(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """The length and JSON of a safetensors file, written without the code under test."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    return frame(json.dumps(entries, separators=(",", ":")).encode())


def frame(body: bytes) -> bytes:
    """A header's JSON with its length, padded to 8 bytes."""
    body += b" " * (-len(body) % 8)
    return struct.pack("<Q", len(body)) + body


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file with the tensors in the order given."""
    path.write_bytes(header(tensors, metadata) + b"".join(data for _, _, data in tensors.values()))
    return path


def write_shards(
    folder: Path, tensors: Tensors, count: int, stem: str = "diffusion_pytorch_model", variant: str = ""
) -> Path:
    """Shards and their index, as diffusers writes them; the index's path."""
    folder.mkdir(parents=True, exist_ok=True)
    names, per = list(tensors), math.ceil(len(tensors) / count)
    weight_map: dict[str, str] = {}
    middle = f".{variant}" if variant else ""
    for number in range(count):
        part = {name: tensors[name] for name in names[number * per : (number + 1) * per]}
        shard = f"{stem}{middle}-{number + 1:05d}-of-{count:05d}.safetensors"
        write(folder / shard, part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = folder / f"{stem}.safetensors.index{middle}.json"
    total = sum(len(data) for _, _, data in tensors.values())
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    return index


def write_sparse(path: Path, table: str, metadata: Mapping[str, str] | None = None) -> Path:
    """A real model's full-size header with a hole for its weights."""
    entries: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for name, (dtype, shape) in sorted(load(table).items(), key=lambda item: -SIZES[item[1][0]]):
        size = math.prod(shape) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    head = frame(json.dumps(entries, separators=(",", ":")).encode())
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + position)
    return path


def write_whole(path: Path, table: str, seed: int = 0) -> Path:
    """A real model in its full size with random weights of a scale that keeps a picture finite; in F16, F32 or I64."""
    tensors = {name: (dtype, shape, b"") for name, (dtype, shape) in load(table).items()}
    write_sparse(path, table)
    positions, begin = _header_of(path)
    with path.open("r+b") as file:
        for name, (dtype, shape, _) in tensors.items():
            count, inputs = math.prod(shape), math.prod(shape[1:])
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            if dtype == "I64":
                values = np.arange(count, dtype="<f4")
            else:
                # Evenly distributed, which is drawn fastest. A sum keeps the scale of its terms.
                scale = 0.02 if len(shape) == 1 else (0.5 + rng.random()) / math.sqrt(inputs / 3)
                values = np.frombuffer(rng.bytes(2 * count), "<i2") * np.float32(scale / (1 << 15))
                values += 1 if len(shape) == 1 and name.endswith("weight") else 0  # of a norm
            file.seek(begin + positions[name]["data_offsets"][0])
            file.write(values.astype({"I64": "<i8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes())
    return path


def _header_of(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, parsed without the code under test, and where its data begin."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size)), 8 + size


def read(path: Path) -> dict[str, tuple[str, Shape, bytes]]:
    """A safetensors file's tensors."""
    data = path.read_bytes()[_header_of(path)[1] :]
    return {
        name: (entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in entries_of(path).items()
    }


def entries_of(path: Path) -> dict[str, Any]:
    """The tensors' entries in a safetensors file's header."""
    entries, _ = _header_of(path)
    entries.pop("__metadata__", None)
    return entries


def metadata_of(path: Path) -> dict[str, str]:
    """A safetensors file's metadata."""
    metadata: dict[str, str] = _header_of(path)[0].get("__metadata__", {})
    return metadata


def changed(path: Path, name: str, places: Mapping[int, bytes], to: Path) -> Path:
    """A copy of a file with other bytes at some places of a tensor."""
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    start = 8 + length + entries_of(path)[name]["data_offsets"][0]
    for place, data in places.items():
        raw[start + place : start + place + len(data)] = data
    to.write_bytes(raw)
    return to


def said(path: Path, changes: Mapping[str, str | None], to: Path) -> Path:
    """A copy of a file with other metadata; None removes a key."""
    entries, start = _header_of(path)
    metadata = entries["__metadata__"] | changes
    entries["__metadata__"] = {key: text for key, text in metadata.items() if text is not None}
    to.write_bytes(frame(json.dumps(entries).encode()) + path.read_bytes()[start:])
    return to
