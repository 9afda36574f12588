"""What an export must give, worked out the slow way: numbers decoded by formula, sorted, and compared as numbers.

An independent oracle: it shares no code and no table with the package. It finds the targets by the words of the method
(a layer whose path holds `attn` or `ff` and not `attn2`, in a down, mid or up block) and by the names of the layouts.
"""

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.support.makers import Shape, Tensors

Bools = NDArray[np.bool_]
FLOAT32_MAX = float(np.finfo(np.float32).max)


class Format(NamedTuple):
    """Bits of a float format; without `infinity` only the very last magnitude is no number (OCP OFP8 E4M3)."""

    exponent: int
    mantissa: int
    infinity: bool = True

    @property
    def size(self) -> int:
        return (1 + self.exponent + self.mantissa) // 8

    @property
    def finite(self) -> int:
        """How many magnitudes are numbers; their patterns are those below."""
        return (((1 << self.exponent) - 1) << self.mantissa) if self.infinity else (1 << 7) - 1


FORMATS = {
    "F64": Format(11, 52),
    "F32": Format(8, 23),
    "F16": Format(5, 10),
    "BF16": Format(8, 7),
    "F8_E4M3": Format(4, 3, infinity=False),
    "F8_E5M2": Format(5, 2),
}


def decode(dtype: str, data: bytes) -> NDArray[np.float64]:
    """The numbers that little-endian floats stand for; float64 holds each of them exactly."""
    form = FORMATS[dtype]
    raw = np.frombuffer(data, f"<u{form.size}").astype(np.uint64)
    mantissa = (raw & np.uint64((1 << form.mantissa) - 1)).astype(np.float64)
    exponent = ((raw >> np.uint64(form.mantissa)) & np.uint64((1 << form.exponent) - 1)).astype(np.int64)
    negative = (raw >> np.uint64(form.exponent + form.mantissa)).astype(bool)
    top, bias = (1 << form.exponent) - 1, (1 << (form.exponent - 1)) - 1
    whole = np.where(exponent == 0, mantissa, mantissa + 2.0**form.mantissa)
    power = np.maximum(exponent, 1) - bias - form.mantissa
    last = exponent == top
    if form.infinity:
        power[last] = 0
        numbers = np.ldexp(whole, power)
        numbers[last] = np.where(mantissa[last] == 0, np.inf, np.nan)
    else:
        numbers = np.ldexp(whole, power)
        numbers[last & (mantissa == (1 << form.mantissa) - 1)] = np.nan
    signed: NDArray[np.float64] = np.where(negative, -numbers, numbers)
    return signed


@dataclass(frozen=True)
class Expected:
    """The answer. `thresholds` are per group, or per layer in the order of the bytes; None where none was due."""

    files: tuple[dict[str, bytes], ...]
    thresholds: tuple[float | None, ...]
    pruned: dict[str, int]
    total: dict[str, int]
    nonfinite: dict[str, int]
    slices: "tuple[Slice, ...]"


class Slice(NamedTuple):
    """Elements of a tensor that are one layer's weight."""

    file: int
    tensor: str
    group: str
    start: int
    stop: int


