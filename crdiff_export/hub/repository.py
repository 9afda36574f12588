"""Read what a repository on the Hub holds at one commit, without downloading its weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from crdiff_export.errors import CrdiffError, HubError
from crdiff_export.formats.safetensors import Header, TensorSpec
from crdiff_export.hub.daemon_threads import map_in_threads
from crdiff_export.hub.messages import as_hub_error

if TYPE_CHECKING:
    from huggingface_hub import SafetensorsFileMetadata

_T = TypeVar("_T")
# Headers to request at once.
AT_ONCE = 8
# Bytes at the start of a safetensors file that give the length of its header.
_LENGTH = 8
# Paths in one request about files.
_PATHS = 100
# What the client raises for a header whose JSON has another form than it expects.
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError, RecursionError)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        path: The path in the repository.
        size: Bytes.
        sha256: The SHA-256 as hex for a file in LFS, else None.
        blob: The id that git gives the file, or its LFS pointer.

    """

    path: str
    size: int
    sha256: str | None
    blob: str

    @property
    def content(self) -> str:
        """An id that files of equal content share, if both are stored in LFS or both outside."""
        return self.sha256 or self.blob


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at a commit: its id, the commit and its files by path."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile] = field(default_factory=dict)


def read(repo: str, revision: str | None = None) -> Repository:
    """List the files of a repository at the head of a revision.

    Args:
        repo: ORG/NAME.
        revision: A branch, tag or commit; None for the default branch.

    Returns:
        The repository at the commit that the revision is at now.

    Raises:
        HubError: If the Hub does not answer, or has no such repository or revision.

    """
    from huggingface_hub import HfApi

    with as_hub_error(repo):
        commit = str(HfApi().model_info(repo, revision=revision).sha)
        return Repository(repo, commit, _files(HfApi().list_repo_tree(repo, recursive=True, revision=commit)))


def read_if_there(repo: str, revision: str | None = None) -> Repository | None:
    """List the files of a repository that may not exist.

    Args:
        repo: ORG/NAME.
        revision: A branch, tag or commit; None for the default branch.

    Returns:
        The repository; None if it does not exist, has no such revision, or must not be read.

    Raises:
        HubError: If the Hub does not answer.
    """
    from huggingface_hub import errors

    try:
        return read(repo, revision)
    except HubError as error:
        if isinstance(error.__cause__, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
            return None
        raise


def files_at(repo: str, commit: str, paths: list[str]) -> Mapping[str, RemoteFile]:
    """Look up some files of a repository at a commit.

    Args:
        repo: ORG/NAME.
        commit: A commit or another revision.
        paths: Paths in the repository.

    Returns:
        The files that exist, by path.

    Raises:
        HubError: If the Hub does not answer.

    """
    from huggingface_hub import HfApi

    with as_hub_error(repo, access="write"):
        files: dict[str, RemoteFile] = {}
        for start in range(0, len(paths), _PATHS):
            files |= _files(HfApi().get_paths_info(repo, paths[start : start + _PATHS], revision=commit))
        return files


def _files(entries: Iterable[Any]) -> dict[str, RemoteFile]:
    """Take the files of a tree; folders have no size."""
    return {
        entry.path: RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in entries
        if hasattr(entry, "size")
    }


def headers(repository: Repository, paths: Iterable[str]) -> dict[str, Header]:
    """Read the headers of safetensors files, several at once.

    Args:
        repository: The repository at a commit.
        paths: The files.

    Returns:
        The headers, by path, in the order of `paths`.

    Raises:
        HubError: If a file is not a safetensors file, or the Hub does not answer.

    """
    names = list(paths)
    return dict(zip(names, map_in_threads(lambda path: _header(repository, path), names, AT_ONCE), strict=True))


class _NotSafetensorsError(HubError):
    """A file that is not what its name says."""


def _header(repository: Repository, path: str) -> Header:
    from huggingface_hub import HfApi, errors

    size = repository.files[path].size
    wrong = _NotSafetensorsError(
        f"{repository.repo}/{path}: not a safetensors file", "Give another file of the repository."
    )
    if size <= _LENGTH:  # the Hub cannot give a part of an empty file
        raise wrong
    with as_hub_error(repository.repo, path):
        try:
            parsed = HfApi().parse_safetensors_file_metadata(repository.repo, path, revision=repository.commit)
            tensors = tuple(_tensors(parsed))
            data_start = size - max((tensor.end for tensor in tensors), default=0)
            return Header(tensors, _checked_metadata(parsed.metadata or {}), data_start)
        except errors.HfHubHTTPError:
            raise
        except (errors.SafetensorsParsingError, *_MALFORMED) as error:
            raise wrong from error


def _checked_metadata(metadata: Any) -> Mapping[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise TypeError
    return metadata


def _tensors(parsed: "SafetensorsFileMetadata") -> Iterator[TensorSpec]:
    for name, tensor in parsed.tensors.items():
        start, end = tensor.data_offsets
        yield TensorSpec(name, str(tensor.dtype), tuple(tensor.shape), start, end)


def parsed_headers(
    repository: Repository,
    paths: Iterable[str],
    parse: Callable[[str, Mapping[str, str]], _T | None],
    cache: dict[str, _T | None],
) -> dict[str, _T]:
    """Read and parse the metadata of safetensors files, several at once.

    Files that are no safetensors files, or whose header is damaged, are left out.

    Args:
        repository: The repository at a commit.
        paths: The files to look at.
        parse: Parses the metadata of a path; None for what is of no interest, CrdiffError for what is damaged.
        cache: Results by `RemoteFile.content`, for files that need no request; new ones are added.

    Returns:
        The results, by path.

    Raises:
        HubError: If the Hub does not answer.

    """

    def read_one(path: str) -> _T | None:
        try:
            metadata = _header(repository, path).metadata
        except _NotSafetensorsError:
            return None
        try:
            return parse(path, metadata)
        except CrdiffError:
            return None

    contents = {path: repository.files[path].content for path in sorted(repository.files.keys() & set(paths))}
    new = {content: path for path, content in contents.items() if content not in cache}
    cache |= zip(new, map_in_threads(read_one, new.values(), AT_ONCE), strict=True)
    return {path: header for path, content in contents.items() if (header := cache[content]) is not None}


def download(repository: Repository, path: str) -> Path:
    """Download a file into the Hub client's cache.

    Args:
        repository: The repository at a commit.
        path: The file.

    Returns:
        The file on this machine.

    Raises:
        HubError: If the Hub does not give it.

    """
    from huggingface_hub import hf_hub_download

    with as_hub_error(repository.repo, path):
        return Path(hf_hub_download(repository.repo, path, revision=repository.commit))


def read_text(repository: Repository, path: str) -> str | None:
    """Read a small text file, with its line ends as they are.

    Args:
        repository: The repository at a commit.
        path: The file.

    Returns:
        The text; None if there is no such file.

    Raises:
        HubError: If the Hub does not give it, or it is not UTF-8.

    """
    if path not in repository.files:
        return None
    try:
        return download(repository, path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise HubError(f"{repository.repo}/{path}: not UTF-8", "Save it as UTF-8 text on the Hub first.") from error
