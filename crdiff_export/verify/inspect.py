"""Describe any checkpoint from its headers alone, whoever made it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crdiff_export.bake.residual import EMBED, OWNER_HASH, RESIDUAL_KEYS, SIDECAR, residual_tensors, sidecar_path
from crdiff_export.errors import FamilyError
from crdiff_export.formats.checkpoint import Checkpoint, open_checkpoint
from crdiff_export.formats.crdiff_keys import LAYER_WISE, Stamp, is_baked
from crdiff_export.formats.text import amount, printable
from crdiff_export.models import families
from crdiff_export.models.families import Match
from crdiff_export.prune.plan import quantisation

GROUP_COLUMNS = ("group", "ratio", "zeroed", "of", "share", "threshold")
_SHAPES = {"file": "one file", "shards": "shards", "folder": "diffusers folder"}


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the headers of a checkpoint say.

    Attributes:
        path: The file or folder.
        kind: `file`, `shards` or `folder`.
        files: The number of files of weights.
        tensors: The number of tensors.
        size: Their bytes.
        dtypes: Bytes of tensors by dtype.
        match: The model family; None if it is unknown.
        why_not: Why the family is unknown.
        quantised: How the weights are quantised, if they are.
        sparse: A file is mostly a hole, without weights.
        stamp: The `crdiff.*` keys; None for a checkpoint that crdiff has not made.
        metadata: All keys of the first file.
        columns: The names of the columns of `rows`.
        rows: A table of the groups, as text.
        groups: The groups as numbers.
        notes: Notes for the user.
        residual: Where the residual is and how large, in words; also what a sidecar belongs to.
    """

    path: Path
    kind: str
    files: int
    tensors: int
    size: int
    dtypes: Mapping[str, int]
    match: Match | None
    why_not: str | None
    quantised: str | None
    sparse: bool
    stamp: Stamp | None
    metadata: Mapping[str, str]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]
    residual: str | None = None

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield what to print before the table, as name and text."""
        shape = _SHAPES[self.kind] + (f", {self.files} files of weights" if self.files > 1 else "")
        tensors = "tensor" if self.tensors == 1 else "tensors"
        yield "file", f"{self.path} ({shape}, {self.tensors} {tensors}, {amount(self.size)})"
        yield "dtypes", ", ".join(f"{dtype} {amount(size)}" for dtype, size in self.dtypes.items()) or "none"
        if self.match:
            inpainting = ", inpainting" if self.match.inpainting else ""
            yield "family", f"{self.match.family.title} ({self.match.layout.name} layout{inpainting})"
            yield "prefix", self.match.prefix or "none"
        else:
            yield "family", self.why_not or "unknown"
        if self.quantised:
            yield "quantised", f"{self.quantised}; cannot be pruned by magnitude"
        if title := self.metadata.get("modelspec.title"):
            yield "title", printable(title)
        if self.stamp:
            yield from _stamp_facts(self.stamp, self.metadata.get("modelspec.hash_sha256"))
        elif not self.residual:
            yield "crdiff", "not made by crdiff"
        if self.residual:
            yield "residual", self.residual
        for note in self.notes:
            yield "note", note

    def as_json(self) -> dict[str, Any]:
        """Return the same as an object for JSON."""
        values: dict[str, Any] = {
            "file": str(self.path), "kind": self.kind, "files": self.files, "tensors": self.tensors, "bytes": self.size,
            "dtypes": dict(self.dtypes), "family": self.match.family.id if self.match else None,
            "layout": self.match.layout.name if self.match else None,
            "prefix": self.match.prefix if self.match else None,
            "inpainting": self.match.inpainting if self.match else None, "unknown": self.why_not,
            "quantised": self.quantised, "sparse": self.sparse, "title": self.metadata.get("modelspec.title"),
            "groups": self.groups, "notes": list(self.notes), "crdiff": None,
        }  # fmt: skip
        if self.stamp:
            keys = {k.removeprefix("crdiff."): v for k, v in self.metadata.items() if k.startswith("crdiff.")}
            values["crdiff"] = keys
        return values


def inspect(path: Path) -> Inspection:
    """Read the headers of a file or folder of any family; CheckpointError if they cannot be read."""
    checkpoint = open_checkpoint(path)
    dtypes: Counter[str] = Counter()
    for _, tensor in checkpoint.tensors():
        dtypes[tensor.dtype] += tensor.nbytes
    match: Match | None = None
    why_not: str | None = None
    try:
        match = families.detect(checkpoint.shapes)
    except FamilyError as error:
        why_not = error.message
    stamped = is_baked(checkpoint.metadata)
    stamp = Stamp.from_metadata(checkpoint.metadata, str(path)) if stamped else None
    groups = _stamped_groups(stamp) if stamp else _plain_groups(checkpoint, match) if match else {}
    columns = GROUP_COLUMNS if stamp else ("group", "layers", "weights")
    notes = [f"{f.path.name} is sparse: mostly a hole, without weights" for f in checkpoint.files if f.is_sparse]
    if match and match.ema_tensors:
        notes.append(f"{match.ema_tensors} tensors of an EMA copy (model_ema.*)")
    return Inspection(
        path=path,
        kind=checkpoint.kind,
        files=len(checkpoint.files),
        tensors=sum(len(f.tensors) for f in checkpoint.files),
        size=sum(f.data_size for f in checkpoint.files),
        dtypes=dict(dtypes.most_common()),
        match=match,
        why_not=why_not,
        quantised=quantisation(checkpoint),
        sparse=any(f.is_sparse for f in checkpoint.files),
        stamp=stamp,
        metadata=checkpoint.metadata,
        columns=columns,
        rows=_rows(groups, stamp),
        groups=groups,
        notes=(*checkpoint.notes, *notes),
        residual=_residual(checkpoint, stamp) if stamp else _sidecar_of(checkpoint.metadata),
    )


def _residual(checkpoint: Checkpoint, stamp: Stamp) -> str | None:
    """Say where the residual is and how large."""
    if stamp.residual == RESIDUAL_KEYS[EMBED]:
        return f"embedded, {amount(sum(t.nbytes for f in checkpoint.files for t in residual_tensors(f.tensors)))}"
    if stamp.residual != RESIDUAL_KEYS[SIDECAR]:
        return None
    sidecars = [sidecar_path(file.path) for file in checkpoint.files]
    if missing := next((path for path in sidecars if not path.is_file()), None):
        return f"in a sidecar, but there is no {missing.name}"
    return f"in a sidecar, {amount(sum(path.stat().st_size for path in sidecars))}"


def _sidecar_of(metadata: Mapping[str, str]) -> str | None:
    of = metadata.get(OWNER_HASH)
    return of and f"the sidecar of a file whose tensors hash to {printable(of)}"


def _stamp_facts(stamp: Stamp, output_hash: str | None) -> Iterator[tuple[str, str]]:
    yield "pruned for", f"{stamp.resolution} (native {stamp.native})"
    yield "ratios", printable(provenance(stamp.provenance, stamp.provenance_source))
    yield "recipe", printable(stamp.recipe)
    if stamp.evidence:
        yield "evidence", printable(", ".join(f"{key} {text}" for key, text in sorted(stamp.evidence.items())))
    if stamp.prompt:
        yield "prompt", printable(stamp.prompt)
    cast = f", cast to {printable(stamp.cast)}" if stamp.cast else ""
    yield "targets", printable(f"{', '.join(stamp.targets)} by {stamp.criterion}") + cast
    if stamp.masked:
        yield "mask", printable(mask(stamp))
    if stamp.calibrated:
        yield "calibration", f"{stamp.calibrated.hash}, made at {stamp.calibrated.size}"
    yield "POA weight", f"{stamp.poa_weight:g}"
    yield "base", f"{printable(stamp.source_name)} ({_base_hash(stamp)})"
    yield "hash", printable(output_hash) if output_hash else "none"
    yield "made by", f"crdiff {printable(stamp.version)}"


def mask(stamp: Stamp) -> str:
    """Describe the mask of a file without thresholds."""
    per_layer = stamp.masked == LAYER_WISE
    names = {"block": "layer" if per_layer else "group of blocks", "row": "output row"}
    among = names.get(stamp.compare, stamp.compare)
    moved = "; the weights that stay were moved" if stamp.moved else ""
    return f"its zeros, compared within each {among}{moved}"


def _base_hash(stamp: Stamp) -> str:
    """Say which hash identifies the base: that of its tensors or that of its file."""
    if stamp.source_file_hash:
        return f"file {stamp.source_file_hash}"
    return stamp.source_hash or "not hashed"


def provenance(standing: str, source: str) -> str:
    """Say in one line where ratios come from and, if nobody has tuned them, say so.

    Args:
        standing: The provenance, as in recipes and headers.
        source: Its source, as in recipes and headers.

    Returns:
        The line.
    """
    return f"{'starting point, tuned by nobody' if standing == 'starting-point' else standing} ({source})"


def _stamped_groups(stamp: Stamp) -> dict[str, dict[str, Any]]:
    return {
        name: {"ratio": g.ratio, "pruned": g.pruned, "total": g.total, "threshold": g.threshold and g.threshold.hex()}
        for name, g in stamp.groups.items()
    }


def _plain_groups(checkpoint: Checkpoint, match: Match) -> dict[str, dict[str, Any]]:
    """Count the prunable layers of a file that is not pruned, with the family's default targets."""
    groups: dict[str, dict[str, Any]] = {name: {"layers": 0, "total": 0} for name in match.family.groups}
    for layer in match.layout.layers:
        if layer.kind in match.family.default_kinds:
            shape = checkpoint.shapes[match.prefix + layer.tensor]
            groups[layer.group]["layers"] += 1
            groups[layer.group]["total"] += shape[1] * (shape[0] if layer.part is None else shape[1])
    return groups


def _rows(groups: Mapping[str, Mapping[str, Any]], stamp: Stamp | None) -> list[list[str]]:
    return group_rows(stamp) if stamp else [[n, str(g["layers"]), f"{g['total']:,}"] for n, g in groups.items()]


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
