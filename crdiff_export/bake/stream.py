"""Pass two: the outputs' bytes as a stream of chunks, read, zeroed and hashed side by side in buffers used again.

`bake` writes the stream, `verify` compares it with a file. Several variants of one base come out of one reading: each
chunk of the source gives one chunk for every variant, in turn. A chunk is a window of the data section on a grid of
pages, whatever the tensors are, so that it can be written unbuffered. It is read with a seam on both sides, so that a
weight that two chunks share is judged whole in both.
"""

import mmap
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING

from crdiff_export.bake.prefetch import AHEAD, ahead
from crdiff_export.bake.source_hashes import SourceHashes
from crdiff_export.errors import PlanError
from crdiff_export.formats import dtypes as floats
from crdiff_export.formats.safetensors import BITS, show
from crdiff_export.formats.weight_file import Bytes
from crdiff_export.prune.criteria import Decision, Mask
from crdiff_export.prune.kernels import Kernel
from crdiff_export.prune.plan import Plan, Run

if TYPE_CHECKING:
    from hashlib import _Hash

    import numpy as np
    from numpy.typing import NDArray

CHUNK = 8 << 20
# The widest element has 8 bytes. A page before the window holds the seam and keeps the window itself on a page.
SEAM = 8
PAGE = mmap.PAGESIZE
STAGES = 3
_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class Pruning:
    """A plan and what was decided for it. With `keep` the weights that are zeroed are handed on, for a residual."""

    plan: Plan
    decision: Decision
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """Output data bytes `start:stop` hold a target's weights, of which those of a magnitude pattern up to `limit` go.

    Where there is a `mask`, those of its bits go instead. `moved` are all of the bytes, to be put in their place.
    """

    start: int
    stop: int
    dtype: str
    limit: int = 0
    mask: Mask | None = None
    moved: memoryview | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes `start:stop` of the data section of variant number `variant`; `data`, a part of `buffer`, holds them.

    `untouched` chunks were not read: their bytes are the source's. `removed` are the weights that begin in the chunk
    and were zeroed, as they were, one after another; nothing for a variant that does not keep them.
    """

    start: int
    stop: int
    buffer: memoryview
    variant: int = 0
    untouched: bool = False
    removed: memoryview = _NOTHING

    @property
    def data(self) -> memoryview:
        """The chunk's bytes, from the buffer's second page on."""
        return self.buffer[PAGE : PAGE + self.stop - self.start]

    def part(self, start: int, stop: int) -> memoryview:
        """Data bytes `start:stop`, which are of the chunk or on its seams."""
        return self.buffer[PAGE + start - self.start : PAGE + stop - self.start]


def places(plan: Plan, file: int) -> tuple[Cut, ...]:
    """Where one file of the plan has weights that may go, in order; not yet which."""
    return tuple(cut for _, cut in _numbered(plan, file))


def cuts(pruning: Pruning, file: int) -> tuple[Cut, ...]:
    """What to zero in one file of the plan, in order."""
    decision, targets = pruning.decision, pruning.plan.targets
    found = []
    for number, cut in _numbered(pruning.plan, file):
        moved = decision.moved.get(number)
        if decision.masks is None:
            bits = decision.thresholds[targets[number].scope].bits
            assert bits is not None
            limit = min(floats.limit(cut.dtype, bits), floats.FORMATS[cut.dtype].first_nonfinite - 1)
            found.append(replace(cut, limit=limit))
        elif moved is not None:
            found.append(replace(cut, moved=moved.data.cast("B")))
        else:
            mask = decision.masks[number]
            assert mask is not None
            assert mask.count == targets[number].count
            found.append(replace(cut, mask=mask))
    return tuple(found)


def _numbered(plan: Plan, file: int) -> list[tuple[int, Cut]]:
    """The same with the targets' numbers."""
    found = [
        (number, Cut(*target.span(target.output), target.output.dtype))
        for number, target in enumerate(plan.targets)
        if target.file == file and plan.scopes[target.scope].rank
    ]
    return sorted(found, key=lambda one: one[1].start)


