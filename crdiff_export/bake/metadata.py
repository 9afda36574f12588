"""The metadata of a baked file: the source's own keys, ModelSpec's keys, and `crdiff.*` keys.

docs/metadata.md specifies the `crdiff.*` keys. ModelSpec: https://github.com/Stability-AI/ModelSpec.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

from crdiff_export.bake.modelspec import THUMBNAIL, Thumbnail, people_keys
from crdiff_export.formats.checkpoint import Checkpoint, file_stem, variant_of
from crdiff_export.formats.crdiff_keys import (
    BLOCK_WISE,
    LAYER_WISE,
    PREFIX,
    TENSORS_HASH,
    CalibrationStamp,
    GroupStamp,
    Stamp,
    safe,
)
from crdiff_export.models.prediction import PREDICTION_KEY, by_marks
from crdiff_export.models.recipe import Evidence
from crdiff_export.prune.architecture import Architecture
from crdiff_export.prune.criteria import Decision
from crdiff_export.prune.plan import Plan

# Hashes of bytes that pruning changes; web UIs would name the base in every image that the baked file draws.
STALE = re.compile(r"modelspec\.hash_\w+|sshs_model_hash|sshs_legacy_hash")


@dataclass(frozen=True, slots=True)
class Hashes:
    """SHA-256 hashes for one file's header, as hex with `0x` before it.

    Attributes:
        source: Of the source's data section; None where `source_file` is known.
        source_file: Of the whole source file, where it was known without reading the file.
        output: Of the output's data section.
    """

    source: str | None
    source_file: str | None
    output: str


def stamp_of_plan(
    plan: Plan, criterion: str, source_name: str, residual: str = "none", calibrated: CalibrationStamp | None = None
) -> Stamp:
    """Make the part of an export's stamp that is known before a weight is read.

    With the hash of its source it has the same digest as the stamp of the finished file.

    Args:
        plan: The plan of the export.
        criterion: The criterion as headers spell it.
        source_name: The name of the base.
        residual: The value of `crdiff.residual`.
        calibrated: The calibration that the weights are ranked by, if any.

    Returns:
        The stamp, without counts and thresholds.
    """
    variant = plan.variant
    return Stamp(
        family=plan.match.family.id,
        family_table=plan.match.family.table or None,
        layout=plan.match.layout.name,
        prefix=plan.match.prefix,
        criterion=criterion,
        targets=plan.kinds,
        groups={group: GroupStamp(plan.ratio(group), 0, 0) for group in plan.groups},
        resolution=plan.size,
        native=plan.size,
        native_source="",
        source_name=_text(source_name),
        recipe=_text(f"{plan.recipe} {variant.resolution}"),
        provenance=variant.provenance,
        provenance_source=_text(variant.source),
        borrowed_from=variant.borrowed_from,
        poa_weight=float(variant.poa_weight),
        calibrated=calibrated,
        cast=plan.cast,
        source_layout=source_layout(plan.checkpoint, plan.match.layout.name),
        source_variant=variant_of(plan.checkpoint.origin.files[0].name) if plan.checkpoint.origin else None,
        prompt=None if variant.prompt is None else _text(variant.prompt),
        evidence=_evidence(variant.evidence),
        residual=residual,
        scaled=plan.has_scales,
        version=tool_version(),
    )


def source_layout(checkpoint: Checkpoint, layout: str) -> str | None:
    """Tell whether a base is written in another layout than its own.

    Args:
        checkpoint: The base, in the layout that is written.
        layout: That layout.

    Returns:
        The base's own layout; None where it is the same.
    """
    others = {"original": "diffusers", "diffusers": "original"}
    return others[layout] if checkpoint.origin else None


def stamp(
    plan: Plan,
    decision: Decision,
    criterion: str,
    source_name: str,
    architecture: Architecture,
    residual: str = "none",
    calibrated: CalibrationStamp | None = None,
) -> Stamp:
    """Make the stamp of an export: the `crdiff.*` keys of its files without the hashes, which differ by file.

    Args:
        plan: The plan of the export.
        decision: Which weights go.
        criterion: The criterion as headers spell it.
        source_name: The name of the base.
        architecture: The base's architecture.
        residual: The value of `crdiff.residual`.
        calibrated: The calibration that the weights were ranked by, if any.

    Returns:
        The stamp.
    """
    per_layer = plan.match.family.scope == "layer"
    masked = decision.masks is not None
    method = LAYER_WISE if per_layer else BLOCK_WISE
    groups = {}
    for group in plan.groups:
        thresholds = [t for t, scope in zip(decision.thresholds, plan.scopes, strict=True) if scope.group == group]
        groups[group] = GroupStamp(
            ratio=plan.ratio(group),
            pruned=sum(t.pruned for t in thresholds),
            total=sum(t.total for t in thresholds),
            threshold=None if per_layer or masked else thresholds[0].value,
            nonfinite=sum(t.nonfinite for t in thresholds),
        )
    return replace(
        stamp_of_plan(plan, criterion, source_name, residual, calibrated),
        groups=groups,
        native=architecture.native,
        native_source=architecture.native_source,
        special=architecture.special or None,
        prediction=str(architecture.prediction) if architecture.prediction else None,
        thresholds=tuple(t.value for t in decision.thresholds) if per_layer and not masked else None,
        masked=method if masked else None,
        moved=bool(decision.moved),
    )


def _evidence(evidence: Evidence | None) -> dict[str, str]:
    if evidence is None:
        return {}
    keys = {"scorer": evidence.scorer, "pruned": evidence.pruned, "dense": evidence.dense, "prompts": evidence.prompts}
    interval = {} if evidence.interval is None else {"interval": json.dumps(list(evidence.interval))}
    values = {**dict(evidence.extra), **keys, **interval}
    return {_text(key): _text(v if isinstance(v, str) else repr(v)) for key, v in values.items() if v is not None}


def _text(name: str) -> str:
    """Replace what UTF-8 cannot hold: a file's name may be any bytes, and a JSON string half a surrogate pair."""
    return name.encode("utf-8", "replace").decode()


