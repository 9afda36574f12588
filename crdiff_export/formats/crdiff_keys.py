"""The `crdiff.*` keys in the header of a baked file, as typed values, written and parsed.

docs/metadata.md specifies them. All values are strings and none starts with '{': A1111 would parse such a value as a
dict and then fail to save the file (its `read_metadata_from_safetensors`).
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from crdiff_export.errors import CheckpointError
from crdiff_export.formats import dtypes
from crdiff_export.formats.safetensors import show
from crdiff_export.sizes import Size

SCHEMA = "1"
# Of files with keys that a reader of schema 1 must not overlook: the table of a family that is not built in, scales.
SCHEMA_2 = "2"
PAPER = "arXiv:2604.05524"
# The value of `crdiff.mask` where no threshold exists: the zeros of the file are the mask.
ZEROS = "zeros"
BLOCK_WISE = "block-wise"
LAYER_WISE = "layer-wise"
PREFIX = "crdiff."
TENSORS_HASH = "modelspec.hash_sha256"
# Only packs have it.
PACK = f"{PREFIX}pack"
LAYOUTS = ("original", "diffusers")
RESIDUALS = ("none", "embedded", "sidecar")
HASH = re.compile(r"0x[0-9a-f]{64}")
_GROUP = re.compile(r"crdiff\.(?:ratio|pruned|total)\.(.+)", re.DOTALL)
_REQUEST_KEYS = re.compile(
    r"crdiff\.(schema|criterion|family|family\.table|targets|ratio\..*|resolution\.target|poa\.weight|recipe|provenance.*"
    r"|cast|prompt|evidence\..*|residual|source\.layout|source\.variant|source\.\w+_sha256|calibration\.file_sha256)",
    re.DOTALL,
)
# A float as Python writes it: `repr` and `float.hex`.
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-][0-9]{1,3})?")
_WHOLE = re.compile(r"[0-9]{1,18}")
_SIZE = re.compile(r"[1-9][0-9]{0,5}x[1-9][0-9]{0,5}")
_HEX_FLOAT = re.compile(r"0x[01]\.[0-9a-f]+p[+-][0-9]{1,3}")


# The fields of a Stamp that are texts, and their keys.
_TEXTS = {
    "version": "version", "criterion": "criterion", "family": "family", "layout": "layout", "prefix": "prefix",
    "source_name": "source.name", "recipe": "recipe", "provenance": "provenance",
    "provenance_source": "provenance.source", "residual": "residual",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class CalibrationStamp:
    """The calibration that the weights were ranked by: the SHA-256 of its file, and the size that it was made at."""

    hash: str
    size: Size


@dataclass(frozen=True, slots=True)
class GroupStamp:
    """One group of a baked file: the requested ratio and the result.

    Attributes:
        ratio: The requested share of pruned weights.
        pruned: Weights that were set to zero.
        total: Weights of the group.
        threshold: The largest pruned magnitude; None where thresholds are per layer, where the file has a mask instead,
            and where nothing was pruned.
        nonfinite: Weights that are infinite or not a number.
    """

    ratio: float
    pruned: int
    total: int
    threshold: float | None = None
    nonfinite: int = 0

    @property
    def threshold_text(self) -> str | None:
        """The threshold as an exact hex float; None for a group without a threshold."""
        return None if self.threshold is None else self.threshold.hex()


@dataclass(frozen=True, slots=True)
class Stamp:
    """The `crdiff.*` keys as values.

    Attributes:
        family_table: The table of a family that is not built in (docs/families.md); None for others.
        special: What kind of model of its family the base is, such as `inpainting`; None for the plain one.
        prediction: What the base predicts, such as `v-zsnr`; None if nothing marks it.
        source_layout: The layout of the base, where it is another one than the file's; None where it is the same.
        source_variant: The variant of the weights that was taken from a folder in that layout; None for the plain ones.
        borrowed_from: The size that the ratios were found for, where they were taken for another one.
        thresholds: Per layer, in target order; None for a layer where nothing was pruned.
        masked: The method of a file that has a mask instead of thresholds, because its criterion is not the magnitude;
            None for a file with thresholds.
        moved: Whether weights that were not pruned were changed as well.
        scaled: Whether pruned layers have a scale (scaled fp8): magnitudes are |code| * scale, thresholds are doubles.
        tensors_hash: `modelspec.hash_sha256` of the file, which is read here but written elsewhere.
    """

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
    native_source: str = "family"
    family_table: str | None = None
    special: str | None = None
    prediction: str | None = None
    source_layout: str | None = None
    source_variant: str | None = None
    borrowed_from: Size | None = None
    thresholds: tuple[float | None, ...] | None = None
    masked: str | None = None
    moved: bool = False
    scaled: bool = False
    calibrated: CalibrationStamp | None = None
    source_hash: str | None = None
    source_file_hash: str | None = None
    cast: str | None = None
    prompt: str | None = None
    evidence: Mapping[str, str] = field(default_factory=dict)
    residual: str = "none"
    version: str = ""
    tensors_hash: str | None = field(default=None, compare=False)

    def to_metadata(self) -> dict[str, str]:
        """Return the keys and values of the header."""
        keys = {
            **{key: getattr(self, name) for name, key in _TEXTS.items()},
            "schema": SCHEMA_2 if self.family_table is not None or self.scaled else SCHEMA,
            "paper": PAPER,
            "method": self.masked or (LAYER_WISE if self.thresholds is not None else BLOCK_WISE),
            "targets": ",".join(self.targets),
            "resolution.target": str(self.resolution),
            "resolution.native": str(self.native),
            "resolution.native.source": self.native_source,
            "poa.weight": repr(self.poa_weight),
        }
        for name, group in self.groups.items():
            keys[f"ratio.{name}"] = repr(group.ratio)
            keys[f"pruned.{name}"] = str(group.pruned)
            keys[f"total.{name}"] = str(group.total)
            if self.thresholds is None and not self.masked:
                keys[f"threshold.{name}"] = _hex(group.threshold)
            if group.nonfinite:
                keys[f"nonfinite.{name}"] = str(group.nonfinite)
        if self.thresholds is not None:
            keys["thresholds"] = json.dumps([_hex(t) for t in self.thresholds], separators=(",", ":"))
        optional = {
            "source.hash_sha256": self.source_hash, "source.file_sha256": self.source_file_hash,
            "source.layout": self.source_layout, "source.variant": self.source_variant,
            "provenance.borrowed_from": str(self.borrowed_from) if self.borrowed_from else None,
            "family.table": self.family_table,
            "special": self.special, "prediction": self.prediction, "cast": self.cast, "prompt": self.prompt,
            "mask": ZEROS if self.masked else None, "moved": "true" if self.moved else None,
            "scaled": "true" if self.scaled else None,
            "calibration.file_sha256": self.calibrated.hash if self.calibrated else None,
            "calibration.size": str(self.calibrated.size) if self.calibrated else None,
        }  # fmt: skip
        keys |= {key: text for key, text in optional.items() if text is not None}
        keys |= {f"evidence.{key}": text for key, text in self.evidence.items()}
        return {PREFIX + key: safe(text) for key, text in keys.items()}

    def request_keys(self) -> dict[str, str]:
        """Return the keys that determine the content of the file: base, numbers, schema.

        The tool's version, the name of the base and the results (counts, thresholds) are not among them.
        """
        return {key: text for key, text in self.to_metadata().items() if _REQUEST_KEYS.fullmatch(key)}

    def digest(self) -> str | None:
        """Return the SHA-256 of `request_keys` as hex, or None if the hash of the base is unknown."""
        if not (self.source_hash or self.source_file_hash):
            return None
        return hashlib.sha256(json.dumps(self.request_keys(), sort_keys=True).encode()).hexdigest()

    @property
    def compare(self) -> str:
        """The weights that each weight was compared with, by the criterion's option: its `block`, or its `row`."""
        options = self.criterion.partition(":")[2].split(",")
        return next((text.removeprefix("compare=") for text in options if text.startswith("compare=")), "block")

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> "Stamp":
        """Parse the keys.

        Args:
            metadata: The header's metadata.
            where: The file, for messages.

        Returns:
            The values.

        Raises:
            CheckpointError: crdiff did not make the file, or a key is not as docs/metadata.md specifies it.
        """
        keys = _Keys(metadata, where)
        method, masked = keys.one_of("method", (BLOCK_WISE, LAYER_WISE)), keys.masked()
        thresholds = keys.thresholds() if method == LAYER_WISE and not masked else None
        names = dict.fromkeys(match[1] for key in metadata if (match := _GROUP.fullmatch(key)))
        return cls(
            **{name: keys.text(key) for name, key in _TEXTS.items()},
            targets=tuple(keys.text("targets").split(",")),
            groups={name: keys.group(name, shared=thresholds is None and not masked) for name in names},
            resolution=keys.size("resolution.target"),
            native=keys.size("resolution.native"),
            native_source=keys.optional("resolution.native.source") or "family",
            poa_weight=keys.number("poa.weight"),
            family_table=keys.optional("family.table"),
            special=keys.special(),
            prediction=keys.optional("prediction"),
            source_layout=keys.one_of("source.layout", LAYOUTS) if keys.optional("source.layout") is not None else None,
            source_variant=keys.optional("source.variant"),
            borrowed_from=keys.optional_size("provenance.borrowed_from"),
            thresholds=thresholds,
            masked=method if masked else None,
            moved=masked and keys.is_true("moved"),
            scaled=keys.is_true("scaled"),
            calibrated=keys.calibrated(),
            source_hash=keys.optional_hash("source.hash_sha256"),
            source_file_hash=keys.optional_hash("source.file_sha256"),
            cast=keys.one_of("cast", tuple(dtypes.DTYPES.values())) if keys.optional("cast") is not None else None,
            prompt=keys.optional("prompt"),
            evidence=keys.below("evidence."),
            tensors_hash=keys.tensors_hash(),
        )


