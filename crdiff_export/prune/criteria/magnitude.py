"""Rank by |w| (Han et al. 2015, arXiv 1506.02626), the criterion of the paper. This is pass one over the weights."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock, local
from typing import TYPE_CHECKING

from crdiff_export.formats.dtypes import FORMATS, INFINITY
from crdiff_export.formats.weight_file import Bytes
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import threshold
from crdiff_export.prune.criteria import nonfinite
from crdiff_export.prune.criteria.decision import Decision
from crdiff_export.prune.kernels import LOWER_BITS, REFINED, Kernel, counters, magnitudes
from crdiff_export.prune.plan import Plan, Scope, Target
from crdiff_export.prune.threshold import Threshold

if TYPE_CHECKING:
    from crdiff_export.prune.kernels import Counts

    _Refined = Mapping[Hashable, dict[int, threshold.Totals]]

# Elements read and counted at once.
CHUNK = 2 << 20
# Small targets are counted together up to this number of elements.
SHARE = 1 << 16


@dataclass
class _Tally:
    """Counts of some weights: a histogram per dtype, and for F32 refined ones by the upper bits that they belong to."""

    counts: "dict[str, threshold.Totals]" = field(default_factory=dict)
    refined: "dict[int, threshold.Totals]" = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements `start:stop` of a target's tensor, few enough to be counted at once."""

    target: Target
    start: int
    stop: int


def thresholds(plans: Sequence[Plan], kernel: Kernel, progress: Progress) -> tuple[tuple[Threshold, ...], ...]:
    """Compute the exact thresholds of plans that share their checkpoint and cast.

    The weights are read once for all plans (fp32: twice), and compared in the dtypes that will be written.

    Args:
        plans: The plans.
        kernel: Counts magnitudes.
        progress: Told of the bytes read.

    Returns:
        For each plan one threshold for each scope: the k-th smallest magnitude.

    Raises:
        PlanError: Target weights are not finite, and the plans do not allow that.
    """
    ranking = Ranking(plans, kernel, progress)
    ranking.count(refined=True)
    return tuple(ranking.thresholds(plan) for plan in plans)


class Ranking:
    """Counts the weights of a checkpoint, and computes the thresholds of any ratios from the counts.

    All targets are counted on the kernel's threads. Counts are integers, so the result does not depend on threads.
    Each kind of layers in a group has its own tally, so that plans with other kinds of targets can use them.
    """

    def __init__(self, plans: Sequence[Plan], kernel: Kernel, progress: Progress) -> None:
        self._plans, self._kernel, self._progress = plans, kernel, progress
        self._targets = {t.name: t for plan in plans for t in plan.targets if plan.scopes[t.scope].rank}
        self._tallies = {_tally(plans[0], t): _Tally() for t in self._targets.values()}
        self._widest = max((t.source.itemsize for t in self._targets.values()), default=1)
        self._nonfinite: dict[str, int] = {}
        self._lock = Lock()
        self._own = local()
        self._readers: list[Bytes] = []

    def count(self, *, refined: bool = False) -> None:
        """Read every target that is pruned; with `refined` also count what the plans' own ratios need."""
        counted = list(self._targets.values())
        wide = [t for t in counted if t.output.dtype == "F32"] if refined else []
        self._progress.stage("counting", sum(t.count * t.source.itemsize for t in (*counted, *wide)))
        self._pass(counted)
        if refined:
            nonfinite.refuse(self._plans, self._nonfinite)
            self._refine(self._plans, self._progress)

    def thresholds(self, plan: Plan) -> tuple[Threshold, ...]:
        """Return one threshold for each scope of a plan whose targets were counted, with any ratios.

        F32 weights are read again, unless the same upper bits were refined before.
        """
        nonfinite.refuse([plan], self._nonfinite)
        self._refine([plan], Silent())
        return tuple(_select(*scope) for scope in self._scopes(plan))

    def _refine(self, plans: Sequence[Plan], progress: Progress) -> None:
        """Count the lower bits of the F32 weights near the thresholds, if that was not done before."""
        asked: dict[Hashable, set[int]] = {}
        for scope, names in (scope for plan in plans for scope in self._named(plan)):
            tallies = [self._tallies[name] for name in names]
            if names and "F32" in (counts := _merged(tallies)):
                upper = threshold.upper_bits(counts, scope.rank)
                for name, tally in zip(names, tallies, strict=True):
                    if upper not in tally.refined:
                        asked.setdefault(name, set()).add(upper)
        found = {name: {upper: threshold.totals(REFINED) for upper in uppers} for name, uppers in asked.items()}
        wide = [t for t in self._targets.values() if t.output.dtype == "F32" and _tally(self._plans[0], t) in asked]
        self._pass(wide, found, progress)
        for name, refined in found.items():  # only when complete: nothing may use half a count
            self._tallies[name].refined |= refined

    def _scopes(self, plan: Plan) -> list[tuple[Scope, list[_Tally]]]:
        """Return every scope of a plan with the tallies of its weights."""
        return [(scope, [self._tallies[name] for name in names]) for scope, names in self._named(plan)]

    def _named(self, plan: Plan) -> list[tuple[Scope, list[Hashable]]]:
        names: list[dict[Hashable, None]] = [{} for _ in plan.scopes]
        for target in plan.targets:
            if plan.scopes[target.scope].rank:
                names[target.scope][_tally(plan, target)] = None
        return [(scope, list(found)) for scope, found in zip(plan.scopes, names, strict=True)]

    def _pass(self, targets: list[Target], refined: "_Refined | None" = None, progress: Progress | None = None) -> None:
        if not targets:
            return
        try:
            with ThreadPoolExecutor(self._kernel.threads, "crdiff-count") as pool:
                futures = [pool.submit(self._count_all, pieces, refined) for pieces in _shares(targets)]
                try:
                    for future in futures:
                        (progress or self._progress).advance(future.result())
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            for reader in self._readers:
                reader.close()
            self._readers, self._own = [], local()

    def _count_all(self, pieces: Sequence[_Piece], refined: "_Refined | None") -> int:
        return sum(self._count(piece, refined) for piece in pieces)

    def _count(self, piece: _Piece, refined: "_Refined | None") -> int:
        target = piece.target
        dtype = target.output.dtype
        weights = self._read(piece)
        name = _tally(self._plans[0], target)
        tally = self._tallies[name]
        if refined is not None:
            found = {upper: counters(REFINED) for upper in refined[name]}
            for upper, counts in found.items():
                self._kernel.refine(weights, upper, counts)
            with self._lock:
                for upper, counts in found.items():
                    refined[name][upper] += counts
        else:
            counts = counters(magnitudes(dtype))
            self._kernel.count(weights, dtype, counts)
            with self._lock:
                tally.counts.setdefault(dtype, threshold.totals(len(counts)))
                tally.counts[dtype] += counts
                self._note_nonfinite(target, counts)
        return (piece.stop - piece.start) * target.source.itemsize

    def _read(self, piece: _Piece) -> memoryview:
        """Read the weights of a piece into this thread's buffer, in the dtype that will be written."""
        source, output = piece.target.source, piece.target.output
        own = self._own
        if not hasattr(own, "buffer"):
            own.buffer, own.readers = self._kernel.buffer(CHUNK * self._widest), {}
        if piece.target.file not in own.readers:
            reader = own.readers[piece.target.file] = self._plans[0].checkpoint.files[piece.target.file].open()
            with self._lock:
                self._readers.append(reader)
        weights: memoryview = own.buffer[: (piece.stop - piece.start) * source.itemsize]
        own.readers[piece.target.file].read_into(source.start + piece.start * source.itemsize, weights)
        if source.dtype == output.dtype:
            return weights
        from crdiff_export.prune.kernels.cast import cast

        return memoryview(cast(weights, source.dtype, output.dtype))

    def _note_nonfinite(self, target: Target, counts: "Counts") -> None:
        form = FORMATS[target.output.dtype]
        first = INFINITY >> LOWER_BITS if form.width == 32 else form.first_nonfinite
        if found := int(counts[first:].sum()):
            self._nonfinite[target.name] = self._nonfinite.get(target.name, 0) + found


