"""Casts between float dtypes on raw bits, rounding to nearest even as torch does."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crdiff_export.formats.dtypes import FORMATS, INFINITY, patterns

_NUMPY: dict[str, type[np.floating[Any]]] = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def cast(data: memoryview, source: str, target: str) -> bytes | memoryview:
    """Cast weights; numbers that are too large for the new dtype become infinite, as in torch.

    Args:
        data: Weights, as bytes.
        source: Their dtype: F64 or one of `dtypes.FORMATS`.
        target: The new dtype: F32, F16 or BF16.

    Returns:
        The cast weights, as bytes.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        wide = np.frombuffer(data, _NUMPY[source]) if source in _NUMPY else _widen(data, source)
        if source == "F64":  # torch also casts by way of float32, and so rounds twice
            wide = wide.astype(np.float32)
        return _narrow(wide) if target == "BF16" else wide.astype(_NUMPY[target]).data.cast("B")


def nonfinite(data: bytes | memoryview, dtype: str) -> int:
    """Count weights that are infinite or not a number.

    Args:
        data: Weights, as bytes.
        dtype: Their dtype: F64 or one of `dtypes.FORMATS`.

    Returns:
        The number of such weights.
    """
    if dtype == "F64":
        return int(np.count_nonzero(~np.isfinite(np.frombuffer(data, np.float64))))
    form = FORMATS[dtype]
    bits = np.frombuffer(data, f"u{form.itemsize}")
    return int(np.count_nonzero((bits & bits.dtype.type(form.mask)) >= form.first_nonfinite))


def _widen(data: memoryview, source: str) -> NDArray[np.float32]:
    """Widen BF16 and F8 to float32, which is exact."""
    form = FORMATS[source]
    bits = np.frombuffer(data, f"u{form.itemsize}")
    sign = (bits >> (form.width - 1)).astype(np.uint32) << np.uint32(31)
    wide: NDArray[np.uint32] = patterns(source)[bits & bits.dtype.type(form.mask)] | sign
    return wide.view(np.float32)


def _narrow(wide: NDArray[np.float32]) -> memoryview:
    """Round float32 to BF16, to nearest even: add half of the last remaining bit, less one if that bit is even."""
    bits = wide.astype(np.float32, copy=False).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    nan = (bits & np.uint32(INFINITY | 0x7FFFFF)) > INFINITY
    rounded = np.where(nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded)
    return rounded.astype(np.uint16).data.cast("B")
