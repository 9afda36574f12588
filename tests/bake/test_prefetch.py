"""Stages side by side: order, errors, an early end, and no buffer that two of them hold at once."""

import itertools
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from crdiff_export import CrdiffError, ExportRequest, export
from crdiff_export.bake import stream as stream_module
from crdiff_export.bake.prefetch import prefetch
from crdiff_export.bake.stream import Chunk, Pruning, Stream
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.prune.criteria import Decision, magnitude
from crdiff_export.prune.kernels.cpu import CpuKernel
from tests.support import makers, oracle
from tests.support.exporting import SIZE, Interrupting, write_in_chunks

T = TypeVar("T")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    # Nothing is waited for: whoever started a thread must have joined it.
    assert set(threading.enumerate()) - before == set()


class Source:
    """A generator of numbers that counts what it gave and knows whether it was closed."""

    def __init__(self, stop: int | None = None, error: BaseException | None = None) -> None:
        self.stop, self.error = stop, error
        self.given = 0
        self.closed = threading.Event()
        self.thread: threading.Thread | None = None

    def items(self) -> Generator[int, None, None]:
        self.thread = threading.current_thread()
        try:
            for number in itertools.count() if self.stop is None else range(self.stop):
                self.given += 1
                yield number
            if self.error is not None:
                raise self.error
        finally:
            self.closed.set()


def settle(read: Callable[[], int]) -> int:
    """A number that another thread changes, once it stays the same."""
    before, now = -1, read()
    while before != now:
        time.sleep(0.01)
        before, now = now, read()
    return now


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_items_come_in_order(count: int, depth: int) -> None:
    source = Source(count)
    assert list(prefetch(source.items(), depth)) == list(range(count))
    assert source.closed.is_set()
    assert source.thread is not threading.current_thread()


def test_anything_that_can_be_iterated() -> None:
    assert list(prefetch([3, 1, 2])) == [3, 1, 2]
    assert list(prefetch(iter("abc"))) == ["a", "b", "c"]
    assert list(prefetch([None, False, 0])) == [None, False, 0]


def test_nothing_starts_before_the_first_item_is_asked_for() -> None:
    source = Source(3)
    stream = prefetch(source.items())
    assert source.given == 0
    stream.close()
    assert source.given == 0


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_producer_is_only_a_few_items_ahead(depth: int) -> None:
    source = Source()
    stream = prefetch(source.items(), depth)
    for taken in range(1, 20):
        next(stream)
        # One in its hands, `depth` waiting, those that were taken.
        assert source.given <= taken + depth + 1
    assert settle(lambda: source.given) == 19 + depth + 1
    stream.close()


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [Broken("x"), KeyboardInterrupt(), SystemExit(3), MemoryError()], ids=repr)
def test_an_error_of_the_producer_comes_after_its_items(error: BaseException) -> None:
    """Through several stages, too."""
    source = Source(3, error)
    with pytest.raises(type(error)) as raised:
        list(prefetch(x for x in prefetch(source.items())))
    assert raised.value is error
    assert source.closed.is_set()
    frames = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert frames.index("prefetch") < frames.index("items")  # the producer's own lines are in the traceback


def test_the_items_before_an_error_are_not_lost() -> None:
    stream = prefetch(Source(3, Broken()).items(), depth=5)
    assert [next(stream), next(stream), next(stream)] == [0, 1, 2]
    with pytest.raises(Broken):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("taken", [1, 5])
def test_closing_stops_every_stage(taken: int, stages: int) -> None:
    source = Source()
    stream: Generator[int, None, None] = source.items()
    sources = [stream]
    for _ in range(stages):
        stream = prefetch(stream)
        sources.append(stream)
    for _ in range(taken):
        next(stream)
    stream.close()
    assert source.closed.is_set()
    assert source.thread is not None
    assert not source.thread.is_alive()
    given = source.given
    time.sleep(0.1)
    assert source.given == given <= taken + 2 * stages


def test_closing_while_the_producer_is_busy_waits_for_it() -> None:
    busy, ended = threading.Event(), threading.Event()

    def slow() -> Generator[int, None, None]:
        try:
            yield 0
            busy.set()
            time.sleep(0.2)
            yield 1
        finally:
            ended.set()

    stream = prefetch(slow())
    next(stream)
    busy.wait()
    stream.close()
    assert ended.is_set()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="Windows signals otherwise")
def test_ctrl_c_while_the_consumer_waits() -> None:
    closed = threading.Event()

    def slow() -> Generator[int, None, None]:
        try:
            yield 0
            time.sleep(0.3)
        finally:
            closed.set()

    stream = prefetch(slow())
    next(stream)
    press = threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    press.start()
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert closed.is_set()
    press.join()


