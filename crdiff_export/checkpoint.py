"""A checkpoint on disk as one value: its files, its tensors, and where their bytes are. Only headers are read.

`open_checkpoint` takes one safetensors file, an index of shards, a folder of a diffusers pipeline or of one component,
or a `.ckpt`. Names, folders and variants follow diffusers (`_add_variant`, `WEIGHTS_INDEX_NAME`).
"""

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from crdiff_export import header
from crdiff_export.errors import CheckpointError
from crdiff_export.header import TensorSpec, show

Kind = Literal["file", "shards", "folder"]
COMPONENTS = ("unet", "transformer")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
MAX_INDEX_BYTES = 64 << 20


class Bytes(Protocol):
    """The bytes of a data section, to be read at any place. Not for use by two threads at once."""

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on; CheckpointError if the file ends before."""
        ...

    def close(self) -> None:
        """Give back what is held."""
        ...


class Tensors(Protocol):
    """Tensors that lie elsewhere than in a safetensors file (a pickle), as the bytes such a file would have."""

    def open(self) -> Bytes:
        """A reader of its own for each thread."""
        ...


@dataclass(frozen=True)
class SourceFile:
    """One file of weights. `name` is its path below the checkpoint, and so below the output, with '/' between parts."""

    path: Path
    name: str
    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    data_start: int
    stored: int
    tensors_of: Tensors | None = None

    @cached_property
    def data_size(self) -> int:
        """Bytes of the data section."""
        return max((t.end for t in self.tensors), default=0)

    @cached_property
    def by_offset(self) -> tuple[TensorSpec, ...]:
        """The tensors in the order of their bytes."""
        return tuple(sorted(self.tensors, key=lambda t: (t.start, t.end)))

    @property
    def is_sparse(self) -> bool:
        """Whether most of the file is a hole, so that its weights are not really there."""
        return self.data_size > 1 << 20 and self.stored < self.data_size // 2

    def open(self) -> Bytes:
        """A reader of the data section, one for each thread."""
        return self.tensors_of.open() if self.tensors_of else _FileBytes(self.path, self.data_start)


@dataclass(frozen=True)
class Checkpoint:
    """A base: `files` hold what is pruned, `companions` are copied as they are (index, configs, other components)."""

    path: Path
    kind: Kind
    files: tuple[SourceFile, ...]
    companions: tuple[PurePosixPath, ...] = ()
    notes: tuple[str, ...] = ()
    origin: str | None = None

    @property
    def stem(self) -> str:
        """The name that outputs are called after."""
        if self.kind == "folder":
            return self.path.resolve().name or "model"
        name = self.path.name.removesuffix(".index.json")
        return re.sub(r"\.(safetensors|ckpt|pth?|bin)$", "", name)

    @property
    def home(self) -> Path:
        """The folder that the names of files and companions start from."""
        return self.path if self.kind == "folder" else self.path.parent

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by its name."""
        return {t.name: t.shape for f in self.files for t in f.tensors}

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the first file; shards carry the same or none."""
        return self.files[0].metadata

    def tensors(self) -> Iterator[tuple[int, TensorSpec]]:
        """Every tensor with the number of its file, files by name, tensors by place."""
        for number, file in enumerate(self.files):
            for tensor in file.by_offset:
                yield number, tensor


class _FileBytes:
    def __init__(self, path: Path, data_start: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._path, self._start = path, data_start

    def read_into(self, offset: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            try:
                self._file.seek(self._start + offset + done)
                got = self._file.readinto(target[done:])
            except OSError as error:
                raise CheckpointError(
                    f"{self._path}: reading failed: {error.strerror}",
                    "Check the disk, or copy the file to another one.",
                ) from error
            if not got:
                raise CheckpointError(
                    f"{self._path}: the file became shorter while it was read",
                    "Leave the file alone during the export, then run it again.",
                )
            done += got

    def close(self) -> None:
        self._file.close()


def open_checkpoint(path: Path, variant: str | None = None) -> Checkpoint:
    """Read the headers of a checkpoint; CheckpointError names the file, the key and what is wrong with them."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _open_folder(path, variant)
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path}: not a regular file", "Give a checkpoint file or a diffusers folder.")
        if path.suffix == ".json":
            return _open_index(path)
        if path.suffix in PICKLES:
            from crdiff_export.pickled import open_pickle

            return Checkpoint(path, "file", (open_pickle(path),))
        return Checkpoint(path, "file", (read_file(path, path.name),))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such file or folder",
            "Give a path, a Hub id such as ORG/NAME, or an alias; `crdiff recipes list` names them.",
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror or error}", "Check the path and its permissions, then try again."
        ) from error


