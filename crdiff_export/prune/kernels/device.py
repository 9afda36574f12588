"""The loops in torch on an accelerator; weights are sent there from pinned memory and come back bit for bit."""

import mmap
from typing import TYPE_CHECKING

import numpy as np
import torch

from crdiff_export.errors import PlanError
from crdiff_export.formats.dtypes import FORMATS
from crdiff_export.prune.kernels import LOWER_BITS, REFINED, counters, magnitudes

if TYPE_CHECKING:
    from crdiff_export.prune.kernels import Counts, Flags

# Signed, because torch has few operations on unsigned integers; the mask removes the sign.
_SIGNED = {8: torch.int8, 16: torch.int16, 32: torch.int32}


class DeviceKernel:
    """The kernel of a torch device; PlanError if torch cannot use it."""

    def __init__(self, device: str) -> None:
        self.name = device
        self.threads = 2  # one sends while the other computes
        try:
            self._device = torch.device(device)
            self._pinned = self._device.type == "cuda"
            self._try()
        except (RuntimeError, AssertionError, TypeError) as error:
            raise PlanError(
                f"device {device}: {str(error).splitlines()[0]}", "Leave --device out: the CPU gives the same file."
            ) from error

    def _try(self) -> None:
        """Run every loop once, because not every device has every operation for every dtype."""
        for form in FORMATS.values():
            weights = self.buffer(64)
            self.count(weights, form.dtype, counters(magnitudes(form.dtype)))
            self.zero(weights, form.dtype, 0)
            self.clear(weights, form.dtype, np.zeros(512 // form.width, np.bool_))
        self.refine(weights, 0, counters(REFINED))

    def buffer(self, size: int) -> memoryview:
        if not self._pinned:
            return memoryview(mmap.mmap(-1, size))
        page = mmap.PAGESIZE
        pinned = torch.empty(size + page, dtype=torch.uint8, pin_memory=True)
        start = -pinned.data_ptr() % page
        return pinned.numpy().data[start : start + size]

    def count(self, weights: memoryview, dtype: str, counts: "Counts") -> None:
        patterns = self._magnitudes(weights, dtype)
        if dtype == "F32":
            patterns >>= LOWER_BITS
        counts += _histogram(patterns, len(counts))

    def refine(self, weights: memoryview, upper: int, counts: "Counts") -> None:
        patterns = self._magnitudes(weights, "F32")
        inside = patterns[(patterns >> LOWER_BITS) == upper]
        counts += _histogram(inside & (REFINED - 1), REFINED)

    def zero(self, weights: memoryview, dtype: str, limit: int) -> None:
        bits = self._bits(weights, dtype)
        bits *= (bits & FORMATS[dtype].mask) > limit
        torch.frombuffer(weights, dtype=torch.uint8).copy_(bits.view(torch.uint8))

    def clear(self, weights: memoryview, dtype: str, gone: "Flags") -> None:
        bits = self._bits(weights, dtype)
        bits *= ~torch.from_numpy(gone).to(self._device)
        torch.frombuffer(weights, dtype=torch.uint8).copy_(bits.view(torch.uint8))

    def _bits(self, weights: memoryview, dtype: str) -> torch.Tensor:
        raw = torch.frombuffer(weights, dtype=torch.uint8).to(self._device, copy=True)
        return raw.view(_SIGNED[FORMATS[dtype].width])

    def _magnitudes(self, weights: memoryview, dtype: str) -> torch.Tensor:
        return self._bits(weights, dtype).to(torch.int32) & FORMATS[dtype].mask


def _histogram(values: torch.Tensor, size: int) -> "Counts":
    counted: Counts = torch.bincount(values, minlength=size).cpu().numpy().astype(np.uint32)
    return counted
