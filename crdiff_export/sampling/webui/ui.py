"""Which web UI a folder has, and where it looks for extensions."""

import os
from dataclasses import dataclass
from pathlib import Path

from crdiff_export.errors import PoaError


@dataclass(frozen=True, slots=True)
class Ui:
    """A web UI in a folder.

    Attributes:
        name: Its name.
        adapter: The module of this folder that applies POA in it.
        extensions: The folder that it loads extensions from.
    """

    name: str
    adapter: str
    extensions: Path


# Each UI, its adapter, and paths that it has and the ones below it do not all have.
_SIGNS = (
    ("SD.Next", "sdnext", ("installer.py", "modules/sd_offload.py")),
    ("reForge", "reforge", ("modules_forge", "ldm_patched/modules/patcher_extension.py")),
    ("Forge", "forge", ("modules_forge", "backend/patcher")),
    ("Forge Classic", "forge", ("modules_forge", "ldm_patched")),
    ("A1111", "a1111", ("webui.py", "modules/sd_hijack_unet.py")),
)


def detect(path: Path) -> Ui:
    """Find out which UI a folder has.

    Args:
        path: The folder that has `modules` and `extensions` in it.

    Returns:
        The UI.

    Raises:
        PoaError: The folder has none.

    """
    root = Path(os.path.abspath(path.expanduser()))  # noqa: PTH100  keeps symbolic links
    for name, adapter, signs in _SIGNS:
        if all((root / sign).exists() for sign in signs):
            return Ui(name, adapter, root / "extensions")
    hint = "Give the folder that has webui.py, modules and extensions in it."
    if root.name == "extensions":
        hint = f"Give the folder that it is in: {root.parent}."
    names = ", ".join(name for name, _, _ in _SIGNS)
    raise PoaError(f"{root}: is none of {names}" if root.is_dir() else f"{root}: there is no such folder", hint)
