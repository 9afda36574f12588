"""Describe any checkpoint from its headers alone, whoever made it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from crdiff_export.bake.residual import (
    EMBED,
    OUTPUT_HASH,
    OWNER_HASH,
    RESIDUAL_KEYS,
    SIDECAR,
    residual_tensors,
    sidecar_path,
)  # fmt: skip
from crdiff_export.errors import FamilyError
from crdiff_export.formats.checkpoint import Checkpoint, open_checkpoint
from crdiff_export.formats.crdiff_keys import LAYER_WISE, PREFIX, Stamp, auto_v2, auto_v3, is_baked
from crdiff_export.formats.text import amount, printable
from crdiff_export.models import families
from crdiff_export.models.evidence_text import evidence_text, poa_note
from crdiff_export.models.families import Match
from crdiff_export.prune.criteria.calibration import KEY as CALIBRATION
from crdiff_export.prune.plan import quantisation
from crdiff_export.sizes import Size

GROUP_COLUMNS = ("group", "ratio", "zeroed", "of", "share", "threshold")
_SHAPES = {"file": "one file", "shards": "shards", "folder": "diffusers folder"}


@dataclass(frozen=True)
class Inspection:
    """What the headers of a checkpoint say.

    Attributes:
        path: The file or folder.
        checkpoint: Its headers.
        match: The model family; None if it is unknown.
        why_not: Why the family is unknown.
        stamp: The `crdiff.*` keys; None for a checkpoint that crdiff has not made.
    """

    path: Path
    checkpoint: Checkpoint
    match: Match | None
    why_not: str | None
    stamp: Stamp | None

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(file.data_size for file in self.checkpoint.files)

    @property
    def dtypes(self) -> dict[str, int]:
        """Bytes of tensors by dtype, the most first."""
        sizes: Counter[str] = Counter()
        for _, tensor in self.checkpoint.tensors():
            sizes[tensor.dtype] += tensor.nbytes
        return dict(sizes.most_common())

    @cached_property
    def groups(self) -> Mapping[str, Mapping[str, Any]]:
        """The groups as numbers."""
        if self.stamp:
            return {
                name: {
                    "ratio": group.ratio, "pruned": group.pruned, "total": group.total,
                    "threshold": group.threshold_text,
                }
                for name, group in self.stamp.groups.items()
            }  # fmt: skip
        return _plain_groups(self.checkpoint, self.match) if self.match else {}

    @property
    def columns(self) -> Sequence[str]:
        """The names of the columns of `rows`."""
        return GROUP_COLUMNS if self.stamp else ("group", "layers", "weights")

    @property
    def rows(self) -> list[list[str]]:
        """A table of the groups, as text."""
        if self.stamp:
            return group_rows(self.stamp)
        return [[name, str(group["layers"]), f"{group['total']:,}"] for name, group in self.groups.items()]

    @property
    def notes(self) -> list[str]:
        """Notes for the user."""
        files, match = self.checkpoint.files, self.match
        sparse = [f"{file.path.name} is sparse: mostly a hole, without weights" for file in files if file.is_sparse]
        ema = [f"{match.ema_tensors} tensors of an EMA copy (model_ema.*)"] if match and match.ema_tensors else []
        return [*self.checkpoint.notes, *self.checkpoint.copy_notes, *sparse, *ema]

    @property
    def residual(self) -> str | None:
        """Where the residual is and how large, in words; of a sidecar, what it belongs to."""
        files = self.checkpoint.files
        if self.stamp is None:
            owner = self.checkpoint.metadata.get(OWNER_HASH)
            return owner and f"the sidecar of a file whose tensors hash to {printable(owner)}"
        if self.stamp.residual == RESIDUAL_KEYS[EMBED]:
            return f"embedded, {amount(sum(t.nbytes for f in files for t in residual_tensors(f.tensors)))}"
        if self.stamp.residual != RESIDUAL_KEYS[SIDECAR]:
            return None
        sidecars = [sidecar_path(file.path) for file in files]
        if missing := next((path for path in sidecars if not path.is_file()), None):
            return f"in a sidecar, but there is no {missing.name}"
        return f"in a sidecar, {amount(sum(path.stat().st_size for path in sidecars))}"

    @property
    def calibration(self) -> str | None:
        """What a calibration is one of, in words; None for any other file."""
        metadata = self.checkpoint.metadata
        if CALIBRATION not in metadata:
            return None
        base, size, statistics = (metadata.get(f"{CALIBRATION}.{key}", "?") for key in ("base", "size", "statistics"))
        return printable(f"a calibration of {base} at {size}: {statistics}")

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield what to print before the table, as name and text."""
        checkpoint, match = self.checkpoint, self.match
        files, count = len(checkpoint.files), sum(len(file.tensors) for file in checkpoint.files)
        shape = _SHAPES[checkpoint.kind] + (f", {files} files of weights" if files > 1 else "")
        yield "file", f"{self.path} ({shape}, {count} {'tensor' if count == 1 else 'tensors'}, {amount(self.size)})"
        yield "dtypes", ", ".join(f"{dtype} {amount(size)}" for dtype, size in self.dtypes.items()) or "none"
        if match:
            special = f", {match.special.title}" if match.special else ""
            yield "family", f"{match.family.title} ({match.layout.name} layout{special})"
            yield "prefix", match.prefix or "none"
        elif not self.calibration:
            yield "family", self.why_not or "unknown"
        if quantised := quantisation(checkpoint):
            yield "quantised", f"weights {quantised}"
        if title := checkpoint.metadata.get("modelspec.title"):
            yield "title", printable(title)
        if self.stamp:
            yield from _stamp_facts(self.stamp, checkpoint.metadata.get(OUTPUT_HASH))
        elif calibrated := self.calibration:
            yield "crdiff", calibrated
        elif not self.residual:
            yield "crdiff", "not made by crdiff"
        if self.residual:
            yield "residual", self.residual
        for note in self.notes:
            yield "note", note

    def as_json(self) -> dict[str, Any]:
        """Return the same as an object for JSON."""
        checkpoint, match, metadata = self.checkpoint, self.match, self.checkpoint.metadata
        keys = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
        quantised = quantisation(checkpoint)
        return {
            "file": str(self.path), "kind": checkpoint.kind, "files": len(checkpoint.files),
            "tensors": sum(len(file.tensors) for file in checkpoint.files), "bytes": self.size, "dtypes": self.dtypes,
            "family": match and match.family.id, "layout": match and match.layout.name,
            "prefix": match and match.prefix, "special": match and match.special and match.special.id,
            "inpainting": match and bool(match.special and match.special.id == "inpainting"), "unknown": self.why_not,
            "quantised": quantised and quantised.kind, "sparse": any(file.is_sparse for file in checkpoint.files),
            "title": metadata.get("modelspec.title"), "groups": self.groups, "notes": self.notes,
            "crdiff": keys if self.stamp else None, "calibration": self.calibration is not None,
        }  # fmt: skip


