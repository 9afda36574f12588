"""The loops in numba. They release the interpreter's lock, so that threads run them in parallel."""

import functools
import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numpy.typing import NDArray

from crdiff_export.formats.dtypes import FORMATS
from crdiff_export.prune.kernels import LOWER_BITS

if TYPE_CHECKING:
    from crdiff_export.prune.kernels import Counts, Flags

_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {8: np.uint8, 16: np.uint16, 32: np.uint32}


def compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop to machine code, with numba's cache where possible."""
    try:
        loop_code = numba.njit(nogil=True, cache=True)(loop)
    except RuntimeError:  # no folder for a cache, such as in a read-only home
        loop_code = numba.njit(nogil=True)(loop)

    @functools.wraps(loop_code)
    def call(*args: Any) -> Any:
        try:
            return loop_code(*args)
        except OSError:  # the folder is full: the code was compiled but not cached, and has not run
            return loop_code(*args)

    return call


@compiled
def _count(weights: Any, mask: Any, shift: Any, counts: Any) -> None:
    for i in range(weights.size):
        counts[(weights[i] & mask) >> shift] += 1


@compiled
def _refine(weights: Any, mask: Any, shift: Any, upper: Any, counts: Any) -> None:
    for i in range(weights.size):
        magnitude = weights[i] & mask
        if magnitude >> shift == upper:
            counts[magnitude & ((1 << shift) - 1)] += 1


@compiled
def _zero(weights: Any, mask: Any, limit: Any) -> None:
    for i in range(weights.size):
        weights[i] = weights[i] if (weights[i] & mask) > limit else 0


@compiled
def _count_keys(bits: Any, counts: Any) -> None:
    for i in range(bits.size):
        counts[((bits[i] ^ ((bits[i] >> 31) & 0x7FFFFFFF)) >> 16) + 0x8000] += 1


@compiled
def _refine_keys(bits: Any, upper: Any, counts: Any) -> None:
    for i in range(bits.size):
        key = bits[i] ^ ((bits[i] >> 31) & 0x7FFFFFFF)
        if key >> 16 == upper:
            counts[key & 0xFFFF] += 1


def count_keys(bits: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
    """Count the upper 16 bits of the sort keys of float32 numbers.

    A sort key is an integer that has the order of the number (Herf, "Radix Tricks", 2001).

    Args:
        bits: int32, the patterns of the numbers.
        counts: int64 [65536], to which the counts are added.
    """
    _count_keys(bits, counts)


def refine_keys(bits: NDArray[np.int32], upper: int, counts: NDArray[np.int64]) -> None:
    """Count the lower 16 bits of the sort keys with certain upper bits.

    Args:
        bits: int32, the patterns of the numbers.
        upper: The index of the upper bits in the histogram of `count_keys`.
        counts: int64 [65536], to which the counts are added.
    """
    _refine_keys(bits, np.int32(upper - 0x8000), counts)


class CpuKernel:
    """The kernel of the CPU; `threads` is the number of threads that should use it at once."""

    name = "cpu"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def buffer(self, size: int) -> memoryview:
        return memoryview(mmap.mmap(-1, size))  # starts on a page, as unbuffered writes need

    def count(self, weights: memoryview, dtype: str, counts: "Counts") -> None:
        bits, mask = as_bits(weights, dtype)
        _count(bits, mask, bits.dtype.type(LOWER_BITS if dtype == "F32" else 0), counts)

    def refine(self, weights: memoryview, upper: int, counts: "Counts") -> None:
        bits, mask = as_bits(weights, "F32")
        _refine(bits, mask, np.uint32(LOWER_BITS), np.uint32(upper), counts)

    def zero(self, weights: memoryview, dtype: str, limit: int) -> None:
        bits, mask = as_bits(weights, dtype)
        _zero(bits, mask, bits.dtype.type(limit))
        put_back(weights, bits)

    def clear(self, weights: memoryview, dtype: str, gone: "Flags") -> None:
        bits, _ = as_bits(weights, dtype)
        np.multiply(bits, ~gone, out=bits)
        put_back(weights, bits)


def as_bits(weights: memoryview, dtype: str) -> tuple[NDArray[Any], Any]:
    """Return weights as unsigned integers, and the bit mask of their magnitude."""
    unsigned = _UNSIGNED[FORMATS[dtype].width]
    bits = np.frombuffer(weights, unsigned)
    return bits if bits.flags.aligned else bits.copy(), unsigned(FORMATS[dtype].mask)


def put_back(weights: memoryview, bits: NDArray[Any]) -> None:
    """Write the result of `as_bits` back if it is a copy, which it is for weights that are not aligned."""
    if bits.base is None:
        weights[:] = bits.data.cast("B")
