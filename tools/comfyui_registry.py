"""Write the folder that can be published to ComfyUI's registry: `python tools/comfyui_registry.py FOLDER`.

It is the folder that `crdiff comfyui install` makes, with a `pyproject.toml` of its own, the licence and a README. The
registry's client takes a whole folder, and ComfyUI loads the `__init__.py` at its top. The repository has no such file,
but tests, and dependencies that the nodes do not need.
"""

import argparse
import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

from crdiff_export.sampling.comfyui import install

ROOT = Path(__file__).parents[1]
_DESCRIPTION = "CR-Diff in ComfyUI: prune a model for the size of each picture, with pruned output amplification."
_OPERATING_SYSTEM = "Operating System :: "


def write(folder: Path) -> list[str]:
    """Write the folder.

    Args:
        folder: Where to; it may exist if it is empty.

    Returns:
        What has to be filled in before the folder can be published.

    Raises:
        FileExistsError: There is something in the folder.

    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; give another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    own = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, comfy = own["project"], own["tool"]["comfy"]
    install.write_nodes(folder, version=project["version"])
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    shutil.copyfile(Path(install.__file__).with_name("README.md"), folder / "README.md")
    (folder / "pyproject.toml").write_text(_pyproject(project, comfy), encoding="utf-8", newline="\n")
    missing = [] if comfy["PublisherId"] else ["PublisherId in [tool.comfy]"]
    return missing + ([] if "Repository" in project["urls"] else ["Repository in [project.urls]"])


def _pyproject(project: dict[str, Any], comfy: dict[str, Any]) -> str:
    """Return the folder's `pyproject.toml`, as https://docs.comfy.org/registry/specifications describes it."""
    nodes = {
        "name": install.FOLDER,
        "version": project["version"],
        "description": _DESCRIPTION,
        "requires-python": project["requires-python"],
        # ComfyUI itself has all that the nodes need.
        "dependencies": [],
        "classifiers": [name for name in project["classifiers"] if name.startswith(_OPERATING_SYSTEM)],
    }
    lines = ["[project]", *_entries(nodes), 'license = { file = "LICENSE" }', 'readme = "README.md"', ""]
    lines += ["[project.urls]", *_entries(project["urls"]), "", "[tool.comfy]", *_entries(comfy), ""]
    return "\n".join(lines)


def _entries(table: dict[str, Any]) -> list[str]:
    """Return the lines of a table of strings and lists of strings, which TOML writes as JSON does."""
    return [f"{key} = {json.dumps(value)}" for key, value in table.items()]


def main() -> int:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    try:
        missing = write(folder)
    except FileExistsError as error:
        parser.error(str(error))
    sys.stdout.write(f"{folder}\n")
    for name in missing:
        sys.stderr.write(f"fill in {name} of pyproject.toml and run this again, before `comfy node publish`\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
