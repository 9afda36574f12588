"""The loops of a residual in numba: copy the weights that will be set to zero, and put them back.

They always run on the CPU, because the weights are in its memory.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from crdiff_export.prune.kernels.cpu import as_bits, compiled, put_back

if TYPE_CHECKING:
    from crdiff_export.prune.kernels import Flags

# Zeros are located for this many weights before any is filled: three times as fast as one loop for both.
_BLOCK = 4096


# Without a branch, which the processor would predict wrongly for every third weight.
@compiled
def _take(weights: Any, mask: Any, limit: Any, into: Any) -> int:
    taken = 0
    for i in range(weights.size):
        into[taken] = weights[i]
        taken += 0 if (weights[i] & mask) > limit else 1
    return taken


@compiled
def _pick(weights: Any, gone: Any, into: Any) -> int:
    taken = 0
    for i in range(weights.size):
        into[taken] = weights[i]
        taken += 1 if gone[i] else 0
    return taken


@compiled
def _put(weights: Any, values: Any) -> None:
    indices, done = np.empty(_BLOCK + 1, np.int64), 0
    for start in range(0, weights.size, _BLOCK):
        count = 0
        for i in range(start, min(start + _BLOCK, weights.size)):
            indices[count] = i
            count += 0 if weights[i] else 1
        for j in range(count):
            weights[indices[j]] = values[done + j]
        done += count


def take(weights: memoryview, dtype: str, limit: int, into: memoryview) -> int:
    """Copy the weights of small magnitude, in order.

    Args:
        weights: Weights, as bytes.
        dtype: Their safetensors dtype.
        limit: The largest magnitude pattern to copy.
        into: An aligned buffer with room for all weights.

    Returns:
        The number of bytes copied.
    """
    bits, mask = as_bits(weights, dtype)
    room = np.frombuffer(into[: len(weights)], bits.dtype)
    return int(_take(bits, mask, bits.dtype.type(limit), room)) * bits.itemsize


def pick(weights: memoryview, dtype: str, gone: "Flags", into: memoryview) -> int:
    """Copy the weights of a mask, in order.

    Args:
        weights: Weights, as bytes.
        dtype: Their safetensors dtype.
        gone: bool [weights], True for weights to copy.
        into: An aligned buffer with room for all weights.

    Returns:
        The number of bytes copied.
    """
    bits, _ = as_bits(weights, dtype)
    room = np.frombuffer(into[: len(weights)], bits.dtype)
    return int(_pick(bits, gone, room)) * bits.itemsize


def zeros(weights: memoryview, dtype: str) -> int:
    """Count the weights that are +0.0.

    Args:
        weights: Weights, as bytes.
        dtype: Their safetensors dtype.

    Returns:
        The number of such weights.
    """
    bits, _ = as_bits(weights, dtype)
    return bits.size - int(np.count_nonzero(bits))


def put(weights: memoryview, dtype: str, values: memoryview) -> None:
    """Replace the weights that are +0.0 by values, in order.

    Args:
        weights: Weights, as bytes.
        dtype: Their safetensors dtype.
        values: Aligned, exactly one value for each such weight.
    """
    bits, _ = as_bits(weights, dtype)
    _put(bits, np.frombuffer(values, bits.dtype))
    put_back(weights, bits)