def read_file(path: Path, name: str) -> SourceFile:
    """One safetensors file's header, checked; `name` is what messages and outputs call it."""
    info = path.stat()
    if stat.S_ISDIR(info.st_mode):
        raise CheckpointError(f"{path}: a folder, where a file of weights should be", "Remove it or fetch the file.")
    with path.open("rb", buffering=0) as file:
        prefix = file.read(8) or b""
        try:
            size = header.length(prefix, info.st_size, str(path))
        except CheckpointError:
            # Not earlier: a length, too, may begin with the bytes of a magic.
            _check_magic(prefix, path)
            raise
        raw = file.read(size) or b""
        while len(raw) < size and (more := file.read(size - len(raw))):
            raw += more
    found = header.parse(raw, info.st_size, str(path))
    # Windows has no st_blocks; there a file counts as stored in full.
    stored = getattr(info, "st_blocks", info.st_size // 512 + 1) * 512
    return SourceFile(path, name, found.tensors, found.metadata, found.data_start, stored)


def _check_magic(prefix: bytes, path: Path) -> None:
    if prefix.startswith(b"GGUF"):
        raise CheckpointError(
            f"{path}: a GGUF file; its weights are quantised and cannot be pruned by magnitude",
            "Use the fp16 or bf16 checkpoint that it was made from.",
        )
    if prefix.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise CheckpointError(
            f"{path}: a pickle or zip archive under another name, not a safetensors file",
            "Rename it to .ckpt if it is a torch checkpoint; it is then read without running any code in it.",
        )
    if prefix.startswith(b"version "):
        raise CheckpointError(
            f"{path}: a Git LFS pointer, not the checkpoint itself", "Fetch the file with `git lfs pull`."
        )


def _open_index(path: Path) -> Checkpoint:
    files, index_name = _read_shards(path.parent, PurePosixPath(path.name))
    return Checkpoint(path, "shards", files, (PurePosixPath(index_name.name),))


def _read_shards(root: Path, index: PurePosixPath) -> tuple[tuple[SourceFile, ...], PurePosixPath]:
    """The shards of an index at `index` below `root`, each key in the shard that the index names."""
    weight_map = _read_index(root / index)
    shards = sorted(set(weight_map.values()))
    files = []
    for shard in shards:
        path = root / index.parent / shard
        if not path.exists():
            raise CheckpointError(
                f"{root / index}: its shard {show(shard)} is missing", "Fetch the missing shard into the same folder."
            )
        files.append(read_file(path, str(index.parent / shard)))
    for shard, file in zip(shards, files, strict=True):
        for tensor in file.tensors:
            if weight_map.get(tensor.name) != shard:
                raise CheckpointError(
                    f"{root / index}: does not place {show(tensor.name)} in {show(shard)}, which holds it",
                    "The index and the shards are not of one checkpoint; fetch them again together.",
                )
    missing = weight_map.keys() - {t.name for file in files for t in file.tensors}
    if missing:
        key = min(missing)
        raise CheckpointError(
            f"{root / index}: {show(key)} is not in {show(weight_map[key])}",
            "The index and the shards are not of one checkpoint; fetch them again together.",
        )
    return tuple(files), index


def _read_index(path: Path) -> dict[str, str]:
    damaged = "The index is damaged or is not one of a sharded checkpoint; fetch it again."
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path}: larger than any index of shards", damaged)
    try:
        value: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON", damaged) from error
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map", damaged)
    for key, shard in weight_map.items():
        # A plain name only: an index must not lead out of its own folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise CheckpointError(
                f"{path}: {show(key)} is placed in {show(shard)}, not a file beside the index", damaged
            )
    return weight_map


