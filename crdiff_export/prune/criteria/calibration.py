"""The calibration file: statistics of a model's layers, collected by running it. A safetensors file with a header.

A tensor is called `<statistic>/<layer>` with the diffusers name of the layer's weight. `header` makes the metadata of a
new file; `Calibration` reads one. docs/calibration.md specifies both.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from crdiff_export.errors import CalibrationError, CheckpointError, RecipeError
from crdiff_export.formats.checkpoint import read_file
from crdiff_export.formats.dtypes import FORMATS
from crdiff_export.formats.hashing import hash_file
from crdiff_export.formats.safetensors import TensorSpec, show
from crdiff_export.formats.strict_json import MalformedError, parse_object
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune.plan import Plan
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

VERSION: Final = "1"
KEY: Final = "crdiff.calibration"
FACTS: Final = f"{KEY}.facts."
# The number of hex digits of a weight's SHA-256 that identify it.
DIGITS: Final = 16
# Each statistic's dtype, and its shape for a weight of shape (out, in).
STATISTICS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "norm": ("F64", ("in",)),
    "gram": ("F32", ("in", "in")),
    "gradient": ("F32", ("out", "in")),
    "gradient_abs": ("F32", ("out", "in")),
    "gradient_square": ("F32", ("out", "in")),
    "native_gradient": ("F32", ("out", "in")),
    "native_gradient_abs": ("F32", ("out", "in")),
    "native_gradient_square": ("F32", ("out", "in")),
}
_AGAIN = "Calibrate again, or give another file."
_OWN = "Give a calibration of this base, or calibrate it."
# A calibration describes the uncast weights, so casting is no way out for a base of F64.
NARROWER: Final = f"Save it as {', '.join(FORMATS)} first, then calibrate and export that."


def header(
    *,
    family: str,
    base: str,
    base_hash: str,
    size: Size,
    native: Size,
    statistics: Sequence[str],
    layers: Mapping[str, str],
    facts: Mapping[str, str],
) -> dict[str, str]:
    """Make the metadata of a calibration.

    Args:
        family: The id of the base's family.
        base: The name of the base.
        base_hash: The SHA-256 of the base's weights.
        size: The size that the model was run at.
        native: The native size.
        statistics: The names of the statistics.
        layers: For each layer the first 16 hex digits of the SHA-256 of its weight's bytes in the base.
        facts: How the calibration was made, for people.

    Returns:
        The keys and values of the header.
    """
    return {
        KEY: VERSION,
        f"{KEY}.family": family,
        f"{KEY}.base": base,
        f"{KEY}.base_hash": base_hash,
        f"{KEY}.size": str(size),
        f"{KEY}.native": str(native),
        f"{KEY}.statistics": ",".join(statistics),
        f"{KEY}.layers": json.dumps(dict(layers), sort_keys=True),
    } | {f"{FACTS}{name}": text for name, text in facts.items()}


@dataclass(frozen=True)
class Calibration:
    """An open calibration: its header is parsed, its tensors are read on request.

    `layers` has the first 16 hex digits of the SHA-256 of each layer's weight in the base.
    """

    path: Path
    family: str
    base: str
    base_hash: str
    size: Size
    native: Size
    statistics: tuple[str, ...]
    layers: Mapping[str, str]
    facts: Mapping[str, str]
    source: SourceFile

    @classmethod
    def open(cls, path: Path) -> "Self":
        """Read a calibration's header.

        Raises:
            CalibrationError: The file is unreadable, not a calibration, or of another version.
        """
        try:
            source = read_file(path, path.name)
        except CheckpointError as error:
            raise CalibrationError(error.message, _AGAIN) from error
        except OSError as error:
            what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            raise CalibrationError(f"{path}: {what}", "Check the path and its permissions.") from error
        metadata = source.metadata
        if KEY not in metadata:
            raise CalibrationError(f"{path}: is not a calibration", f"Its header has no {KEY}. {_AGAIN}")
        if metadata[KEY] != VERSION:
            raise CalibrationError(
                f"{path}: is a calibration of version {show(metadata[KEY])}, version {VERSION} is known here",
                "Calibrate again, or use the crdiff that made it.",
            )
        return cls(
            path=path,
            family=_text(path, metadata, "family"),
            base=_text(path, metadata, "base"),
            base_hash=_text(path, metadata, "base_hash"),
            size=_size(path, metadata, "size"),
            native=_size(path, metadata, "native"),
            statistics=tuple(name for name in _text(path, metadata, "statistics").split(",") if name),
            layers=_layers(path, metadata),
            facts={key.removeprefix(FACTS): text for key, text in metadata.items() if key.startswith(FACTS)},
            source=source,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.source.data_start + self.source.data_size

    @cached_property
    def hash(self) -> str:
        """`0x` and the SHA-256 of the whole file as hex; the first access reads the file."""
        return self.hashed(Silent())

    def hashed(self, progress: Progress) -> str:
        """Return `hash`, and report progress if the file has to be read.

        Raises:
            CalibrationError: The file cannot be read, or was changed since it was opened.
        """
        if cached := vars(self).get("hash"):
            return str(cached)
        try:
            digest = hash_file(self.path, progress)
            self.source.check_unchanged()
        except CheckpointError as error:
            raise CalibrationError(error.message, error.hint) from error
        except OSError as error:
            raise CalibrationError(
                f"{self.path}: reading failed: {error.strerror}", "Check the disk, or copy the file to another one."
            ) from error
        vars(self)["hash"] = text = f"0x{digest}"
        return text

    def read(self, layer: str, statistic: str, shape: tuple[int, int] | None = None) -> "Tensor":
        """Read a statistic of a layer.

        Args:
            layer: The diffusers name of its weight.
            statistic: One of STATISTICS.
            shape: The shape (out, in) of the weight, if the tensor's shape should be checked against it.

        Returns:
            The tensor on the CPU, float64 or float32.

        Raises:
            CalibrationError: The statistic is missing, of another shape or not finite.
        """
        import torch

        from crdiff_export.prune.criteria import selection

        tensor = self._find(layer, statistic, shape)
        dtype = {"F64": torch.float64, "F32": torch.float32}[tensor.dtype]
        values = torch.empty(tensor.shape, dtype=dtype)
        try:
            with closing(self.source.open()) as reader:
                reader.read_into(tensor.start, values.numpy().reshape(-1).view("u1").data)
            self.source.check_unchanged()
        except CheckpointError as error:
            raise CalibrationError(error.message, error.hint) from error
        if not selection.finite(values):
            broken = tensor.count - int(torch.isfinite(values).sum())
            raise CalibrationError(f"{self.path}: {broken} numbers of {tensor.name} are not finite", _AGAIN)
        return values

    def check(self, plan: Plan, statistics: Sequence[str]) -> tuple[str, ...]:
        """Check a calibration against a plan, by their headers only.

        Args:
            plan: The plan.
            statistics: The statistics that the criterion needs.

        Returns:
            Notes for the user, such as that the calibration was made at another size.

        Raises:
            CalibrationError: It is of another family, a weight has a dtype that cannot be calibrated, or a statistic of
                a pruned layer is missing or of another shape.
        """
        family = plan.match.family
        if self.family != family.id:
            raise CalibrationError(
                f"{self.path}: is of the family {show(self.family)}, {plan.checkpoint.path} of {family.id}", _OWN
            )
        if missing := [name for name in statistics if name not in self.statistics or name not in STATISTICS]:
            raise CalibrationError(
                f"{self.path}: has no {missing[0]}, it has {', '.join(self.statistics) or 'nothing'}",
                "Calibrate again for this criterion.",
            )
        for target in plan.targets:
            if plan.scopes[target.scope].rank:
                if (dtype := target.source.dtype) not in FORMATS:
                    what = f"{show(target.name)} is {dtype}, which is not calibrated"
                    raise CalibrationError(f"{plan.checkpoint.path}: {what}", NARROWER)
                for statistic in statistics:
                    self._find(target.layer.diffusers, statistic, target.shape)
        if self.size == plan.size:
            return ()
        return (
            f"{self.path.name} was made at {self.size}, this is for {plan.size}: other weights may matter at that size",
        )

    def check_weight(self, layer: str, digest: str) -> None:
        """Check that a layer's weight is the one that the calibration was made with.

        Args:
            layer: The diffusers name of the weight.
            digest: The SHA-256 of its bytes as hex.

        Raises:
            CalibrationError: The calibration has no such layer, or was made with other weights.
        """
        if layer not in self.layers:
            self._missing(layer)
        if self.layers[layer] != digest[:DIGITS]:
            raise CalibrationError(f"{self.path}: was made of another base: {layer} has other weights", _OWN)

    def _find(self, layer: str, statistic: str, shape: tuple[int, int] | None) -> TensorSpec:
        name = f"{statistic}/{layer}"
        tensor = self._tensors.get(name)
        if tensor is None or statistic not in STATISTICS:
            self._missing(layer, statistic)
        dtype, axes = STATISTICS[statistic]
        out, columns = shape or (tensor.shape[:1] + tensor.shape[-1:] if tensor.shape else (0, 0))
        expected = tuple(out if axis == "out" else columns for axis in axes)
        if (tensor.dtype, tensor.shape) != (dtype, expected):
            raise CalibrationError(
                f"{self.path}: {name} is {tensor.dtype} {show(list(tensor.shape))}, not {dtype} {show(list(expected))}",
                _OWN,
            )
        return tensor

    def _missing(self, layer: str, statistic: str | None = None) -> NoReturn:
        raise CalibrationError(f"{self.path}: has {f'no {statistic}' if statistic else 'nothing'} of {layer}", _OWN)

    @cached_property
    def _tensors(self) -> dict[str, TensorSpec]:
        return {tensor.name: tensor for tensor in self.source.tensors}


def _text(path: Path, metadata: Mapping[str, str], key: str) -> str:
    text = metadata.get(f"{KEY}.{key}")
    if text is None:
        raise CalibrationError(f"{path}: its header has no {KEY}.{key}", _AGAIN)
    return text


def _size(path: Path, metadata: Mapping[str, str], key: str) -> Size:
    text = _text(path, metadata, key)
    try:
        return Size.parse(text)
    except RecipeError as error:
        raise CalibrationError(f"{path}: {KEY}.{key} is {show(text)}, which is not a size", _AGAIN) from error


def _layers(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        layers: dict[str, Any] = parse_object(_text(path, metadata, "layers").encode())
    except MalformedError as error:
        raise CalibrationError(f"{path}: {KEY}.layers {error}", _AGAIN) from error
    for name, digest in layers.items():
        if not isinstance(digest, str) or len(digest) != DIGITS:
            raise CalibrationError(f"{path}: {KEY}.layers has {show(digest)} for {show(name)}", _AGAIN)
    return layers
