"""A checkpoint on disk as one value: its files, their tensors, and where the bytes are. Only headers are read.

`open_checkpoint` accepts a safetensors file, an index of shards, a folder of a diffusers pipeline or of one component,
and a `.ckpt`. Names, folders and variants follow diffusers (`_add_variant`, `WEIGHTS_INDEX_NAME`).
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal, NoReturn

from crdiff_export.errors import CheckpointError
from crdiff_export.formats import safetensors, sniff
from crdiff_export.formats.pipeline_files import (
    COMPONENTS,
    component_folders,
    component_variants,
    pipeline_files,
)
from crdiff_export.formats.safetensors import TensorSpec, show
from crdiff_export.formats.strict_json import MalformedError, parse_object
from crdiff_export.formats.torch_zip import open_pickle
from crdiff_export.formats.weight_file import SourceFile, check_regular

Kind = Literal["file", "shards", "folder"]
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
MAX_INDEX_BYTES = 64 << 20
MODEL_INDEX = "model_index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A base.

    Attributes:
        path: The file or folder that was opened.
        kind: One file, shards with an index, or a diffusers folder.
        files: The files of weights that are pruned.
        companions: Files that an export copies unchanged: index, configurations, other components.
        notes: What the user should know, such as files that are not in the output.
        copy_notes: The same of the companions, which an export into one file does not copy.
        generated: Small files that an export writes beside the weights, by their path inside the output.
        origin: The checkpoint on the disk, for one whose layout is changed while it is read; None for any other.
    """

    path: Path
    kind: Kind
    files: tuple[SourceFile, ...]
    companions: tuple[PurePosixPath, ...] = ()
    notes: tuple[str, ...] = ()
    copy_notes: tuple[str, ...] = ()
    generated: Mapping[str, bytes] = field(default_factory=dict)
    origin: "Checkpoint | None" = None

    @property
    def on_disk(self) -> "Checkpoint":
        """The checkpoint as it is on the disk."""
        return self.origin or self

    @property
    def stem(self) -> str:
        """The name that default output names begin with."""
        if self.origin:
            return self.origin.stem
        return (self.path.resolve().name or "model") if self.kind == "folder" else file_stem(self.path.name)

    @property
    def home(self) -> Path:
        """The folder that the names of files and companions are relative to."""
        return self.path if self.kind == "folder" else self.path.parent

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return {t.name: t.shape for f in self.files for t in f.tensors}

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the first file; shards have the same or none."""
        return self.files[0].metadata

    def tensors(self) -> Iterator[tuple[int, TensorSpec]]:
        """Yield every tensor with the number of its file, in the order of files and bytes."""
        for number, file in enumerate(self.files):
            for tensor in file.by_offset:
                yield number, tensor


def file_stem(name: str) -> str:
    """Return the name of a checkpoint's file, or of its index, without its ending."""
    return re.sub(r"\.(safetensors|sft|ckpt|pth?|bin)$", "", name.removesuffix(".index.json"), flags=re.IGNORECASE)


