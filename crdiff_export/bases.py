"""From what a user calls a base to a path on this machine: a path, a Hub id, `hf://id/file`, or an alias."""

import re
from dataclasses import dataclass
from pathlib import Path

from crdiff_export import recipe_files
from crdiff_export.errors import CheckpointError

BUILT_IN = "demo"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True, slots=True)
class Base:
    """A base on this machine. `name` is what the output's header calls it."""

    path: Path
    name: str


def locate(base: str, variant: str | None = None) -> Base:
    """Find a base, fetching it from the Hub only if it is named by an alias or an id; CheckpointError or HubError else.

    An alias wins over a file of the same name (`./sdxl` means the file), a file over a Hub id.
    """
    if base == BUILT_IN:
        from crdiff_export import demo

        return Base(demo.path(), BUILT_IN)
    if recipe := recipe_files.by_alias(base):
        return _fetch(f"{recipe.repo}/{recipe.file}", variant)
    if base.startswith("hf://"):
        return _fetch(base.removeprefix("hf://"), variant)
    path = Path(base).expanduser()
    if path.exists() or path.is_symlink():
        return Base(path, path.resolve().name)
    if _HUB_ID.fullmatch(base) and path.suffix not in (".safetensors", ".ckpt", ".json"):
        return _fetch(base, variant)
    raise CheckpointError(f"{base}: no such file or folder", _hint(base))


def _hint(base: str) -> str:
    if "/" in base or "." in base:
        return "Give a path, a Hub id such as ORG/NAME, or an alias; `crdiff recipes list` names them."
    return recipe_files.unknown_alias_hint(base)


def _fetch(place: str, variant: str | None) -> Base:
    from crdiff_export import hub

    parts = place.split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise CheckpointError(f"hf://{place}: not a place on the Hub", "Write hf://ORG/NAME or hf://ORG/NAME/FILE.")
    name, _, revision = parts[1].partition("@")
    repo = f"{parts[0]}/{name}"
    file = parts[2] if len(parts) == 3 else None
    return Base(hub.fetch(repo, file, revision or None, variant), f"hf://{place}")
