"""Plans of narrow models, calibrations with random numbers, and the slow way to choose which weights go."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.models.recipe import Variant
from crdiff_export.prune import layer_names, plan
from crdiff_export.prune.plan import Plan
from crdiff_export.sizes import Size
from tests.support import makers, oracle
from tests.support.makers import Tensors

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


def raw_weights(planned: Plan) -> list[bytes]:
    """Every target's bytes in the file."""
    data = [file.path.read_bytes()[file.data_start :] for file in planned.checkpoint.files]
    return [data[target.file][slice(*target.span(target.source))] for target in planned.targets]


def weights(planned: Plan) -> list[Numbers]:
    """Every target's weights as the file has them."""
    return [
        oracle.decode(target.source.dtype, raw).reshape(-1, target.source.shape[-1])
        for target, raw in zip(planned.targets, raw_weights(planned), strict=True)
    ]


def digests(planned: Plan) -> dict[str, str]:
    """The hash of each layer's weight."""
    return {
        name: hashlib.sha256(raw).hexdigest()[:16]
        for name, raw in zip(names(planned), raw_weights(planned), strict=True)
    }


def gradients(rng: np.random.Generator, shape: tuple[int, ...], mean: float) -> dict[str, NDArray[np.floating]]:
    """Statistics of random gradients at both sizes; `shape` is samples x rows x columns."""
    found = {}
    for prefix in ("", "native_"):
        samples = rng.standard_normal(shape) * 1e-3 + mean
        found[f"{prefix}gradient"] = samples.mean(0).astype(np.float32)
        found[f"{prefix}gradient_abs"] = np.abs(samples).mean(0).astype(np.float32)
        found[f"{prefix}gradient_square"] = (samples**2).mean(0).astype(np.float32)
    return found


@cache
def statistics(shape: tuple[int, ...], seed: int = 0, tokens: int = 40) -> Statistics:
    """All statistics of a layer, of random inputs that depend on each other and random gradients of six samples."""
    rows, columns = shape
    rng = np.random.default_rng([seed, rows, columns])
    inputs = rng.standard_normal((tokens, columns)) @ (np.eye(columns) + 0.3 * rng.standard_normal((columns, columns)))
    return {
        "norm": (inputs**2).sum(0), "gram": (inputs.T @ inputs).astype(np.float32),
        **gradients(rng, (6, rows, columns), 3e-4),
    }  # fmt: skip


def calibrated(planned: Plan, kinds: Sequence[str] = ALL, seed: int = 0) -> dict[str, Statistics]:
    """Statistics of every layer of a plan."""
    return {
        name: {k: v for k, v in statistics(values.shape, seed=seed + number).items() if k in kinds}
        for number, (name, values) in enumerate(zip(names(planned), weights(planned), strict=True))
    }


def write_calibration(
    path: Path, planned: Plan, found: Mapping[str, Statistics], said: Mapping[str, str | None] | None = None
) -> Path:
    """A calibration's file for a plan; `said` changes keys below `crdiff.calibration`, None drops one."""
    keys = {
        "family": planned.match.family.id, "base": "base.safetensors", "size": str(SIZE),
        "layers": json.dumps(digests(planned)), "facts.prompts": "abc",
    }  # fmt: skip
    return write_statistics(path, found, {**keys, **(said or {})})


def write_statistics(path: Path, found: Mapping[str, Statistics], said: Mapping[str, str | None]) -> Path:
    """A calibration's file, its header spelt out here. The key `""` is `crdiff.calibration` itself."""
    kinds = dict.fromkeys(kind for each in found.values() for kind in each)
    keys = {"": "1", "base_hash": "0x12", "native": str(NATIVE), "statistics": ",".join(kinds), **said}
    metadata = {f"crdiff.calibration{key and '.'}{key}": text for key, text in keys.items() if text is not None}
    dtypes = {"float64": "F64", "float32": "F32"}
    content = {
        f"{kind}/{name}": (dtypes[str(values.dtype)], values.shape, values.tobytes())
        for name, each in found.items()
        for kind, values in each.items()
    }
    return makers.write(path, content, metadata)


def choose(
    planned: Plan, scores: Sequence[Numbers], values: Sequence[Numbers], compare: str
) -> list[NDArray[np.bool_]]:
    """Which weights go, by sorting whatever is compared; nothing of a scope of rank 0 does."""
    masks = [np.zeros(each.shape, bool) for each in values]
    for number, scope in enumerate(planned.scopes):
        members = [i for i, target in enumerate(planned.targets) if target.scope == number]
        if int(sum(values[i].size for i in members) * scope.ratio) == 0:
            continue
        ranked = {i: np.where(np.isfinite(values[i]), scores[i], np.inf) for i in members}
        every = np.sort(np.concatenate([each.ravel() for each in ranked.values()]))
        for i, each in ranked.items():
            own = np.sort(each, axis=1) if compare == "row" else every[None]
            k = int(own.shape[1] * scope.ratio)
            gone = each <= own[:, k - 1 : k] if k else np.zeros(each.shape, bool)
            masks[i] = (gone & np.isfinite(values[i])) | (values[i] == 0)
    return masks