def _open_folder(path: Path, variant: str | None) -> Checkpoint:
    component = next((c for c in COMPONENTS if (path / c).is_dir()), None)
    home = PurePosixPath(component) if component else PurePosixPath()
    choices = _weights(path / home)
    if not choices:
        raise CheckpointError(
            f"{path / home}: no diffusion_pytorch_model weights in safetensors format",
            "Give a diffusers folder with a unet/ or transformer/ part, or the checkpoint file itself.",
        )
    chosen = _choose(choices, variant, path / home)
    if choices[chosen].endswith(".index.json"):
        files, _ = _read_shards(path, home / choices[chosen])
    else:
        files = (read_file(path / home / choices[chosen], str(home / choices[chosen])),)
    left_out = _weight_files(path / home)
    others = sorted(set(choices) - {chosen})
    notes = [f"the {name or 'plain'} weights beside them are not in the output" for name in others]
    companions, links = _companions(path)
    kept = [c for c in companions if not (c.parent == home and c.name in left_out)]
    if choices[chosen].endswith(".index.json"):
        kept.append(home / choices[chosen])
    notes += [f"{link} is a link to a folder and is not in the output" for link in links]
    return Checkpoint(path, "folder", files, tuple(sorted(kept)), tuple(notes))


_WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.(?P<variant>[\w-]+?))?\.safetensors")
_INDEX = re.compile(r"diffusion_pytorch_model\.safetensors\.index(?:\.(?P<variant>[\w-]+))?\.json")
_ANY_WEIGHTS = re.compile(r"diffusion_pytorch_model.*\.(safetensors|bin|msgpack|onnx|ckpt|pt)|"
                          r"diffusion_pytorch_model.*\.index(\.[\w-]+)?\.json")  # fmt: skip
_SHARD = re.compile(r"\d{5}-of-\d{5}")


def _weights(folder: Path) -> dict[str, str]:
    """Variant ('' for none) to the file of weights, or to the index where they are sharded."""
    found: dict[str, str] = {}
    for name in sorted(entry.name for entry in folder.iterdir()):
        if match := _INDEX.fullmatch(name):
            found[match["variant"] or ""] = name
        elif (match := _WEIGHTS.fullmatch(name)) and not _SHARD.search(name):
            found.setdefault(match["variant"] or "", name)
    return found


def _weight_files(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if _ANY_WEIGHTS.fullmatch(entry.name)}


def _choose(choices: Mapping[str, str], variant: str | None, folder: Path) -> str:
    if variant is None:
        return "" if "" in choices else min(choices)
    if variant not in choices:
        names = ", ".join(name or "none (leave --variant out)" for name in sorted(choices))
        raise CheckpointError(f"{folder}: no {show(variant)} variant of the weights", f"There are: {names}.")
    return variant


def _companions(root: Path) -> tuple[list[PurePosixPath], list[str]]:
    """Every file below `root`, and the links to folders, which are not followed (a link may lead in a circle)."""
    files, links = [], []
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        links += [str((here / f).relative_to(root)) for f in folders if (here / f).is_symlink()]
        folders[:] = sorted(f for f in folders if not (here / f).is_symlink() and f not in (".git", ".cache"))
        for name in sorted(names):
            if not stat.S_ISREG((here / name).stat().st_mode):
                raise CheckpointError(f"{here / name}: not a regular file", "Remove it from the folder.")
            files.append(PurePosixPath((here / name).relative_to(root).as_posix()))
    return files, links
