"""The baked files among ComfyUI's models."""

import os
import struct
from functools import lru_cache
from pathlib import Path

from crdiff_export.errors import PoaError
from crdiff_export.formats.safetensors import MAX_BYTES
from crdiff_export.packs import SUFFIX
from crdiff_export.verify import inspect

# ComfyUI's names of the folders with models.
FOLDERS = ("checkpoints", "diffusion_models")
# Our folder beside them, for packs.
PACKS = "crdiff"
_KEY = b'"crdiff.schema"'


def names() -> list[str]:
    """List the baked files in ComfyUI's folders by ComfyUI's names."""
    return [name for name, path in _paths().items() if is_baked(path)]


def path(name: str) -> Path:
    """Return the file that ComfyUI calls `name`; PoaError if there is none."""
    file = _paths().get(name)
    if file is None:
        raise PoaError(
            f"{name}: is not among ComfyUI's models", f"Put it into one of its folders {' or '.join(FOLDERS)}."
        )
    return file


def is_baked(file: Path) -> bool:
    """Whether a safetensors file has crdiff's header; the header is not parsed. False for files that cannot be read."""
    try:
        status = file.stat()
    except OSError:
        return False
    return _is_baked(file, status.st_mtime_ns, status.st_size)


def packs() -> list[str]:
    """List the packs in ComfyUI's folders by their path there."""
    return sorted(_packs())


def pack_path(name: str) -> Path:
    """Return the path of a listed pack; raises PoaError for an unknown name."""
    file = _packs().get(name)
    if file is None:
        raise PoaError(
            f"{name}: is not among ComfyUI's packs", f"Put it into models/{PACKS}, or beside the checkpoints."
        )
    return file


def _packs() -> dict[str, Path]:
    """Return every pack by its path in models/crdiff, or in a folder with models."""
    import folder_paths

    roots = [Path(folder_paths.models_dir) / PACKS]
    roots += [Path(root) for folder in FOLDERS for root in folder_paths.get_folder_paths(folder)]
    files: dict[str, Path] = {}
    for root in roots:
        for folder, _, names in os.walk(root, followlinks=True):
            for file in (Path(folder) / name for name in names if name.endswith(SUFFIX)):
                files.setdefault(file.relative_to(root).as_posix(), file)
    return files


def about(file: Path) -> str:
    """Return the text of `crdiff inspect` for a file."""
    report = inspect.inspect(file)
    lines = [f"{name}: {text}" for name, text in report.facts()]
    lines += ["", " | ".join(report.columns), *(" | ".join(row) for row in report.rows)] if report.rows else []
    return "\n".join(lines)


def _paths() -> dict[str, Path]:
    """Return every safetensors file by its name; of two files with one name the one in `checkpoints`."""
    import folder_paths

    files: dict[str, Path] = {}
    for folder in FOLDERS:
        for name in folder_paths.get_filename_list(folder):
            full = folder_paths.get_full_path(folder, name) if name.endswith(".safetensors") else None
            if full:
                files.setdefault(name, Path(full))
    return files


@lru_cache(maxsize=4096)  # ComfyUI lists the files whenever its page is loaded
def _is_baked(file: Path, changed: int, size: int) -> bool:  # noqa: ARG001  a changed file is read again
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            return _KEY in stream.read(length) if length <= min(size, MAX_BYTES) else False
    except (OSError, struct.error):
        return False
