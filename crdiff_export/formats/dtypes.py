"""The float dtypes that can be pruned, as bit patterns.

Magnitudes of floats have the order of their bit patterns without the sign bit. Every plain magnitude of a 16 or 8 bit
dtype is also a float32, so float32 patterns compare all dtypes exactly. Magnitudes with a scale (scaled fp8) are
compared as doubles: see `Encoding`.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

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
def patterns(dtype: str) -> "NDArray[np.uint32]":
    """Convert every magnitude of a narrow dtype to float32.

    Args:
        dtype: A safetensors dtype of at most 16 bits.

    Returns:
        uint32 [2 ** (width - 1)]: the float32 pattern of each magnitude pattern, ascending.
    """
    import numpy as np

    stored = np.arange(1 << (FORMATS[dtype].width - 1), dtype=np.uint32)
    if dtype == "BF16":
        return stored << np.uint32(16)
    if dtype == "F8_E4M3":
        exponent, mantissa = stored >> 3, stored & 7
        # bias 7; exponent 0 is subnormal, in steps of 2**-9
        values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(np.int64) - 10))
        values[0x7F] = np.nan
        return values.astype(np.float32).view(np.uint32)
    # E5M2 is the upper half of binary16
    half = (stored << np.uint32(8 if dtype == "F8_E5M2" else 0)).astype(np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):  # some processors warn of a signalling NaN
        return half.astype(np.float32).view(np.uint32)


class Encoding(NamedTuple):
    """How a weight is stored: as a float of `dtype`, multiplied by `scale` if it has one (scaled fp8).

    A float of 8 bits has at most 4 significant bits and a float32 has 24, so their product is exact as a double.
    """

    dtype: str
    scale: float | None = None

    def values(self) -> "NDArray[np.float64]":
        """Return every finite magnitude of a narrow dtype by its pattern, float64 [first_nonfinite], ascending."""
        plain = _values(self.dtype)
        return plain if self.scale is None else plain * self.scale

    def float32_patterns(self) -> "NDArray[np.uint32]":
        """Return for every magnitude of a narrow dtype the pattern of the largest float32 that is not above it.

        Magnitudes that are infinite or not a number have patterns of INFINITY and above.
        """
        import numpy as np

        exact = patterns(self.dtype)
        if self.scale is None:
            return exact
        values = self.values()
        with np.errstate(over="ignore"):
            nearest = values.astype(np.float32)
        floors = np.where(nearest > values, np.nextafter(nearest, np.float32(0)), nearest).view(np.uint32)
        return np.concatenate([floors, exact[len(values) :]])

    def limit(self, threshold: float) -> int:
        """Return the largest magnitude pattern of a finite number that is at most a threshold."""
        if self.dtype == "F32":
            return floor_bits(threshold)
        return int(self.values().searchsorted(threshold, side="right")) - 1


@cache
def _values(dtype: str) -> "NDArray[np.float64]":
    import numpy as np

    return patterns(dtype)[: FORMATS[dtype].first_nonfinite].view(np.float32).astype(np.float64)


def value(bits: int) -> float:
    """Return the number with this float32 magnitude pattern."""
    (number,) = struct.unpack("<f", struct.pack("<I", bits))
    return float(number)


def bits(value: float) -> int:
    """Return the float32 magnitude pattern of a number that a float32 holds exactly."""
    (pattern,) = struct.unpack("<I", struct.pack("<f", abs(value)))
    return int(pattern)


def floor_bits(number: float) -> int:
    """Return the pattern of the largest finite float32 that is not above a number of at least 0."""
    if number >= value(LARGEST):
        return LARGEST
    nearest = bits(number)
    return nearest if value(nearest) <= number else nearest - 1
