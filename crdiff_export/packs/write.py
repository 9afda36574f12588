"""Write a pack: the header, the identity, and the masks of those sizes that have some, one size at a time."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Final

from crdiff_export.bake import staging
from crdiff_export.bake.direct_writer import DirectWriter
from crdiff_export.errors import PackError
from crdiff_export.formats import safetensors
from crdiff_export.formats.checkpoint import read_file
from crdiff_export.formats.crdiff_keys import Stamp
from crdiff_export.formats.safetensors import TensorSpec
from crdiff_export.packs.pack import (
    DTYPES,
    IDENTITY,
    KEY,
    KINDS,
    MASKS_HASH,
    NO_RESIDUAL,
    PACK_HASH,
    SCHEMA,
    SHARED,
    SIZES,
    BaseFile,
    Pack,
    by_width,
    pack_hash,
    read_pack,
)  # fmt: skip
from crdiff_export.progress import Progress
from crdiff_export.prune.identity import HASH_BYTES, LayerHashes
from crdiff_export.sizes import Size
from crdiff_export.verify.reopen import DATA_HASH, FILE_HASH

# Not among the keys of a size: its base's hashes stand in a pack once.
_LEFT_OUT: Final = (*NO_RESIDUAL, DATA_HASH, FILE_HASH)
# Counts are known only when the masks are written, so there has to be room for them: a key takes less than this many
# bytes, without its group's name, of which a letter takes at most six.
_COUNT: Final = 128
_UNKNOWN_HASH: Final = f"0x{'0' * 64}"

# The bits of each layer of a size, in the order of `Entry.layers`.
Masks = Iterable[bytes | bytearray | memoryview]


@dataclass(frozen=True, slots=True)
class Entry:
    """One size of a pack that is to be written.

    Attributes:
        size: The size.
        stamp: What its keys will say. Counts may be unknown where `masks` gives the final stamp.
        layers: The layers that have a mask, with the number of their weights.
        masks: Decides, and returns the final stamp and the masks; None for a size that has thresholds.
    """

    size: Size
    stamp: Stamp
    layers: tuple[tuple[str, int], ...] = ()
    masks: Callable[[], tuple[Stamp, Masks]] | None = None


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything that a pack will hold."""

    kinds: tuple[str, ...]
    files: tuple[BaseFile, ...]
    identity: LayerHashes
    entries: tuple[Entry, ...]


def write(
    target: Path, contents: Contents, progress: Progress, *, replace: bool = False, before: Pack | None = None
) -> Pack:
    """Write a pack; it appears under its name only when it is complete and reads back.

    Args:
        target: The file.
        contents: What to write.
        progress: Is told of the bytes of masks, and may interrupt.
        replace: Replace a file that exists.
        before: The pack that this one takes the place of, which must be as it was read.

    Returns:
        The pack, read back.

    Raises:
        BakeError: The file cannot be written; nothing is left behind.
        CheckpointError: The pack that was there has changed meanwhile, and stays as it is.
    """
    entries = sorted(contents.entries, key=lambda entry: by_width(entry.size))
    tensors = _tensors(contents, entries)
    try:
        with staging.temp_sibling(target, folder=False) as part:
            with DirectWriter(part) as file:
                _write_into(file, contents, entries, tensors, progress)
            pack = read_pack(target, read_file(part, target.name))
            for size in pack.masked_sizes:
                for _ in pack.read_masks(size):
                    progress.advance(0)
            if before:
                before.file.check_unchanged()
            staging.copy_permissions(part, target)
            staging.publish(part, target, replace=replace or before is not None)
    except OSError as error:
        raise staging.as_bake_error(error, target) from error
    return read_pack(target, read_file(target, target.name))