@pytest.mark.parametrize("started", [False, True])
def test_an_interrupt_at_the_start(started: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        if started:
            start(self)
        raise KeyboardInterrupt

    source = Source()
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(prefetch(source.items()))
    assert source.closed.is_set() == started


# The stream of weights

CHUNK = 4096
UNET = {"down": 0.3, "mid": 0.5, "up": 0.7}


class Prepared:
    """A base of some fifty chunks, what is to be pruned from it for each variant, and the bytes that must come out.

    The last of four variants leaves the base alone, and the three before it need a copy each at the same time.
    """

    def __init__(self, folder: Path, dtype: str | None = None, variants: int = 1) -> None:
        tensors = {"odd": ("U8", (3,), b"abc")} | {
            name: (kind, shape, makers.weights(name, kind, shape))
            for (name, (_, shape)), kind in zip(
                makers.narrow("demo.diffusers-unet", 4).items(), itertools.cycle(("F32", "F16", "F8_E5M2"))
            )
        }
        base = makers.write(folder / "base.safetensors", tensors)
        self.prunings, self.data = [], []
        for number in range(variants):
            ratios = {group: (0 if number == 3 else ratio / (1 + number)) for group, ratio in UNET.items()}
            request = ExportRequest(str(base), SIZE, folder / f"{number}.safetensors", ratios=ratios, dtype=dtype)
            baked = export(request)
            self.prunings.append(Pruning(baked.job.plan, Decision(baked.thresholds), keep=True))
            self.data.append(oracle.read(baked.written.path).data)

    def stream(self, kernel: CpuKernel) -> Stream:
        return Stream(self.prunings, 0, kernel, chunk=CHUNK)

    def part(self, chunk: Chunk) -> bytes:
        return self.data[chunk.variant][chunk.start : chunk.stop]


CASES: dict[str, tuple[str | None, int]] = {"as-it-is": (None, 1), "four-cast": ("fp16", 4)}


@pytest.fixture(scope="module", params=CASES)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("prepared"), *CASES[request.param])


class Watched(CpuKernel):
    """A kernel that remembers its buffers."""

    def __init__(self) -> None:
        super().__init__(1)
        self.buffers: list[memoryview] = []

    def buffer(self, size: int) -> memoryview:
        self.buffers.append(super().buffer(size))
        return self.buffers[-1]


def test_a_chunk_stays_as_it_is_while_it_is_held(prepared: Prepared) -> None:
    """The consumer holds every chunk until all stages before it have run as far ahead as they can."""
    kernel = Watched()
    stream = prepared.stream(kernel).chunks()
    checked = 0
    for chunk in stream:
        pruned = bytes(chunk.pruned)
        settle(lambda: sum(int(np.frombuffer(b, np.uint8)[:: CHUNK // 2].sum()) for b in kernel.buffers))
        assert bytes(chunk.data) == prepared.part(chunk)
        assert bytes(chunk.pruned) == pruned
        checked += len(chunk.data)
        if chunk.start > 14 * CHUNK:
            break
    stream.close()
    assert checked > 10 * CHUNK


@pytest.mark.parametrize("seed", range(3))
def test_no_buffer_is_used_twice_at_a_time(prepared: Prepared, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages dawdle at random; every byte must still be right."""
    dice = random.Random(seed)
    naps = [0.0, 0.0, 0.0, 0.001, 0.004][: 3 + seed % 3]

    def dawdle(items: Iterable[T]) -> Generator[T, None, None]:
        for item in items:
            time.sleep(dice.choice(naps))
            yield item
            time.sleep(dice.choice(naps))

    def slow(items: Iterable[T]) -> Generator[T, None, None]:
        yield from dawdle(prefetch(dawdle(items)))

    monkeypatch.setattr(stream_module, "prefetch", slow)
    chunks = 0
    for chunk in prepared.stream(CpuKernel(1)).chunks():
        assert bytes(chunk.data) == prepared.part(chunk), chunk.start
        time.sleep(dice.choice(naps))
        assert bytes(chunk.data) == prepared.part(chunk), chunk.start
        chunks += 1
    assert chunks == sum(-(-len(data) // CHUNK) for data in prepared.data)


# Whole exports


def make(folder: Path) -> ExportRequest:
    base = makers.write(folder / "base.safetensors", makers.tiny("sd15.diffusers-unet", "F16"))
    return ExportRequest(str(base), SIZE, folder / "out.safetensors", ratio=0.3, threads=2)


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("stage", ["counting", "writing"])
def test_an_interrupted_export_leaves_nothing(
    stage: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_in_chunks(monkeypatch, CHUNK)
    request = make(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        export(request, Interrupting(stage, after))
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


@pytest.mark.parametrize("at", [0, 100_000, 600_000])
def test_a_base_that_cannot_be_read_to_its_end(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It became shorter after its header was read."""
    write_in_chunks(monkeypatch, CHUNK)
    monkeypatch.setattr(magnitude, "CHUNK", 1000)
    request = make(tmp_path)
    opened = SourceFile.open

    def shorter(self: SourceFile) -> Any:
        with self.path.open("r+b") as file:
            file.truncate(self.data_start + at)
        return opened(self)

    monkeypatch.setattr(SourceFile, "open", shorter)
    with pytest.raises(CrdiffError, match="shorter"):
        export(request)
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]
