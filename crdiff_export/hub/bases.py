"""From what a user calls a base to a path on this machine: a path, a Hub id, `hf://id/file`, or an alias."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from crdiff_export.errors import CheckpointError
from crdiff_export.formats.checkpoint import PICKLES, Checkpoint, open_checkpoint
from crdiff_export.models import recipe_files

BUILT_IN = "demo"
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# huggingface_hub's own spelling; a revision with a slash is a pull request, or has %2F for it.
_HUB_PLACE = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(/(?P<file>.+))?")
_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)(?:/(?:blob|resolve)/main/([^?#]+))?"
)
# What is the name of a file, even where it looks like ORG/NAME.
_FILES = (".safetensors", ".ckpt", ".json", ".pt", ".pth", ".bin", ".gguf", ".sft")


@dataclass(frozen=True, slots=True)
class Base:
    """A base on this machine. `name` is what the output's header calls it.

    Outputs are called after `stem` if there is one: in the Hub's cache a folder's own name is a commit. `hashes` are
    the SHA-256 of whole files as the Hub gives them, by the files' names.
    """

    path: Path
    name: str
    stem: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)

    def open(self, variant: str | None) -> Checkpoint:
        """Read its headers; CheckpointError says what is wrong with them."""
        checkpoint = open_checkpoint(self.path, variant)
        if self.stem is None or checkpoint.kind != "folder":
            return checkpoint
        from crdiff_export import hub

        names = hub.without_others([str(name) for name in checkpoint.companions], variant)
        return replace(checkpoint, companions=tuple(map(PurePosixPath, names)))


@dataclass(frozen=True, slots=True)
class _Place:
    """A repository on the Hub, or one file of it."""

    repo: str
    file: str | None
    revision: str | None

    @property
    def name(self) -> str:
        at = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        return f"hf://{self.repo}{at}{f'/{self.file}' if self.file else ''}"


def locate(base: str, variant: str | None = None) -> Base:
    """Find a base, fetching it from the Hub only if it is named by an alias or an id; CheckpointError or HubError else.

    An alias wins over a file of the same name (`./sdxl` means the file), a file over a Hub id.
    """
    if not base.strip():
        raise CheckpointError("the name of the base is empty", _hint(""))
    if base == BUILT_IN:
        from crdiff_export.models import demo

        return Base(demo.path(), BUILT_IN)
    if place := _place(base):
        from crdiff_export import hub

        path = hub.fetch(place.repo, place.file, place.revision, variant)
        stem = place.repo.partition("/")[2] if path.is_dir() else None
        return Base(path, place.name, stem, hub.hashes(path))
    found = _path(base)
    if found is None:
        raise CheckpointError(f"{_shown(base)}: no such file or folder", _hint(base))
    # A link's own name says more than what it leads to: in the Hub's cache that is a hash.
    return Base(found, found.name if found.name not in ("", "..") else found.resolve().name)


@dataclass(frozen=True, slots=True)
class Looked:
    """A base of which only the headers have been read; its files may still be on the Hub.

    `place` is where to fetch it from as of the commit that was looked at, with `size` bytes at most; None for what is
    on this machine. `contents` tell what its companions hold, as far as the Hub says.
    """

    base: Base
    checkpoint: Checkpoint
    place: str | None = None
    size: int = 0
    contents: Mapping[str, str] = field(default_factory=dict)

    def here(self, variant: str | None = None) -> "Looked":
        """The same on this machine, fetched if it has to be; HubError where that fails."""
        if self.place is None:
            return self
        path = locate(self.place, variant).path
        found = open_checkpoint(path, variant)
        kept = tuple(name for name in found.companions if name in self.checkpoint.companions)
        return Looked(replace(self.base, path=path), replace(found, companions=kept))


def look(base: str, variant: str | None = None) -> Looked:
    """Read a base's headers, those of one on the Hub without fetching it; CheckpointError or HubError as in `locate`.

    A pickle has no header and is fetched. So is everything while the Hub is off (HF_HUB_OFFLINE): from the cache.
    """
    place = _place(base)
    if place and not (place.file or "").lower().endswith(PICKLES):
        from crdiff_export import hub

        if found := hub.look(place.repo, place.file, place.revision, variant):
            stem = place.repo.partition("/")[2] if found.checkpoint.kind == "folder" else None
            at = _Place(place.repo, place.file or found.file, found.commit).name
            return Looked(
                Base(found.checkpoint.path, place.name, stem, found.hashes),
                found.checkpoint,
                at,
                found.size,
                found.contents,
            )
    located = locate(base, variant)
    return Looked(located, located.open(variant))


def remote(base: str) -> str | None:
    """Where on the Hub a base is, as hf://…; None for what is on this machine or nowhere."""
    place = _place(base)
    return place.name if place else None


def _place(base: str) -> _Place | None:
    recipe = recipe_files.by_alias(base)
    if recipe:
        return _Place(recipe.repo, recipe.file, None) if recipe.repo else None
    if base.startswith("hf://"):
        match = _HUB_PLACE.fullmatch(base.removeprefix("hf://").rstrip("/"))
        if not match:
            raise CheckpointError(f"{base}: not a place on the Hub", "Write hf://ORG/NAME or hf://ORG/NAME/FILE.")
        revision = match["revision"]
        return _Place(match["repo"], match["file"], unquote(revision) if revision else None)
    if _path(base) is None and not base.lower().endswith(_FILES) and (match := _HUB_ID.fullmatch(base)):
        return _Place(match["repo"], None, match["revision"])
    return None


def _path(base: str) -> Path | None:
    """The path, if something is there; a broken link is something."""
    try:
        path = Path(base).expanduser()
    except RuntimeError:  # a ~name that is nobody's home
        return None
    return path if os.path.lexists(path) else None


def _shown(base: str) -> str:
    """What was given; a link without the places where passwords and tokens stand."""
    return re.sub(r"//[^/@]*@", "//", base.partition("?")[0]) if "://" in base else base


def _hint(base: str) -> str:
    if page := _HUB_PAGE.match(base):
        return f"A file on the Hub is written hf://{page[1]}{f'/{page[2]}' if page[2] else ''}."
    if "://" in base:
        return "Download the file and give its path, or name a file on the Hub: hf://ORG/NAME/FILE."
    if "/" in base or "." in base or not base.strip():
        return "Give a path, a Hub id such as ORG/NAME, or an alias; `crdiff recipes list` names them."
    return recipe_files.unknown_alias_hint(base)