def _write_into(
    file: DirectWriter,
    contents: Contents,
    entries: Sequence[Entry],
    tensors: Sequence[TensorSpec],
    progress: Progress,
) -> None:
    stamps = {entry.size: _without_counts(entry.stamp) if entry.masks else entry.stamp for entry in entries}
    hashes = {entry.size: _UNKNOWN_HASH for entry in entries if entry.masks}
    reserved = len(safetensors.serialise(tensors, _metadata(contents, stamps, hashes)))
    if hashes:
        names = [name for entry in entries if entry.masks for name in entry.stamp.groups]
        reserved += _pages(sum(3 * (_COUNT + 6 * len(name)) for name in names))  # pruned, total, nonfinite
    identity = b"".join(contents.identity.hashes.values())
    file.append(memoryview(identity), reserved)
    offset = reserved + len(identity)
    progress.stage("writing", max((t.end for t in tensors), default=0))
    progress.advance(len(identity))
    for entry in entries:
        if entry.masks is None:
            continue
        stamps[entry.size], masks = entry.masks()
        digest = hashlib.sha256()
        for bits in masks:
            file.append(memoryview(bits), offset)
            digest.update(bits)
            offset += len(bits)
            progress.advance(len(bits))
        hashes[entry.size] = f"0x{digest.hexdigest()}"
    metadata = _metadata(contents, stamps, hashes)
    metadata[PACK_HASH] = pack_hash(metadata, identity)
    file.complete(tensors, metadata, reserved)


def _without_counts(stamp: Stamp) -> Stamp:
    """Leave out what masks are counted for, so that the room for a header does not depend on the masks."""
    groups = {name: replace_fields(group, pruned=0, total=0, nonfinite=0) for name, group in stamp.groups.items()}
    return replace_fields(stamp, groups=groups)


def _pages(size: int) -> int:
    return -(-size // safetensors.ALIGNMENT) * safetensors.ALIGNMENT


def _tensors(contents: Contents, entries: Sequence[Entry]) -> list[TensorSpec]:
    tensors, end = [], 0
    count = len(contents.identity.layers)
    for dtype, hashes in contents.identity.hashes.items():
        tensors.append(TensorSpec(f"{IDENTITY}{dtype}", "U8", (count, HASH_BYTES), end, end + len(hashes)))
        end += len(hashes)
    for entry in entries:
        for layer, weights in entry.layers:
            size = -(-weights // 8)
            tensors.append(TensorSpec(f"{entry.size}/{layer}", "U8", (size,), end, end + size))
            end += size
    return tensors


def _metadata(contents: Contents, stamps: Mapping[Size, Stamp], hashes: Mapping[Size, str]) -> dict[str, str]:
    """Make all keys; the hash of the pack is still unknown."""
    stored = contents.identity.stored
    metadata = {
        KEY: SCHEMA,
        KINDS: ",".join(contents.kinds),
        SIZES: ",".join(map(str, stamps)),
        DTYPES: stored[0] if len(set(stored)) == 1 else ",".join(stored),
        PACK_HASH: _UNKNOWN_HASH,
    }
    for file in contents.files:
        metadata[f"file/{file.name}/{DATA_HASH}"] = f"0x{file.data_hash}"
        if file.file_hash:
            metadata[f"file/{file.name}/{FILE_HASH}"] = f"0x{file.file_hash}"
    shared: dict[str, str] = {}
    for size, stamp in stamps.items():
        keys = {key: text for key, text in stamp.to_metadata().items() if key not in _LEFT_OUT}
        own = {key: text for key, text in keys.items() if key not in SHARED}
        common = {key: text for key, text in keys.items() if key in SHARED}
        shared = shared or common
        if different := next((key for key in SHARED if shared.get(key) != common.get(key)), None):
            raise PackError(
                f"{size}: {different} is {common.get(different)}, for {next(iter(stamps))} {shared.get(different)}",
                "What a pack says of its base is the same for all sizes; make a pack of its own.",
            )
        metadata |= {f"{size}/{key}": text for key, text in own.items()}
        if size in hashes:
            metadata[f"{size}/{MASKS_HASH}"] = hashes[size]
    return {**metadata, **shared}
