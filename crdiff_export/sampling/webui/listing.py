"""The baked files and packs among a web UI's models."""

import os
from collections.abc import Iterator
from pathlib import Path

from crdiff_export.errors import PoaError
from crdiff_export.packs import SUFFIX
from crdiff_export.sampling.comfyui.listing import PACKS, is_baked


def files() -> dict[str, Path]:
    """Return every baked file and pack by its path in its folder, such as `SUBFOLDER/NAME.crdiff`."""
    by_name: dict[str, Path] = {}
    for root in _roots():
        for folder, _, names in os.walk(root, followlinks=True):
            for file in (Path(folder) / name for name in sorted(names)):
                if file.suffix == SUFFIX or (file.suffix == ".safetensors" and is_baked(file)):
                    by_name.setdefault(file.relative_to(root).as_posix(), file)
    return by_name


def path(name: str) -> Path:
    """Return the path of a listed file; raises PoaError for an unknown name."""
    file = files().get(name)
    if file is None:
        raise PoaError(
            f"{name}: is not among this UI's models", f"Put it into models/{PACKS}, or beside the checkpoints."
        )
    return file


def _roots() -> Iterator[Path]:
    """Yield models/crdiff and the folders with checkpoints: the usual one, and the one that the user has named."""
    from modules import paths, sd_models, shared

    yield Path(paths.models_path) / PACKS
    folders = (getattr(owner, "ckpt_dir", None) for owner in (shared.cmd_opts, shared.opts))
    for folder in (getattr(sd_models, "model_path", None), *folders):
        if folder:
            yield Path(folder)
