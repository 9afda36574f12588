"""The same input and recipe give the same bytes, whatever the threads, chunks, kernel and way of writing."""

import dataclasses
import errno
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from crdiff_export import ExportRequest, export
from crdiff_export.prune import kernels
from crdiff_export.prune.criteria import magnitude
from crdiff_export.prune.kernels.cpu import CpuKernel
from crdiff_export.prune.kernels.device import DeviceKernel
from tests.support import makers, oracle
from tests.support.accelerators import accelerator, on_an_accelerator
from tests.support.exporting import SIZE, write_in_chunks
from tests.support.makers import Shape
from tests.support.mixed_models import sd3, unet

UNET = {"down": 0.3, "mid": 0.55, "up": 0.1}
PAGES = (4096, 8192, 12288, 1 << 20)


BASES: Mapping[str, tuple[Callable[[], dict[str, tuple[str, Shape, bytes]]], dict[str, Any]]] = {
    "unet": (unet, {"ratios": UNET}),
    "unet-cast-to-fp16": (unet, {"ratios": UNET, "dtype": "fp16"}),
    "unet-cast-to-fp32": (unet, {"ratios": UNET, "dtype": "fp32"}),
    "sd3": (sd3, {"ratios": {"blocks": 0.25}, "targets": ("attn", "ff")}),
}


class Case:
    """A base, what is asked for, and the bytes that an export of it gave."""

    def __init__(self, folder: Path, name: str) -> None:
        make, self.asked = BASES[name]
        self.folder = folder
        self.tensors = make()
        self.base = makers.write(folder / "base.safetensors", self.tensors, {"format": "pt"})
        self.wanted = self.bake(threads=1).read_bytes()

    def bake(self, folder: Path | None = None, **asked: Any) -> Path:
        output = (folder or self.folder) / "out.safetensors"
        export(ExportRequest(str(self.base), SIZE, output, force=True, **self.asked, **asked))
        return output


@pytest.fixture(scope="module", params=BASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("plain"), "unet")


@pytest.mark.parametrize("name", [name for name, (_, asked) in BASES.items() if "dtype" not in asked])
def test_the_bytes_are_the_oracles(name: str, tmp_path: Path) -> None:
    """Casts are held against it in test_cast.py."""
    case = Case(tmp_path, name)
    output = case.bake()
    dit = "blocks" in case.asked["ratios"]
    expected = oracle.expect([case.tensors], case.asked["ratios"], ("attn", "ff"), dit=dit)
    oracle.hold(case.base, output, expected)


@pytest.mark.parametrize("threads", [3, None])
def test_threads(case: Case, threads: int | None) -> None:
    assert case.bake(threads=threads).read_bytes() == case.wanted


