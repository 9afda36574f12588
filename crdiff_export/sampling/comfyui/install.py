"""Put the nodes into a ComfyUI and take them out again; nothing that somebody else put there is touched."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crdiff_export.bake import staging
from crdiff_export.bake.metadata import tool_version
from crdiff_export.errors import PoaError

FOLDER = "crdiff"
MARKER = "crdiff.json"
# ComfyUI passes over what is called so.
ASIDE = ".disabled"
_COPY = "crdiff_export"
_OURS = {"__init__.py", MARKER, _COPY, "__pycache__"}


@dataclass(frozen=True, slots=True)
class Installed:
    """What an installation is: its folder, the version in it, and where the package is if that is not in the folder.

    `replaced` is the version that was there before, `aside` where somebody else's folder of the same name now is.
    """

    folder: Path
    version: str
    linked: Path | None = None
    replaced: str | None = None
    aside: Path | None = None


def install(comfyui: Path, *, link: bool = False, force: bool = False) -> Installed:
    """Write `custom_nodes/crdiff`, in one step, in place of an older one.

    With `link` it takes the package from where it is now, instead of a copy. Somebody else's folder of that name is a
    PoaError; with `force` it is renamed.
    """
    target = _custom_nodes(comfyui) / FOLDER
    package = Path(__file__).parents[2]
    aside: Path | None = None
    with _explained(target):
        before = _version(target)
        if os.path.lexists(target) and before is None:
            aside = _make_way(target, force=force)
        with staging.temp_sibling(target, folder=True) as part:
            shutil.copyfile(Path(__file__).with_name("custom_node.py"), part / "__init__.py")
            if not link:
                # Recipes are for exports; bytecode is another Python's.
                shutil.copytree(package, part / _COPY, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "recipes"))
            marker = {"crdiff": tool_version(), "package": str(package) if link else _COPY}
            (part / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
            part.chmod(0o755)
            staging.publish(part, target)
    return Installed(target, tool_version(), package if link else None, before, aside)


def uninstall(comfyui: Path) -> Installed | None:
    """Remove what `install` wrote, and say what it was; None where nothing is installed."""
    target = _custom_nodes(comfyui) / FOLDER
    with _explained(target):
        if not os.path.lexists(target):
            return None
        version = _version(target)
        if version is None:
            raise _foreign(target, "Remove it yourself if you do not need it.")
        with staging.temp_sibling(target, folder=True) as part:
            part.rmdir()
            target.rename(part)
    return Installed(target, version)


def _custom_nodes(comfyui: Path) -> Path:
    """The folder of custom nodes; PoaError where that is not in a ComfyUI."""
    root = Path(os.path.abspath(comfyui.expanduser()))  # noqa: PTH100  a link to it is as good
    # The desktop app keeps its code elsewhere: there it is the folder with models and custom nodes.
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


def _version(target: Path) -> str | None:
    """The version that is installed; None where nothing is, or nothing of ours alone."""
    try:
        if target.is_symlink() or not target.is_dir() or {path.name for path in target.iterdir()} - _OURS:
            return None
        version = json.loads((target / MARKER).read_text(encoding="utf-8"))["crdiff"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, str) else None


def _make_way(target: Path, *, force: bool) -> Path:
    aside = target.with_name(target.name + ASIDE)
    if not force:
        raise _foreign(target, f"Remove it, or give --force to have it renamed to {aside.name}.")
    if os.path.lexists(aside):
        raise _foreign(target, f"Remove it or {aside.name}, which is there, too.")
    target.rename(aside)
    return aside


def _foreign(target: Path, hint: str) -> PoaError:
    return PoaError(f"{target}: was not installed by crdiff, or has files in it that were not", hint)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PoaError(
            f"{error.filename or target}: {error.strerror or error}",
            "Nothing was changed; see to it that you may write there and that ComfyUI does not run, then try again.",
        ) from error
