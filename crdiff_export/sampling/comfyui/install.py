"""Install the nodes into a ComfyUI folder and remove them; files of others are never touched."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crdiff_export.bake import staging
from crdiff_export.bake.metadata import tool_version
from crdiff_export.errors import PoaError

FOLDER = "crdiff"
MARKER = "crdiff.json"
# ComfyUI ignores folders with this ending.
ASIDE = ".disabled"
# ComfyUI lists the workflows in this folder among its templates.
WORKFLOWS = "example_workflows"
COPY = "crdiff_export"
_OURS = frozenset({"__init__.py", MARKER, WORKFLOWS, COPY, "__pycache__"})
_PACKAGE = Path(__file__).parents[2]
# The nodes need no recipes and no demo models. ComfyUI's Python writes its own bytecode.
_NOT_COPIED = ("__pycache__", "*.pyc", "recipes", "demo*.safetensors", WORKFLOWS)


@dataclass(frozen=True, slots=True)
class Installed:
    """An installation.

    Attributes:
        folder: The folder of custom nodes.
        version: The version of crdiff in it.
        linked: The folder of the package if it was not copied.
        replaced: The version that was there before.
        aside: The new name of a folder of the same name that crdiff had not installed.
    """

    folder: Path
    version: str
    linked: Path | None = None
    replaced: str | None = None
    aside: Path | None = None


def install(comfyui: Path, *, link: bool = False, force: bool = False) -> Installed:
    """Write `custom_nodes/crdiff` in one step, in place of an older one.

    Args:
        comfyui: ComfyUI's folder.
        link: Whether the nodes load the package from its present folder, instead of a copy.
        force: Whether to rename a folder of that name that crdiff has not installed.

    Returns:
        The installation.

    Raises:
        PoaError: The folder is not ComfyUI's, cannot be written, or has another `custom_nodes/crdiff`.

    """
    package = _PACKAGE if link else None
    return replace(_folder(comfyui), lambda folder: write_nodes(folder, package), linked=package, force=force)


def write_nodes(folder: Path, package: Path | None = None, version: str | None = None) -> None:
    """Write the nodes and the example workflows as ComfyUI loads them.

    Args:
        folder: An empty folder.
        package: The package that the nodes load; None for a copy in `folder`.
        version: The version to note; that of this package if not given.

    """
    here = Path(__file__).parent
    shutil.copyfile(here / "custom_node.py", folder / "__init__.py")
    shutil.copytree(here / WORKFLOWS, folder / WORKFLOWS, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    write_package(folder, package, version)


def write_package(folder: Path, package: Path | None = None, version: str | None = None) -> None:
    """Write a copy of the package and the marker, which notes where the package is.

    Args:
        folder: The folder of an installation.
        package: The package that it loads; None for a copy in `folder`.
        version: The version to note; that of this package if not given.

    """
    if package is None:
        shutil.copytree(_PACKAGE, folder / COPY, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    marker = {"crdiff": version or tool_version(), "package": str(package) if package else COPY}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def uninstall(comfyui: Path) -> Installed | None:
    """Remove the installation.

    Args:
        comfyui: ComfyUI's folder.

    Returns:
        The installation that was removed, or None if there was none.

    Raises:
        PoaError: The folder is not ComfyUI's, or `custom_nodes/crdiff` has files of others.

    """
    return remove(_folder(comfyui))


@dataclass(frozen=True, slots=True)
class OwnFolder:
    """A folder that crdiff installs into a program and removes again.

    Attributes:
        path: The folder.
        names: The names of what is written there; a folder with anything else is not removed.
        aside: Where a folder that crdiff has not installed is moved to; the program must not load it from there.
        program: The program's name, for messages.
    """

    path: Path
    names: frozenset[str]
    aside: Path
    program: str


def replace(
    folder: OwnFolder, write: Callable[[Path], None], *, linked: Path | None = None, force: bool = False
) -> Installed:
    """Write a folder in one step, in place of an older one.

    Args:
        folder: The folder.
        write: Writes its files into an empty folder.
        linked: The package that it loads, if that is not a copy.
        force: Whether to move a folder of that name aside that crdiff has not installed.

    Returns:
        The installation.

    Raises:
        PoaError: The folder cannot be written, or crdiff has not installed what is there.

    """
    target = folder.path
    aside: Path | None = None
    with _as_poa_error(folder):
        before = _version(folder)
        if os.path.lexists(target) and before is None:
            aside = _move_aside(folder, force=force)
        with staging.temp_sibling(target, folder=True) as part:
            write(part)
            part.chmod(0o755)
            staging.publish(part, target)
    return Installed(target, tool_version(), linked, before, aside)


def remove(folder: OwnFolder) -> Installed | None:
    """Remove a folder that crdiff has installed.

    Args:
        folder: The folder.

    Returns:
        The installation that was removed, or None if there was none.

    Raises:
        PoaError: The folder has files of others.

    """
    target = folder.path
    with _as_poa_error(folder):
        if not os.path.lexists(target):
            return None
        version = _version(folder)
        if version is None:
            raise _foreign(target, "Remove it yourself if you do not need it.")
        with staging.temp_sibling(target, folder=True) as part:
            part.rmdir()
            target.rename(part)
    return Installed(target, version)


def _folder(comfyui: Path) -> OwnFolder:
    path = _custom_nodes(comfyui) / FOLDER
    return OwnFolder(path, _OURS, path.with_name(path.name + ASIDE), "ComfyUI")


def _custom_nodes(comfyui: Path) -> Path:
    """Return the folder of custom nodes; PoaError if this is not ComfyUI's folder."""
    root = Path(os.path.abspath(comfyui.expanduser()))  # noqa: PTH100  keeps symbolic links
    # The desktop app has its code elsewhere, and its user's folder has models and custom nodes.
    if (root / "custom_nodes").is_dir() and ((root / "comfy").is_dir() or (root / "models").is_dir()):
        return root / "custom_nodes"
    inside = root / "ComfyUI"
    if root.name == "custom_nodes":
        hint = f"Give the folder that it is in: {root.parent}."
    elif (inside / "custom_nodes").is_dir():
        hint = f"Give the folder inside: {inside}."
    else:
        hint = "Give the folder that has custom_nodes and comfy in it."
    raise PoaError(f"{root}: is no ComfyUI folder" if root.is_dir() else f"{root}: there is no such folder", hint)


def _version(folder: OwnFolder) -> str | None:
    """Return the version that is installed; None if there is none, or if the folder has files of others."""
    target = folder.path
    try:
        if target.is_symlink() or not target.is_dir() or {path.name for path in target.iterdir()} - folder.names:
            return None
        version = json.loads((target / MARKER).read_text(encoding="utf-8"))["crdiff"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, str) else None


def _move_aside(folder: OwnFolder, *, force: bool) -> Path:
    target, aside = folder.path, folder.aside
    where = aside.name if aside.parent == target.parent else str(aside)
    if not force:
        raise _foreign(target, f"Remove it, or give --force to have it renamed to {where}.")
    if os.path.lexists(aside):
        raise _foreign(target, f"Remove it or {where}, which is there, too.")
    target.rename(aside)
    return aside


def _foreign(target: Path, hint: str) -> PoaError:
    return PoaError(f"{target}: was not installed by crdiff, or has files in it that were not", hint)


@contextmanager
def _as_poa_error(folder: OwnFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PoaError(
            f"{error.filename or folder.path}: {error.strerror or error}",
            f"Nothing was changed; see to it that you may write there and that {folder.program} does not run, then try "
            "again.",
        ) from error
