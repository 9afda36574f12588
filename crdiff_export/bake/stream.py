"""The outputs' bytes as a stream of chunks: read, pruned and hashed in parallel threads, in buffers that are reused.

`bake` writes the stream, `verify` compares it with a file. Several variants of one base come from one reading: each
chunk of the source gives one chunk for every variant, in turn. A chunk is a window of the data section on a grid of
pages, independent of the tensors, so that it can be written unbuffered. It is read with a seam on both sides, so that
a weight that lies in two chunks is complete in both.
"""

import contextlib
import mmap
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle
from operator import attrgetter
from typing import TYPE_CHECKING

from crdiff_export.bake.prefetch import DEPTH, prefetch
from crdiff_export.bake.source_hashes import SourceHashes
from crdiff_export.errors import PlanError
from crdiff_export.formats import dtypes
from crdiff_export.formats.safetensors import BITS, show
from crdiff_export.formats.weight_file import Bytes
from crdiff_export.prune.criteria import Decision, Mask
from crdiff_export.prune.kernels import Kernel
from crdiff_export.prune.plan import Plan, Run, Target

if TYPE_CHECKING:
    from hashlib import _Hash
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

CHUNK = 8 << 20
# The widest element has 8 bytes. A page before the window holds the seam and keeps the window itself on a page.
SEAM = 8
PAGE = mmap.PAGESIZE
STAGES = 3
# Threads that hash outputs. One for all variants would take longer than the disk.
HASHERS = 2
_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class Pruning:
    """A plan and the decision which weights go. With `keep` the stream also passes on the pruned weights."""

    plan: Plan
    decision: Decision
    keep: bool = False


