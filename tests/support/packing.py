"""Packs for tests: made by the package, and read, changed and hashed again without it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from crdiff_export import ExportRequest, Size, export
from crdiff_export.packs import Pack, create, open_pack
from crdiff_export.packs.create import PackRequest
from crdiff_export.progress import Silent
from crdiff_export.prune.plan_request import PlanRequest
from tests.support import makers
from tests.support.exporting import SIZE, content

HASH = "crdiff.pack.hash_sha256"
# What an export decides beside what a pack does.
OF_EXPORTS = ("residual", "all_files", "variant", "force", "rehash", "device")


def plans(base: object, *sizes: Size, **options: Any) -> tuple[PlanRequest, ...]:
    """What to prune at sizes, which differ in nothing else."""
    return tuple(PlanRequest(str(base), size, **options) for size in sizes or (SIZE,))


def new_pack(base: object, path: Path, *sizes: Size, force: bool = False, **options: Any) -> Pack:
    """Make a pack of a base."""
    request = PackRequest(plans(base, *sizes, **options), path, force=force)
    return create.make(create.prepare_new(request), Silent()).pack


def add_sizes(base: object, path: Path, *sizes: Size, force: bool = False, **options: Any) -> Pack:
    """Add sizes to a pack."""
    request = PackRequest(plans(base, *sizes, **options), path, force=force)
    return create.make(create.prepare_more(request, open_pack(path)), Silent()).pack


def from_pack(base: object, pack: Pack, output: Path, size: Size = SIZE, **options: Any) -> Path:
    """Export one size of a pack; the path of the output."""
    return export(ExportRequest(str(base), size, output, pack=pack, **options)).written.path


def same_as_plain(base: Path, folder: Path, *sizes: Size, **options: Any) -> Pack:
    """Assert that exports from a pack and plain ones give the same bytes, and return the pack.

    Args:
        base: The base.
        folder: Where to write; a folder that does not exist.
        sizes: The sizes.
        options: What to prune and how to write it.
    """
    folder.mkdir(parents=True)
    suffix = "" if base.is_dir() or base.suffix == ".json" else ".safetensors"
    decided = {key: value for key, value in options.items() if key not in OF_EXPORTS or key == "variant"}
    asked = {key: value for key, value in options.items() if key in (*OF_EXPORTS, "allow_nonfinite")}
    pack = new_pack(base, folder / "sizes.crdiff", *sizes, **decided)
    for size in sizes or (SIZE,):
        plain = export(ExportRequest(str(base), size, folder / f"plain-{size}{suffix}", **options)).written
        packed = from_pack(base, pack, folder / f"packed-{size}{suffix}", size, **asked)
        assert content(packed) == content(plain.path), size
        for file, other in zip(sorted(folder.glob(f"packed-{size}.*-residual")), plain.files, strict=False):
            assert other.sidecar
            assert file.read_bytes() == other.sidecar.path.read_bytes()
    return pack


def hash_of(metadata: Mapping[str, str], identity: bytes) -> str:
    """The hash of a pack, as docs/metadata.md has it."""
    others = {key: metadata[key] for key in sorted(metadata) if key != HASH}
    text = json.dumps(others, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    return f"0x{hashlib.sha256(text + identity).hexdigest()}"


def identity_of(tensors: makers.Tensors) -> bytes:
    """The bytes that the hash of a pack is of, behind its keys."""
    return b"".join(data for name, (_, _, data) in tensors.items() if name.startswith("identity/"))


def read(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, makers.Shape, bytes]]]:
    """A pack's metadata, and its tensors in the order of their bytes."""
    entries = makers.entries_of(path)
    tensors = makers.read(path)
    ordered = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    return makers.metadata_of(path), {name: tensors[name] for name in ordered}


def changed(
    path: Path,
    to: Path,
    keys: Mapping[str, str | None] | None = None,
    tensors: Callable[[dict[str, tuple[str, makers.Shape, bytes]]], None] | None = None,
) -> Path:
    """A copy of a pack with other keys or tensors, and the hash of that; None removes a key."""
    metadata, content = read(path)
    if tensors:
        tensors(content)
    metadata = {key: text for key, text in {**metadata, **(keys or {})}.items() if text is not None}
    if HASH not in (keys or {}):
        metadata[HASH] = hash_of(metadata, identity_of(content))
    return makers.write(to, content, metadata)
