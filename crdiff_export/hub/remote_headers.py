"""Read the headers of a base on the Hub, so that it can be planned or skipped before anything is downloaded."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from crdiff_export.errors import HubError
from crdiff_export.formats.checkpoint import COMPONENTS, INDEX_NAME, Checkpoint
from crdiff_export.formats.safetensors import BITS, show
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.hub import repository
from crdiff_export.hub.bases import Base, RemoteBase
from crdiff_export.hub.download import INDEX, SMALL_FILES, choose_files, shard_names
from crdiff_export.hub.location import HubLocation
from crdiff_export.hub.repository import RemoteFile, RemoteHeader, Repository


def read_remote_headers(location: HubLocation, variant: str | None) -> RemoteBase | None:
    """Read the headers of what `fetch` would get; None if the Hub is off. Raises HubError."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    there = repository.read(location.repo, location.revision)
    if location.file is not None and location.file not in there.files:
        hint = f"See {constants.ENDPOINT}/{location.repo}/tree/main."
        raise HubError(f"{location.repo}/{location.file}: no such file in the repository", hint)
    chosen = location.file if location.file is not None else choose_files(location.repo, list(there.files), variant)
    if not isinstance(chosen, str):
        return _folder(location, there, chosen)
    if chosen.endswith(INDEX):
        names = shard_names(chosen, repository.download(there, chosen))
        if missing := [name for name in names if name not in there.files]:
            raise HubError(
                f"{there.repo}/{chosen}: its shard {missing[0]} is not in the repository", "Give another file."
            )
        return _files(location, there, chosen, names)
    return _files(location, there, chosen, [chosen])


def _files(location: HubLocation, there: Repository, file: str, weights: Sequence[str]) -> RemoteBase:
    """Describe a single file, or the shards of an index, which are named after the repository's root."""
    name = PurePosixPath(PurePosixPath(file).name)
    local_names = {path: PurePosixPath(path).name for path in weights}
    sharded = file not in local_names
    headers = repository.headers(there, weights)
    files = tuple(_source(there.files[path], local_names[path], headers[path]) for path in weights)
    hashes = {local_names[path]: sha256 for path in weights if (sha256 := there.files[path].sha256)}
    checkpoint = Checkpoint(Path(name), "shards" if sharded else "file", files, (name,) if sharded else ())
    size = sum(there.files[path].size for path in {file, *weights})
    pinned = HubLocation(there.repo, file, there.commit)
    return RemoteBase(Base(checkpoint.path, str(location), None, hashes), checkpoint, pinned, size)


def _folder(location: HubLocation, there: Repository, weights: list[str]) -> RemoteBase:
    """Describe a diffusers folder; of its weights only those of the pruned component have headers to read."""
    components = {name.partition("/")[0] for name in weights}
    component = next((name for name in COMPONENTS if name in components), COMPONENTS[0])
    pruned = sorted(name for name in weights if name.startswith(f"{component}/"))
    if not pruned:
        raise HubError(f"{there.repo}: its {component}/ has no weights in safetensors format", "Give another one.")
    headers = repository.headers(there, pruned)
    small = [name for name in there.files if any(PurePosixPath(name).match(kind) for kind in SMALL_FILES)]
    others = {*weights, *small} - set(pruned)
    companions = tuple(PurePosixPath(name) for name in sorted(others) if not _is_other_index(name, component, pruned))
    name = there.repo.partition("/")[2]
    files = tuple(_source(there.files[path], path, headers[path]) for path in pruned)
    return RemoteBase(
        Base(Path(name), str(location), name, {p: sha256 for p in pruned if (sha256 := there.files[p].sha256)}),
        Checkpoint(Path(name), "folder", files, companions),
        HubLocation(there.repo, None, there.commit),
        sum(there.files[path].size for path in {*weights, *small}),
        {str(path): there.files[str(path)].content for path in companions},
    )


def _is_other_index(name: str, component: str, pruned: list[str]) -> bool:
    """Whether a file is the index of weights of the pruned component that were not chosen."""
    path = PurePosixPath(name)
    if path.parent != PurePosixPath(component) or not (match := INDEX_NAME.fullmatch(path.name)):
        return False
    middle = f".{match['variant']}" if match["variant"] else ""
    return not any(re.search(rf"diffusion_pytorch_model{re.escape(middle)}-\d{{5}}-of-", file) for file in pruned)


def _source(remote: RemoteFile, name: str, header: RemoteHeader) -> SourceFile:
    for tensor in header.tensors:
        if tensor.dtype not in BITS:
            message = f"{remote.path}: tensor {show(tensor.name)} has the unknown dtype {show(tensor.dtype)}"
            raise HubError(message, "Give another file.")
    data = max((tensor.end for tensor in header.tensors), default=0)
    return SourceFile(Path(remote.path), name, header.tensors, header.metadata, remote.size - data, None)