def inspect(path: Path) -> Inspection:
    """Read the headers of a file or folder of any family; CheckpointError if they cannot be read."""
    checkpoint = open_checkpoint(path)
    match, why_not = None, None
    try:
        match = families.detect_baked(checkpoint.shapes, checkpoint.metadata, str(checkpoint.path))
    except FamilyError as error:
        why_not = error.message
    stamped = is_baked(checkpoint.metadata)
    stamp = Stamp.from_metadata(checkpoint.metadata, str(path)) if stamped else None
    return Inspection(path, checkpoint, match, why_not, stamp)


def _stamp_facts(stamp: Stamp, output_hash: str | None) -> Iterator[tuple[str, str]]:
    source = printable(stamp.native_source)
    known_from = {"family": "", "given": " as given"}.get(source, f" by its {source}")
    yield "pruned for", f"{stamp.resolution} (native {stamp.native}{known_from})"
    yield "ratios", provenance(stamp.provenance, stamp.provenance_source, stamp.borrowed_from)
    yield "recipe", printable(stamp.recipe)
    if stamp.evidence:
        yield "evidence", evidence_text(stamp.evidence)
    if stamp.prompt:
        yield "prompt", printable(stamp.prompt)
    cast = f", cast to {printable(stamp.cast)}" if stamp.cast else ""
    yield "targets", printable(f"{', '.join(stamp.targets)} by {stamp.criterion}") + cast
    if stamp.masked:
        yield "mask", printable(mask(stamp))
    if stamp.calibrated:
        yield "calibration", f"{stamp.calibrated.hash}, made at {stamp.calibrated.size}"
    yield "POA weight", f"{stamp.poa_weight:g}{poa_note(stamp.evidence)}"
    yield "base", f"{printable(stamp.source_name)} ({_base_hash(stamp)})"
    short = f" (AutoV3 {auto_v3(stamp.tensors_hash)})" if stamp.tensors_hash else ""
    yield "hash", f"{printable(output_hash)}{short}" if output_hash else "none"
    yield "made by", f"crdiff {printable(stamp.version)}"


