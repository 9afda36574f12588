"""Pass two: the output's bytes as a stream of chunks, read, zeroed and hashed side by side in buffers used again.

`bake` writes the stream, `verify` compares it with a file. A chunk is a window of the output file on a grid of pages,
whatever the tensors are, so that it can be written unbuffered. It is read with a seam on both sides, so that a weight
that two chunks share is judged whole in both.
"""

import mmap
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from crdiff_export import floats
from crdiff_export.errors import PlanError
from crdiff_export.hashing import SourceHashes
from crdiff_export.header import BITS, show
from crdiff_export.kernels import Kernel
from crdiff_export.pipeline import AHEAD, ahead
from crdiff_export.plan import Plan, Run
from crdiff_export.source import Bytes
from crdiff_export.threshold import Threshold

CHUNK = 8 << 20
# The widest element has 8 bytes. A page before the window holds the seam and keeps the window itself on a page.
SEAM = 8
PAGE = mmap.PAGESIZE
STAGES = 3


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

    With `hashes`, `output_hash` is then the SHA-256 of the data section as hex (ModelSpec 1.0.1, `hash_sha256`).
    `skip_untouched` leaves chunks that nobody has to see unread, for the consumer to copy.
    """

    output_hash: str | None = None

    def __init__(
        self,
        plan: Plan,
        thresholds: Sequence[Threshold],
        file: int,
        data_start: int,
        kernel: Kernel,
        *,
        hashes: SourceHashes | None = None,
        skip_untouched: bool = False,
        chunk: int = CHUNK,
    ) -> None:
        self._plan, self._file, self._kernel, self._hashes = plan, file, kernel, hashes
        self._output = plan.outputs[file]
        self._cuts = cuts(plan, thresholds, file)
        self._data_start, self._chunk = data_start, chunk
        self._unchanged = plan.unchanged(file)
        casts = any(run.cast for run in self._output.runs)
        self._skip = skip_untouched and not casts and self._output.source.tensors_of is None
        self._nonfinite: dict[str, int] = {}

    def chunks(self) -> Generator[Chunk, None, None]:
        """Every chunk in order; closing the generator stops all stages."""
        # A buffer for every chunk that can be alive: one in each stage's hands and AHEAD between each two.
        buffers = [self._kernel.buffer(self._chunk + 2 * PAGE) for _ in range(STAGES + (STAGES - 1) * AHEAD)]
        return ahead(self._zero(ahead(self._read(buffers))))

    def _read(self, buffers: Sequence[memoryview]) -> Generator[Chunk, None, None]:
        size = self._data_start + self._output.data_size
        source = self._output.source.open()
        try:
            for number, start in enumerate(range(0, size, self._chunk)):
                stop = min(start + self._chunk, size)
                buffer = buffers[number % len(buffers)]
                window = buffer[PAGE : PAGE + stop - start]
                data = window[min(max(self._data_start - start, 0), len(window)) :]
                skipped = self._skip and self._is_untouched(start, stop)
                chunk = Chunk(start, stop, buffer, window, data, untouched=skipped)
                if not chunk.untouched:
                    self._fill(buffer, chunk, source)
                yield chunk
        finally:
            source.close()
        self._refuse_nonfinite()

    def _is_untouched(self, start: int, stop: int) -> bool:
        low, high = start - self._data_start, stop - self._data_start
        seen = self._hashes is not None and high > self._unchanged
        return low >= 0 and not seen and not any(self._parts(low, high))

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
        if self._nonfinite and not self._plan.allow_nonfinite:
            raise PlanError(
                f"{self._output.source.path}: {show(min(self._nonfinite))} holds numbers that the new dtype cannot",
                "Choose --dtype bf16, which has the range of fp32, or leave --dtype out.",
            )

    def _zero(self, stream: Iterator[Chunk]) -> Generator[Chunk, None, None]:
        digest = None
        for chunk in stream:
            origin = chunk.start - self._data_start
            for cut, start, stop in self._parts(origin, chunk.stop - self._data_start):
                self._kernel.zero(chunk.buffer[PAGE + start - origin : PAGE + stop - origin], cut.dtype, cut.limit)
            if self._hashes and chunk.stop - self._data_start > self._unchanged:
                if digest is None:
                    digest = self._hashes.state(self._file)
                    digest.update(chunk.data[self._unchanged - max(origin, 0) :])
                else:
                    digest.update(chunk.data)
            yield chunk
        if self._hashes:
            self.output_hash = digest.hexdigest() if digest else self._hashes.digest(self._file)

    def _parts(self, low: int, high: int) -> Iterator[tuple[Cut, int, int]]:
        """Of each cut within data bytes `low:high`, the whole elements that lie there or on the seam."""
        for cut in self._cuts:
            start, stop = max(low, cut.start), min(high, cut.stop)
            if start < stop:
                size = floats.FORMATS[cut.dtype].itemsize
                start -= (start - cut.start) % size
                stop += -(stop - cut.start) % size
                yield cut, start, stop
