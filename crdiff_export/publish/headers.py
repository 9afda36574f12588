"""The headers of what crdiff made and a repository on the Hub holds: baked files and packs."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from crdiff_export.formats.crdiff_keys import Stamp, is_baked
from crdiff_export.hub import repository
from crdiff_export.hub.repository import Repository
from crdiff_export.packs import PackHeader, is_pack, read_header
from crdiff_export.packs.pack import KEY

# The header of a baked file, or of a pack.
MadeHeader = Stamp | PackHeader
# Headers by `RemoteFile.content` of their file; None for a file that crdiff did not make.
HeaderCache = dict[str, MadeHeader | None]


def remote_headers(remote: Repository, paths: Iterable[str], cache: HeaderCache | None = None) -> dict[str, MadeHeader]:
    """Read the headers of the files that crdiff made, without fetching their weights or masks.

    Files that are not checkpoints or packs, or whose header is damaged, are left out.

    Args:
        remote: The repository at a commit.
        paths: The files to look at.
        cache: Headers of files that need no request; new ones are added.

    Returns:
        The headers, by path.

    Raises:
        HubError: If the Hub does not answer.
    """
    chosen = [path for path in paths if path.endswith(".safetensors") or is_pack(Path(path))]
    known: HeaderCache = {} if cache is None else cache
    headers: dict[str, MadeHeader] = repository.parsed_headers(remote, chosen, _parse, known)
    # Only its name makes a pack usable.
    return {path: header for path, header in headers.items() if isinstance(header, PackHeader) == is_pack(Path(path))}


def _parse(path: str, metadata: Mapping[str, str]) -> MadeHeader | None:
    if KEY in metadata:
        return read_header(Path(path), metadata)
    return Stamp.from_metadata(metadata, path) if is_baked(metadata) else None
