"""Torch pickles (`.ckpt`, `.pt`, `.bin`) as the safetensors file they would make. Nothing in them is ever executed.

`torch.load(weights_only=True)` builds tensors and plain containers only and refuses every other global;
`mmap=True` leaves the weights on disk until they are read.
"""

import pickle
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crdiff_export.checkpoint import Bytes, SourceFile
from crdiff_export.errors import CheckpointError
from crdiff_export.header import BITS, TensorSpec, show

if TYPE_CHECKING:
    import torch

# safetensors.torch: _SIZE and the names of the format
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
# What trainers wrap a model's weights in, from the outside in.
_WRAPPERS = ("state_dict", "model_state_dict", "module", "params")


def open_pickle(path: Path) -> SourceFile:
    """A pickle's tensors, placed as a safetensors writer would place them; CheckpointError for anything else in it."""
    found = _tensors(_load(path), path)
    # Wide dtypes first, so that every tensor is aligned; then by name (safetensors `prepare`).
    names = sorted(found, key=lambda name: (-BITS[_dtype(found[name], name, path)], name))
    specs, position = [], 0
    for name in names:
        tensor = found[name]
        end = position + tensor.numel() * tensor.element_size()
        specs.append(TensorSpec(name, _dtype(tensor, name, path), tuple(tensor.shape), position, end))
        position = end
    info = path.stat()
    stored = getattr(info, "st_blocks", info.st_size // 512 + 1) * 512
    tensors = _PickledTensors(tuple(specs), found)
    return SourceFile(path, path.with_suffix(".safetensors").name, tuple(specs), {}, 0, stored, tensors)


def _load(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than weights, and code in a checkpoint is not run ({_first_line(error)})",
            "Get the model as .safetensors; if you trust its origin, convert it with the tool that made it.",
        ) from error
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        OverflowError,
    ) as error:
        # What torch raises for damaged archives; it also cannot map files from before torch 1.6.
        raise CheckpointError(
            f"{path}: cannot be read as a torch checkpoint ({_first_line(error)})",
            "Get the model as .safetensors, or save it again with a current torch.",
        ) from error


def _first_line(error: Exception) -> str:
    return show(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__, 120)


def _tensors(value: Any, path: Path) -> dict[str, "torch.Tensor"]:
    import torch

    for _ in range(8):
        inner = next(
            (value[key] for key in _WRAPPERS if isinstance(value, Mapping) and isinstance(value.get(key), Mapping)),
            None,
        )
        if inner is None:
            break
        value = inner
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not named weights", "Give a model's checkpoint.")
    found = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, torch.Tensor) and not v.is_sparse}
    if not found:
        raise CheckpointError(f"{path}: holds no tensors", "Give a model's checkpoint.")
    return found


def _dtype(tensor: "torch.Tensor", name: str, path: Path) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{path}: {show(name)} is {dtype}, which has no place in a safetensors file", "Convert it first."
        )
    return _DTYPES[dtype]


@dataclass(frozen=True)
class _PickledTensors:
    specs: tuple[TensorSpec, ...]
    tensors: Mapping[str, "torch.Tensor"]

    def open(self) -> Bytes:
        return _PickledBytes(self)


class _PickledBytes:
    """Reads mapped tensors as if they lay one behind the other."""

    def __init__(self, source: _PickledTensors) -> None:
        self._source = source
        self._starts = [spec.start for spec in source.specs]

    def read_into(self, offset: int, target: memoryview) -> None:
        done, index = 0, max(bisect_right(self._starts, offset) - 1, 0)
        while done < len(target):
            spec = self._source.specs[index]
            inside = offset + done - spec.start
            if 0 <= inside < spec.nbytes:
                raw = _raw(self._source.tensors[spec.name])
                part = raw[inside : inside + len(target) - done]
                target[done : done + len(part)] = part
                done += len(part)
            index += 1

    def close(self) -> None:
        """Nothing is held that the tensors do not hold."""


def _raw(tensor: "torch.Tensor") -> memoryview:
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    raw: memoryview = flat.view(torch.uint8).numpy().data
    return raw
