"""Files that must be refused, or read with care: one maker per failure, named after it. Each gives the path it made."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from tests.support import makers

Maker = Callable[[Path], Path]
WEIGHT = {"weight": ("F16", (2, 3), bytes(range(12)))}
MARKER = "code-of-the-checkpoint-has-run"


def file(body: str | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with exactly this header."""
    raw = body if isinstance(body, bytes) else body.encode()
    return struct.pack("<Q", len(raw)) + raw + data


def good() -> bytes:
    """A small file with nothing wrong."""
    return makers.header(WEIGHT) + WEIGHT["weight"][2]


def read_by_the_library(raw: bytes) -> dict[str, tuple[str, makers.Shape, bytes]]:
    """What the official library reads; SafetensorError if it refuses."""
    found = safetensors.deserialize(raw)  # type: ignore[no-untyped-call,unused-ignore]
    return {name: (value["dtype"], tuple(value["shape"]), bytes(value["data"])) for name, value in found}


def holding(content: bytes) -> Maker:
    """A maker of a file with this content."""

    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


# Files that are no safetensors files, though they are called so.

empty = holding(b"")
cut_in_the_header = holding(good()[:30])
cut_in_the_data = holding(good()[:-5])
noise = holding(b"\x9b" * 4096)
gguf = holding(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(64))
git_lfs_pointer = holding(
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 6938040682\n"
)
web_page = holding("\n<!DOCTYPE html>\n<html><head><title>Log in</title></head><body>…</body></html>\n".encode())


def zip_archive(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.safetensors", good())
    return path


# Things that are no files.


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def endless_device(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


def link_in_a_circle(path: Path) -> Path:
    other = path.with_name("there-and-back" + path.suffix)
    other.symlink_to(path.name)
    path.symlink_to(other.name)
    return path


def link_to_nothing(path: Path) -> Path:
    path.symlink_to("never-was" + path.suffix)
    return path


# Pickles, as torch lays them out. They are built from opcodes, as nobody should have to run what they hold.


class Code:
    """Leaves MARKER in the working folder when it is unpickled by anything that runs what it reads."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"echo > {MARKER}",)


def archive(
    path: Path,
    data: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    compression: int = zipfile.ZIP_STORED,
    extra: Mapping[str, bytes] | None = None,
    folder: str = "model/",
) -> Path:
    """A zip archive like torch's with any data.pkl."""
    with zipfile.ZipFile(path, "w", compression) as found:
        found.writestr(f"{folder}data.pkl", data)
        for key, raw in (storages or {}).items():
            found.writestr(f"{folder}data/{key}", raw)
        for name, raw in (extra or {}).items():
            found.writestr(name, raw)
    return path


def opcodes(*parts: bytes) -> bytes:
    """A pickle of protocol 2."""
    return b"\x80\x02" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(kind: str = "FloatStorage", key: str = "0", count: int = 6) -> bytes:
    return b"((" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(
    source: bytes | None = None,
    offset: int = 0,
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    tail: bytes = b"\x89ccollections\nOrderedDict\n)R",
) -> bytes:
    """A call of torch._utils._rebuild_tensor_v2 with six float32 under the key "0", or with what is given."""
    arguments = (source or storage()) + number(offset) + numbers(*shape) + numbers(*strides) + tail
    # `storage` leaves a mark below itself, and the tuple of arguments ends there.
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"tR"


def state(**entries: bytes) -> bytes:
    """A dict of things by name."""
    return opcodes(b"}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u")


def archived(data: bytes, extra: Mapping[str, bytes] | None = None) -> Maker:
    """A maker of an archive with 24 bytes of storage."""
    return lambda path: archive(path, data, {"0": np.arange(6, dtype="<f4").tobytes()}, extra=extra)


weights = archived(state(weight=tensor()))
pickled_code = archived(pickle.dumps({"state_dict": {}, "x": Code()}, protocol=2))
bare_pickle_with_code = holding(pickle.dumps(Code(), protocol=2))
# What torch wrote before 1.6: a magic number, a protocol, then more pickles.
legacy_torch = holding(
    b"".join(
        pickle.dumps(part, protocol=2)
        for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"weight": [1.0]})
    )
)


def nested_archive(path: Path) -> Path:
    inner = pickled_code(path.with_name("inner"))
    with zipfile.ZipFile(path, "w") as outer:
        outer.write(inner, "model/model.ckpt")
    return path


def twice_the_same_file(path: Path) -> Path:
    archive(path, state(weight=tensor()), {"0": bytes(24), "1": bytes(24)})
    path.write_bytes(path.read_bytes().replace(b"model/data/1", b"model/data/0"))
    return path


def compressed_bomb(path: Path) -> Path:
    """4 MB of nothing in 4 KB."""
    return archive(path, bytes(4 << 20), compression=zipfile.ZIP_DEFLATED)


def compressed_storage(path: Path) -> Path:
    data = state(weight=tensor(storage(count=1 << 20), shape=(1 << 20,), strides=(1,)))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", data)
        file.writestr("model/data/0", bytes(4 << 20), zipfile.ZIP_DEFLATED)
    return path


def truncated_archive(path: Path) -> Path:
    weights(path).write_bytes(path.read_bytes()[:-30])
    return path


def damaged_archive(path: Path) -> Path:
    """Its directory leads to bytes that are no file."""
    raw = weights(path).read_bytes()
    path.write_bytes(raw.replace(b"PK\x03\x04", b"PK\x03\x05").replace(b"PK\x03\x05", b"PK\x03\x04", 1))
    return path


def endless_directory(path: Path) -> Path:
    """An archive that is nothing but a directory of 32 MB, and that one a hole."""
    size = 32 << 20
    with path.open("wb") as file:
        file.write(b"PK\x03\x04" + bytes(60))
        file.seek(64 + size)
        file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, size, 64, 0))
    return path


# Checkpoints of several files.


def sharded(folder: Path, change: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """Two shards of four tensors; `change` may spoil the index."""
    tensors = {name: ("F16", (2, 2), bytes([i] * 8)) for i, name in enumerate(("a", "b", "c", "d"))}
    index = makers.write_shards(folder, tensors, 2, stem="model")
    if change is not None:
        value = json.loads(index.read_text())
        change(value)
        index.write_text(json.dumps(value))
    return index


FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


def sharded_with(change: Callable[[dict[str, object]], object]) -> Maker:
    """Shards whose index places tensors elsewhere."""
    return lambda folder: sharded(folder, lambda index: change(index["weight_map"]))


def missing_shard(folder: Path) -> Path:
    index = sharded(folder)
    (folder / SECOND).unlink()
    return index


def pipeline(folder: Path, component: str = "unet", names: tuple[str, ...] = ("",)) -> Path:
    """A diffusers folder: `names` are the variants of its pruned component."""
    for part in (component, "vae", "text_encoder"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}")
    (folder / "model_index.json").write_text("{}")
    for name in names:
        middle = f".{name}" if name else ""
        makers.write(folder / component / f"diffusion_pytorch_model{middle}.safetensors", WEIGHT, {"format": "pt"})
    makers.write(folder / "vae" / "diffusion_pytorch_model.safetensors", WEIGHT)
    makers.write(folder / "text_encoder" / "model.safetensors", WEIGHT)
    return folder


def pipeline_without_weights(folder: Path) -> Path:
    (pipeline(folder) / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


def folder_without_weights(folder: Path) -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}.")
    return folder
