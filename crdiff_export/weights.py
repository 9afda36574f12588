"""Pass two: the output's bytes as a stream of chunks, read, hashed and zeroed side by side in buffers used again.

`bake` writes the stream, `verify` compares it with a file. A chunk is a window of the output file on a grid of pages,
whatever the tensors are, so that it can be written unbuffered. It is read with a seam on both sides, so that a weight
that two chunks share is judged whole in both.
"""

import hashlib
import mmap
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crdiff_export import floats
from crdiff_export.checkpoint import Bytes
from crdiff_export.errors import PlanError
from crdiff_export.header import BITS, show
from crdiff_export.kernels import Kernel
from crdiff_export.pipeline import AHEAD, ahead
from crdiff_export.plan import Output, Plan, Run
from crdiff_export.progress import Progress
from crdiff_export.threshold import Threshold

if TYPE_CHECKING:
    from hashlib import _Hash

CHUNK = 8 << 20
# The widest element has 8 bytes. A page before the window holds the seam and keeps the window itself on a page.
SEAM = 8
PAGE = mmap.PAGESIZE
STAGES = 4


@dataclass(frozen=True, slots=True)
class Cut:
    """Output data bytes `start:stop` hold target weights; those of magnitude pattern at most `limit` become +0.0."""

    start: int
    stop: int
    dtype: str
    limit: int


@dataclass(slots=True)
class Chunk:
    """Output file bytes `start:stop`.

    `window` of `buffer` holds them, except those of the header, which the consumer fills in; `data` is its part in the
    data section. `untouched` chunks were not read: their bytes are the source's.
    """

    start: int
    stop: int
    buffer: memoryview
    window: memoryview
    data: memoryview
    untouched: bool = False
    fork: "_Hash | None" = None


def cuts(plan: Plan, thresholds: Sequence[Threshold], file: int) -> tuple[Cut, ...]:
    """What to zero in one file of the plan, by place."""
    found = []
    for target in plan.targets:
        bits = thresholds[target.scope].bits
        if target.file == file and bits is not None:
            dtype = target.output.dtype
            limit = min(floats.limit(dtype, bits), floats.FORMATS[dtype].first_nonfinite - 1)
            found.append(Cut(*target.span(target.output), dtype, limit))
    return tuple(sorted(found, key=lambda cut: cut.start))