@dataclass(frozen=True, slots=True)
class PruneRange:
    """The bytes of one target in the output's data section, and which of its weights to prune.

    Attributes:
        start: The first byte of the target in the data section.
        stop: The byte behind its last.
        dtype: The dtype of its weights in the output.
        limit: Weights whose magnitude, as raw bits, is at most this are set to zero.
        mask: Replaces the limit: the weights to set to zero.
        moved: Replaces both: all new bytes of the target.
    """

    start: int
    stop: int
    dtype: str
    limit: int = 0
    mask: Mask | None = None
    moved: memoryview | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one variant's data section.

    Attributes:
        start: Its first byte in the data section.
        stop: The byte behind its last.
        buffer: The memory with its bytes and its seams.
        variant: The number of the variant.
        pruned: The original values of the weights that begin in the chunk and were pruned, one after another; empty
            for a variant that does not keep them.
        hashing: A thread that reads the buffer, too, until this is done; None if no thread does.
    """

    start: int
    stop: int
    buffer: memoryview
    variant: int = 0
    pruned: memoryview = _NOTHING
    hashing: "Future[None] | None" = None

    @property
    def data(self) -> memoryview:
        """The chunk's bytes, which begin on the buffer's second page."""
        return self.buffer[PAGE : PAGE + self.stop - self.start]

    def part(self, start: int, stop: int) -> memoryview:
        """Return bytes of the data section that lie in the chunk or on its seams.

        Args:
            start: The first byte.
            stop: The byte behind the last.

        Returns:
            A part of the buffer.
        """
        return self.buffer[PAGE + start - self.start : PAGE + stop - self.start]


def prune_ranges(plan: Plan, file: int, decision: Decision | None = None) -> tuple[PruneRange, ...]:
    """List the targets that may be pruned in one file of a plan.

    Args:
        plan: The plan.
        file: The number of the file.
        decision: Which of their weights go; None where only their places matter.

    Returns:
        Where their bytes are, in order, and what to prune there.
    """
    ranges = []
    for number, target in enumerate(plan.targets):
        if target.file == file and plan.scopes[target.scope].rank:
            bounds = PruneRange(*target.span(target.output), target.output.dtype)
            ranges.append(_with_decision(bounds, decision, number, target) if decision else bounds)
    return tuple(sorted(ranges, key=attrgetter("start")))


def _with_decision(bounds: PruneRange, decision: Decision, number: int, target: Target) -> PruneRange:
    if number in decision.moved:
        return replace(bounds, moved=decision.moved[number].data.cast("B"))
    if decision.masks is not None:
        mask = decision.masks[number]
        assert mask is not None
        assert mask.count == target.count
        return replace(bounds, mask=mask)
    value = decision.thresholds[target.scope].value
    assert value is not None
    return replace(bounds, limit=target.encoding.limit(value))


def buffers(kernel: Kernel, chunk: int, number: int) -> Iterator[memoryview]:
    """Make buffers for chunks, which are used in turn.

    Args:
        kernel: Makes memory that it can work on.
        chunk: Bytes of a chunk, which gets a page for the seam on both sides.
        number: How many chunks are alive at once.

    Returns:
        The buffers, again and again.
    """
    return cycle([kernel.buffer(chunk + 2 * PAGE) for _ in range(number)])


def windows(size: int, chunk: int, kernel: Kernel) -> Iterator[Chunk]:
    """Divide a stream into chunks, whose buffers the first of the stages fills.

    Args:
        size: Bytes of the stream.
        chunk: Bytes of a chunk.
        kernel: Makes the buffers.

    Yields:
        The chunks, with as many buffers as can be alive: one in each stage, and DEPTH between each two stages.
    """
    memory = buffers(kernel, chunk, STAGES + (STAGES - 1) * DEPTH)
    for start in range(0, size, chunk):
        yield Chunk(start, min(start + chunk, size), next(memory))


class Stream:
    """The chunks of one file for all variants, which can be iterated once.

    Args:
        prunings: The variants; they share their checkpoint and cast.
        file: The number of the file in the plan.
        kernel: Prunes the weights.
        hashes: The base's hashes, where the outputs are hashed, too.
        chunk: Bytes of a chunk.

    Attributes:
        digests: After the last chunk, with `hashes`: the SHA-256 of each variant's data section (ModelSpec 1.0.1,
            `hash_sha256`), which can be continued with what comes behind it.
    """

    def __init__(
        self,
        prunings: Sequence[Pruning],
        file: int,
        kernel: Kernel,
        *,
        hashes: SourceHashes | None = None,
        chunk: int = CHUNK,
    ) -> None:
        self._file, self._kernel, self._hashes, self._chunk = file, kernel, hashes, chunk
        self._plan = prunings[0].plan
        self._output = self._plan.outputs[file]
        self._ranges = [prune_ranges(pruning.plan, file, pruning.decision) for pruning in prunings]
        self._keep = [pruning.keep for pruning in prunings]
        self._unchanged = hashes.shared(file) if hashes else 0
        self._nonfinite: dict[str, int] = {}
        self.digests: list[_Hash] = []
        # Variants share the source's buffer, so each needs its own copy, unless there is only one.
        behind = STAGES - 1 + DEPTH
        self._copies = buffers(kernel, chunk, behind) if len(prunings) > 1 else None
        self._values = buffers(kernel, chunk, behind) if any(self._keep) else None

    def chunks(self) -> Generator[Chunk, None, None]:
        """Yield every chunk in order, all variants in turn; closing the generator stops all stages."""
        with contextlib.closing(prefetch(self._zero(prefetch(self._read())))) as stream:
            for chunk in stream:
                yield chunk
                if chunk.hashing:
                    chunk.hashing.result()  # the buffer may be used again only then

    def _read(self) -> Generator[Chunk, None, None]:
        with contextlib.closing(self._output.source.open()) as source:
            for chunk in windows(self._output.data_size, self._chunk, self._kernel):
                self._fill(chunk, source)
                yield chunk
        self._refuse_nonfinite()

    def _fill(self, chunk: Chunk, source: Bytes) -> None:
        """Read the chunk and its seams into its buffer, and cast them where the plan says so."""
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
        self, run: Run, pair: tuple[str, str], start: int, stop: int, source: Bytes
    ) -> tuple[int, bytes | memoryview]:
        """Cast the elements that overlap output bytes `start:stop`; return where the first begins, and the bytes."""
        from crdiff_export.prune.kernels import cast

        narrow, wide = (BITS[dtype] // 8 for dtype in pair)
        first, last = (start - run.start) // wide, -(-(stop - run.start) // wide)
        raw = memoryview(bytearray((last - first) * narrow))
        source.read_into(run.source + first * narrow, raw)
        weights = cast.cast(raw, *pair)
        if lost := cast.nonfinite(weights, pair[1]) - cast.nonfinite(raw, pair[0]):
            self._nonfinite[run.tensor] = lost
        return run.start + first * wide, weights

    def _refuse_nonfinite(self) -> None:
        if self._nonfinite and not self._plan.allow_nonfinite:
            raise PlanError(
                f"{self._output.source.path}: {show(min(self._nonfinite))} holds numbers that the new dtype cannot",
                "Choose --dtype bf16, which has the range of fp32, or leave --dtype out.",
            )

    def _zero(self, stream: Generator[Chunk, None, None]) -> Generator[Chunk, None, None]:
        digests: list[_Hash] = []
        # An error holds this frame, and so the thread behind the stream.
        with contextlib.closing(stream), _Hashers(len(self._ranges)) as hashers:
            for chunk in stream:
                if self._hashes and not digests and chunk.stop > self._unchanged:
                    digests = [self._hashes.state(self._file) for _ in self._ranges]
                for variant, ranges in enumerate(self._ranges):
                    output = self._prune(replace(chunk, variant=variant), ranges)
                    if digests:
                        data = output.part(max(chunk.start, self._unchanged), chunk.stop)
                        output = replace(output, hashing=hashers.update(variant, digests[variant], data))
                    yield output
        if self._hashes:
            self.digests = digests or [self._hashes.state(self._file) for _ in self._ranges]

    def _prune(self, chunk: Chunk, ranges: Sequence[PruneRange]) -> Chunk:
        """Prune a chunk, in a copy where other variants need the source's bytes."""
        parts = list(overlaps(ranges, chunk.start, chunk.stop))
        if parts and self._copies:
            low, high = chunk.start - SEAM, chunk.stop + SEAM
            copy = replace(chunk, buffer=next(self._copies))
            copy.part(low, high)[:] = chunk.part(low, high)
            chunk = copy
        if parts and self._values and self._keep[chunk.variant]:
            chunk = replace(chunk, pruned=_copy_pruned(chunk, ranges, next(self._values)))
        for target, start, stop in parts:
            self._prune_target(target, chunk.part(start, stop), start - target.start)
        return chunk

    def _prune_target(self, target: PruneRange, weights: memoryview, offset: int) -> None:
        """Prune whole weights of a target, which begin at its byte `offset`."""
        if target.moved is not None:
            weights[:] = target.moved[offset : offset + len(weights)]
        elif target.mask is not None:
            self._kernel.clear(weights, target.dtype, _unpack(target, target.mask, offset, len(weights)))
        else:
            self._kernel.zero(weights, target.dtype, target.limit)


