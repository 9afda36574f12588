"""The loops of a residual, in numba: taking out the weights that are about to be zeroed, and putting them back.

They run on the CPU whatever the device, which has the weights in reach: an accelerator would have to send them back.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from crdiff_export.prune.kernels.cpu import as_bits, compiled, put_back

if TYPE_CHECKING:
    from crdiff_export.prune.kernels import Flags

# Weights whose zeros are found before any of them is filled: three times as fast as one loop for both.
_BLOCK = 4096


# Without a branch, which a processor would guess wrong for every third weight.
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
def _zeros(weights: Any) -> int:
    found = 0
    for i in range(weights.size):
        found += 0 if weights[i] else 1
    return found


@compiled
def _put(weights: Any, values: Any) -> None:
    places, done = np.empty(_BLOCK + 1, np.int64), 0
    for start in range(0, weights.size, _BLOCK):
        found = 0
        for i in range(start, min(start + _BLOCK, weights.size)):
            places[found] = i
            found += 0 if weights[i] else 1
        for j in range(found):
            weights[places[j]] = values[done + j]
        done += found


def take(weights: memoryview, dtype: str, limit: int, into: memoryview) -> int:
    """Copy every weight of magnitude pattern at most `limit` to `into`, in order; how many bytes they are.

    `into` lies on a multiple of their size and has room for all weights.
    """
    bits, mask = as_bits(weights, dtype)
    room = np.frombuffer(into[: len(weights)], bits.dtype)
    return int(_take(bits, mask, bits.dtype.type(limit), room)) * bits.itemsize


def pick(weights: memoryview, dtype: str, gone: "Flags", into: memoryview) -> int:
    """Copy every weight that is True in `gone`, which has one for each, to `into`, as `take` does."""
    bits, _ = as_bits(weights, dtype)
    room = np.frombuffer(into[: len(weights)], bits.dtype)
    return int(_pick(bits, gone, room)) * bits.itemsize


def zeros(weights: memoryview, dtype: str) -> int:
    """How many of the weights are +0.0."""
    return int(_zeros(as_bits(weights, dtype)[0]))


def put(weights: memoryview, dtype: str, values: memoryview) -> None:
    """Put the values in the places of the weights that are +0.0, in order; there is one for each, no more and no less.

    `values` lies on a multiple of their size.
    """
    bits, _ = as_bits(weights, dtype)
    _put(bits, np.frombuffer(values, bits.dtype))
    put_back(weights, bits)
