"""What a repository on the Hub holds as of one commit, without downloading its weights."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from crdiff_export.errors import CheckpointError, HubError
from crdiff_export.formats.crdiff_keys import Stamp, is_baked
from crdiff_export.formats.safetensors import TensorSpec
from crdiff_export.hub.daemon_threads import each
from crdiff_export.hub.messages import explained
from crdiff_export.publish.card import BaseModel, Row

if TYPE_CHECKING:
    from huggingface_hub import SafetensorsFileMetadata

# Headers that are asked for at once.
AT_ONCE = 8
# The bytes at a safetensors file's begin that say how long its header is.
_LENGTH = 8
# What the client falls over where a header's JSON is not of the form that it expects.
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError, RecursionError)
_MODEL = r"diffusion_pytorch_model(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors"
_PIPELINE = re.compile(rf"(?P<folder>.*?)/?(?:unet|transformer)/{_MODEL}")
_SHARD = re.compile(r"(?P<folder>.*?)/?[^/]*-\d{5}-of-\d{5}(?:\.(?P<variant>[\w-]+))?\.safetensors")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository: its SHA-256 as hex where it is in LFS, and its git object's id."""

    path: str
    size: int
    sha256: str | None
    blob: str

    @property
    def content(self) -> str:
        """What two files with the same bytes share, wherever they are stored in the same way."""
        return self.sha256 or self.blob


@dataclass(frozen=True, slots=True)
class RemoteHeader:
    """What a safetensors file on the Hub says of itself, in the order of its header."""

    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository as of a commit; `private` and `gated` as they are now."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile] = field(default_factory=dict)
    private: bool = False
    gated: bool = False


def read(repo: str, revision: str | None = None) -> Repository:
    """The files of a repository at the head of a revision; HubError where there is none such."""
    from huggingface_hub import HfApi

    with explained(repo):
        api = HfApi()
        info = api.model_info(repo, revision=revision)
        commit = str(info.sha)
        tree = api.list_repo_tree(repo, recursive=True, revision=commit)
        return Repository(repo, commit, _files(tree), bool(info.private), bool(info.gated))


def files_at(repo: str, commit: str, paths: list[str]) -> Mapping[str, RemoteFile]:
    """Some files of a repository at a commit; those that are not there are left out."""
    from huggingface_hub import HfApi

    with explained(repo, access="write"):
        found: dict[str, RemoteFile] = {}
        for start in range(0, len(paths), 100):
            found |= _files(HfApi().get_paths_info(repo, paths[start : start + 100], revision=commit))
        return found


def _files(entries: Iterable[Any]) -> dict[str, RemoteFile]:
    """Those entries of a tree that are files: folders have no size."""
    return {
        entry.path: RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in entries
        if hasattr(entry, "size")
    }


def headers(repository: Repository, paths: Iterable[str]) -> dict[str, RemoteHeader]:
    """The headers of safetensors files, by path; HubError for one that has none."""
    wanted = list(paths)
    return dict(zip(wanted, each(lambda path: _header(repository, path), wanted, AT_ONCE), strict=True))


class _Odd(HubError):
    """A file that is not what its name says."""


def _header(repository: Repository, path: str) -> RemoteHeader:
    from huggingface_hub import HfApi, errors

    file = repository.files.get(path)
    odd = _Odd(f"{repository.repo}/{path}: not a safetensors file", "Give another file of the repository.")
    if file and file.size <= _LENGTH:  # of an empty one the Hub cannot give a part
        raise odd
    with explained(repository.repo, path):
        try:
            found = HfApi().parse_safetensors_file_metadata(repository.repo, path, revision=repository.commit)
            return RemoteHeader(tuple(_tensors(found)), _texts(found.metadata or {}))
        except errors.HfHubHTTPError:
            raise
        except (errors.SafetensorsParsingError, *_MALFORMED) as error:
            raise odd from error