def _base_hash(stamp: Stamp) -> str:
    """Name a base by its hash, and by the short form under which Civitai and A1111 find it."""
    if stamp.source_layout:  # no file has the hash, except one that `crdiff convert` writes
        variant = f", variant {printable(stamp.source_variant)}" if stamp.source_variant else ""
        hashed = f"; in the {stamp.layout} layout {stamp.source_hash}" if stamp.source_hash else ""
        return f"{stamp.source_layout} layout{variant}{hashed}"
    if stamp.source_file_hash:
        return f"file {stamp.source_file_hash}, AutoV2 {auto_v2(stamp.source_file_hash)}"
    if stamp.source_hash:
        return f"{stamp.source_hash}, AutoV3 {auto_v3(stamp.source_hash)}"
    return "not hashed"


def mask(stamp: Stamp) -> str:
    """Describe the mask of a file without thresholds."""
    per_layer = stamp.masked == LAYER_WISE
    names = {"block": "layer" if per_layer else "group of blocks", "row": "output row"}
    among = names.get(stamp.compare, stamp.compare)
    moved = "; the weights that stay were moved" if stamp.moved else ""
    return f"its zeros, compared within each {among}{moved}"


def provenance(standing: str, source: str, borrowed_from: Size | None = None) -> str:
    """Say in one line where ratios come from and say so if they are not tuned.

    Args:
        standing: The provenance, as in recipes and headers.
        source: Its source, as in recipes and headers.
        borrowed_from: The size that they were found for, where that is another one.

    Returns:
        The line.
    """
    if borrowed_from:
        return f"starting point, borrowed from {borrowed_from} ({printable(source)})"
    standing = "starting point, not tuned" if standing == "starting-point" else printable(standing)
    return f"{standing} ({printable(source)})"


def _plain_groups(checkpoint: Checkpoint, match: Match) -> dict[str, dict[str, Any]]:
    """Count the prunable layers of a file that is not pruned, with the family's default targets."""
    groups: dict[str, dict[str, Any]] = {name: {"layers": 0, "total": 0} for name in match.family.groups}
    for layer in match.layout.layers:
        if layer.kind in match.family.default_kinds:
            shape = checkpoint.shapes[match.prefix + layer.tensor]
            start, stop = layer.rows(shape)
            groups[layer.group]["layers"] += 1
            groups[layer.group]["total"] += (stop - start) * shape[1]
    return groups


def total_row(stamp: Stamp) -> list[list[str]]:
    """Make the row of all groups together, for the columns GROUP_COLUMNS; empty if there is one group only."""
    if len(stamp.groups) < 2:
        return []
    pruned, total = (sum(getattr(group, key) for group in stamp.groups.values()) for key in ("pruned", "total"))
    return [["all", "", f"{pruned:,}", f"{total:,}", f"{pruned / max(total, 1):.4f}", ""]]


def group_rows(stamp: Stamp) -> list[list[str]]:
    """Make a row for each group of a baked file, for the columns GROUP_COLUMNS."""
    rows = []
    for name, group in stamp.groups.items():
        threshold = "-" if group.threshold is None else f"{group.threshold:.6g}"
        if stamp.thresholds is not None:
            threshold = "per layer"
        if stamp.masked:
            threshold = "mask"
        share = f"{group.pruned / max(group.total, 1):.4f}"
        rows.append([name, f"{group.ratio:.4g}", f"{group.pruned:,}", f"{group.total:,}", share, threshold])
    return rows