@pytest.mark.parametrize("chunk", PAGES)
def test_chunks_of_the_write(case: Case, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_in_chunks(monkeypatch, chunk)
    assert case.bake(threads=2).read_bytes() == case.wanted


@pytest.mark.parametrize("cast", [None, "fp32", "fp16"])
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_weights_that_two_chunks_share(
    shift: int, cast: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page ends `shift` bytes into a weight, on every page."""
    source = "F16" if cast == "fp32" else "F32"
    tensors = {"shift": ("U8", (shift,), bytes(shift))} | {
        name: (source, shape, makers.weights(name, source, shape))
        for name, (_, shape) in makers.narrow("demo.diffusers-unet", 4).items()
    }
    base = makers.write(tmp_path / "base.safetensors", tensors)
    wanted = tmp_path / "wanted.safetensors"
    request = ExportRequest(str(base), SIZE, wanted, ratios=UNET, dtype=cast)
    export(request)
    write_in_chunks(monkeypatch, 4096)
    export(dataclasses.replace(request, output=tmp_path / "out.safetensors"))
    assert (tmp_path / "out.safetensors").read_bytes() == wanted.read_bytes()
    if cast is None:
        oracle.hold(base, wanted, oracle.expect([tensors], UNET, ("attn", "ff")))


@pytest.mark.parametrize("chunk", [1, 7])
def test_the_smallest_chunks_of_the_count(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        name: (dtype, shape, makers.weights(name, dtype, shape))
        for (name, (_, shape)), dtype in zip(
            makers.narrow("demo.diffusers-unet").items(), itertools.cycle(("F32", "F16", "F8_E4M3"))
        )
    }
    base = makers.write(tmp_path / "base.safetensors", tensors)
    monkeypatch.setattr(magnitude, "CHUNK", chunk)
    export(ExportRequest(str(base), SIZE, tmp_path / "out.safetensors", ratios=UNET))
    oracle.hold(base, tmp_path / "out.safetensors", oracle.expect([tensors], UNET, ("attn", "ff")))


@pytest.fixture
def on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load", lambda device, threads: DeviceKernel("cpu"))


@pytest.mark.usefixtures("on_torch")
@pytest.mark.parametrize("chunk", [4096, 1 << 20])
def test_the_kernel_of_torch(case: Case, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_in_chunks(monkeypatch, chunk)
    assert case.bake().read_bytes() == case.wanted


@on_an_accelerator
@pytest.mark.parametrize("chunk", [4096, 1 << 20])
def test_an_accelerator(case: Case, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_in_chunks(monkeypatch, chunk)
    assert case.bake(device=accelerator()).read_bytes() == case.wanted


def test_the_hashes_are_those_of_the_data(case: Case) -> None:
    output = case.bake()
    metadata = oracle.read(output).metadata
    assert metadata["crdiff.source.hash_sha256"] == oracle.sha256(case.base)
    assert metadata["modelspec.hash_sha256"] == oracle.sha256(output)
    assert metadata["crdiff.source.hash_sha256"] != metadata["modelspec.hash_sha256"]


def test_nothing_pruned_leaves_one_hash(plain: Case, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    export(ExportRequest(str(plain.base), SIZE, output, ratio=0.0))
    metadata = oracle.read(output).metadata
    assert metadata["crdiff.source.hash_sha256"] == metadata["modelspec.hash_sha256"] == oracle.sha256(plain.base)
    assert oracle.read(output).data == oracle.read(plain.base).data


def test_without_unbuffered_writes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    write_in_chunks(monkeypatch, 4096)
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    assert case.bake().read_bytes() == case.wanted


def test_without_hashes(case: Case) -> None:
    data = oracle.read(case.bake(hashing=False)).data
    assert data == case.wanted[-len(data) :]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where writes are cached."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("no /dev/shm")
    folder = shared / f"crdiff-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_another_file_system(plain: Case, memory: Path) -> None:
    assert plain.bake(memory).read_bytes() == plain.wanted


def test_a_device_that_wants_another_alignment(plain: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first unbuffered write is refused, as by a disk with larger blocks; all goes through the cache then."""
    write_in_chunks(monkeypatch, 4096)
    direct = getattr(os, "O_DIRECT", None)
    if direct is None:
        pytest.skip("no unbuffered writes here")
    opened, unbuffered = os.open, set()
    write = os.write

    def watch(path: Any, flags: int, *args: Any, **more: Any) -> int:
        handle = opened(path, flags, *args, **more)
        unbuffered.add(handle) if flags & direct else unbuffered.discard(handle)
        return handle

    def refuse(handle: int, data: Any) -> int:
        if handle in unbuffered:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(handle, data)

    monkeypatch.setattr(os, "open", watch)
    monkeypatch.setattr(os, "write", refuse)
    assert plain.bake().read_bytes() == plain.wanted


def test_a_disk_that_writes_some_at_a_time(plain: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short writes, at the end of a signal for instance, break the alignment of the next."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:1500]))
    assert plain.bake().read_bytes() == plain.wanted


def test_the_two_kernels_name_the_same_weights_that_are_no_numbers(plain: Case, tmp_path: Path) -> None:
    tensors = dict(plain.tensors)
    name = next(n for n in tensors if n.endswith("ff.net.2.weight") and tensors[n][0] == "F16")
    dtype, shape, data = tensors[name]
    tensors[name] = dtype, shape, b"\x01\xfc\x00\x7c" + data[4:]
    base = makers.write(tmp_path / "base.safetensors", tensors)
    request = ExportRequest(str(base), SIZE, tmp_path / "out.safetensors", ratios=UNET, force=True)
    said = []
    for kernel in (CpuKernel(1), DeviceKernel("cpu")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "load", lambda device, threads, kernel=kernel: kernel)
            with pytest.raises(Exception, match=name) as refusal:
                export(request)
        said.append(str(refusal.value))
    assert said[0] == said[1]