UNET = re.compile(
    r"(?!model_ema\.)(?:.*\.)?(?P<block>down_blocks|input_blocks|mid_block|middle_block|up_blocks|output_blocks)\."
    r"(?P<layer>.*)\.weight"
)
GROUPS = {
    "down_blocks": "down", "input_blocks": "down", "mid_block": "mid", "middle_block": "mid",
    "up_blocks": "up", "output_blocks": "up",
}  # fmt: skip
# By kind: layers that are a tensor (0), fused tensors of which the first squares of rows are layers (their number), and
# fused tensors whose rows are parts of these proportions.
DIT: Mapping[str, Sequence[tuple[str, int | tuple[int, ...]]]] = {
    "ff": (
        (r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)", 0),
        (r"joint_blocks\.\d+\.x_block\.mlp\.fc[12]", 0),
        (r"double_blocks\.\d+\.img_mlp\.[02]", 0),
        (r"transformer_blocks\.\d+\.img_mlp\.net\.(0\.proj|2)", 0),
        (r"transformer_blocks\.\d+\.ff\.linear_(in|out)", 0),
        (r"joint_transformer_blocks\.\d+\.ff\.(linear_1|linear_2|out_projection)", 0),
        (r"double_layers\.\d+\.mlpX\.(c_fc1|c_fc2|c_proj)", 0),
        (r"blocks\.\d+\.mlp\.(fc|layer)[12]", 0),
        (r"double_stream_blocks\.\d+\.block\.ff_i\.shared_experts\.w[123]", 0),
    ),
    "ff-shared": (
        (r"layers\.\d+\.feed_forward\.(w|linear_)[123]", 0),
        (r"single_transformer_blocks\.\d+\.ff\.(linear_1|linear_2|out_projection)", 0),
        (r"single_layers\.\d+\.mlp\.(c_fc1|c_fc2|c_proj)", 0),
        (r"single_stream_blocks\.\d+\.block\.ff_i\.shared_experts\.w[123]", 0),
        (r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)", 0),
    ),
    "attn": (
        (r"((single|joint)_)?transformer_blocks\.\d+\.attn1?\.(to_q|to_k|to_v|to_out\.0)", 0),
        (r"(double_layers\.\d+\.attn\.w2|single_layers\.\d+\.attn\.w1)[qkvo]", 0),
        (r"(double|single)_stream_blocks\.\d+\.block\.attn1\.to_[qkv]", 0),
        (r"blocks\.\d+\.attn\.proj", 0),
        (r"blocks\.\d+\.attn\.qkv", 3),
        (r"blocks\.\d+\.self_attn\.(q_proj|k_proj|v_proj|output_proj)", 0),
        (r"joint_blocks\.\d+\.x_block\.attn\.proj", 0),
        (r"joint_blocks\.\d+\.x_block\.attn\.qkv", 3),
        (r"double_blocks\.\d+\.img_attn\.proj", 0),
        (r"double_blocks\.\d+\.img_attn\.qkv", 3),
        (r"single_blocks\.\d+\.linear1", 3),
        (r"layers\.\d+\.(attn|attention)\.(to_q|to_k|to_v|to_out\.0|out)", 0),
        (r"layers\.\d+\.attention\.qkv", (3, 1, 1)),
    ),
    "attn2": (
        (r"transformer_blocks\.\d+\.attn2\.(to_q|to_k|to_v|to_out\.0)", 0),
        (r"joint_blocks\.\d+\.x_block\.attn2\.proj", 0),
        (r"joint_blocks\.\d+\.x_block\.attn2\.qkv", 3),
        (r"blocks\.\d+\.cross_attn\.(q_linear|proj|q_proj|k_proj|v_proj|output_proj)", 0),
        (r"blocks\.\d+\.cross_attn\.kv_linear", 2),
    ),
}


def slices(file: int, name: str, shape: Shape, kinds: Sequence[str], *, dit: bool) -> list[Slice]:
    """The layers that a tensor holds."""
    if dit:
        for kind in kinds:
            for pattern, fused in DIT[kind]:
                if re.fullmatch(rf"(?:.*\.)?{pattern}\.weight", name):
                    return [Slice(file, name, "blocks", *cut) for cut in _cuts(shape, fused)]
        return []
    match = UNET.fullmatch(name)
    if match is None or "attn2" in match["layer"]:
        return []
    if not any(kind in match["layer"] for kind in kinds):
        return []
    return [Slice(file, name, GROUPS[match["block"]], 0, shape[0] * shape[1])]


