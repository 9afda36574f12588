"""A base on the Hub by its headers alone, so that it can be planned, or skipped, before anything is downloaded."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from crdiff_export.errors import HubError
from crdiff_export.formats.checkpoint import COMPONENTS, INDEX_NAME, Checkpoint
from crdiff_export.formats.safetensors import BITS, show
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.hub import repository
from crdiff_export.hub.download import INDEX, SMALL_FILES, shards, wanted
from crdiff_export.hub.repository import RemoteFile, RemoteHeader, Repository


@dataclass(frozen=True, slots=True)
class Seen:
    """A base as of a commit: its headers, the SHA-256 of its files in LFS, and `size`, the bytes to fetch.

    `file` is the one that a repository without a folder for diffusers consists in. `contents` are those of companions,
    by their names (`RemoteFile.content`).
    """

    checkpoint: Checkpoint
    commit: str
    hashes: Mapping[str, str]
    size: int
    file: str | None = None
    contents: Mapping[str, str] = field(default_factory=dict)


def look(repo: str, file: str | None, revision: str | None, variant: str | None) -> Seen | None:
    """The headers of what `fetch` would get; HubError says why there are none, None that the Hub is off."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    there = repository.read(repo, revision)
    if file is not None and file not in there.files:
        raise HubError(f"{repo}/{file}: no such file in the repository", f"See {constants.ENDPOINT}/{repo}/tree/main.")
    found = file if file is not None else wanted(repo, list(there.files), variant)
    if not isinstance(found, str):
        return _folder(there, found)
    return _shards(there, found) if found.endswith(INDEX) else _file(there, found)


def _file(there: Repository, file: str) -> Seen:
    remote = there.files[file]
    name = PurePosixPath(file).name
    source = _source(remote, name, repository.headers(there, [file])[file])
    checkpoint = Checkpoint(Path(name), "file", (source,))
    return Seen(checkpoint, there.commit, {name: remote.sha256} if remote.sha256 else {}, remote.size, file)


def _shards(there: Repository, index: str) -> Seen:
    names = shards(index, repository.download(there, index))
    for name in names:
        if name not in there.files:
            raise HubError(f"{there.repo}/{index}: its shard {name} is not in the repository", "Give another file.")
    found = repository.headers(there, names)
    files = tuple(_source(there.files[name], PurePosixPath(name).name, found[name]) for name in names)
    hashes = {PurePosixPath(name).name: sha for name in names if (sha := there.files[name].sha256)}
    own = PurePosixPath(PurePosixPath(index).name)
    size = sum(there.files[name].size for name in (index, *names))
    return Seen(Checkpoint(Path(own), "shards", files, (own,)), there.commit, hashes, size, index)


def _folder(there: Repository, weights: list[str]) -> Seen:
    pruned = [name for name in weights if name.partition("/")[0] in COMPONENTS]
    component = next((c for c in COMPONENTS if any(name.startswith(f"{c}/") for name in pruned)), COMPONENTS[0])
    pruned = sorted(name for name in pruned if name.startswith(f"{component}/"))
    if not pruned:
        raise HubError(f"{there.repo}: its {component}/ has no weights in safetensors format", "Give another one.")
    found = repository.headers(there, pruned)
    files = tuple(_source(there.files[name], name, found[name]) for name in pruned)
    small = [name for name in there.files if any(PurePosixPath(name).match(kind) for kind in SMALL_FILES)]
    hashes = {name: sha for name in pruned if (sha := there.files[name].sha256)}
    size = sum(there.files[name].size for name in {*weights, *small})
    others = {*weights, *small} - set(pruned)
    companions = tuple(PurePosixPath(name) for name in sorted(others) if not _is_other(name, component, pruned))
    path = Path(there.repo.partition("/")[2])
    contents = {str(name): there.files[str(name)].content for name in companions}
    return Seen(Checkpoint(path, "folder", files, companions), there.commit, hashes, size, contents=contents)


def _is_other(name: str, component: str, pruned: list[str]) -> bool:
    """Whether a file is the index of weights of the pruned component other than those that were chosen."""
    path = PurePosixPath(name)
    if path.parent != PurePosixPath(component) or not (match := INDEX_NAME.fullmatch(path.name)):
        return False
    middle = f".{match['variant']}" if match["variant"] else ""
    return not any(re.search(rf"diffusion_pytorch_model{re.escape(middle)}-\d{{5}}-of-", one) for one in pruned)


def _source(remote: RemoteFile, name: str, header: RemoteHeader) -> SourceFile:
    for tensor in header.tensors:
        if tensor.dtype not in BITS:
            raise HubError(f"{remote.path}: tensor {show(tensor.name)} has the unknown dtype {show(tensor.dtype)}",
                           "Give another file.")  # fmt: skip
    data = max((tensor.end for tensor in header.tensors), default=0)
    return SourceFile(Path(remote.path), name, header.tensors, header.metadata, remote.size - data, None)