def open_checkpoint(path: Path, variant: str | None = None, *, all_files: bool = True) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        path: A file, an index of shards, or a folder.
        variant: The variant of the weights in a diffusers folder, such as `fp16`; by default the plain ones.
        all_files: Whether all files of a folder are companions, or only those of its pipeline.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: The checkpoint is missing, unreadable or damaged. The message names the file and the key.
    """
    try:
        if path.is_dir():
            return _open_folder(path, variant, all_files=all_files)
        check_regular(path)
        if path.suffix.lower() == ".json":
            return _open_index(path)
        if path.suffix.lower() in PICKLES:
            return Checkpoint(path, "file", (open_pickle(path),))
        return Checkpoint(path, "file", (read_file(path, path.name),))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename or path}: no such file or folder",
            "Check the path.",
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: cannot be read: {error.strerror or error}",
            "Check the path and its permissions, then try again.",
        ) from error


def read_file(path: Path, name: str) -> SourceFile:
    """Read and check the header of one safetensors file.

    Args:
        path: The file.
        name: Its path inside the checkpoint, with '/' between the parts.

    Returns:
        The file with its tensors.

    Raises:
        CheckpointError: The file is damaged or of another kind.
    """
    info = check_regular(path)
    with path.open("rb") as file:
        start = file.read(sniff.SIZE)
        if not sniff.is_safetensors(start):
            sniff.refuse_other(start, path)
        size = safetensors.length(start[:8], info.st_size, str(path))
        file.seek(8)
        raw = file.read(size)
    header = safetensors.parse(raw, info.st_size, str(path))
    return SourceFile(path, name, header.tensors, header.metadata, header.data_start, info)


def open_component(folder: Path, variant: str | None = None) -> tuple[SourceFile, ...]:
    """Read the headers of a component of a diffusers pipeline, such as its VAE.

    Args:
        folder: The component's folder.
        variant: The variant to take where the component has it.

    Returns:
        Its files of weights, pickles where it has no safetensors; none if it has no weights.

    Raises:
        CheckpointError: A file is damaged, or the folder has the weights several times.
    """
    if not folder.is_dir():
        return ()
    paths = [folder / name for name in _component_files(folder, variant)]
    for path in paths:
        if match := re.search(r"-\d{5}-of-(\d{5})", path.name):
            for number in range(1, int(match[1]) + 1):
                shard = re.sub(r"-\d{5}-of-", f"-{number:05}-of-", path.name)
                if folder / shard not in paths:
                    raise CheckpointError(f"{folder}: its shard {show(shard)} is missing", "Fetch it into the folder.")
    files = tuple(
        open_pickle(path) if path.suffix in PICKLES else read_file(path, f"{folder.name}/{path.name}") for path in paths
    )
    seen: dict[str, Path] = {}
    for file in files:
        for tensor in file.tensors:
            if (other := seen.setdefault(tensor.name, file.path)) != file.path:
                raise CheckpointError(
                    f"{file.path}: {show(tensor.name)} is in {other.name}, too",
                    "Leave one variant of the weights in the folder, or choose with --variant.",
                )
    return files


def _component_files(folder: Path, variant: str | None) -> list[str]:
    """List the weights of a component as its library takes them: the variant's, else the plain ones."""
    entries = [entry.name for entry in sorted(folder.iterdir()) if entry.is_file() and _COMPONENT.match(entry.name)]
    for ending in ("safetensors", "bin"):
        names = [f"x/{name}" for name in entries if name.endswith(f".{ending}")]
        kinds = component_variants(names)
        for wanted in (variant, None) if variant else (None,):
            if chosen := [name for name, kind in kinds.items() if kind == wanted]:
                return [name.removeprefix("x/") for name in chosen]
    return entries


def _open_index(path: Path) -> Checkpoint:
    index = PurePosixPath(path.name)
    return Checkpoint(path, "shards", _read_shards(path.parent, index), (index,))


def _read_shards(root: Path, index: PurePosixPath) -> tuple[SourceFile, ...]:
    """Read the shards of the index `root / index`, and check that each tensor is in the shard that the index names."""
    weight_map = read_index(root / index)
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
    return tuple(files)


def read_index(path: Path) -> dict[str, str]:
    """Read an index of shards.

    Args:
        path: The index.

    Returns:
        The name of the shard of each tensor; shards are files in the folder of the index.

    Raises:
        CheckpointError: The file is not an index of shards, or names a file outside of its folder.
    """
    damaged = "The index is damaged or is not one of a sharded checkpoint; fetch it again."
    if check_regular(path).st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path}: larger than any index of shards", damaged)
    try:
        weight_map = parse_object(path.read_bytes(), fractions=True).get("weight_map")
    except MalformedError as error:
        raise CheckpointError(f"{path}: the index {error}", damaged) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map", damaged)
    for key, shard in weight_map.items():
        # A plain file name: an index must not lead out of its folder. C:name is a path on Windows.
        named = isinstance(shard, str) and re.fullmatch(r"[^/\\:]{1,200}\.safetensors", shard)
        if not named or not shard.isprintable():
            raise CheckpointError(
                f"{path}: {show(key)} is placed in {show(shard)}, not a file beside the index", damaged
            )
    return weight_map


