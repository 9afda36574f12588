"""The hot loops on raw bits: count magnitudes, set small ones to zero, cast. One protocol with two implementations.

`cpu.py` runs them in numba, `device.py` in torch on an accelerator, with the same results. This package imports neither
of them before `load` is called.
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

# A histogram has a counter for each magnitude; for float32 one for each value of the upper 16 of 31 bits, and REFINED
# counters for the lower 15 bits of one such value.
LOWER_BITS = 15
REFINED = 1 << LOWER_BITS
DEVICES = "auto, cpu, cuda, cuda:N or mps"


class Kernel(Protocol):
    """The loops over weights on one device. All methods may be called by several threads at once."""

    name: str
    threads: int

    def buffer(self, size: int) -> memoryview:
        """Return a page-aligned buffer of `size` bytes that this device reads fastest."""
        ...

    def count(self, weights: memoryview, dtype: str, counts: "Counts") -> None:
        """Count magnitudes.

        Args:
            weights: Weights, as bytes.
            dtype: Their safetensors dtype.
            counts: uint32 [magnitudes(dtype)], to which the counts are added.
        """
        ...

    def refine(self, weights: memoryview, upper: int, counts: "Counts") -> None:
        """Count the lower 15 bits of the F32 magnitudes with certain upper bits.

        Args:
            weights: F32 weights, as bytes.
            upper: The upper 16 bits of the magnitude.
            counts: uint32 [REFINED], to which the counts are added.
        """
        ...

    def zero(self, weights: memoryview, dtype: str, limit: int) -> None:
        """Set weights of small magnitude to +0.0 in place.

        Args:
            weights: Weights, as bytes.
            dtype: Their safetensors dtype.
            limit: The largest magnitude pattern that is set to zero.
        """
        ...

    def clear(self, weights: memoryview, dtype: str, gone: "Flags") -> None:
        """Set the weights of a mask to +0.0 in place.

        Args:
            weights: Weights, as bytes.
            dtype: Their safetensors dtype.
            gone: bool [weights], True for weights to set to zero.
        """
        ...


def magnitudes(dtype: str) -> int:
    """Return the number of counters in a histogram of a dtype."""
    width = FORMATS[dtype].width
    return 1 << (width - 1 - LOWER_BITS if width == 32 else width - 1)


def counters(size: int) -> "Counts":
    """Return an empty histogram, uint32 [size], which is wide enough for one piece of weights."""
    import numpy as np

    return np.zeros(size, np.uint32)


def load(device: str = "auto", threads: int | None = None) -> Kernel:
    """Load the kernel of a device.

    `auto` is the CPU: each core processes several Gelements/s, which is faster than a disk delivers weights, so an
    accelerator would only add transfers and the start of torch (benchmarks/NOTES.md).

    Args:
        device: auto, cpu, cuda, cuda:N or mps.
        threads: Threads on the CPU; by default one for each core.

    Returns:
        The kernel.

    Raises:
        PlanError: This machine has no such device.
    """
    if device in ("auto", "cpu"):
        from crdiff_export.prune.kernels.cpu import CpuKernel

        return CpuKernel(threads or cores())
    if device in ("mps", "cuda") or device.removeprefix("cuda:").isdecimal():
        from crdiff_export.prune.kernels.device import DeviceKernel

        return DeviceKernel(device)
    raise PlanError(f"unknown device {device!r}", f"Choose {DEVICES}.")


def cores() -> int:
    """Return the number of cores that this process may use."""
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def devices() -> list[str]:
    """Name the devices that torch can compute on, or say why it cannot be loaded."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [f"torch cannot be loaded: {error}".splitlines()[0]]
    accelerators = [
        f"cuda:{number} ({torch.cuda.get_device_name(number)})" for number in range(torch.cuda.device_count())
    ]
    return ["cpu", *accelerators, *(["mps"] if torch.backends.mps.is_available() else [])]