def _cuts(shape: Shape, fused: int | tuple[int, ...]) -> list[tuple[int, int]]:
    rows, columns = shape
    if fused == 0:
        return [(0, rows * columns)]
    if rows == 3 * columns:  # as many key heads as query heads
        fused = 3
    if isinstance(fused, int):
        return [(i * columns * columns, (i + 1) * columns * columns) for i in range(fused)]
    ends = [rows * sum(fused[:i]) // sum(fused) * columns for i in range(len(fused) + 1)]
    return list(pairwise(ends))


def expect(
    files: Sequence[Tensors],
    ratios: Mapping[str, float],
    kinds: Sequence[str],
    *,
    dit: bool = False,
    scales: Mapping[str, float] | None = None,
) -> Expected:
    """Prune files of tensors, given in the order of their bytes, as the reference does: sort, take, compare.

    `scales` has what the numbers of a tensor are to be multiplied with.
    """
    found = [
        piece
        for number, tensors in enumerate(files)
        for name, (_, shape, _) in tensors.items()
        for piece in slices(number, name, shape, kinds, dit=dit)
    ]
    output = [{name: bytearray(data) for name, (_, _, data) in tensors.items()} for tensors in files]
    scopes = [[piece] for piece in found] if dit else [[p for p in found if p.group == group] for group in ratios]
    pruned, total, nonfinite = (dict.fromkeys(ratios, 0) for _ in range(3))
    thresholds: list[float | None] = []
    for scope in scopes:
        group = scope[0].group
        magnitudes = [np.abs(_decode(files, piece)) * (scales or {}).get(piece.tensor, 1.0) for piece in scope]
        every = np.sort(np.concatenate(magnitudes))
        k = int(len(every) * ratios[group])
        total[group] += len(every)
        if k == 0:
            thresholds.append(None)
            continue
        # What is no number ranks last and stays; where the rank is beyond the numbers, all of those go.
        threshold = float(every[k - 1]) if np.isfinite(every[k - 1]) else FLOAT32_MAX
        thresholds.append(threshold)
        pruned[group] += int(np.count_nonzero(every <= threshold))
        nonfinite[group] += int(np.count_nonzero(~np.isfinite(every)))
        for piece, own in zip(scope, magnitudes, strict=True):
            size = FORMATS[files[piece.file][piece.tensor][0]].size
            into = np.frombuffer(output[piece.file][piece.tensor], f"<u{size}")
            into[piece.start : piece.stop][own <= threshold] = 0
    return Expected(
        tuple({name: bytes(data) for name, data in tensors.items()} for tensors in output),
        tuple(thresholds), pruned, total, nonfinite, tuple(found),
    )  # fmt: skip


def _decode(files: Sequence[Tensors], piece: Slice) -> NDArray[np.float64]:
    dtype, _, data = files[piece.file][piece.tensor]
    return decode(dtype, data)[piece.start : piece.stop]


def choose(
    scores: Sequence[NDArray[Any]],
    values: Sequence[NDArray[Any]],
    scopes: Sequence[object],
    ratios: Mapping[Any, float],
    compare: str,
) -> list[Bools]:
    """Which weights go, by sorting what is compared; none of a scope whose rank is 0.

    Args:
        scores: Of each layer.
        values: Its weights; what is no finite number stays, and a zero goes.
        scopes: Its scope.
        ratios: By scope.
        compare: "row" to compare the weights of a row, or anything else for those of a scope.
    """
    masks: list[Bools] = [np.zeros(each.shape, bool) for each in values]
    for scope, ratio in ratios.items():
        members = [i for i, own in enumerate(scopes) if own == scope]
        if int(sum(values[i].size for i in members) * ratio) == 0:
            continue
        ranked = {i: np.where(np.isfinite(values[i]), scores[i], np.inf) for i in members}
        every = np.sort(np.concatenate([each.ravel() for each in ranked.values()]))
        for i, each in ranked.items():
            own = np.sort(each, axis=1) if compare == "row" else every[None]
            k = int(own.shape[1] * ratio)
            gone = each <= own[:, k - 1 : k] if k else np.zeros(each.shape, bool)
            masks[i] = (gone & np.isfinite(values[i])) | (values[i] == 0)
    return masks


class Entry(NamedTuple):
    """A tensor as a header has it."""

    name: str
    dtype: str
    shape: Shape
    start: int
    stop: int


@dataclass(frozen=True)
class Content:
    """A safetensors file, taken apart without the code under test; entries in the order of the header."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    data: bytes

    def tensors(self) -> dict[str, tuple[str, Shape, bytes]]:
        """Tensors in the order of their bytes."""
        placed = sorted(self.entries, key=lambda entry: (entry.start, entry.stop))
        return {e.name: (e.dtype, e.shape, self.data[e.start : e.stop]) for e in placed}


def read(path: Path) -> Content:
    """A file's content."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    entries = (Entry(n, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in header.items())
    return Content(tuple(entries), metadata, raw[8 + size :])


def hold(base: Path, output: Path, expected: Expected, number: int = 0) -> None:
    """Assert that a baked file is what the oracle says of file `number`: header, places, every byte, every number."""
    source, baked = read(base), read(output)
    assert baked.entries == source.entries
    assert len(baked.data) == len(source.data)
    for name, (_, _, data) in baked.tensors().items():
        assert data == expected.files[number][name], name
    hold_numbers(baked.metadata, expected)


def hold_numbers(said: Mapping[str, str], expected: Expected) -> None:
    """Assert that a header's thresholds and counts are the oracle's."""
    for group in expected.total:
        assert int(said[f"crdiff.pruned.{group}"]) == expected.pruned[group], group
        assert int(said[f"crdiff.total.{group}"]) == expected.total[group], group
        assert int(said.get(f"crdiff.nonfinite.{group}", "0")) == expected.nonfinite[group], group
    if "crdiff.thresholds" in said:
        written = json.loads(said["crdiff.thresholds"])
        assert not any(key.startswith("crdiff.threshold.") for key in said)
    else:
        written = [said[f"crdiff.threshold.{group}"] for group in expected.total]
    assert written == ["none" if t is None else t.hex() for t in expected.thresholds]


def sha256(path: Path) -> str:
    """The hash of a file's data section as ModelSpec spells it."""
    return "0x" + hashlib.sha256(read(path).data).hexdigest()