class Stream:
    """The chunks of one output file whose data section begins at `data_start`; to be read through once.

    After that `source_hash` and `output_hash` are the SHA-256 of the two data sections (ModelSpec 1.0.1,
    `hash_sha256`). They are one and the same up to the first target weight, so what comes before is hashed once.
    """

    source_hash: str | None = None
    output_hash: str | None = None

    def __init__(
        self,
        output: Output,
        cuts: Sequence[Cut],
        data_start: int,
        kernel: Kernel,
        *,
        hashing: bool,
        skip_untouched: bool = False,
        allow_nonfinite: bool = False,
        chunk: int = CHUNK,
    ) -> None:
        self._output, self._cuts, self._kernel = output, cuts, kernel
        self._data_start, self._chunk = data_start, chunk
        self._hashing, self._allow_nonfinite = hashing, allow_nonfinite
        self._casts = any(run.cast for run in output.runs)
        self._skip = skip_untouched and not hashing and not self._casts and output.source.tensors_of is None
        self._nonfinite: dict[str, int] = {}

    def chunks(self) -> Generator[Chunk, None, None]:
        """Every chunk in order; closing the generator stops all stages."""
        # A buffer for every chunk that can be alive: one in each stage's hands and AHEAD between each two.
        buffers = [self._kernel.buffer(self._chunk + 2 * PAGE) for _ in range(STAGES + (STAGES - 1) * AHEAD)]
        stream = ahead(self._read(buffers))
        if self._hashing and not self._casts:
            stream = ahead(self._hash_source(stream))
        return ahead(self._zero(stream))

    def _read(self, buffers: Sequence[memoryview]) -> Generator[Chunk, None, None]:
        size = self._data_start + self._output.data_size
        source = self._output.source.open()
        try:
            for number, start in enumerate(range(0, size, self._chunk)):
                stop = min(start + self._chunk, size)
                buffer = buffers[number % len(buffers)]
                window = buffer[PAGE : PAGE + stop - start]
                data = window[min(max(self._data_start - start, 0), len(window)) :]
                chunk = Chunk(
                    start, stop, buffer, window, data, untouched=self._skip and self._is_untouched(start, stop)
                )
                if not chunk.untouched:
                    self._fill(buffer, chunk, source)
                yield chunk
        finally:
            source.close()
        self._refuse_nonfinite()

    def _is_untouched(self, start: int, stop: int) -> bool:
        return start >= self._data_start and not any(self._parts(start - self._data_start, stop - self._data_start))

    def _fill(self, buffer: memoryview, chunk: Chunk, source: Bytes) -> None:
        """Read the chunk's data and its seams into the buffer, cast where the plan says so."""
        low = max(chunk.start - self._data_start - SEAM, 0)
        high = min(chunk.stop - self._data_start + SEAM, self._output.data_size)
        origin = PAGE + self._data_start - chunk.start
        for run in self._output.runs:
            start, stop = max(low, run.start), min(high, run.stop)
            if start >= stop:
                continue
            if run.cast is None:
                source.read_into(run.source + start - run.start, buffer[origin + start : origin + stop])
            else:
                first, weights = self._cast(run, run.cast, start, stop, source)
                buffer[origin + first : origin + first + len(weights)] = weights

    def _cast(
        self, run: Run, dtypes: tuple[str, str], start: int, stop: int, source: Bytes
    ) -> tuple[int, bytes | memoryview]:
        """The whole elements that output bytes `start:stop` belong to, and where the first of them begins."""
        from crdiff_export.kernels import cast

        narrow, wide = (BITS[dtype] // 8 for dtype in dtypes)
        first, last = (start - run.start) // wide, -(-(stop - run.start) // wide)
        raw = memoryview(bytearray((last - first) * narrow))
        source.read_into(run.source + first * narrow, raw)
        weights = cast.cast(raw, *dtypes)
        if lost := cast.nonfinite(weights, dtypes[1]) - cast.nonfinite(raw, dtypes[0]):
            self._nonfinite[run.tensor] = lost
        return run.start + first * wide, weights

    def _refuse_nonfinite(self) -> None:
        if self._nonfinite and not self._allow_nonfinite:
            raise PlanError(
                f"{self._output.source.path}: {show(min(self._nonfinite))} holds numbers that the new dtype cannot",
                "Choose --dtype bf16, which has the range of fp32, or leave --dtype out.",
            )

    def _hash_source(self, stream: Iterator[Chunk]) -> Generator[Chunk, None, None]:
        digest = hashlib.sha256()
        first = self._cuts[0].start + self._data_start if self._cuts else None
        for chunk in stream:
            if first is not None and chunk.start <= first < chunk.stop:
                chunk.fork = digest.copy()
            digest.update(chunk.data)
            yield chunk
        self.source_hash = digest.hexdigest()

    def _zero(self, stream: Iterator[Chunk]) -> Generator[Chunk, None, None]:
        digest = hashlib.sha256() if self._hashing and self._casts else None
        for chunk in stream:
            digest = chunk.fork or digest
            origin = chunk.start - self._data_start
            for cut, start, stop in self._parts(origin, chunk.stop - self._data_start):
                self._kernel.zero(chunk.buffer[PAGE + start - origin : PAGE + stop - origin], cut.dtype, cut.limit)
            if digest is not None:
                digest.update(chunk.data)
            yield chunk
        if self._casts and self._hashing:
            self.source_hash = hash_data(self._output)
        self.output_hash = digest.hexdigest() if digest is not None else self.source_hash

    def _parts(self, low: int, high: int) -> Iterator[tuple[Cut, int, int]]:
        """Of each cut within data bytes `low:high`, the whole elements that lie there or on the seam."""
        for cut in self._cuts:
            start, stop = max(low, cut.start), min(high, cut.stop)
            if start < stop:
                size = floats.FORMATS[cut.dtype].itemsize
                start -= (start - cut.start) % size
                stop += -(stop - cut.start) % size
                yield cut, start, stop


def hash_data(output: Output, progress: Progress | None = None) -> str:
    """SHA-256 of a source file's data section."""
    digest, size = hashlib.sha256(), output.source.data_size
    buffer = memoryview(bytearray(min(CHUNK, size)))
    source = output.source.open()
    try:
        for start in range(0, size, CHUNK):
            part = buffer[: min(CHUNK, size - start)]
            source.read_into(start, part)
            digest.update(part)
            if progress:
                progress.advance(len(part))
    finally:
        source.close()
    return digest.hexdigest()
