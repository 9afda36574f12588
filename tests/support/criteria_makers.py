"""Plans of narrow models, calibrations with random numbers, and the slow way to choose which weights go."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.models.recipe import Variant
from crdiff_export.prune import plan
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
    return [target.layer.diffusers for target in planned.targets]


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


def hessian(gram: Any, damping: float = 0.01) -> Numbers:
    made = np.array(gram, np.float64)
    for j in range(len(made)):
        if made[j, j] == 0:
            made[j, j] = 1
    result: Numbers = made + damping * np.mean(np.diag(made)) * np.eye(len(made))
    return result


def settled(weight: Numbers, mask: Any, h: Numbers) -> Numbers:
    """The OBS update of each weight that goes, in the order of the columns, with the columns before it fixed.

    Hassibi and Stork 1993, equation 5: -w_q / [F^-1]_qq * F^-1 e_q, F being H without the columns before q.
    """
    moved = weight.copy()
    for j in range(weight.shape[1]):
        if not mask[:, j].any():
            continue
        inverse = np.linalg.inv(h[j:, j:])
        for i in range(len(weight)):
            if mask[i, j]:
                moved[i, j:] -= moved[i, j] / inverse[0, 0] * inverse[:, 0]
                moved[i, j] = 0
    return moved


def formula(text: str, w: Numbers, statistics: Mapping[str, NDArray[np.floating]]) -> Numbers:
    """The scores of one layer in float64, by the criterion's formula over whole matrices."""
    s = {kind: values.astype(np.float64) for kind, values in statistics.items()}
    name, _, options = text.partition(":")
    if name == "wanda":
        return np.asarray(np.abs(w) * np.sqrt(s["norm"]))
    if name == "taylor":
        return np.asarray(np.abs(w) * s["gradient_abs"] if options else w**2 * s["gradient_square"])
    if name == "obs":
        h = hessian(s["gram"])
        return np.asarray(w**2 / np.array([np.linalg.inv(h[j:, j:])[0, 0] for j in range(len(h))]))
    target, native = -s["gradient"] * w, -s["native_gradient"] * w
    if options == "form=steady":
        z = {k: -np.sign(w) * s[k] / np.sqrt(s[f"{k}_square"]) for k in ("gradient", "native_gradient")}
        return np.asarray(np.abs(w) * (1 + (z["gradient"] - z["native_gradient"]) / 2))
    forms: dict[str, Any] = {
        "": np.where(target < native, -1 / (np.abs(w) + 1e-8), np.abs(w)),
        "form=signed": target - native,
        "form=guarded": target + np.maximum(0, native),
        "form=second": target - native + (s["gradient_square"] - s["native_gradient_square"]) * w**2 / 2,
        "form=channel": np.broadcast_to((target - native).mean(0).astype(np.float32), w.shape),
    }
    return np.asarray(forms[options])


def choose(planned: Plan, scores: Sequence[Numbers], values: Sequence[Numbers], compare: str) -> list[oracle.Bools]:
    """Which weights of each target go."""
    ratios = {number: scope.ratio for number, scope in enumerate(planned.scopes)}
    return oracle.choose(scores, values, [target.scope for target in planned.targets], ratios, compare)