def _open_folder(path: Path, variant: str | None, *, all_files: bool) -> Checkpoint:
    component = next((c for c in COMPONENTS if (path / c).is_dir()), None)
    home = PurePosixPath(component) if component else PurePosixPath()
    choices = _weights(path / home)
    indexes = [] if choices or component else sorted(path.glob("*.safetensors.index*.json"))
    if len(indexes) == 1:  # shards of another name, which an export of such an index writes
        return _open_index(indexes[0])
    if not choices:
        raise CheckpointError(
            f"{path / home}: no diffusion_pytorch_model weights in safetensors format",
            "Give a diffusers folder with a unet/ or transformer/ part, or the checkpoint file itself.",
        )
    chosen = _choose(choices, variant, path / home)
    if choices[chosen].endswith(".json"):
        _check_shards(path / home, choices, chosen)
        files = _read_shards(path, home / choices[chosen])
    else:
        files = (read_file(path / home / choices[chosen], str(home / choices[chosen])),)
    variants = sorted(set(choices) - {chosen})
    notes = [f"the {name or 'plain'} weights beside them are not in the output" for name in variants]
    companions, links = _companions(path, home)
    # Other weights of the pruned component would not be those of the output.
    beside = [c for c in companions if c.parent == home and _ANY_WEIGHTS.fullmatch(c.name)]
    copied = [c for c in companions if c not in beside]
    shards = re.compile("|".join(map(shard_pattern, choices)))
    unnamed = [c for c in beside if c.name not in choices.values() and not shards.fullmatch(c.name)]
    notes += [f"{_listed(unnamed)}: weights beside those that are pruned, and not in the output"] if unnamed else []
    copy_notes: list[str] = []
    if not all_files:
        index = path / MODEL_INDEX
        components = component_folders(index.read_bytes()) if index.is_file() else None
        of_pipeline = set(pipeline_files([str(c) for c in companions], variant, components))
        others = [c for c in copied if str(c) not in of_pipeline]
        advice = "no part of the pipeline, and left out (crdiff export --all-files copies them)"
        copy_notes += [f"{_listed(others)}: {advice}"] if others else []
        copied = [c for c in copied if str(c) in of_pipeline]
    copy_notes += _outside_links(path, copied)
    if choices[chosen].endswith(".json"):
        copied.append(home / choices[chosen])
    copy_notes += [f"{link} is a link to a folder and is not in the output" for link in links]
    return Checkpoint(path, "folder", files, tuple(sorted(copied)), tuple(notes), tuple(copy_notes))


def _check_shards(folder: Path, choices: Mapping[str, str], chosen: str) -> None:
    """Name another variant where shards of the chosen one are missing, as when only that one was fetched."""
    if all((folder / shard).exists() for shard in read_index(folder / choices[chosen]).values()):
        return
    for name, file in choices.items():
        shards = read_index(folder / file).values() if file.endswith(".json") else ()
        if name and name != chosen and all((folder / shard).exists() for shard in shards):
            raise CheckpointError(
                f"{folder / choices[chosen]}: shards of it are missing",
                f"Fetch them, or take the {name} weights beside them: --variant {name}.",
            )


