"""All metadata of a baked file: the source's own, ModelSpec keys for everyone, `crdiff.*` keys for loaders of POA.

docs/metadata.md specifies ours. ModelSpec: https://github.com/Stability-AI/ModelSpec.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

from crdiff_export.formats.crdiff_keys import (
    BLOCK_WISE,
    LAYER_WISE,
    PREFIX,
    CalibrationStamp,
    GroupStamp,
    Stamp,
    safe,
)
from crdiff_export.models.recipe import Evidence
from crdiff_export.prune.architecture import Architecture
from crdiff_export.prune.plan import Plan
from crdiff_export.prune.threshold import Threshold

# Hashes of the bytes that we change; a stale one would name every image after another model.
STALE = re.compile(r"modelspec\.hash_\w+|sshs_model_hash|sshs_legacy_hash")


@dataclass(frozen=True, slots=True)
class Hashes:
    """SHA-256 in ModelSpec's spelling: of the source's data section, or where that was not needed, of the whole source
    file; and of the output's data section."""

    source: str | None
    source_file: str | None
    output: str


def intended(
    plan: Plan, criterion: str, source_name: str, residual: str = "none", calibrated: CalibrationStamp | None = None
) -> Stamp:
    """What is known of an export's headers before a weight is read: all that was asked for, and nothing that was found.

    It has the digest of the finished files once it is given the hash of their source.
    """
    variant = plan.variant
    return Stamp(
        family=plan.match.family.id,
        layout=plan.match.layout.name,
        prefix=plan.match.prefix,
        criterion=criterion,
        targets=plan.kinds,
        groups={group: GroupStamp(plan.ratio(group), 0, 0) for group in plan.groups},
        resolution=plan.size,
        native=plan.size,
        source_name=_text(source_name),
        recipe=_text(f"{plan.recipe} {variant.resolution}"),
        provenance=variant.provenance,
        provenance_source=_text(variant.source),
        poa_weight=float(variant.poa_weight),
        calibrated=calibrated,
        cast=plan.cast,
        prompt=None if variant.prompt is None else _text(variant.prompt),
        evidence=_evidence(variant.evidence),
        residual=residual,
        version=tool_version(),
    )


def stamp(
    plan: Plan,
    thresholds: Sequence[Threshold],
    criterion: str,
    source_name: str,
    architecture: Architecture,
    *,
    residual: str = "none",
    masked: bool = False,
    moved: bool = False,
    calibrated: CalibrationStamp | None = None,
) -> Stamp:
    """What the headers of an export's files say, except for the hashes, which are each file's own.

    `thresholds` have the counts; the values count only where these weights were not `masked`.
    """
    per_layer = plan.match.family.scope == "layer"
    method = LAYER_WISE if per_layer else BLOCK_WISE
    groups = {}
    for group in plan.groups:
        found = [t for t, scope in zip(thresholds, plan.scopes, strict=True) if scope.group == group]
        groups[group] = GroupStamp(
            ratio=plan.ratio(group),
            pruned=sum(t.pruned for t in found),
            total=sum(t.total for t in found),
            threshold=None if per_layer or masked else found[0].value,
            nonfinite=sum(t.nonfinite for t in found),
        )
    return replace(
        intended(plan, criterion, source_name, residual, calibrated),
        groups=groups,
        native=architecture.native,
        thresholds=tuple(t.value for t in thresholds) if per_layer and not masked else None,
        masked=method if masked else None,
        moved=moved,
    )


def _evidence(evidence: Evidence | None) -> dict[str, str]:
    if evidence is None:
        return {}
    known = {"scorer": evidence.scorer, "pruned": evidence.pruned, "dense": evidence.dense, "prompts": evidence.prompts}
    interval = {} if evidence.interval is None else {"interval": json.dumps(list(evidence.interval))}
    values = {**dict(evidence.extra), **known, **interval}
    return {_text(key): _text(v if isinstance(v, str) else repr(v)) for key, v in values.items() if v is not None}


def _text(name: str) -> str:
    """A name as text that UTF-8 can hold: a file's name may be any bytes, a JSON string half a surrogate pair."""
    return name.encode("utf-8", "replace").decode()


def header(
    plan: Plan, stamp: Stamp, architecture: Architecture, source: Mapping[str, str], hashes: Hashes | None
) -> dict[str, str]:
    """All metadata of one output file: the source's, less what is no longer true, with ModelSpec's and our keys."""
    stale = (PREFIX, *(("modelspec.unet_dtype", "modelspec.vae_dtype") if plan.cast else ()))
    kept = {key: text for key, text in source.items() if not STALE.fullmatch(key) and not key.startswith(stale)}
    title = kept.get("modelspec.title") or _title(stamp.source_name)
    implementation = "diffusers" if plan.match.layout.name == "diffusers" else plan.match.family.implementation
    ours = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": safe(f"{title} CR-Diff {plan.size}"),
        "modelspec.resolution": str(plan.size),
        "modelspec.merged_from": safe(title),
        "modelspec.architecture": kept.get("modelspec.architecture") or architecture.id,
        "modelspec.implementation": kept.get("modelspec.implementation") or implementation,
    }
    if hashes:
        ours["modelspec.hash_sha256"] = hashes.output
        stamp = replace(stamp, source_hash=hashes.source, source_file_hash=hashes.source_file)
    return {**kept, **ours, **stamp.to_metadata()}


def _title(name: str) -> str:
    """What to call a model by the name of its file, folder or repository."""
    last = name.rsplit("/", 1)[-1]
    if re.fullmatch(r"hf://[^/]+/[^/]+", name):
        last = last.partition("@")[0]  # a revision
    return re.sub(r"\.(safetensors|safetensors\.index\.json|ckpt|pth?|bin)$", "", last) or name


def tool_version() -> str:
    """This package's version; a checkout that is not installed has none."""
    try:
        return version("crdiff-export")
    except PackageNotFoundError:
        return "0+checkout"