def header(
    plan: Plan,
    stamp: Stamp,
    architecture: Architecture,
    source: Mapping[str, str],
    hashes: Hashes | None,
    thumbnail: Thumbnail | None = None,
) -> dict[str, str]:
    """Make the metadata of one output file.

    Args:
        plan: The plan of the export.
        stamp: What all files of the export have in common.
        architecture: The base's architecture.
        source: The metadata of the source file; keys that pruning makes untrue are dropped.
        hashes: The file's hashes; None for an export without hashes.
        thumbnail: A picture for the header, on request.

    Returns:
        The metadata by key.
    """
    stale = (PREFIX, THUMBNAIL, *(("modelspec.unet_dtype", "modelspec.vae_dtype") if plan.cast else ()))
    inherited = {key: text for key, text in source.items() if not STALE.fullmatch(key) and not key.startswith(stale)}
    title = inherited.get("modelspec.title") or _title(stamp.source_name)
    implementation = "diffusers" if plan.match.layout.name == "diffusers" else plan.match.family.implementation
    generated = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": safe(f"{title} CR-Diff {plan.size}"),
        "modelspec.resolution": str(plan.size),
        "modelspec.merged_from": safe(title),
        "modelspec.implementation": inherited.get("modelspec.implementation") or implementation,
        **people_keys(stamp, inherited, thumbnail),
    }
    # Of a family that is not built in, only the base itself can know its id.
    family_architecture = "" if plan.match.family.table else architecture.id
    if id_ := inherited.get("modelspec.architecture") or family_architecture:
        generated["modelspec.architecture"] = id_
    stated, prediction = by_marks((), inherited), architecture.prediction
    if prediction and (stated is None or stated.modelspec != prediction.modelspec):
        inherited.pop(PREDICTION_KEY, None)  # a tensor says more than a key
        generated |= {PREDICTION_KEY: prediction.modelspec} if prediction.modelspec else {}
    if hashes:
        generated[TENSORS_HASH] = hashes.output
        stamp = replace(stamp, source_hash=hashes.source, source_file_hash=hashes.source_file)
    return {**inherited, **generated, **stamp.to_metadata()}


def dense_header(
    plan: Plan, architecture: Architecture, source: Mapping[str, str], hashes: Hashes | None
) -> dict[str, str]:
    """Make the metadata of a checkpoint that is written in another layout and not pruned.

    Args:
        plan: A plan that prunes nothing.
        architecture: The base's architecture.
        source: The metadata of the source file; hashes that are no longer true are dropped.
        hashes: The file's hashes; None to write none.

    Returns:
        The metadata by key.
    """
    inherited = {key: text for key, text in source.items() if not STALE.fullmatch(key)}
    implementation = "diffusers" if plan.match.layout.name == "diffusers" else plan.match.family.implementation
    generated = {"format": "pt", "modelspec.implementation": implementation}
    defaults = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": safe(_title(plan.checkpoint.stem)),
        "modelspec.resolution": str(architecture.native),
    }
    if architecture.id and not plan.match.family.table:
        defaults["modelspec.architecture"] = architecture.id
    if architecture.prediction and architecture.prediction.modelspec:
        generated[PREDICTION_KEY] = architecture.prediction.modelspec
    if hashes:
        generated[TENSORS_HASH] = hashes.output
    return {**defaults, **inherited, **generated}


def _title(name: str) -> str:
    """Make a model's title from the name of its file, folder or repository."""
    last = name.rsplit("/", 1)[-1]
    if re.fullmatch(r"hf://[^/]+/[^/]+", name):
        last = last.partition("@")[0]  # a revision
    return file_stem(last) or name


def tool_version() -> str:
    """Return this package's version, or `0+checkout` where it is not installed."""
    try:
        return version("crdiff-export")
    except PackageNotFoundError:
        return "0+checkout"
