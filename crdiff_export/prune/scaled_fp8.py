"""The scales of fp8 weights: each weight is its code times one number of its tensor, the scale.

The scale and the format of a layer X have three spellings (ComfyUI: `convert_old_quants` in `comfy/utils.py`, and
`comfy/ops.py`):

- `X.scale_weight`, where the model has a tensor `scaled_fp8` and the header has no `_quantization_metadata`; the format
  is the dtype of `X.weight` (ComfyUI 0.33 casts E5M2 to E4M3, older ones did not),
- `X.weight_scale`, and JSON with the format in the tensor `X.comfy_quant`,
- `X.weight_scale`, and JSON with the formats of all layers in the header's `_quantization_metadata`.
"""

import bisect
import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from crdiff_export.errors import PlanError
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.safetensors import TensorSpec, show
from crdiff_export.formats.strict_json import MalformedError, parse_object
from crdiff_export.formats.weight_file import Bytes
from crdiff_export.models.families.quantised import METADATA

_FORMATS: Final[Mapping[str, str]] = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
# What ComfyUI's JSON may say beside the format: how the layer computes.
_SETTINGS = {"format", "full_precision_matrix_mult"}
# Tensors of a layer that do not change its weight, or are read here.
_KNOWN = ("weight", "bias", "scale_weight", "weight_scale", "comfy_quant", "input_scale", "scale_input", "_extra_state")
# The product of a code and a number of these dtypes is exact in double precision.
_SCALE_DTYPES = ("F32", "F16", "BF16")
# A format in JSON has some dozen characters; do not read gigabytes.
_MOST_BYTES = 1 << 16
_HINT = "Export from the fp16 or bf16 checkpoint, then quantise the result."

_Tensors = Mapping[str, tuple[int, TensorSpec]]
_Read = Callable[[str], memoryview]


def read_scales(checkpoint: Checkpoint, prefix: str, names: Iterable[str]) -> dict[str, float]:
    """Read the scales of weights.

    Args:
        checkpoint: The checkpoint.
        prefix: The prefix of the model's tensors.
        names: The names of the weights, with prefix.

    Returns:
        The scale by the weight's name; weights without a scale are plain. Empty for files on the Hub, which are planned
        from their headers alone.

    Raises:
        PlanError: A weight is quantised in another way, or its scale is not one finite number above 0.
    """
    if any(file.info is None for file in checkpoint.files):
        return {}
    tensors = {tensor.name: (number, tensor) for number, tensor in checkpoint.tensors()}
    by_header = any(METADATA in file.metadata for file in checkpoint.files)
    formats = _header_formats(checkpoint)
    by_marker = f"{prefix}scaled_fp8" in tensors and not by_header
    in_order = sorted(tensors)
    scales = {}
    with _open(checkpoint, tensors) as read:
        for name in names:
            try:
                _refuse_others(name, tensors, in_order)
                if key := _scale_key(name, tensors, formats, read, by_marker=by_marker):
                    scales[name] = _scale(key, tensors, read)
            except ValueError as error:
                raise PlanError(f"{checkpoint.path}: {show(name)} {error}", _HINT) from error
    return scales


@contextlib.contextmanager
def _open(checkpoint: Checkpoint, tensors: _Tensors) -> Iterator[_Read]:
    """Give a function that reads a whole small tensor; it opens each file once."""
    readers: dict[int, Bytes] = {}
    with contextlib.ExitStack() as stack:

        def read(name: str) -> memoryview:
            number, tensor = tensors[name]
            if tensor.nbytes > _MOST_BYTES:
                raise ValueError(f"has a {name.rpartition('.')[2]} of {tensor.nbytes:,} bytes")
            if number not in readers:
                readers[number] = stack.enter_context(contextlib.closing(checkpoint.files[number].open()))
            data = memoryview(bytearray(tensor.nbytes))
            readers[number].read_into(tensor.start, data)
            return data

        yield read


