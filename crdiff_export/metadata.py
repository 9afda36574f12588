"""What a baked file says of itself: ModelSpec keys for everyone, `crdiff.*` keys for loaders that know POA.

docs/metadata.md specifies them. All values are strings and none of ours starts with '{': A1111 would read such a value
as a dict and then fail to save the file again (its `read_metadata_from_safetensors`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import NoReturn

from crdiff_export.errors import CheckpointError
from crdiff_export.header import show
from crdiff_export.plan import Plan
from crdiff_export.recipe import Evidence, Size
from crdiff_export.threshold import Threshold

SCHEMA = "1"
PAPER = "arXiv:2604.05524"
SHARED_LAYERS = "block-wise"
OWN_LAYERS = "layer-wise"
PREFIX = "crdiff."
# Takes the hash's place until it is known; a SHA-256 in ModelSpec's spelling has this length.
RESERVED = "0x" + "0" * 64
# Hashes of the bytes that we change; a stale one would name every image after another model.
STALE = re.compile(r"modelspec\.hash_\w+|sshs_model_hash|sshs_legacy_hash")


@dataclass(frozen=True, slots=True)
class GroupStamp:
    """One group of a baked file: what was asked for and what was done. `threshold` None where thresholds are per layer
    or the group was left alone."""

    ratio: float
    pruned: int
    total: int
    threshold: float | None = None
    nonfinite: int = 0


@dataclass(frozen=True, slots=True)
class Stamp:
    """The `crdiff.*` keys as values. `thresholds` are per layer, in target order; None leaves a layer alone."""

    family: str
    layout: str
    prefix: str
    criterion: str
    targets: tuple[str, ...]
    groups: Mapping[str, GroupStamp]
    resolution: Size
    native: Size
    source_name: str
    recipe: str
    provenance: str
    provenance_source: str
    poa_weight: float
    thresholds: tuple[float | None, ...] | None = None
    source_hash: str | None = None
    cast: str | None = None
    prompt: str | None = None
    evidence: Mapping[str, str] = field(default_factory=dict)
    residual: str = "none"
    version: str = ""

    def to_metadata(self) -> dict[str, str]:
        """The keys as they stand in the header."""
        keys = {
            "schema": SCHEMA,
            "version": self.version,
            "paper": PAPER,
            "method": OWN_LAYERS if self.thresholds is not None else SHARED_LAYERS,
            "criterion": self.criterion,
            "family": self.family,
            "layout": self.layout,
            "prefix": self.prefix,
            "targets": ",".join(self.targets),
            "resolution.target": str(self.resolution),
            "resolution.native": str(self.native),
            "source.name": self.source_name,
            "recipe": self.recipe,
            "provenance": self.provenance,
            "provenance.source": self.provenance_source,
            "poa.weight": repr(self.poa_weight),
            "residual": self.residual,
        }
        for name, group in self.groups.items():
            keys[f"ratio.{name}"] = repr(group.ratio)
            keys[f"pruned.{name}"] = str(group.pruned)
            keys[f"total.{name}"] = str(group.total)
            if self.thresholds is None:
                keys[f"threshold.{name}"] = _hex(group.threshold)
            if group.nonfinite:
                keys[f"nonfinite.{name}"] = str(group.nonfinite)
        if self.thresholds is not None:
            keys["thresholds"] = json.dumps([_hex(t) for t in self.thresholds], separators=(",", ":"))
        optional = {"source.hash_sha256": self.source_hash, "cast": self.cast, "prompt": self.prompt}
        keys |= {key: text for key, text in optional.items() if text is not None}
        keys |= {f"evidence.{key}": text for key, text in self.evidence.items()}
        return {PREFIX + key: _safe(text) for key, text in keys.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> "Stamp":
        """Read the keys back; CheckpointError for a header that is not ours or not as the specification says."""
        keys = _Keys(metadata, where)
        thresholds = keys.thresholds() if keys.text("method") == OWN_LAYERS else None
        names = [key.removeprefix("crdiff.ratio.") for key in metadata if key.startswith("crdiff.ratio.")]
        return cls(
            family=keys.text("family"),
            layout=keys.text("layout"),
            prefix=keys.text("prefix"),
            criterion=keys.text("criterion"),
            targets=tuple(keys.text("targets").split(",")),
            groups={name: keys.group(name, shared=thresholds is None) for name in names},
            resolution=keys.size("resolution.target"),
            native=keys.size("resolution.native"),
            source_name=keys.text("source.name"),
            recipe=keys.text("recipe"),
            provenance=keys.text("provenance"),
            provenance_source=keys.text("provenance.source"),
            poa_weight=keys.number("poa.weight"),
            thresholds=thresholds,
            source_hash=keys.optional("source.hash_sha256"),
            cast=keys.optional("cast"),
            prompt=keys.optional("prompt"),
            evidence=keys.below("evidence."),
            residual=keys.text("residual"),
            version=keys.text("version"),
        )


def is_baked(metadata: Mapping[str, str]) -> bool:
    """Whether the header is one of ours."""
    return PREFIX + "schema" in metadata


class _Keys:
    """Our keys of one header, each read with its place in the message if it is not what it should be."""

    def __init__(self, metadata: Mapping[str, str], where: str) -> None:
        self._metadata, self._where = metadata, where
        schema = self.optional("schema")
        if schema is None:
            raise CheckpointError(
                f"{where}: not made by crdiff (no {PREFIX}schema in its header)",
                "`crdiff export` makes such files; `crdiff inspect` shows what this one is.",
            )
        if schema != SCHEMA:
            raise CheckpointError(
                f"{where}: its header has schema {show(schema)}, this crdiff reads {SCHEMA}", "Install a newer crdiff."
            )

    def optional(self, key: str) -> str | None:
        text = self._metadata.get(PREFIX + key)
        return text if text is None else _plain(text)

    def text(self, key: str) -> str:
        value = self.optional(key)
        if value is None:
            self._refuse(key, "is missing")
        return value

    def below(self, start: str) -> dict[str, str]:
        start = PREFIX + start
        return {key.removeprefix(start): _plain(text) for key, text in self._metadata.items() if key.startswith(start)}

    def number(self, key: str) -> float:
        try:
            return float(self.text(key))
        except ValueError:
            return self._refuse(key, f"is {show(self.text(key))}, not a number")

    def whole(self, key: str, default: str | None = None) -> int:
        text = self.text(key) if default is None else self._metadata.get(PREFIX + key, default)
        if not re.fullmatch(r"[0-9]{1,18}", text):
            self._refuse(key, f"is {show(text)}, not a whole number")
        return int(text)

    def size(self, key: str) -> Size:
        match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", self.text(key))
        if not match:
            self._refuse(key, f"is {show(self.text(key))}, not a size such as 512x512")
        return Size(int(match[1]), int(match[2]))

    def group(self, name: str, *, shared: bool) -> GroupStamp:
        return GroupStamp(
            ratio=self.number(f"ratio.{name}"),
            pruned=self.whole(f"pruned.{name}"),
            total=self.whole(f"total.{name}"),
            threshold=self._hex(f"threshold.{name}", self.text(f"threshold.{name}")) if shared else None,
            nonfinite=self.whole(f"nonfinite.{name}", "0"),
        )

    def thresholds(self) -> tuple[float | None, ...]:
        try:
            values = json.loads(self.text("thresholds"))
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            self._refuse("thresholds", "is not a JSON array of hex floats")
        return tuple(self._hex("thresholds", v) for v in values)

    def _hex(self, key: str, text: str) -> float | None:
        if text == "none":
            return None
        if not re.fullmatch(r"0x[01]\.[0-9a-f]+p[+-][0-9]{1,3}", text):
            self._refuse(key, f"is {show(text)}, not a hex float")
        return float.fromhex(text)

    def _refuse(self, key: str, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self._where}: {PREFIX}{key} {what}",
            "The header was changed after crdiff wrote it; export the file again from its base.",
        )


def stamp(plan: Plan, thresholds: Sequence[Threshold], criterion: str, source_name: str) -> Stamp:
    """What the headers of an export's files say, except for the hashes, which are each file's own."""
    variant, per_layer = plan.variant, plan.match.family.scope == "layer"
    groups = {}
    for group in plan.groups:
        found = [t for t, scope in zip(thresholds, plan.scopes, strict=True) if scope.group == group]
        groups[group] = GroupStamp(
            ratio=plan.ratio(group),
            pruned=sum(t.pruned for t in found),
            total=sum(t.total for t in found),
            threshold=None if per_layer else found[0].value,
            nonfinite=sum(t.nonfinite for t in found),
        )
    return Stamp(
        family=plan.match.family.id,
        layout=plan.match.layout.name,
        prefix=plan.match.prefix,
        criterion=criterion,
        targets=plan.kinds,
        groups=groups,
        resolution=plan.size,
        native=Size(*plan.match.family.native),
        source_name=_text(source_name),
        recipe=_text(f"{plan.recipe} {variant.resolution}"),
        provenance=variant.provenance,
        provenance_source=variant.source,
        poa_weight=float(variant.poa_weight),
        thresholds=tuple(t.value for t in thresholds) if per_layer else None,
        cast=plan.cast,
        prompt=variant.prompt,
        evidence=_evidence(variant.evidence),
        version=tool_version(),
    )


def _evidence(evidence: Evidence | None) -> dict[str, str]:
    if evidence is None:
        return {}
    known = {"scorer": evidence.scorer, "pruned": evidence.pruned, "dense": evidence.dense, "prompts": evidence.prompts}
    interval = {} if evidence.interval is None else {"interval": json.dumps(list(evidence.interval))}
    values = {**dict(evidence.extra), **known, **interval}
    return {key: v if isinstance(v, str) else repr(v) for key, v in values.items() if v is not None}


def _text(name: str) -> str:
    """A file's name as text, whatever its bytes."""
    return name.encode("utf-8", "replace").decode()


