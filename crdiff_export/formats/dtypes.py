"""The float formats that can be pruned, seen as bits.

The magnitude of a float orders like its bits without the sign. Every magnitude of the half and quarter formats is also
a float32, so float32 magnitude bits are the one scale on which weights of any of these dtypes compare exactly.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# IEEE 754 binary32: the first magnitude that is not a finite number (infinity), and the last that is.
INFINITY = 0x7F80_0000
LARGEST = INFINITY - 1


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A safetensors float dtype: `width` in bits, and the first magnitude pattern that is no finite number."""

    dtype: str
    width: int
    first_nonfinite: int

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return self.width // 8

    @property
    def mask(self) -> int:
        """The bits of the magnitude."""
        return (1 << (self.width - 1)) - 1


# F8_E4M3 is the "fn" variant of OCP OFP8 / arXiv 2209.05433: no infinity, one NaN pattern.
FORMATS: Mapping[str, FloatFormat] = {
    f.dtype: f
    for f in (
        FloatFormat("F32", 32, INFINITY),
        FloatFormat("F16", 16, 0x7C00),
        FloatFormat("BF16", 16, 0x7F80),
        FloatFormat("F8_E4M3", 8, 0x7F),
        FloatFormat("F8_E5M2", 8, 0x7C),
    )
}

# What `--dtype` calls them.
DTYPES: Mapping[str, str] = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}


@cache
def scale(dtype: str) -> "NDArray[np.uint32]":
    """The float32 magnitude bits of every magnitude of a format of at most 16 bits, ascending."""
    import numpy as np

    patterns = np.arange(1 << (FORMATS[dtype].width - 1), dtype=np.uint32)
    if dtype == "BF16":
        return patterns << np.uint32(16)
    if dtype == "F8_E4M3":
        exponent, mantissa = patterns >> 3, patterns & 7
        # bias 7; exponent 0 is subnormal, in steps of 2**-9
        values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(np.int64) - 10))
        values[0x7F] = np.nan
        return values.astype(np.float32).view(np.uint32)
    # E5M2 is the upper half of binary16
    half = (patterns << np.uint32(8 if dtype == "F8_E5M2" else 0)).astype(np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):  # some processors complain of a NaN that signals
        return half.astype(np.float32).view(np.uint32)


def limit(dtype: str, bits: int) -> int:
    """The largest magnitude pattern of `dtype` that is at most the float32 magnitude `bits`."""
    if dtype == "F32":
        return bits
    return int(scale(dtype).searchsorted(bits, side="right")) - 1


def value(bits: int) -> float:
    """The number that float32 magnitude `bits` stand for."""
    (number,) = struct.unpack("<f", struct.pack("<I", bits))
    return float(number)


def bits(value: float) -> int:
    """The float32 magnitude bits of a number that is exactly a float32."""
    (pattern,) = struct.unpack("<I", struct.pack("<f", abs(value)))
    return int(pattern)
