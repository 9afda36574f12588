"""Collect what is pushed: the files of a baked checkpoint, or a pack, with their hashes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crdiff_export.errors import CheckpointError, VerifyError
from crdiff_export.formats.checkpoint import Checkpoint, open_checkpoint
from crdiff_export.formats.crdiff_keys import TENSORS_HASH, Stamp
from crdiff_export.formats.hashing import hash_from
from crdiff_export.formats.safetensors import show
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.packs import is_pack, open_pack
from crdiff_export.progress import Progress
from crdiff_export.publish.headers import MadeHeader

# Files of the repository that a folder was downloaded from; at the root they would replace those of this repository.
_STAY_HERE = ("README.md", ".gitattributes")


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to push: its path here, its bytes, its SHA-256 as hex, and its header if crdiff made it."""

    path: Path
    size: int
    sha256: str
    header: MadeHeader | None = None


@dataclass(frozen=True, slots=True)
class Upload:
    """What to push.

    Attributes:
        files: The files by their paths in the repository.
        message: The message of the commit.
        base_model: The Hub id of a base that was a local file, for the card.
        relation: The Hub's `base_model_relation`, for the card.
        tag: The tag to set.
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
    """Read the headers of a file or a folder to push; raises CheckpointError for anything else."""
    checkpoint = open_checkpoint(path)
    if checkpoint.kind == "shards" and not path.is_dir():
        raise CheckpointError(f"{path}: the index of shards", f"Push the folder that they are in: {path.parent}.")
    return checkpoint


def collect(path: Path, destination: str, progress: Progress, *, checked: bool = False) -> dict[str, LocalFile]:
    """Hash the files of a baked checkpoint, or a pack.

    Args:
        path: The file or folder.
        destination: The path in the repository of a file, or of the folder below which a folder's files go.
        progress: Told how far the hashing is.
        checked: Whether the bytes have just been written, so that the hash in the header need not be compared.

    Returns:
        The files by their paths in the repository.

    Raises:
        CheckpointError: If crdiff did not bake the checkpoint, or a file cannot be read.
        PackError: If the pack is damaged.
        VerifyError: If the bytes of a file are not those of the hash in its header.
    """
    if is_pack(path):
        return {destination: _collect_pack(path, progress, checked=checked)}
    checkpoint = open_whole(path)
    baked = {file.path: file for file in checkpoint.files}
    headers = {file.path: Stamp.from_metadata(file.metadata, str(file.path)) for file in checkpoint.files}
    if checkpoint.kind == "file":
        paths = dict.fromkeys(baked, destination)
    else:
        below = f"{destination.rstrip('/')}/" if destination.strip("/") else ""
        files = (*baked, *(checkpoint.home / name for name in checkpoint.companions))
        paths = {file: below + file.relative_to(checkpoint.home).as_posix() for file in files}
    sizes = {file: file.stat().st_size for file in paths if paths[file] not in _STAY_HERE}
    progress.stage("hashing", sum(sizes.values()))
    collected = {}
    for file, size in sizes.items():
        sha256 = _hash(file, None if checked else baked.get(file), progress)
        collected[paths[file]] = LocalFile(file, size, sha256, headers.get(file))
    return collected


def _collect_pack(path: Path, progress: Progress, *, checked: bool) -> LocalFile:
    """Hash a pack, and compare its masks with their hashes; opening it compares its own."""
    pack = open_pack(path)
    sizes = () if checked else pack.masked_sizes
    total = pack.file.data_start + pack.file.data_size
    progress.stage("hashing", total + sum(mask.nbytes for size in sizes for mask in pack.masks(size)))
    for size in sizes:
        for _, bits in pack.read_masks(size):
            progress.advance(len(bits))
    sha256 = _hash(path, None, progress)
    pack.file.check_unchanged()
    return LocalFile(path, total, sha256, pack.header)


def _hash(path: Path, source: SourceFile | None, progress: Progress) -> str:
    """Hash a file; with `source`, its header, compare the bytes of its tensors with the hash there."""
    expected = source.metadata.get(TENSORS_HASH) if source else None
    starts = (0, source.data_start) if source and expected else (0,)
    try:
        whole, *data = hash_from(path, starts, progress)
    except OSError as error:
        message = f"{path}: reading failed: {error.strerror}"
        raise CheckpointError(message, "Check the disk, or copy the file to another one.") from error
    if expected and expected != f"0x{data[0]}":
        raise VerifyError(
            f"{path}: its bytes hash to 0x{data[0]}, its header says {show(expected)}",
            "Do not publish the file; export it again from its base.",
        )
    return whole
