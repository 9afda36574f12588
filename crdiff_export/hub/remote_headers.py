"""Read the headers of a base on the Hub, so that it can be planned or skipped before anything is downloaded."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from crdiff_export.errors import HubError
from crdiff_export.formats.checkpoint import (
    INDEX_NAME,
    MODEL_INDEX,
    PICKLES,
    Checkpoint,
    open_checkpoint,
    shard_pattern,
)
from crdiff_export.formats.pipeline_files import COMPONENTS, SMALL_FILES, component_folders, pipeline_files
from crdiff_export.formats.safetensors import BITS, show
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.hub import bases, repository
from crdiff_export.hub.bases import Base
from crdiff_export.hub.download import INDEX, choose_files, shard_names
from crdiff_export.hub.location import HubLocation
from crdiff_export.hub.repository import Repository


@dataclass(frozen=True, slots=True)
class RemoteBase:
    """A base whose headers have been read; its files may still be on the Hub.

    Attributes:
        base: The base; its path exists only after `fetch`.
        checkpoint: The headers.
        location: Where to fetch it from, at the commit whose headers were read; None for a base on this machine.
        size: The bytes to fetch at most.
        contents: `RemoteFile.content` of the files beside the weights, by name, as far as the Hub gives it.

    """

    base: Base
    checkpoint: Checkpoint
    location: HubLocation | None = None
    size: int = 0
    contents: Mapping[str, str] = field(default_factory=dict)

    def fetch(self, variant: str | None = None) -> "RemoteBase":
        """Fetch the files that are not on this machine.

        Args:
            variant: The weights to take from a folder that has several.

        Returns:
            The same base on this machine.

        Raises:
            HubError: If the Hub does not give the files.

        """
        if self.location is None:
            return self
        path = bases.locate(str(self.location), variant).path
        checkpoint = open_checkpoint(path, variant)
        companions = tuple(name for name in checkpoint.companions if name in self.checkpoint.companions)
        return RemoteBase(replace(self.base, path=path), replace(checkpoint, companions=companions))


def read_headers(base: str, variant: str | None = None) -> RemoteBase:
    """Read the headers of a base, on the Hub without fetching its weights.

    A pickle has no header and is fetched. So is everything if the Hub is off (HF_HUB_OFFLINE): from the cache.

    Args:
        base: As for `locate`.
        variant: As for `locate`.

    Returns:
        The base and its headers.

    Raises:
        CheckpointError: If the text names nothing, or not a checkpoint.
        HubError: If the Hub does not give the headers.

    """
    location = bases.hub_location(base)
    if location and not (location.file or "").lower().endswith(PICKLES):
        from huggingface_hub import constants

        if not constants.HF_HUB_OFFLINE:
            return _read_remote_headers(location, variant)
    local = bases.locate(base, variant)
    return RemoteBase(local, local.open(variant))


def _read_remote_headers(location: HubLocation, variant: str | None) -> RemoteBase:
    """Read the headers of what `fetch` would get."""
    from huggingface_hub import constants

    listing = repository.read(location.repo, location.revision)
    chosen = location.file or choose_files(location.repo, list(listing.files), variant)
    if not isinstance(chosen, str):
        return _folder(location, listing, chosen, variant)
    if chosen not in listing.files:
        hint = f"See {constants.ENDPOINT}/{location.repo}/tree/main."
        raise HubError(f"{location.repo}/{chosen}: no such file in the repository", hint)
    if not chosen.endswith(INDEX):
        return _files(location, listing, chosen, [chosen])
    shards = shard_names(chosen, repository.download(listing, chosen))
    if missing := [name for name in shards if name not in listing.files]:
        raise HubError(
            f"{listing.repo}/{chosen}: its shard {missing[0]} is not in the repository", "Give another file."
        )
    return _files(location, listing, chosen, shards)


def _files(location: HubLocation, listing: Repository, file: str, paths: Sequence[str]) -> RemoteBase:
    """Describe a single file, or the shards of an index, which are named after the repository's root."""
    name = PurePosixPath(PurePosixPath(file).name)
    weights, hashes = _weights(listing, {path: PurePosixPath(path).name for path in paths})
    sharded = file not in paths
    checkpoint = Checkpoint(Path(name), "shards" if sharded else "file", weights, (name,) if sharded else ())
    return RemoteBase(
        Base(checkpoint.path, str(location), None, hashes),
        checkpoint,
        HubLocation(listing.repo, file, listing.commit),
        sum(listing.files[path].size for path in {file, *paths}),
    )


def _folder(location: HubLocation, listing: Repository, paths: list[str], variant: str | None) -> RemoteBase:
    """Describe a diffusers folder; of its weights only those of the pruned component have headers to read."""
    components = {name.partition("/")[0] for name in paths}
    component = next((name for name in COMPONENTS if name in components), COMPONENTS[0])
    pruned = sorted(name for name in paths if name.startswith(f"{component}/") and name.endswith(".safetensors"))
    if not pruned:
        raise HubError(f"{listing.repo}: its {component}/ has no weights in safetensors format", "Give another one.")
    small = [name for name in listing.files if name.endswith(SMALL_FILES)]
    index = repository.download(listing, MODEL_INDEX).read_bytes() if MODEL_INDEX in listing.files else b""
    needed = pipeline_files(list(listing.files), variant, component_folders(index))
    others = {*needed} & {*paths, *small} - {*pruned}
    companions = tuple(PurePosixPath(name) for name in sorted(others) if not _is_other_index(name, component, pruned))
    name = listing.repo.partition("/")[2]
    weights, hashes = _weights(listing, {path: path for path in pruned})
    return RemoteBase(
        Base(Path(name), str(location), name, hashes),
        Checkpoint(Path(name), "folder", weights, companions),
        HubLocation(listing.repo, None, listing.commit),
        sum(listing.files[path].size for path in {*paths, *small}),
        {str(path): listing.files[str(path)].content for path in companions},
    )


def _is_other_index(name: str, component: str, pruned: list[str]) -> bool:
    """Whether a file is the index of weights of the pruned component that were not chosen."""
    path = PurePosixPath(name)
    if path.parent != PurePosixPath(component) or not (match := INDEX_NAME.fullmatch(path.name)):
        return False
    variant = match["variant"] or match["old"]
    shard = re.compile(shard_pattern(variant))
    return not any(shard.fullmatch(PurePosixPath(file).name) for file in pruned)


def _weights(listing: Repository, names: Mapping[str, str]) -> tuple[tuple[SourceFile, ...], dict[str, str]]:
    """Describe files of weights by their path and their name on this machine; also return the SHA-256 of each name."""
    files, hashes = [], {}
    for path, header in repository.headers(listing, names).items():
        for tensor in header.tensors:
            if tensor.dtype not in BITS:
                message = f"{path}: tensor {show(tensor.name)} has the unknown dtype {show(tensor.dtype)}"
                raise HubError(message, "Give another file.")
        files.append(SourceFile(Path(path), names[path], header.tensors, header.metadata, header.data_start, None))
        if sha256 := listing.files[path].sha256:
            hashes[names[path]] = sha256
    return tuple(files), hashes