def header(
    plan: Plan, stamp: Stamp, source: Mapping[str, str], source_hash: str | None, output_hash: str | None
) -> dict[str, str]:
    """All metadata of one output file: the source's, less stale hashes, with ModelSpec's and our keys.

    The hashes are SHA-256 of the data sections as hex, RESERVED as long as they are not known, None where nobody asked.
    """
    kept = {key: text for key, text in source.items() if not STALE.fullmatch(key) and not key.startswith(PREFIX)}
    title = kept.get("modelspec.title") or stamp.source_name
    family = plan.match.family
    implementation = "diffusers" if plan.match.layout.name == "diffusers" else family.implementation
    ours = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": f"{title} CR-Diff {plan.size}",
        "modelspec.resolution": str(plan.size),
        "modelspec.merged_from": title,
        "modelspec.architecture": kept.get("modelspec.architecture") or family.architecture,
        "modelspec.implementation": kept.get("modelspec.implementation") or implementation,
    }
    if plan.cast:
        kept = {key: text for key, text in kept.items() if key not in ("modelspec.unet_dtype", "modelspec.vae_dtype")}
    hashes = {"modelspec.hash_sha256": output_hash, "crdiff.source.hash_sha256": source_hash}
    return {**kept, **ours, **stamp.to_metadata(), **{key: text for key, text in hashes.items() if text}}


def _safe(text: str) -> str:
    """Text that does not start with '{': a space goes before one that would, and `_plain` takes it away."""
    return " " + text if text.lstrip(" ").startswith("{") else text


def _plain(text: str) -> str:
    return text[1:] if text.startswith(" ") and text.lstrip(" ").startswith("{") else text


def _hex(value: float | None) -> str:
    return "none" if value is None else float(value).hex()


def tool_version() -> str:
    """This package's version."""
    return version("crdiff-export")
