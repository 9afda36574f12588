"""The float dtypes that can be pruned, as bit patterns.

Magnitudes of floats have the order of their bit patterns without the sign bit. Every magnitude of a 16 or 8 bit dtype
is also a float32, so the float32 pattern of a magnitude is a scale on which weights of all dtypes compare exactly.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

# IEEE 754 binary32: the pattern of infinity, and of the largest finite magnitude.
INFINITY = 0x7F80_0000
LARGEST = INFINITY - 1


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A safetensors float dtype.

    Attributes:
        dtype: Its safetensors name.
        width: Bits of an element.
        first_nonfinite: The smallest magnitude pattern that is infinite or not a number.
    """

    dtype: str
    width: int
    first_nonfinite: int

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.width // 8

    @property
    def mask(self) -> int:
        """The bits of a pattern that hold the magnitude, all but the sign."""
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

# The values of `--dtype`, and their safetensors names.
DTYPES: Mapping[str, str] = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}


@cache
def torch_dtypes() -> "Mapping[str, torch.dtype]":
    """Return torch's dtype for each safetensors dtype of `FORMATS`; this imports torch."""
    import torch

    return {
        "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }  # fmt: skip


@cache
def scale(dtype: str) -> "NDArray[np.uint32]":
    """Convert every magnitude of a narrow dtype to float32.

    Args:
        dtype: A safetensors dtype of at most 16 bits.

    Returns:
        uint32 [2 ** (width - 1)]: the float32 pattern of each magnitude pattern, ascending.
    """
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
    with np.errstate(invalid="ignore"):  # some processors warn of a signalling NaN
        return half.astype(np.float32).view(np.uint32)


def limit(dtype: str, bits: int) -> int:
    """Convert a float32 limit to a narrow dtype.

    Args:
        dtype: A safetensors dtype.
        bits: A float32 magnitude pattern.

    Returns:
        The largest magnitude pattern of `dtype` that is at most `bits`.
    """
    if dtype == "F32":
        return bits
    return int(scale(dtype).searchsorted(bits, side="right")) - 1


def value(bits: int) -> float:
    """Return the number with this float32 magnitude pattern."""
    (number,) = struct.unpack("<f", struct.pack("<I", bits))
    return float(number)


def bits(value: float) -> int:
    """Return the float32 magnitude pattern of a number that a float32 holds exactly."""
    (pattern,) = struct.unpack("<I", struct.pack("<f", abs(value)))
    return int(pattern)
