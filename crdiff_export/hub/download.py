"""Bases from the Hub, by way of huggingface_hub's cache: only the files that are needed."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from crdiff_export.errors import HubError
from crdiff_export.formats.checkpoint import read_index
from crdiff_export.hub.daemon_threads import aside
from crdiff_export.hub.messages import explained, no_answer

INDEX = ".safetensors.index.json"
# What a pipeline folder needs besides its weights.
SMALL_FILES = ("*.json", "*.txt", "*.model")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# diffusers' `_add_variant`: model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
_WEIGHTS = re.compile(r"(?P<folder>.+)/[^/.]+(\.(?P<variant>[^/.]+?))?(-\d{5}-of-\d{5})?\.safetensors")


def fetch(repo: str, file: str | None, revision: str | None, variant: str | None) -> Path:
    """The path in huggingface_hub's cache of one file of a repository, or of its diffusers folder where `file` is None.

    With an index come its shards. Only what is needed is downloaded; with HF_HUB_OFFLINE, or without a connection, only
    the cache is looked at. HubError says what to do next.
    """
    with explained(repo, file):
        if file is None:
            return aside(lambda: _fetch_folder(repo, revision, variant))
        return aside(lambda: _fetch_file(repo, file, revision))


def _fetch_file(repo: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(repo, file, revision=revision))
    for shard in shards(file, path):
        hf_hub_download(repo, shard, revision=revision)
    return path


def shards(file: str, path: Path) -> list[str]:
    """The shards that a file of a repository leads to, if it is an index of some; `path` is where it is."""
    if not file.endswith(INDEX):
        return []
    folder = PurePosixPath(file).parent
    return [str(folder / name) for name in sorted(set(read_index(path).values()))]


def fetch_parts(repo: str, revision: str | None = None, without: str | None = None) -> Path:
    """The path in the cache of a repository's folder for diffusers, without any weights; HubError says what to do next.

    With `without`, the name of a component, the weights of all others come, too.
    """

    def act() -> Path:
        from huggingface_hub import snapshot_download

        if without is None:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=list(SMALL_FILES)))
        names, offline = _list(repo, revision)
        weights = [name for name in _weights(names, None) if not name.startswith((f"{without}/", "safety_checker/"))]
        patterns = [*SMALL_FILES, *weights]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=offline))

    with explained(repo):
        return aside(act)


def hashes(path: Path) -> Mapping[str, str]:
    """The SHA-256 of files in the client's cache as the Hub gave them, by their names; only files in LFS have one.

    `path` is a file or a folder that `fetch` gave. The cache calls a file's content by its ETag, and leads to it by a
    link; where the system has no links, nothing is known.
    """
    home = path.parent if path.is_file() else path
    if path.name.endswith(INDEX):
        files = sorted(home.glob("*.safetensors"))
    else:
        files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    names = {file.relative_to(home).as_posix(): file.resolve().name for file in files if file.is_symlink()}
    return {name: blob for name, blob in names.items() if _SHA256.fullmatch(blob)}


def _fetch_folder(repo: str, revision: str | None, variant: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    names, offline = _list(repo, revision)
    found = wanted(repo, names, variant)
    if isinstance(found, str):
        return Path(hf_hub_download(repo, found, revision=revision, local_files_only=offline))
    patterns = [*SMALL_FILES, *found]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=offline))


def wanted(repo: str, names: Sequence[str], variant: str | None) -> str | list[str]:
    """Of a repository's files the one that is its checkpoint, or the weights of its diffusers folder."""
    if any(name.startswith(("unet/", "transformer/")) for name in names):
        return _weights(names, variant)
    single = [name for name in names if name.endswith(".safetensors")]
    if variant and len(single) > 1:  # as in model.fp16.safetensors, model-fp16.safetensors, model_fp16.safetensors
        single = [name for name in single if re.search(rf"[._-]{re.escape(variant)}\.safetensors$", name)] or single
    if len(single) == 1:
        return single[0]
    if not single:
        raise HubError(f"{repo}: has no checkpoint in safetensors format", "Give another repository.")
    shown = ", ".join(f"hf://{repo}/{name}" for name in single[:4])
    raise HubError(f"{repo}: has {len(single)} checkpoints", f"Choose one: {shown}{', …' if len(single) > 4 else ''}.")


def without_others(names: Sequence[str], variant: str | None) -> list[str]:
    """Of a folder's files those that `fetch` is after: the cache may also have weights of other variants."""
    chosen = set(_weights(names, variant))
    return [name for name in names if name in chosen or not _WEIGHTS.fullmatch(name)]


def _list(repo: str, revision: str | None) -> tuple[list[str], bool]:
    """The names of a repository's files, and whether they had to come from the cache."""
    from huggingface_hub import HfApi, constants, errors

    if not constants.HF_HUB_OFFLINE:
        try:
            return HfApi().list_repo_files(repo, revision=revision), False
        except errors.HfHubHTTPError:  # an answer
            raise
        except no_answer():
            pass  # as hf_hub_download does
    return _cached(repo, revision), True


def _cached(repo: str, revision: str | None) -> list[str]:
    """The names of a repository's files as of the last time that they were asked for."""
    import huggingface_hub
    from huggingface_hub import errors

    # From 2.0 on; there a snapshot of which only a part was wanted counts as incomplete.
    listing = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if listing is not None:
        with contextlib.suppress(errors.CachedRepoTreeNotFoundError):
            return [file.path for file in listing(repo, revision=revision)]
    folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _weights(files: Sequence[str], variant: str | None) -> list[str]:
    """The weights of one variant in every component's folder: that variant's where it has one, else the plain ones."""
    folders: dict[str, dict[str, str | None]] = {}
    for name in files:
        if match := _WEIGHTS.fullmatch(name):
            folders.setdefault(match["folder"], {})[name] = match["variant"]
    chosen: list[str] = []
    for _, inside in sorted(folders.items()):
        special = [name for name, kind in inside.items() if variant and kind == variant]
        plain = [name for name, kind in inside.items() if kind is None]
        chosen += special or plain or inside
    return chosen
