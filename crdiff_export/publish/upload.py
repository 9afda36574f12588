"""What is pushed: the files of a baked checkpoint, whole and as their headers say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crdiff_export.errors import CheckpointError, VerifyError
from crdiff_export.formats.checkpoint import Checkpoint, open_checkpoint
from crdiff_export.formats.hashing import hash_from
from crdiff_export.formats.safetensors import show
from crdiff_export.hub.repository import Found
from crdiff_export.progress import Progress

# A folder's own, from where it was downloaded; at the root of a repository they are the repository's.
_THEIRS = ("README.md", ".gitattributes")


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to push: where it is, its size, and its SHA-256 as hex. `found` where crdiff baked it."""

    path: Path
    size: int
    sha256: str
    found: Found | None = None


@dataclass(frozen=True, slots=True)
class Upload:
    """What to push: files by their paths in the repository, and the message of the commit.

    `base_model` is the Hub id of a base that was a local file.
    """

    files: Mapping[str, LocalFile]
    message: str
    base_model: str | None = None
    relation: str = "finetune"
    tag: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


def open_whole(path: Path) -> Checkpoint:
    """Read the headers of what is to be pushed: a file or a folder; CheckpointError for anything else."""
    checkpoint = open_checkpoint(path)
    if checkpoint.kind == "shards" and not path.is_dir():
        raise CheckpointError(f"{path}: the index of shards", f"Push the folder that they are in: {path.parent}.")
    return checkpoint


def collect(path: Path, place: str, progress: Progress, *, checked: bool = False) -> dict[str, LocalFile]:
    """The files of a baked checkpoint by their paths in the repository, with their hashes.

    A file goes to `place`, the files of a folder below it. CheckpointError for anything that crdiff did not bake;
    VerifyError for a file whose bytes are not those of its header's hash, unless they have been `checked`.
    """
    checkpoint = open_whole(path)
    baked = {file.path: file for file in checkpoint.files}
    found = {file.path: Found.of(file.metadata, str(file.path)) for file in checkpoint.files}
    others = () if checkpoint.kind == "file" else checkpoint.companions
    places = dict.fromkeys(baked, place) if checkpoint.kind == "file" else {}
    for file in (*baked, *(checkpoint.home / name for name in others)):
        places.setdefault(file, _below(place, file.relative_to(checkpoint.home).as_posix()))
    sizes = {file: file.stat().st_size for file in places if places[file] not in _THEIRS}
    progress.stage("hashing", sum(sizes.values()))
    collected: dict[str, LocalFile] = {}
    for file, size in sizes.items():
        source = baked.get(file)
        said = None if checked or source is None else source.metadata.get("modelspec.hash_sha256")
        whole, *data = _hashes(file, (0, source.data_start) if source and said else (0,), progress)
        if said and said != f"0x{data[0]}":
            raise VerifyError(
                f"{file}: its bytes hash to 0x{data[0]}, its header says {show(said)}",
                "Do not publish the file; export it again from its base.",
            )
        collected[places[file]] = LocalFile(file, size, whole, found.get(file))
    return collected


def _hashes(path: Path, starts: Sequence[int], progress: Progress) -> list[str]:
    try:
        return hash_from(path, starts, progress)
    except OSError as error:
        raise CheckpointError(
            f"{path}: reading failed: {error.strerror}", "Check the disk, or copy the file to another one."
        ) from error


def _below(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if folder.strip("/") else name
