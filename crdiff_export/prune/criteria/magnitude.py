"""Rank by |w| (Han et al. 2015, arXiv 1506.02626), the criterion of the paper. This is pass one over the weights."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, local

from crdiff_export.formats.dtypes import FORMATS, INFINITY, Encoding
from crdiff_export.formats.weight_file import Bytes, FileBytes
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import threshold
from crdiff_export.prune.criteria import nonfinite
from crdiff_export.prune.criteria.decision import Decision
from crdiff_export.prune.kernels import LOWER_BITS, REFINED, Kernel, counters, magnitudes
from crdiff_export.prune.plan import Plan, Scope, Target
from crdiff_export.prune.threshold import Threshold

# Counts weights of a target, in the dtype that will be written.
_Counting = Callable[[Target, memoryview], None]
# Elements read and counted at once.
CHUNK = 2 << 20
# How many such pieces the disk reads ahead: 32 MB of fp16 keep it busy while the processor counts.
AHEAD = 8
_F32 = Encoding("F32")


class RankedMagnitudes:
    """Counts the weights of a checkpoint, and computes the thresholds of any ratios from the counts.

    All targets are counted on the kernel's threads. Counts are integers, so the result does not depend on threads.
    Each kind of layers in a group has its own tally, so that plans with other kinds of targets can use them.

    Args:
        plans: Plans that share their checkpoint and cast. Weights are compared in the dtypes that will be written.
        kernel: Counts magnitudes.
        progress: Told of the bytes read.
        refined: Whether to count at once what the plans' own ratios need of F32 weights, which are then read twice.

    Raises:
        PlanError: Target weights are not finite, and the plans do not allow that.
    """

    def __init__(self, plans: Sequence[Plan], kernel: Kernel, progress: Progress, *, refined: bool = True) -> None:
        self._plan, self._kernel = plans[0], kernel
        self._targets = {t.name: t for plan in plans for t in plan.targets if plan.scopes[t.scope].rank}
        tallies = {_tally(plans[0], t) for t in self._targets.values()}
        # By tally: a histogram for each encoding, and refined ones of F32 for some values of the upper bits.
        self._counts: dict[Hashable, dict[Encoding, threshold.Totals]] = {tally: {} for tally in tallies}
        self._refined: dict[Hashable, dict[int, threshold.Totals]] = {tally: {} for tally in tallies}
        self._widest = max((t.source.itemsize for t in self._targets.values()), default=1)
        self._nonfinite = Counter[str]()
        self._lock = Lock()
        self._own = local()
        self._readers: list[Bytes] = []
        counted = list(self._targets.values())
        wide = [t for t in counted if t.output.dtype == "F32"] if refined else []
        progress.stage("counting", sum(t.nbytes for t in (*counted, *wide)))
        self._pass(counted, self._count, progress)
        if refined:
            nonfinite.refuse(plans, self._nonfinite)
            self._refine(plans, progress)

    def decide(self, plan: Plan, progress: Progress | None = None) -> Decision:
        # F32 weights are read again, unless the same upper bits were refined before.
        nonfinite.refuse([plan], self._nonfinite)
        self._refine([plan], Silent())
        return Decision(tuple(self._threshold(scope, tallies) for scope, tallies in _tallies_of(plan)))

    def _threshold(self, scope: Scope, tallies: Sequence[Hashable]) -> Threshold:
        if not scope.rank:
            return Threshold(None, 0, scope.count)
        counts = _merged([self._counts[tally] for tally in tallies])
        if _F32 not in counts:
            return threshold.select(counts, scope.rank)
        upper = threshold.upper_bits(counts, scope.rank)
        refined = sum((self._refined[tally][upper] for tally in tallies), threshold.totals(REFINED))
        return threshold.select(counts, scope.rank, refined)

    def _refine(self, plans: Sequence[Plan], progress: Progress) -> None:
        """Count the lower bits of the F32 weights near the thresholds, if that was not done before."""
        refined: dict[Hashable, dict[int, threshold.Totals]] = {}
        for scope, tallies in (scope for plan in plans for scope in _tallies_of(plan)):
            counts = _merged([self._counts[tally] for tally in tallies])
            if _F32 in counts:
                upper = threshold.upper_bits(counts, scope.rank)
                for tally in tallies:
                    if upper not in self._refined[tally]:
                        refined.setdefault(tally, {})[upper] = threshold.totals(REFINED)
        wide = [t for t in self._targets.values() if t.output.dtype == "F32" and _tally(self._plan, t) in refined]

        def count(target: Target, weights: memoryview) -> None:
            totals = refined[_tally(self._plan, target)]
            for upper in totals:
                counts = counters(REFINED)
                self._kernel.refine(weights, upper, counts)
                with self._lock:
                    totals[upper] += counts

        self._pass(wide, count, progress)
        for tally, totals in refined.items():  # only when complete: nothing may use half a count
            self._refined[tally] |= totals

    def _pass(self, targets: list[Target], count: _Counting, progress: Progress) -> None:
        """Read targets, and count their weights on the kernel's threads."""
        if not targets:
            return

        pieces = [
            (target, start, min(start + CHUNK, target.stop))
            for target in targets
            for start in range(target.start, target.stop, CHUNK)
        ]

        def count_piece(number: int) -> int:
            if number + AHEAD < len(pieces):
                self._advise(*pieces[number + AHEAD])
            target, start, stop = pieces[number]
            count(target, self._read(target, start, stop))
            return (stop - start) * target.source.itemsize

        try:
            with ThreadPoolExecutor(self._kernel.threads, "crdiff-count") as pool:
                futures = [pool.submit(count_piece, number) for number in range(len(pieces))]
                try:
                    for future in futures:
                        progress.advance(future.result())
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            for reader in self._readers:
                reader.close()
            self._readers, self._own = [], local()

    def _count(self, target: Target, weights: memoryview) -> None:
        form = FORMATS[target.output.dtype]
        counts = counters(magnitudes(form.dtype))
        self._kernel.count(weights, form.dtype, counts)
        first = INFINITY >> LOWER_BITS if form.width == 32 else form.first_nonfinite
        totals = self._counts[_tally(self._plan, target)]
        with self._lock:
            totals.setdefault(target.encoding, threshold.totals(len(counts)))
            totals[target.encoding] += counts
            self._nonfinite[target.name] += int(counts[first:].sum())

    def _reader(self, target: Target) -> Bytes:
        """Return this thread's reader of a target's file."""
        own = self._own
        if not hasattr(own, "buffer"):
            own.buffer, own.readers = self._kernel.buffer(CHUNK * self._widest), {}
        if target.file not in own.readers:
            reader = own.readers[target.file] = self._plan.checkpoint.files[target.file].open()
            with self._lock:
                self._readers.append(reader)
        opened: Bytes = own.readers[target.file]
        return opened

    def _advise(self, target: Target, start: int, stop: int) -> None:
        """Let the system begin to read elements that will be counted soon."""
        reader, source = self._reader(target), target.source
        if isinstance(reader, FileBytes):
            reader.will_need(source.start + start * source.itemsize, (stop - start) * source.itemsize)

    def _read(self, target: Target, start: int, stop: int) -> memoryview:
        """Read elements of a target's tensor into this thread's buffer, in the dtype that will be written."""
        source, output, reader = target.source, target.output, self._reader(target)
        weights: memoryview = self._own.buffer[: (stop - start) * source.itemsize]
        reader.read_into(source.start + start * source.itemsize, weights)
        if source.dtype == output.dtype:
            return weights
        from crdiff_export.prune.kernels.cast import cast

        return memoryview(cast(weights, source.dtype, output.dtype))


def _tally(plan: Plan, target: Target) -> Hashable:
    """Return the key of a target's tally: its name if thresholds are per layer, else its group and kind."""
    return target.name if plan.match.family.scope == "layer" else (target.layer.group, target.layer.kind)


def _tallies_of(plan: Plan) -> list[tuple[Scope, list[Hashable]]]:
    """Return every scope of a plan with the keys of its weights' tallies; a scope of rank 0 has none."""
    names: list[dict[Hashable, None]] = [{} for _ in plan.scopes]
    for target in plan.targets:
        if plan.scopes[target.scope].rank:
            names[target.scope][_tally(plan, target)] = None
    return [(scope, list(keys)) for scope, keys in zip(plan.scopes, names, strict=True)]


def _merged(tallies: "Sequence[Mapping[Encoding, threshold.Totals]]") -> "dict[Encoding, threshold.Totals]":
    """Sum the histograms of several tallies."""
    merged: dict[Encoding, threshold.Totals] = {}
    for encoding, counts in (item for tally in tallies for item in tally.items()):
        merged[encoding] = merged[encoding] + counts if encoding in merged else counts
    return merged
