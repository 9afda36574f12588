"""The baked files among ComfyUI's models."""

import struct
from functools import lru_cache
from pathlib import Path

from crdiff_export.errors import PoaError
from crdiff_export.formats.safetensors import MAX_BYTES
from crdiff_export.verify import inspect

# ComfyUI's names for the folders that its loaders take models from.
FOLDERS = ("checkpoints", "diffusion_models")
_KEY = b'"crdiff.schema"'


def names() -> list[str]:
    """The baked files in ComfyUI's folders, as its loaders call them."""
    return [name for name, path in _paths().items() if is_baked(path)]


def path(name: str) -> Path:
    """The file that ComfyUI calls `name`; PoaError if there is none."""
    found = _paths().get(name)
    if found is None:
        raise PoaError(
            f"{name}: is not among ComfyUI's models", f"Put it into one of its folders {' or '.join(FOLDERS)}."
        )
    return found


def is_baked(file: Path) -> bool:
    """Whether a safetensors file has our header, told without parsing it; False for one that cannot be read."""
    try:
        status = file.stat()
    except OSError:
        return False
    return _is_baked(file, status.st_mtime_ns, status.st_size)


def about(file: Path) -> str:
    """What `crdiff inspect` says of a file."""
    found = inspect.inspect(file)
    lines = [f"{name}: {text}" for name, text in found.facts()]
    lines += ["", " | ".join(found.columns), *(" | ".join(row) for row in found.rows)] if found.rows else []
    return "\n".join(lines)


def _paths() -> dict[str, Path]:
    """Every safetensors file by its name; of two with one name the checkpoint."""
    import folder_paths

    found: dict[str, Path] = {}
    for folder in FOLDERS:
        for name in folder_paths.get_filename_list(folder):
            full = folder_paths.get_full_path(folder, name) if name.endswith(".safetensors") else None
            if full:
                found.setdefault(name, Path(full))
    return found


@lru_cache(maxsize=4096)  # ComfyUI asks at every reload of a page
def _is_baked(file: Path, changed: int, size: int) -> bool:  # noqa: ARG001  another time is another file
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            return _KEY in stream.read(length) if length <= min(size, MAX_BYTES) else False
    except (OSError, struct.error):
        return False
