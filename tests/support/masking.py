"""Bases with calibrations for exports by masks, and what such an export must hold, by NumPy and sorting alone."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crdiff_export import ExportRequest, Size
from crdiff_export.export import plan_variant
from crdiff_export.formats.checkpoint import open_checkpoint
from tests.support import criteria_makers, makers, oracle
from tests.support.makers import Shape, Tensors
from tests.support.oracle import Bools, Slice

SIZE, NATIVE = Size(512, 512), Size(64, 64)
UNET = {"down": 0.2, "mid": 0.6, "up": 0.4}
DIT = {"blocks": 0.3}


@dataclass(frozen=True)
class Base:
    """A base on the disk, its tensors in the order of their bytes by file, and the statistics of its layers by name."""

    path: Path
    files: tuple[Tensors, ...]
    kinds: tuple[str, ...]
    dit: bool
    statistics: Mapping[str, Mapping[str, NDArray[np.floating]]]
    names: Mapping[tuple[int, str, int], str]
    calibration: Path

    @property
    def ratios(self) -> dict[str, float]:
        return dict(DIT if self.dit else UNET)

    def request(self, output: Path, criterion: str, **options: Any) -> ExportRequest:
        needs = criterion.partition(":")[0] not in ("random", "magnitude", "uniform")
        given = {"ratios": self.ratios, "targets": self.kinds, "calibration": self.calibration if needs else None}
        return ExportRequest(str(self.path), SIZE, output, criterion=criterion, **{**given, **options})

    def slices(self) -> list[Slice]:
        """The layers, in the order of the bytes."""
        return [
            piece
            for number, tensors in enumerate(self.files)
            for name, (_, shape, _) in tensors.items()
            for piece in oracle.slices(number, name, shape, self.kinds, dit=self.dit)
        ]

    def name(self, piece: Slice) -> str:
        """What diffusers calls a layer's weight."""
        return self.names[piece.file, piece.tensor, piece.start]


def tensors(table: str, dtype: str = "F16", seed: int = 0) -> dict[str, tuple[str, Shape, bytes]]:
    """A narrow model, with zeros of either sign among what may be pruned."""
    made = makers.tiny(table, dtype, seed=seed)
    for number, (name, (own, shape, data)) in enumerate(made.items()):
        if "attn" in name and own == dtype and len(shape) == 2:
            size = makers.SIZES[dtype]
            zeros = bytes(size) + bytes(size - 1) + b"\x80"
            at = size * (number % 3)
            made[name] = own, shape, data[:at] + zeros + data[at + len(zeros) :]
    return made


def base(folder: Path, table: str, dtype: str = "F16", *, shards: int = 0, size: Size = SIZE) -> Base:
    """Write a base and a calibration with random numbers for all of its layers."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tensors(table, dtype)
    if shards:
        makers.write_shards(folder / "base", made, shards)
        path = folder / "base"
        files: tuple[Tensors, ...] = tuple(makers.read(file) for file in sorted(path.glob("*.safetensors")))
    else:
        path = makers.write(folder / "base.safetensors", made)
        files = (made,)
    dit = "transformer" in table
    kinds = ("ff", "attn") if dit else ("attn", "ff")
    checkpoint = open_checkpoint(path)
    planned = plan_variant(ExportRequest(str(path), SIZE, ratio=0.3, targets=kinds), checkpoint)
    names, statistics = {}, {}
    for number, (name, target) in enumerate(zip(criteria_makers.names(planned), planned.targets, strict=True)):
        columns = target.source.shape[-1]
        names[target.file, target.source.name, target.start] = name
        statistics[name] = layer_statistics(number, target.count // columns, columns)
    digests = criteria_makers.digests(planned)
    calibration = write_calibration(
        folder / "calibration.safetensors", statistics, digests, planned.match.family.id, size
    )
    return Base(path, files, kinds, dit, statistics, names, calibration)


def layer_statistics(seed: int, rows: int, columns: int) -> dict[str, NDArray[np.floating]]:
    """Random numbers of a calibration for a layer."""
    rng = np.random.default_rng([7, seed])
    inputs = rng.standard_normal((2 * columns, columns)) * (0.2 + rng.random(columns))
    return {
        "norm": (inputs**2).sum(0), "gram": (inputs.T @ inputs).astype(np.float32),
        **criteria_makers.gradients(rng, (3, rows, columns), 0),
    }  # fmt: skip


def write_calibration(
    path: Path,
    statistics: Mapping[str, Mapping[str, NDArray[np.floating]]],
    digests: Mapping[str, str],
    family: str,
    size: Size = SIZE,
) -> Path:
    """A calibration's file."""
    said = {"family": family, "base": "base", "size": str(size), "layers": json.dumps(dict(digests))}
    return criteria_makers.write_statistics(path, statistics, said)


def scores(text: str, name: str, weight: NDArray[np.float32], found: Mapping[str, Any]) -> NDArray[Any]:
    """A criterion's scores by its formula."""
    kind, _, option = text.partition(":")
    if kind == "wanda":
        return np.asarray(np.abs(weight) * np.sqrt(found["norm"]).astype(np.float32))
    if kind == "taylor":
        return np.asarray(weight**2 * found["gradient_square"])
    if text == "adverse:form=signed":
        target, native = -(found["gradient"] * weight), -(found["native_gradient"] * weight)
        return np.asarray(target - native)
    assert kind == "random"
    seed = int(option.partition("seed=")[2] or 0)
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    drawn = np.random.Philox(key=key).random_raw(weight.size) >> np.uint64(32)
    return np.asarray(drawn.astype(np.float64).reshape(weight.shape))  # in the same order


def choose(base: Base, text: str, weights: Sequence[NDArray[np.float32]]) -> list[Bools]:
    """Which weights of each layer go."""
    pieces = base.slices()
    criterion = text.replace("compare=row,", "").replace("compare=row", "")
    found = [
        scores(criterion, base.name(piece), weight, base.statistics[base.name(piece)])
        for piece, weight in zip(pieces, weights, strict=True)
    ]
    scopes: list[object] = [number if base.dit else piece.group for number, piece in enumerate(pieces)]
    ratios = {scope: base.ratios[piece.group] for scope, piece in zip(scopes, pieces, strict=True)}
    return oracle.choose(found, weights, scopes, ratios, "row" if "compare=row" in text else "block")


def weights(base: Base, files: Sequence[Tensors]) -> list[NDArray[np.float32]]:
    """The layers' weights as `files`, which may be cast, have them."""
    found = []
    for piece in base.slices():
        dtype, shape, data = files[piece.file][piece.tensor]
        numbers = oracle.decode(dtype, data).astype(np.float32)[piece.start : piece.stop]
        found.append(numbers.reshape(-1, shape[-1]))
    return found


def cleared(base: Base, files: Sequence[Tensors], masks: Sequence[Bools]) -> list[dict[str, bytes]]:
    """The files' tensors with +0.0 where a mask is."""
    made = [{name: bytearray(data) for name, (_, _, data) in tensors.items()} for tensors in files]
    for piece, mask in zip(base.slices(), masks, strict=True):
        size = makers.SIZES[files[piece.file][piece.tensor][0]]
        bits = np.frombuffer(made[piece.file][piece.tensor], f"<u{size}")
        bits[piece.start : piece.stop][mask.ravel()] = 0
    return [{name: bytes(data) for name, data in tensors.items()} for tensors in made]
