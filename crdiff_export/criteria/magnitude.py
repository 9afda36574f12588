"""Rank by |w| (Han et al. 2015, arXiv 1506.02626), the criterion of the paper: pass one over the target weights."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock, local
from typing import TYPE_CHECKING

from crdiff_export import threshold
from crdiff_export.errors import PlanError
from crdiff_export.floats import FORMATS, INFINITY
from crdiff_export.header import show
from crdiff_export.kernels import LOWER_BITS, REFINED, Kernel, counters, magnitudes
from crdiff_export.plan import Plan, Target
from crdiff_export.progress import Progress
from crdiff_export.source import Bytes
from crdiff_export.threshold import Threshold

if TYPE_CHECKING:
    from crdiff_export.kernels import Counts

# Elements read and counted at once.
CHUNK = 2 << 20


@dataclass
class _Tally:
    """What has been counted of a scope: a histogram per dtype; of F32 also, once `upper` is known, a refined one."""

    counts: "dict[str, threshold.Totals]" = field(default_factory=dict)
    refined: "threshold.Totals | None" = None
    upper: int = 0


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements `start:stop` of a target's tensor, small enough to be counted at once."""

    target: Target
    start: int
    stop: int


def thresholds(plan: Plan, kernel: Kernel, progress: Progress) -> tuple[Threshold, ...]:
    """The exact k-th smallest magnitude of every scope, in the dtypes that will be written.

    Non-finite weights raise PlanError with their tensors' names, unless the plan allows them.
    """
    return _Counting(plan, kernel, progress).run()


class _Counting:
    """One count over all targets on the kernel's threads. Sums of integers: their order cannot change the result."""

    def __init__(self, plan: Plan, kernel: Kernel, progress: Progress) -> None:
        self._plan, self._kernel, self._progress = plan, kernel, progress
        self._tallies = [_Tally() for _ in plan.scopes]
        self._widest = max((t.source.itemsize for t in plan.targets), default=1)
        self._nonfinite: dict[str, int] = {}
        self._lock = Lock()
        self._own = local()
        self._readers: list[Bytes] = []

    def run(self) -> tuple[Threshold, ...]:
        scopes = self._plan.scopes
        counted = [t for t in self._plan.targets if scopes[t.scope].rank]
        wide = [t for t in counted if t.output.dtype == "F32"]
        self._progress.stage("counting", sum(t.count * t.source.itemsize for t in (*counted, *wide)))
        try:
            self._pass(counted, refine=False)
            self._refuse_nonfinite()
            for scope, tally in zip(scopes, self._tallies, strict=True):
                if "F32" in tally.counts:
                    tally.upper = threshold.upper_bits(tally.counts, scope.rank)
                    tally.refined = threshold.totals(REFINED)
            self._pass(wide, refine=True)
        finally:
            for reader in self._readers:
                reader.close()
        return tuple(
            threshold.select(tally.counts, scope.rank, tally.refined) if scope.rank else Threshold(None, 0, scope.count)
            for scope, tally in zip(scopes, self._tallies, strict=True)
        )

    def _pass(self, targets: list[Target], *, refine: bool) -> None:
        with ThreadPoolExecutor(self._kernel.threads, "crdiff-count") as pool:
            futures = [pool.submit(self._count, piece, refine) for piece in _pieces(targets)]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _count(self, piece: _Piece, refine: bool) -> None:
        target = piece.target
        dtype = target.output.dtype
        weights = self._read(piece)
        tally = self._tallies[target.scope]
        if refine:
            counts = counters(REFINED)
            self._kernel.refine(weights, tally.upper, counts)
        else:
            counts = counters(magnitudes(dtype))
            self._kernel.count(weights, dtype, counts)
        with self._lock:
            if tally.refined is not None:
                tally.refined += counts
            else:
                tally.counts.setdefault(dtype, threshold.totals(len(counts)))
                tally.counts[dtype] += counts
                self._note_nonfinite(target, counts)
        self._progress.advance((piece.stop - piece.start) * target.source.itemsize)

    def _read(self, piece: _Piece) -> memoryview:
        """The piece's weights in the dtype that will be written, in a buffer of this thread's own."""
        source, output = piece.target.source, piece.target.output
        own = self._own
        if not hasattr(own, "buffer"):
            own.buffer, own.readers = self._kernel.buffer(CHUNK * self._widest), {}
        if piece.target.file not in own.readers:
            reader = own.readers[piece.target.file] = self._plan.checkpoint.files[piece.target.file].open()
            with self._lock:
                self._readers.append(reader)
        weights: memoryview = own.buffer[: (piece.stop - piece.start) * source.itemsize]
        own.readers[piece.target.file].read_into(source.start + piece.start * source.itemsize, weights)
        if source.dtype == output.dtype:
            return weights
        from crdiff_export.kernels.cast import cast

        return memoryview(cast(weights, source.dtype, output.dtype))

    def _note_nonfinite(self, target: Target, counts: "Counts") -> None:
        form = FORMATS[target.output.dtype]
        first = INFINITY >> LOWER_BITS if form.width == 32 else form.first_nonfinite
        if found := int(counts[first:].sum()):
            self._nonfinite[target.name] = self._nonfinite.get(target.name, 0) + found

    def _refuse_nonfinite(self) -> None:
        if not self._nonfinite or self._plan.allow_nonfinite:
            return
        names = ", ".join(show(name) for name in sorted(self._nonfinite)[:3])
        more = len(self._nonfinite) - 3
        raise PlanError(
            f"{self._plan.checkpoint.path}: {sum(self._nonfinite.values())} target weights are not finite, "
            f"in {names}{f' and {more} more' if more > 0 else ''}",
            "The checkpoint is damaged, or --dtype is too narrow for it; --allow-nonfinite keeps such weights.",
        )


def _pieces(targets: list[Target]) -> Iterator[_Piece]:
    for target in targets:
        for start in range(target.start, target.stop, CHUNK):
            yield _Piece(target, start, min(start + CHUNK, target.stop))