class Stream:
    """The chunks of one file of all variants; to be read through once. The variants share their checkpoint and cast.

    With `hashes`, `digests` are then the SHA-256 of the data sections (ModelSpec 1.0.1, `hash_sha256`), to be continued
    where something comes behind them.
    `skip_untouched` leaves chunks that nobody has to see unread, for the consumer to copy.
    """

    def __init__(
        self,
        prunings: Sequence[Pruning],
        file: int,
        kernel: Kernel,
        *,
        hashes: SourceHashes | None = None,
        skip_untouched: bool = False,
        chunk: int = CHUNK,
    ) -> None:
        self._file, self._kernel, self._hashes, self._chunk = file, kernel, hashes, chunk
        self._plan = prunings[0].plan
        self._output = self._plan.outputs[file]
        self._cuts = [cuts(pruning, file) for pruning in prunings]
        self._keep = [pruning.keep for pruning in prunings]
        self._unchanged = hashes.shared(file) if hashes else 0
        casts = any(run.cast for run in self._output.runs)
        self._skip = skip_untouched and not casts and self._output.source.tensors_of is None
        self._nonfinite: dict[str, int] = {}
        self.digests: list[_Hash] = []

    def chunks(self) -> Generator[Chunk, None, None]:
        """Every chunk in order, of each place those of all variants; closing the generator stops all stages."""
        # A buffer for every chunk that can be alive: one in each stage's hands and AHEAD between each two.
        alive = STAGES + (STAGES - 1) * AHEAD
        return ahead(self._zero(ahead(self._read(self._buffers(alive)))))

    def _buffers(self, number: int) -> Iterator[memoryview]:
        return cycle([self._kernel.buffer(self._chunk + 2 * PAGE) for _ in range(number)])

    def _read(self, buffers: Iterator[memoryview]) -> Generator[Chunk, None, None]:
        size = self._output.data_size
        source = self._output.source.open()
        try:
            for start in range(0, size, self._chunk):
                stop = min(start + self._chunk, size)
                chunk = Chunk(start, stop, next(buffers), untouched=self._skip and self._is_untouched(start, stop))
                if not chunk.untouched:
                    self._fill(chunk, source)
                yield chunk
        finally:
            source.close()
        self._refuse_nonfinite()

    def _is_untouched(self, start: int, stop: int) -> bool:
        seen = self._hashes is not None and stop > self._unchanged
        return not seen and not any(any(split(found, start, stop)) for found in self._cuts)

    def _fill(self, chunk: Chunk, source: Bytes) -> None:
        """Read the chunk's data and its seams into its buffer, cast where the plan says so."""
        low, high = max(chunk.start - SEAM, 0), min(chunk.stop + SEAM, self._output.data_size)
        for run in self._output.runs:
            start, stop = max(low, run.start), min(high, run.stop)
            if start >= stop:
                continue
            if run.cast is None:
                source.read_into(run.source + start - run.start, chunk.part(start, stop))
            else:
                first, weights = self._cast(run, run.cast, start, stop, source)
                chunk.part(first, first + len(weights))[:] = weights

    def _cast(
        self, run: Run, dtypes: tuple[str, str], start: int, stop: int, source: Bytes
    ) -> tuple[int, bytes | memoryview]:
        """The whole elements that output bytes `start:stop` belong to, and where the first of them begins."""
        from crdiff_export.prune.kernels import cast

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
        digests = None
        # What one variant zeroes in the source's buffer the next one would miss; one alone needs no copy.
        copies = None if len(self._cuts) == 1 else self._buffers(STAGES - 1 + AHEAD)
        removed = self._buffers(STAGES - 1 + AHEAD) if any(self._keep) else None
        for chunk in stream:
            if self._hashes and digests is None and chunk.stop > self._unchanged:
                digests = [self._hashes.state(self._file) for _ in self._cuts]
            for variant, found in enumerate(self._cuts):
                pruned = self._pruned(replace(chunk, variant=variant), found, copies, removed)
                if digests and not pruned.untouched:
                    digests[variant].update(pruned.part(max(chunk.start, self._unchanged), chunk.stop))
                yield pruned
        if self._hashes:
            digests = digests or [self._hashes.state(self._file) for _ in self._cuts]
            self.digests = digests

    def _pruned(
        self,
        chunk: Chunk,
        found: Sequence[Cut],
        copies: Iterator[memoryview] | None,
        removed: Iterator[memoryview] | None,
    ) -> Chunk:
        """The chunk pruned, in a buffer of its own where others need the source's."""
        parts = list(split(found, chunk.start, chunk.stop))
        if parts and copies is not None:
            low, high = chunk.start - SEAM, chunk.stop + SEAM
            own = replace(chunk, buffer=next(copies))
            own.part(low, high)[:] = chunk.part(low, high)
            chunk = own
        if parts and removed is not None and self._keep[chunk.variant]:
            chunk = replace(chunk, removed=_removed(chunk, parts, next(removed)))
        for cut, start, stop in parts:
            self._cut(cut, chunk.part(start, stop), start - cut.start)
        return chunk

    def _cut(self, cut: Cut, weights: memoryview, place: int) -> None:
        """Prune whole weights, which begin at byte `place` of the cut."""
        if cut.moved is not None:
            weights[:] = cut.moved[place : place + len(weights)]
        elif cut.mask is not None:
            self._kernel.clear(weights, cut.dtype, _gone(cut, cut.mask, place, len(weights)))
        else:
            self._kernel.zero(weights, cut.dtype, cut.limit)


def _removed(chunk: Chunk, parts: Sequence[tuple[Cut, int, int]], into: memoryview) -> memoryview:
    """The weights of a chunk that are to be zeroed; one on the seam before it belongs to the chunk before."""
    end = 0
    for cut, first, stop in parts:
        size = floats.FORMATS[cut.dtype].itemsize
        start = first if first >= chunk.start else first + size
        place = end + -end % size
        taken = _take(cut, chunk.part(start, stop), start - cut.start, into[place:]) if start < stop else 0
        if place != end:
            into[end : end + taken] = into[place : place + taken]
        end += taken
    return into[:end]


def _take(cut: Cut, weights: memoryview, place: int, into: memoryview) -> int:
    """Copy what will go of whole weights, which begin at byte `place` of the cut; how many bytes that is."""
    from crdiff_export.prune.kernels.pick import pick, take

    if cut.mask is None:
        return take(weights, cut.dtype, cut.limit, into)
    return pick(weights, cut.dtype, _gone(cut, cut.mask, place, len(weights)), into)


def _gone(cut: Cut, mask: Mask, place: int, size: int) -> "NDArray[np.bool_]":
    """The mask of `size` bytes of whole weights from byte `place` of the cut on."""
    itemsize = floats.FORMATS[cut.dtype].itemsize
    return mask.unpack(place // itemsize, (place + size) // itemsize)


def split(found: Sequence[Cut], low: int, high: int) -> Iterator[tuple[Cut, int, int]]:
    """Of each cut within data bytes `low:high`, the whole elements that lie there or on the seam."""
    for cut in found:
        start, stop = max(low, cut.start), min(high, cut.stop)
        if start < stop:
            size = floats.FORMATS[cut.dtype].itemsize
            start -= (start - cut.start) % size
            stop += -(stop - cut.start) % size
            yield cut, start, stop