def _texts(metadata: Any) -> Mapping[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise TypeError
    return metadata


def _tensors(found: "SafetensorsFileMetadata") -> Iterator[TensorSpec]:
    for name, tensor in found.tensors.items():
        start, end = tensor.data_offsets
        yield TensorSpec(name, str(tensor.dtype), tuple(tensor.shape), start, end)


@dataclass(frozen=True, slots=True)
class Found:
    """A file that crdiff baked, by its header."""

    stamp: Stamp
    inpainting: bool = False

    @classmethod
    def of(cls, metadata: Mapping[str, str], path: str) -> Self:
        """Read a header's metadata; CheckpointError where they are not ours."""
        return cls(Stamp.from_metadata(metadata, path), "inpaint" in metadata.get("modelspec.architecture", ""))


# By the SHA-256 of a file, what its header says; None where crdiff did not bake it.
Known = dict[str, Found | None]


def baked(repository: Repository, paths: Iterable[str] | None = None, known: Known | None = None) -> dict[str, Found]:
    """What those files of a repository that crdiff baked say of their making, by path; all of them by default.

    A file that is no checkpoint, or whose header somebody has damaged, is not one of them. Files whose content is
    `known` are not asked for again, and what is found is added to it.
    """
    known = {} if known is None else known
    chosen = repository.files if paths is None else repository.files.keys() & set(paths)
    wanted = {path: repository.files[path].sha256 for path in sorted(chosen) if path.endswith(".safetensors")}
    new = [path for path, sha256 in wanted.items() if sha256 not in known]
    found = dict(zip(new, each(lambda path: _found(repository, path), new, AT_ONCE), strict=True))
    known |= {sha256: found[path] for path in new if (sha256 := wanted[path])}
    all_of_them = ((path, found[path] if path in found else known[str(sha256)]) for path, sha256 in wanted.items())
    return {path: one for path, one in all_of_them if one}


def _found(repository: Repository, path: str) -> Found | None:
    try:
        metadata = _header(repository, path).metadata
        return Found.of(metadata, path) if is_baked(metadata) else None
    except (CheckpointError, _Odd):
        return None


def rows(files: Mapping[str, RemoteFile], found: Mapping[str, Found]) -> list[Row]:
    """A row of the card for each variant: a file is one, and so are the files of a pipeline's folder or of shards."""
    grouped: dict[tuple[str, str | None, bool], list[str]] = {}
    for path in sorted(found):
        folder = _PIPELINE.fullmatch(path) or _SHARD.fullmatch(path)
        key = (folder["folder"], folder["variant"], True) if folder else (path, None, False)
        grouped.setdefault(key, []).append(path)
    return [
        Row(
            path=path,
            stamp=found[members[0]].stamp,
            size=sum(files[member].size for member in members),
            sha256=None if whole else files[members[0]].sha256,
            inpainting=found[members[0]].inpainting,
            variant=variant,
        )
        for (path, variant, whole), members in grouped.items()
    ]


def download(repository: Repository, path: str) -> Path:
    """A file of a repository as of its commit, in the client's cache."""
    from huggingface_hub import hf_hub_download

    with explained(repository.repo, path):
        return Path(hf_hub_download(repository.repo, path, revision=repository.commit))


def text(repository: Repository, path: str) -> str | None:
    """A small text file of a repository with its line ends as they are; None where there is none."""
    if path not in repository.files:
        return None
    try:
        return download(repository, path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise HubError(f"{repository.repo}/{path}: not UTF-8", "Save it as UTF-8 text on the Hub first.") from error


def base_model(repo: str) -> BaseModel:
    """What the Hub says of a base: its licence, whether it is gated; HubError where it cannot be asked."""
    from huggingface_hub import HfApi

    with explained(repo):
        info = HfApi().model_info(repo)
        to_dict: Any = info.card_data.to_dict if info.card_data else dict
        data = to_dict()
        names = [sibling.rfilename for sibling in info.siblings or ()]
    return BaseModel.from_front_matter(repo, bool(info.gated), data, pipeline="model_index.json" in names)