def is_baked(metadata: Mapping[str, str]) -> bool:
    """Whether crdiff made the file with this metadata."""
    return PREFIX + "schema" in metadata


class _Keys:
    """The `crdiff.*` keys of one header; each method checks and converts one of them."""

    def __init__(self, metadata: Mapping[str, str], where: str) -> None:
        self._metadata, self._where = metadata, where
        schema = self.optional("schema")
        if schema is None and PACK in metadata:
            raise CheckpointError(
                f"{where}: a pack, which has no weights",
                "Export a checkpoint from it: `crdiff export BASE --pack FILE --res WxH`.",
            )
        if schema is None:
            raise CheckpointError(
                f"{where}: not made by crdiff (no {PREFIX}schema in its header)",
                "`crdiff export` makes such files; `crdiff inspect` shows what this one is.",
            )
        if schema not in (SCHEMA, SCHEMA_2):
            raise CheckpointError(
                f"{where}: its header has schema {show(schema)}, this crdiff reads {SCHEMA} and {SCHEMA_2}",
                "Install a newer crdiff.",
            )

    def special(self) -> str | None:
        """Headers from before there was a key have ModelSpec's architecture alone, which names inpainting models."""
        stated = "inpainting" if "inpaint" in self._metadata.get("modelspec.architecture", "") else None
        special = self.optional("special")
        return stated if special is None else special

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

    def one_of(self, key: str, choices: Sequence[str]) -> str:
        text = self.text(key)
        if text not in choices:
            self._refuse(key, f"is {show(text)}, not {' or '.join(choices)}")
        return text

    def matching(self, key: str, pattern: re.Pattern[str], what: str) -> str:
        text = self.text(key)
        if not pattern.fullmatch(text):
            self._refuse(key, f"is {show(text)}, not {what}")
        return text

    def hash(self, key: str) -> str:
        return self.matching(key, HASH, "0x and 64 lowercase hex digits")

    def optional_hash(self, key: str) -> str | None:
        return None if self.optional(key) is None else self.hash(key)

    def number(self, key: str) -> float:
        number = float(self.matching(key, _NUMBER, "a number"))
        if not math.isfinite(number):
            self._refuse(key, f"is {show(self.text(key))}, not a number")
        return number

    def ratio(self, key: str) -> float:
        ratio = self.number(key)
        if not 0 <= ratio < 1:
            self._refuse(key, f"is {show(self.text(key))}, not a ratio from 0 to below 1")
        return ratio

    def whole(self, key: str) -> int:
        return int(self.matching(key, _WHOLE, "a whole number"))

    def size(self, key: str) -> Size:
        width, height = self.matching(key, _SIZE, "a size such as 512x512").split("x")
        return Size(int(width), int(height))

    def tensors_hash(self) -> str | None:
        """Return the hash of the file's tensors; None if the key is absent or not a hash."""
        text = self._metadata.get(TENSORS_HASH, "")
        return text if HASH.fullmatch(text) else None

    def optional_size(self, key: str) -> Size | None:
        return None if self.optional(key) is None else self.size(key)

    def group(self, name: str, *, shared: bool) -> GroupStamp:
        return GroupStamp(
            ratio=self.ratio(f"ratio.{name}"),
            pruned=self.whole(f"pruned.{name}"),
            total=self.whole(f"total.{name}"),
            threshold=self._magnitude(f"threshold.{name}", self.text(f"threshold.{name}")) if shared else None,
            nonfinite=self.whole(f"nonfinite.{name}") if self.optional(f"nonfinite.{name}") is not None else 0,
        )

    def masked(self) -> bool:
        if self.optional("mask") is None:
            return False
        self.one_of("mask", (ZEROS,))
        if beside := sorted(key for key in self._metadata if key.startswith(f"{PREFIX}threshold")):
            self._refuse("mask", f"stands beside {show(beside[0])}")
        return True

    def is_true(self, key: str) -> bool:
        return self.optional(key) is not None and self.one_of(key, ("true",)) == "true"

    def calibrated(self) -> CalibrationStamp | None:
        if self.optional("calibration.file_sha256") is None and self.optional("calibration.size") is None:
            return None
        return CalibrationStamp(self.hash("calibration.file_sha256"), self.size("calibration.size"))

    def thresholds(self) -> tuple[float | None, ...]:
        try:
            values = json.loads(self.text("thresholds"))
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            self._refuse("thresholds", "is not a JSON array of hex floats")
        return tuple(self._magnitude("thresholds", v) for v in values)

    def _magnitude(self, key: str, text: str) -> float | None:
        if text == "none":
            return None
        value = _unhex(text)
        if self.is_true("scaled"):
            if not math.isfinite(value):
                self._refuse(key, f"is {show(text)}, not the hex float of a double")
        elif not value <= dtypes.value(dtypes.LARGEST) or dtypes.value(dtypes.bits(value)) != value:
            self._refuse(key, f"is {show(text)}, not the hex float of a float32")
        return value

    def _refuse(self, key: str, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self._where}: {PREFIX}{key} {what}",
            "The header was changed after crdiff wrote it; export the file again from its base.",
        )


def auto_v2(file_hash: str) -> str:
    """Return the AutoV2 of a file, by which A1111 and Civitai name it: 10 digits of the SHA-256 of the whole file."""
    return file_hash.removeprefix("0x")[:10].upper()


def auto_v3(tensors_hash: str) -> str:
    """Return the AutoV3 of a file, as kohya and Civitai name it: 12 digits of the SHA-256 of its tensors' bytes."""
    return tensors_hash.removeprefix("0x")[:12].upper()


def safe(text: str) -> str:
    """Put a space before a text that starts with '{', which no value may; parsing removes it."""
    return " " + text if text.lstrip(" ").startswith("{") else text


def _plain(text: str) -> str:
    return text[1:] if text.startswith(" ") and text.lstrip(" ").startswith("{") else text


def _unhex(text: str) -> float:
    try:
        return float.fromhex(text) if _HEX_FLOAT.fullmatch(text) else math.nan
    except OverflowError:
        return math.inf


def _hex(value: float | None) -> str:
    return "none" if value is None else float(value).hex()
