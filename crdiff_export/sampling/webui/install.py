"""Install the extension into a web UI's folder and remove it; files of others are never touched."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from crdiff_export.sampling.comfyui import install as folders
from crdiff_export.sampling.webui import ui
from crdiff_export.sampling.webui.ui import Ui

FOLDER = "sd-webui-crdiff"
_SCRIPTS = "scripts"
_OURS = frozenset({_SCRIPTS, folders.MARKER, folders.COPY, "__pycache__"})


@dataclass(frozen=True, slots=True)
class Extension:
    """An extension that was installed or removed.

    Attributes:
        ui: The UI.
        installed: The installation; None if there was none to remove.
    """

    ui: Ui
    installed: folders.Installed | None


def install(path: Path, *, force: bool = False) -> Extension:
    """Write the extension in one step, in place of an older one.

    Args:
        path: The UI's folder.
        force: Whether to move a folder of that name out of the extensions that crdiff has not installed.

    Returns:
        The extension.

    Raises:
        PoaError: The folder has no UI, cannot be written, or has another extension of that name.

    """
    web_ui = ui.detect(path)
    return Extension(web_ui, folders.replace(_folder(web_ui), write_extension, force=force))


def uninstall(path: Path) -> Extension:
    """Remove the extension.

    Args:
        path: The UI's folder.

    Returns:
        The extension that was removed, if there was one.

    Raises:
        PoaError: The folder has no UI, or the extension has files of others.

    """
    web_ui = ui.detect(path)
    return Extension(web_ui, folders.remove(_folder(web_ui)))


def write_extension(folder: Path) -> None:
    """Write the extension as the UIs load it.

    Args:
        folder: An empty folder.

    """
    (folder / _SCRIPTS).mkdir()
    shutil.copyfile(Path(__file__).with_name("extension.py"), folder / _SCRIPTS / "crdiff_poa.py")
    folders.write_package(folder)


def _folder(web_ui: Ui) -> folders.OwnFolder:
    # A UI loads every folder among its extensions, whatever its name is.
    return folders.OwnFolder(
        web_ui.extensions / FOLDER, _OURS, web_ui.extensions.parent / f"{FOLDER}.disabled", web_ui.name
    )
