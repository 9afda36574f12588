"""The two kernels on raw bits: every pattern of the small formats, the edges of float32, weights at any place."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from numpy.typing import NDArray

from crdiff_export.errors import PlanError
from crdiff_export.prune import kernels
from crdiff_export.prune.kernels import Kernel, cpu
from crdiff_export.prune.kernels.cpu import CpuKernel
from crdiff_export.prune.kernels.device import DeviceKernel
from tests.support import oracle
from tests.support.accelerators import accelerator
from tests.support.messages import raises

DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def makers() -> list[ParameterSet]:
    """The kernels of this machine."""
    there = [pytest.param(lambda: CpuKernel(1), id="cpu"), pytest.param(lambda: DeviceKernel("cpu"), id="torch")]
    if device := accelerator():
        there.append(pytest.param(lambda: DeviceKernel(device), id=device, marks=pytest.mark.gpu))
    return there


@pytest.fixture(params=makers())
def kernel(request: pytest.FixtureRequest) -> Kernel:
    made: Kernel = request.param()
    return made


def patterns(dtype: str) -> NDArray[np.int64]:
    """Every pattern of a small format twice; of float32 the edges of its ranges and random ones."""
    if dtype != "F32":
        every = np.arange(1 << 8 * oracle.FORMATS[dtype].size, dtype=np.int64)
        return np.concatenate([every, every[::-1]])
    edges = np.array([0, 1 << 15, 5 << 15, 0x0080_0000, 0x3F80_0000, 0x7F80_0000, 0x7FC0_0000, 0x8000_0000, 1 << 32])
    near = (edges[:, None] + np.arange(-3, 4)).ravel()
    random = np.random.default_rng(0).integers(0, 1 << 32, 50_000)
    return np.concatenate([near[(near >= 0) & (near < 1 << 32)], random])


def samples(dtype: str) -> list[NDArray[np.int64]]:
    """All patterns, and few of them."""
    every = patterns(dtype)
    return [every, *(every[1 : 1 + count] for count in (1, 2, 3, 5, 17))]


def changed(
    kernel: Kernel, values: NDArray[np.int64], dtype: str, offset: int, change: Callable[[memoryview], None]
) -> NDArray[np.int64]:
    """Change patterns as weights in a buffer of the kernel, `offset` bytes after a page's start, and nothing else."""
    data = values.astype(f"<u{oracle.FORMATS[dtype].size}").tobytes()
    buffer = kernel.buffer(len(data) + 64)
    buffer[:] = b"\xa5" * len(buffer)
    weights = buffer[offset : offset + len(data)]
    weights[:] = data
    change(weights)
    assert set(buffer[:offset]) | set(buffer[offset + len(data) :]) == {0xA5}
    return np.frombuffer(bytes(weights), f"<u{oracle.FORMATS[dtype].size}").astype(np.int64)


def mask(dtype: str) -> int:
    return (1 << (8 * oracle.FORMATS[dtype].size - 1)) - 1


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_count_is_a_bincount(kernel: Kernel, dtype: str, offset: int) -> None:
    for values in samples(dtype):
        counts = kernels.counters(kernels.magnitudes(dtype))
        counts[0] = 7  # they are added to
        after = changed(kernel, values, dtype, offset, partial(kernel.count, dtype=dtype, counts=counts))
        magnitudes = (values & mask(dtype)) >> (15 if dtype == "F32" else 0)
        wanted = np.bincount(magnitudes, minlength=len(counts))
        wanted[0] += 7
        assert np.array_equal(counts, wanted)
        assert np.array_equal(after, values)


@pytest.mark.parametrize(
    ("upper", "offset"), [(0, 0), (1, 1), (5, 2), (0x7F00, 3), (0xFEFF, 0), (0xFEFF, 1), (0xFF00, 2), (0xFFFF, 3)]
)
def test_a_refined_count_is_one_of_the_lower_bits(kernel: Kernel, upper: int, offset: int) -> None:
    values = np.concatenate([patterns("F32"), (upper << 15) + np.arange(0, 1 << 15, 5), [(upper << 15) | 1 << 31]])
    counts = kernels.counters(kernels.REFINED)
    after = changed(kernel, values, "F32", offset, partial(kernel.refine, upper=upper, counts=counts))
    assert np.array_equal(after, values)
    magnitudes = values & mask("F32")
    inside = magnitudes[magnitudes >> 15 == upper]
    assert np.array_equal(counts, np.bincount(inside & 0x7FFF, minlength=1 << 15))


