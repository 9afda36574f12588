"""Plans of narrow models, calibrations with random numbers, and the slow way to choose which weights go."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.models.recipe import Variant
from crdiff_export.prune import layer_names, plan
from crdiff_export.prune.plan import Plan
from crdiff_export.sizes import Size
from tests.support import makers, oracle
from tests.support.makers import Shape, Tensors

Numbers = NDArray[np.float64]
Statistics = Mapping[str, NDArray[np.floating]]
SIZE, NATIVE = Size(96, 64), Size(64, 64)
ALL = (
    "norm", "gram", "gradient", "gradient_abs", "gradient_square",
    "native_gradient", "native_gradient_abs", "native_gradient_square",
)  # fmt: skip


def planned(
    path: Path,
    tensors: Tensors,
    ratios: Mapping[str, float] | float = 0.3,
    *,
    kinds: Sequence[str] | None = None,
    cast: str | None = None,
    allow_nonfinite: bool = False,
    size: Size = SIZE,
) -> Plan:
    """Write a checkpoint and plan an export of it."""
    checkpoint = open_checkpoint(makers.write(path, tensors))
    match = plan.recognise(checkpoint)
    each = ratios if isinstance(ratios, Mapping) else dict.fromkeys(match.family.groups, ratios)
    variant = Variant(size, each, 1.0, "starting-point", "a test")
    return plan.make(
        checkpoint, match, size, variant, "test", kinds=kinds, cast=cast, allow_nonfinite=allow_nonfinite
    )  # fmt: skip


def with_ratio(planned: Plan, ratio: float) -> Plan:
    """The plan with the same ratio for all groups."""
    return plan.with_ratios(planned, dict.fromkeys(planned.groups, ratio))


def names(planned: Plan) -> list[str]:
    """diffusers' name of each target's weight."""
    return [layer_names.diffusers_name(planned, target) for target in planned.targets]


def weights(planned: Plan) -> list[Numbers]:
    """Every target's weights as the file has them."""
    found = []
    for target in planned.targets:
        file = planned.checkpoint.files[target.file]
        raw = file.path.read_bytes()
        start, stop = target.span(target.source)
        values = oracle.decode(target.source.dtype, raw[file.data_start + start : file.data_start + stop])
        found.append(values.reshape(-1, target.source.shape[-1]))
    return found


def digests(planned: Plan) -> dict[str, str]:
    """What tells each layer's weight apart."""
    found = {}
    for name, target in zip(names(planned), planned.targets, strict=True):
        file = planned.checkpoint.files[target.file]
        start, stop = target.span(target.source)
        data = file.path.read_bytes()[file.data_start + start : file.data_start + stop]
        found[name] = hashlib.sha256(data).hexdigest()[:16]
    return found


def statistics(shape: tuple[int, ...], seed: int = 0, tokens: int = 40) -> dict[str, NDArray[np.floating]]:
    """All statistics of a layer, of random inputs that depend on each other and random gradients of six samples."""
    rows, columns = shape
    rng = np.random.default_rng([seed, rows, columns])
    inputs = rng.standard_normal((tokens, columns)) @ (np.eye(columns) + 0.3 * rng.standard_normal((columns, columns)))
    found: dict[str, NDArray[np.floating]] = {
        "norm": (inputs**2).sum(0),
        "gram": (inputs.T @ inputs).astype(np.float32),
    }
    for prefix in ("", "native_"):
        gradients = rng.standard_normal((6, rows, columns)) * 1e-3 + 3e-4
        found[f"{prefix}gradient"] = gradients.mean(0).astype(np.float32)
        found[f"{prefix}gradient_abs"] = np.abs(gradients).mean(0).astype(np.float32)
        found[f"{prefix}gradient_square"] = (gradients**2).mean(0).astype(np.float32)
    return found


def calibrated(planned: Plan, kinds: Sequence[str] = ALL, seed: int = 0) -> dict[str, Statistics]:
    """Statistics of every layer of a plan."""
    return {
        name: {k: v for k, v in statistics(values.shape, seed=seed + number).items() if k in kinds}
        for number, (name, values) in enumerate(zip(names(planned), weights(planned), strict=True))
    }


def tensors_of(found: Mapping[str, Statistics]) -> dict[str, tuple[str, Shape, bytes]]:
    """Statistics as tensors of a file."""
    dtype = {np.dtype(np.float64): "F64", np.dtype(np.float32): "F32"}
    return {
        f"{kind}/{name}": (dtype[values.dtype], values.shape, values.tobytes())
        for name, each in found.items()
        for kind, values in each.items()
    }


def write_calibration(
    path: Path, planned: Plan, found: Mapping[str, Statistics], said: Mapping[str, str | None] | None = None
) -> Path:
    """A calibration's file, its header spelt out here; `said` changes keys below `crdiff.calibration`, None drops one.

    The key `""` is `crdiff.calibration` itself.
    """
    kinds = dict.fromkeys(kind for each in found.values() for kind in each)
    keys: dict[str, str | None] = {
        "": "1", "family": planned.match.family.id, "base": "base.safetensors", "base_hash": "0x12",
        "size": str(SIZE), "native": str(NATIVE), "statistics": ",".join(kinds),
        "layers": json.dumps(digests(planned)), "facts.prompts": "abc",
    }  # fmt: skip
    keys |= dict(said or {})
    metadata = {f"crdiff.calibration{key and '.'}{key}": text for key, text in keys.items() if text is not None}
    return makers.write(path, tensors_of(found), metadata)


def choose(
    planned: Plan, scores: Sequence[Numbers], values: Sequence[Numbers], compare: str
) -> list[NDArray[np.bool_]]:
    """Which weights go, by sorting whatever is compared; nothing of a scope of rank 0 does."""
    masks = [np.zeros(each.shape, bool) for each in values]
    for number, scope in enumerate(planned.scopes):
        members = [i for i, target in enumerate(planned.targets) if target.scope == number]
        count = sum(values[i].size for i in members)
        if int(count * scope.ratio) == 0:
            continue
        ranked = {i: np.where(np.isfinite(values[i]), scores[i], np.inf) for i in members}
        every = sorted(number for each in ranked.values() for number in each.ravel().tolist())
        for i in members:
            for row in range(len(values[i])):
                own = sorted(ranked[i][row].tolist()) if compare == "row" else every
                k = int(len(own) * scope.ratio)
                gone = ranked[i][row] <= own[k - 1] if k else np.zeros(len(own), bool)
                masks[i][row] = (gone & np.isfinite(values[i][row])) | (values[i][row] == 0)
    return masks