class RankedMagnitudes:
    """Magnitudes as a ranked criterion; with `refined` the plans' own ratios need no further reading."""

    def __init__(self, plans: Sequence[Plan], kernel: Kernel, progress: Progress, *, refined: bool = True) -> None:
        self._ranking = Ranking(plans, kernel, progress)
        self._ranking.count(refined=refined)

    def decide(self, plan: Plan, progress: Progress | None = None) -> Decision:
        return Decision(self._ranking.thresholds(plan))


def _tally(plan: Plan, target: Target) -> Hashable:
    """Return the key of a target's tally: its name if thresholds are per layer, else its group and kind."""
    return target.name if plan.match.family.scope == "layer" else (target.group, target.kind)


def _merged(tallies: Sequence[_Tally]) -> "dict[str, threshold.Totals]":
    """Sum the histograms of several tallies."""
    merged: dict[str, threshold.Totals] = {}
    for dtype, counts in ((dtype, counts) for tally in tallies for dtype, counts in tally.counts.items()):
        merged[dtype] = merged[dtype] + counts if dtype in merged else counts
    return merged


def _select(scope: Scope, tallies: Sequence[_Tally]) -> Threshold:
    if not scope.rank:
        return Threshold(None, 0, scope.count)
    counts = _merged(tallies)
    if "F32" not in counts:
        return threshold.select(counts, scope.rank)
    upper, refined = threshold.upper_bits(counts, scope.rank), threshold.totals(REFINED)
    for tally in tallies:
        refined += tally.refined[upper]
    return threshold.select(counts, scope.rank, refined)


def _shares(targets: list[Target]) -> Iterator[list[_Piece]]:
    """Yield the pieces that a thread counts together: a large one, or many small ones."""
    share: list[_Piece] = []
    size = 0
    for piece in _pieces(targets):
        if share and size + piece.stop - piece.start > SHARE:
            yield share
            share, size = [], 0
        share.append(piece)
        size += piece.stop - piece.start
    yield share


def _pieces(targets: list[Target]) -> Iterator[_Piece]:
    for target in targets:
        for start in range(target.start, target.stop, CHUNK):
            yield _Piece(target, start, min(start + CHUNK, target.stop))