def limits(dtype: str) -> list[int]:
    finite = oracle.FORMATS[dtype].finite
    return [0, 1, 2, finite // 3, finite // 2, finite - 2, finite - 1]


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeroing_leaves_positive_zeros_and_all_other_bits(kernel: Kernel, dtype: str, offset: int) -> None:
    for values in samples(dtype):
        for limit in limits(dtype):
            after = changed(kernel, values, dtype, offset, partial(kernel.zero, dtype=dtype, limit=limit))
            assert np.array_equal(after, np.where((values & mask(dtype)) <= limit, 0, values)), limit


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_zeroing_at_every_limit(kernel: Kernel, dtype: str) -> None:
    values = patterns(dtype)
    for limit in range(oracle.FORMATS[dtype].finite):
        after = changed(kernel, values, dtype, 0, partial(kernel.zero, dtype=dtype, limit=limit))
        assert np.array_equal(after, np.where((values & 0x7F) <= limit, 0, values)), limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_what_is_marked_becomes_positive_zero(kernel: Kernel, dtype: str, offset: int) -> None:
    for values in samples(dtype):
        gone = np.random.default_rng(offset).random(len(values)) < 0.4
        after = changed(kernel, values, dtype, offset, partial(kernel.clear, dtype=dtype, gone=gone))
        assert np.array_equal(after, np.where(gone, 0, values))


def test_a_buffer_starts_on_a_page(kernel: Kernel) -> None:
    for size in (1, 4096, 5000):
        buffer = kernel.buffer(size)
        assert len(buffer) == size
        assert not buffer.readonly
        assert np.frombuffer(buffer, np.uint8).ctypes.data % 4096 == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_histograms_have_a_counter_for_every_magnitude(dtype: str) -> None:
    assert kernels.magnitudes(dtype) == (1 << 16 if dtype == "F32" else mask(dtype) + 1)
    assert kernels.magnitudes("F32") * kernels.REFINED == 1 << 31


def test_loading() -> None:
    assert kernels.load().name == kernels.load("cpu", 3).name == "cpu"
    assert kernels.load("cpu", 3).threads == 3
    assert kernels.load("auto").threads == kernels.cores() >= 1


@pytest.mark.parametrize("device", ["gpu", "", "cuda:", "cuda:x", "cuda:-1", "CPU", "cpu:0"])
def test_devices_that_there_are_none_of(device: str) -> None:
    with raises(PlanError, "unknown device", repr(device)):
        kernels.load(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:17"])
def test_a_device_that_this_machine_lacks(device: str) -> None:
    with pytest.raises(PlanError, match=device):  # the rest is torch's
        kernels.load(device)


def test_loops_compile_without_a_cache() -> None:
    """numba raises RuntimeError as soon as it is asked to cache and finds no folder for it."""

    def loop(weights: NDArray[np.uint8]) -> None:
        weights[0] = 1

    asked: list[bool] = []
    njit = numba.njit

    def no_folder(*, nogil: bool, cache: bool = False) -> Callable[..., Callable[..., None]]:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function 'loop': no locator available for file")
        made: Callable[..., Callable[..., None]] = njit(nogil=nogil)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba, "njit", no_folder)
        compiled = cpu.compiled(loop)
    assert asked == [True, False]
    weights = np.zeros(1, np.uint8)
    compiled(weights)
    assert weights[0] == 1


RUN = """
from crdiff_export.prune import kernels
from crdiff_export.prune.kernels import cpu
counts = kernels.counters(128)
cpu.CpuKernel(1).count(memoryview(bytes(range(256))), "F8_E4M3", counts)
print(int(counts.sum()), type(cpu._count.__wrapped__._cache).__name__)
"""


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES], ids=errno.errorcode.get)
def test_a_folder_that_is_full(code: int) -> None:
    """numba raises what the disk says after it has compiled, and before it runs."""

    def loop(weights: NDArray[np.uint8]) -> None:
        weights[0] += 1

    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    compiled = cpu.compiled(loop)
    weights = np.zeros(1, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled.__wrapped__._cache, "save_overload", full)  # type: ignore[attr-defined]
        compiled(weights)
        compiled(weights)
    assert weights[0] == 2


@pytest.mark.slow
def test_a_machine_without_any_folder_to_cache_in(tmp_path: Path) -> None:
    package = Path(kernels.__file__).parents[2]
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    # Files stand where numba would make folders: a read-only installation, to root as well.
    (tmp_path / package.name / "prune" / "kernels" / "__pycache__").write_text("")
    home = tmp_path / "home"
    home.write_text("")
    environment = {key: text for key, text in os.environ.items() if not key.startswith("NUMBA")}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home), "LOCALAPPDATA": str(home)}
    command = [sys.executable, "-B", "-c", RUN]
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (run.stdout.split(), run.stderr) == (["256", "NullCache"], "")