def _listed(names: Sequence[PurePosixPath]) -> str:
    return ", ".join(map(str, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _outside_links(path: Path, names: Sequence[PurePosixPath]) -> list[str]:
    """Note links to files outside of the folder, whose content is copied; those of the Hub's cache belong to it."""
    blobs = path.absolute().parent.parent / "blobs"
    homes = [path.resolve(), *([blobs.resolve()] if path.absolute().parent.name == "snapshots" else [])]
    links = [(name, (path / name).resolve()) for name in names if (path / name).is_symlink()]
    outside = [(name, real) for name, real in links if not any(real.is_relative_to(home) for home in homes)]
    return [f"{name} is a link to {real}, whose content is copied" for name, real in outside]


_WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.(?P<variant>[\w-]+?))?\.safetensors")
# The second form is the old one, as are shards whose variant comes after their number.
INDEX_NAME = re.compile(
    r"diffusion_pytorch_model\.safetensors\.(?:index(?:\.(?P<variant>[\w-]+))?|(?P<old>[\w-]+)\.index)\.json"
)
_ANY_WEIGHTS = re.compile(r"diffusion_pytorch_model.*\.(safetensors|bin|msgpack|onnx|ckpt|pt)|"
                          r"diffusion_pytorch_model.*\.index(\.[\w-]+)?\.json")  # fmt: skip
# diffusers' `_add_variant` puts the variant before the number of the shard.
_VARIANT = re.compile(r"(?:.*/)?diffusion_pytorch_model\.([\w-]+?)(?:-\d{5}-of-\d{5})?\.safetensors")
# Other weights in a component's folder, such as adapters, are not its own.
_COMPONENT = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)(?=[.-]).*\.(safetensors|bin)$")
_SHARD = re.compile(r"\d{5}-of-\d{5}")


def _weights(folder: Path) -> dict[str, str]:
    """Map each variant ('' for the plain weights) to its file of weights, or to its index where they are sharded."""
    by_variant: dict[str, str] = {}
    for name in sorted(entry.name for entry in folder.iterdir()):
        if match := INDEX_NAME.fullmatch(name):
            by_variant[match["variant"] or match["old"] or ""] = name
        elif (match := _WEIGHTS.fullmatch(name)) and not _SHARD.search(name):
            by_variant.setdefault(match["variant"] or "", name)
    return by_variant


def variant_of(name: str) -> str | None:
    """Return the variant of the weights in a diffusers folder.

    Args:
        name: The name of a file of them, such as `unet/diffusion_pytorch_model.fp16.safetensors`.

    Returns:
        The variant, such as `fp16`; None for the plain weights.
    """
    named = _VARIANT.fullmatch(name)
    return named[1] if named else None


def shard_pattern(variant: str | None) -> str:
    """Return a regular expression for the names of a variant's shards, None for the plain weights."""
    if not variant:
        return r"diffusion_pytorch_model-\d{5}-of-\d{5}\.safetensors"
    text = re.escape(variant)
    return rf"diffusion_pytorch_model(\.{text}-\d{{5}}-of-\d{{5}}|-\d{{5}}-of-\d{{5}}\.{text})\.safetensors"


def _choose(choices: Mapping[str, str], variant: str | None, folder: Path) -> str:
    if variant is None:
        return "" if "" in choices else min(choices)
    if variant not in choices:
        names = ", ".join(name or "none (leave --variant out)" for name in sorted(choices))
        raise CheckpointError(f"{folder}: no {show(variant)} variant of the weights", f"There are: {names}.")
    return variant


def _companions(root: Path, home: PurePosixPath) -> tuple[list[PurePosixPath], list[str]]:
    """List every file below `root`, and the links to folders, which are not followed because they can form a circle.

    Only `home`, the folder that is pruned, may be a link itself.
    """
    files, links = [], []
    tops = [root, root / home] if (root / home).is_symlink() and home.parts else [root]
    for folder, folders, names in (step for top in tops for step in os.walk(top, onerror=_fail)):
        here = Path(folder)
        linked = [f for f in folders if (here / f).is_symlink()]
        links += [(here / f).relative_to(root).as_posix() for f in sorted(linked) if here / f not in tops]
        folders[:] = sorted(f for f in folders if f not in linked and f not in (".git", ".cache"))
        for name in sorted(names):
            if not (here / name).exists() and (here / name).is_symlink():
                raise CheckpointError(f"{here / name}: a broken link", "Remove it, or fetch what it should lead to.")
            check_regular(here / name)
            files.append(PurePosixPath((here / name).relative_to(root).as_posix()))
    return files, links


def _fail(error: OSError) -> NoReturn:
    raise error
