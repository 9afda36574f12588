"""Find the base that a user names: by a path, an alias, a Hub id or an `hf://` address."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crdiff_export.errors import CheckpointError
from crdiff_export.formats.checkpoint import Checkpoint, open_checkpoint
from crdiff_export.hub import download
from crdiff_export.hub.location import HubLocation, cached_location, parse_id, parse_page, parse_uri
from crdiff_export.models import demo, recipe_files

BUILT_IN = demo.NAMES
_ADDRESS_HINT = "Write hf://ORG/NAME or hf://ORG/NAME/FILE."


@dataclass(frozen=True, slots=True)
class Base:
    """A base on this machine.

    Attributes:
        path: The file or folder.
        name: What the header of an output calls the base.
        stem: What outputs are named after; None for the path's own stem. A folder in the Hub's cache is named after
            a commit, which says nothing to people.
        hashes: The SHA-256 of whole files as hex, as the Hub gives them, by file name.

    """

    path: Path
    name: str
    stem: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)

    def open(self, variant: str | None, *, all_files: bool = False) -> Checkpoint:
        """Read the headers.

        Args:
            variant: The weights to take from a folder that has several, such as "fp16".
            all_files: Whether an export copies files of a folder that are no part of its pipeline.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: If the base is not a checkpoint that crdiff can read.

        """
        return open_checkpoint(self.path, variant, all_files=all_files)


def locate(base: str, variant: str | None = None) -> Base:
    """Find a base, and fetch it from the Hub if an alias or an id names it.

    An alias wins over a file of the same name (`./sdxl` is the file), a file wins over a Hub id.

    Args:
        base: A path, an alias, `ORG/NAME[@REVISION]` or `hf://ORG/NAME[@REVISION][/FILE]`.
        variant: The weights to take from a folder that has several, such as "fp16".

    Returns:
        The base on this machine.

    Raises:
        CheckpointError: If the text names nothing.
        HubError: If the Hub does not give the files.

    """
    if not base.strip():
        raise CheckpointError("the name of the base is empty", hint(""))
    if base in BUILT_IN:
        return Base(demo.path(base), base)
    if location := hub_location(base):
        path = download.fetch(location, variant)
        stem = location.repo.partition("/")[2] if path.is_dir() else None
        return Base(path, str(location), stem, download.cached_hashes(path))
    local = _existing_path(base)
    if local is None:
        raise CheckpointError(f"{without_secrets(base)}: no such file or folder", hint(base))
    if location := cached_location(local):
        return Base(local, str(location), location.repo.partition("/")[2])
    # The name of a link says more than its target's: in the Hub's cache that is a hash.
    return Base(local, local.name if local.name not in ("", "..") else local.resolve().name)


def hub_location(base: str) -> HubLocation | None:
    """Find where on the Hub a base is, without asking the Hub.

    Args:
        base: As for `locate`.

    Returns:
        The location; None for a base on this machine, and for a text that names nothing.

    Raises:
        CheckpointError: If the text begins with `hf://` and is not the address of a model.

    """
    if recipe := recipe_files.by_alias(base):
        return HubLocation(recipe.repo, recipe.file) if recipe.repo else None
    if base.startswith("hf://"):
        if location := parse_uri(base):
            return location
        raise CheckpointError(f"{base}: not a place on the Hub", _ADDRESS_HINT)
    return parse_id(base) if _existing_path(base) is None else None


def hub_uri(base: str) -> str | None:
    """Return the `hf://` address of a base.

    Args:
        base: As for `locate`.

    Returns:
        The address; None for a base on this machine, and for a text that names nothing.

    Raises:
        CheckpointError: As in `hub_location`.

    """
    location = hub_location(base)
    return str(location) if location else None


def _existing_path(base: str) -> Path | None:
    """Return the path if something is there, be it a broken link."""
    try:
        path = Path(base).expanduser()
    except RuntimeError:  # ~name of an unknown user
        return None
    return path if os.path.lexists(path) else None


def without_secrets(base: str) -> str:
    """Cut the parts of a link that can hold passwords and tokens; return any other text as it is."""
    return re.sub(r"//[^/@]*@", "//", base.partition("?")[0]) if "://" in base else base


def hint(base: str) -> str:
    """Say what to write instead of a text that names no base."""
    if base.startswith("hf://"):
        return _ADDRESS_HINT
    if page := parse_page(base):
        return f"A file on the Hub is written {page}."
    if "://" in base:
        return "Download the file and give its path, or name a file on the Hub: hf://ORG/NAME/FILE."
    if "/" in base or "." in base or not base.strip():
        return "Give a path, a Hub id such as ORG/NAME, or an alias; `crdiff recipes list` names them."
    return recipe_files.unknown_alias_hint(base)