def _header_formats(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the format of each layer that `_quantization_metadata` names."""
    formats: dict[str, str] = {}
    for file in checkpoint.files:
        if METADATA not in file.metadata:
            continue
        try:
            layers = parse_object(file.metadata[METADATA].encode(), fractions=True).get("layers")
        except MalformedError as error:
            raise PlanError(f"{file.path}: metadata {METADATA} {error}", _HINT) from error
        if not isinstance(layers, dict):
            raise PlanError(f"{file.path}: metadata {METADATA} has no object of layers", _HINT)
        formats |= {name: _format(layer) for name, layer in layers.items()}
    return formats


def _scale_key(name: str, tensors: _Tensors, formats: Mapping[str, str], read: _Read, *, by_marker: bool) -> str | None:
    """Return the name of a weight's scale, None for a plain weight; ValueError if it is quantised in another way."""
    layer = name.removesuffix(".weight")
    old, new, quant = (f"{layer}.{tail}" for tail in ("scale_weight", "weight_scale", "comfy_quant"))
    dtype = tensors[name][1].dtype
    if layer in formats or quant in tensors:
        form = formats[layer] if layer in formats else _tensor_format(read(quant))
        if form not in _FORMATS:
            raise ValueError(f"is quantised as {show(form)}, which is not built in")
        if dtype != _FORMATS[form]:
            raise ValueError(f"is {dtype}, its format is {show(form)}")
        if new not in tensors:
            raise ValueError("has a format, but no weight_scale")
        return new
    if new in tensors:
        raise ValueError(f"has weight_scale, but neither comfy_quant nor {METADATA} says its format")
    if old not in tensors:
        return None
    if not by_marker:
        raise ValueError(f"has scale_weight, which counts only with a tensor scaled_fp8 and without {METADATA}")
    if dtype not in _FORMATS.values():
        raise ValueError(f"has scale_weight, but is {dtype}")
    return old


def _refuse_others(name: str, tensors: _Tensors, in_order: Sequence[str]) -> None:
    """Refuse a layer with tensors that may change its weight: other scales of fp8, and an adapter that is not fused."""
    layer = name.removesuffix("weight")
    is_fp8 = tensors[name][1].dtype in _FORMATS.values()
    for place in range(bisect.bisect_left(in_order, layer), len(in_order)):
        other = in_order[place]
        if not other.startswith(layer):
            return
        tail = other.removeprefix(layer)
        if "lora_" in tail or (is_fp8 and tail not in _KNOWN):
            raise ValueError(f"has {show(tail)} beside it, so that it may not be the whole weight")


def _tensor_format(raw: memoryview) -> str:
    try:
        return _format(parse_object(bytes(raw), fractions=True))
    except MalformedError as error:
        raise ValueError(f"has a comfy_quant that {error}") from error


def _format(settings: object) -> str:
    """Return the format that JSON names, or all of the JSON if it says more than ComfyUI's."""
    form = settings.get("format") if isinstance(settings, dict) and settings.keys() <= _SETTINGS else settings
    return form if isinstance(form, str) else json.dumps(form)


def _scale(key: str, tensors: _Tensors, read: _Read) -> float:
    """Read one scale; ValueError if it is not one finite number above 0."""
    import numpy as np

    from crdiff_export.prune.kernels.cast import cast

    tensor, tail = tensors[key][1], key.rpartition(".")[2]
    if tensor.count != 1:
        shape = list(tensor.shape)
        raise ValueError(f"has a {tail} of shape {shape}; only one scale for a whole tensor is built in")
    if tensor.dtype not in _SCALE_DTYPES:
        raise ValueError(f"has a {tail} of the dtype {tensor.dtype}, must be one of {', '.join(_SCALE_DTYPES)}")
    raw = read(key)
    data = raw if tensor.dtype == "F32" else cast(raw, tensor.dtype, "F32")
    scale = float(np.frombuffer(data, np.float32)[0])
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"has the {tail} {scale}, must be a finite number above 0")
    return scale