class _Hashers:
    """Threads that hash outputs, each variant always in the same one, so that its bytes stay in order."""

    def __init__(self, variants: int) -> None:
        self._pools = [ThreadPoolExecutor(1, "crdiff-hash-output") for _ in range(min(variants, HASHERS))]

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc: object) -> None:
        for pool in self._pools:
            pool.shutdown()  # waits for the last bytes

    def update(self, variant: int, digest: "_Hash", data: memoryview) -> "Future[None]":
        """Add bytes to a variant's hash."""
        return self._pools[variant % len(self._pools)].submit(digest.update, data)


def _copy_pruned(chunk: Chunk, ranges: Sequence[PruneRange], into: memoryview) -> memoryview:
    """Copy those of the weights that begin in the chunk that will be pruned."""
    end = 0
    for target, start, stop in own_parts(ranges, chunk.start, chunk.stop):
        aligned = end + -end % dtypes.FORMATS[target.dtype].itemsize
        copied = _pick(target, chunk.part(start, stop), start - target.start, into[aligned:])
        if aligned != end:
            into[end : end + copied] = into[aligned : aligned + copied]
        end += copied
    return into[:end]


def _pick(target: PruneRange, weights: memoryview, offset: int, into: memoryview) -> int:
    """Copy those of a target's weights from its byte `offset` on that will be pruned; return their size in bytes."""
    from crdiff_export.prune.kernels.pick import pick, take

    if target.mask is None:
        return take(weights, target.dtype, target.limit, into)
    return pick(weights, target.dtype, _unpack(target, target.mask, offset, len(weights)), into)


def _unpack(target: PruneRange, mask: Mask, offset: int, size: int) -> "NDArray[np.bool_]":
    """Unpack the part of a mask for `size` bytes of weights from byte `offset` of the target on."""
    itemsize = dtypes.FORMATS[target.dtype].itemsize
    return mask.unpack(offset // itemsize, (offset + size) // itemsize)


def overlaps(ranges: Sequence[PruneRange], low: int, high: int) -> Iterator[tuple[PruneRange, int, int]]:
    """Find the parts of ranges that overlap a window of the data section.

    Elements that lie only partly in the window are included whole; they reach into a seam.

    Args:
        ranges: The ranges.
        low: The first byte of the window.
        high: The byte behind its last.

    Yields:
        The range, and the first byte and the end of its elements in the window.
    """
    for target in ranges:
        start, stop = max(low, target.start), min(high, target.stop)
        if start < stop:
            size = dtypes.FORMATS[target.dtype].itemsize
            start -= (start - target.start) % size
            stop += -(stop - target.start) % size
            yield target, start, stop


def own_parts(ranges: Sequence[PruneRange], low: int, high: int) -> Iterator[tuple[PruneRange, int, int]]:
    """Find the parts of ranges whose elements begin in a window; the others belong to the window before.

    Args:
        ranges: The ranges.
        low: The first byte of the window.
        high: The byte behind its last.

    Yields:
        As `overlaps`.
    """
    for target, first, stop in overlaps(ranges, low, high):
        start = first if first >= low else first + dtypes.FORMATS[target.dtype].itemsize
        if start < stop:
            yield target, start, stop
