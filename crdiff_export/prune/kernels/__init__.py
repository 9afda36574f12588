"""The hot loops, on raw bits: counting magnitudes, zeroing the small ones, casting. One protocol, two makers.

`cpu.py` runs them in numba, `device.py` in torch on an accelerator. Both give the same bits. Importing this package
imports neither; `load` does.
"""

import os
from typing import TYPE_CHECKING, Any, Protocol

from crdiff_export.errors import PlanError
from crdiff_export.formats.dtypes import FORMATS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Counts = NDArray[np.uint32]
    Flags = NDArray[np.bool_]

# A histogram has a counter for each magnitude, of a float32 for each value of the upper 16 of its 31 bits;
# REFINED counters then tell the lower 15 apart.
LOWER_BITS = 15
REFINED = 1 << LOWER_BITS
DEVICES = "auto, cpu, cuda, cuda:N or mps"


class Kernel(Protocol):
    """What the passes over the weights need of a device. All methods may be called by several threads at once."""

    name: str
    threads: int

    def buffer(self, size: int) -> memoryview:
        """A page-aligned buffer of `size` bytes that this kernel reaches fastest."""
        ...

    def count(self, weights: memoryview, dtype: str, counts: "Counts") -> None:
        """Add every weight's magnitude to `counts`: one counter per magnitude, for F32 one per upper 16 bits."""
        ...

    def refine(self, weights: memoryview, upper: int, counts: "Counts") -> None:
        """Add the lower 15 bits of every F32 magnitude whose upper bits are `upper` to `counts`."""
        ...

    def zero(self, weights: memoryview, dtype: str, limit: int) -> None:
        """Set every weight whose magnitude pattern is at most `limit` to +0.0, in place."""
        ...

    def clear(self, weights: memoryview, dtype: str, gone: "Flags") -> None:
        """Set every weight that is True in `gone`, which has one for each, to +0.0, in place."""
        ...


def magnitudes(dtype: str) -> int:
    """How many counters a histogram of `dtype` has."""
    width = FORMATS[dtype].width
    return 1 << (width - 1 - LOWER_BITS if width == 32 else width - 1)


def counters(size: int) -> "Counts":
    """A histogram, all zero; wide enough for any one piece of weights."""
    import numpy as np

    return np.zeros(size, np.uint32)


def load(device: str = "auto", threads: int | None = None) -> Kernel:
    """The kernel for `device`; PlanError for one that this machine does not have.

    `auto` is the CPU: its loops run at several Gelements/s a core, faster than a disk delivers weights and far faster
    than torch starts, so an accelerator can only add transfers (benchmarks/NOTES.md).
    """
    if device in ("auto", "cpu"):
        from crdiff_export.prune.kernels.cpu import CpuKernel

        return CpuKernel(threads or cores())
    if device in ("mps", "cuda") or device.removeprefix("cuda:").isdecimal():
        from crdiff_export.prune.kernels.device import DeviceKernel

        return DeviceKernel(device)
    raise PlanError(f"unknown device {device!r}", f"Choose {DEVICES}.")


def cores() -> int:
    """The processors this process may use."""
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
