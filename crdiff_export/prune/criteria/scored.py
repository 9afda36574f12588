"""Criteria that score each weight: the smallest scores of every scope, or of every output row, are pruned.

The rule is the reference's (`prune_by_ratio`) with the score in place of |w|: k = int(n * ratio), t = the k-th smallest
score, and weights with a score of at most t are pruned. n and t are those of the scope (`compare=block`, the paper's
way) or of each output row (`compare=row`, the way of Wanda, arXiv 2306.11695, section 3). Weights that are already zero
always count as pruned, so that the zeros of the written file are the mask. Weights that are not finite rank last and
are never pruned.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from crdiff_export.errors import CalibrationError, CriterionError, PlanError, foreign_errors
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune.criteria import Layer, nonfinite, selection
from crdiff_export.prune.criteria.decision import Decision, Mask
from crdiff_export.prune.criteria.reading import Weights, rounded, to_weights
from crdiff_export.prune.criteria.spec import SCORED
from crdiff_export.prune.plan import Plan, Target, open_targets
from crdiff_export.prune.threshold import Threshold

if TYPE_CHECKING:
    from crdiff_export.prune.criterion_choice import CriterionChoice

# Scores of up to this many bytes stay in memory, so that the many decisions of a search read nothing.
KEEP = 256 << 20
# The largest finite score; infinity marks weights that are never pruned.
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class _TargetScores:
    """A target's scores, infinite for weights that are not finite, and the mask of its zeros."""

    scores: Tensor
    zero: Tensor | None


class Scored:
    """Scores a base's weights, and computes the masks of any ratios.

    Up to `keep` bytes of scores (float32) stay in memory. If there are more, only one target at a time is in memory and
    scores are computed anew in every pass: two passes find the threshold of a scope, a third one makes the masks.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        choice: "CriterionChoice",
        progress: Progress,
        device: str = "cpu",
        keep: int = KEEP,
    ) -> None:
        assert choice.criterion
        self._choice, self._criterion = choice, choice.criterion
        self._checkpoint, self._device = plans[0].checkpoint, _device(device)
        counts = {target.name: target.count for plan in plans for target in plan.targets}
        self._keeps = 4 * sum(counts.values()) <= keep and choice.compare != "layer"
        self._kept: dict[str, _TargetScores] = {}
        self._upper: dict[Hashable, Tensor] = {}
        self._nonfinite: dict[str, int] = {}  # of every target that was read
        self._read_new(plans, progress)

    def decide(self, plan: Plan, progress: Progress | None = None) -> Decision:
        """Decide which weights are pruned, for a plan of the same checkpoint and cast with any ratios."""
        progress = progress or Silent()
        self._read_new([plan], progress)
        limits = self._limits(plan, progress)
        wanted = {i: target for i, target in enumerate(plan.targets) if plan.scopes[target.scope].rank}
        reads = not self._keeps or self._choice.moves
        if reads:
            progress.stage("choosing", sum(target.nbytes for target in wanted.values()))
        masks: list[Mask | None] = [None] * len(plan.targets)
        moved: dict[int, NDArray[Any]] = {}
        pruned, broken = Counter[int](), Counter[int]()
        with open_targets(self._checkpoint) as read:
            for i, target in wanted.items():
                mask, weights = self._choose(plan, target, limits.get(target.scope), read)
                masks[i] = mask
                if weights is not None:
                    moved[i] = weights
                pruned[target.scope] += mask.pruned
                broken[target.scope] += self._nonfinite[target.name]
                if reads:
                    progress.advance(target.nbytes)
        thresholds = (Threshold(None, pruned[i], scope.count, broken[i]) for i, scope in enumerate(plan.scopes))
        notes = self._notes([target.layer.diffusers for target in wanted.values()])
        return Decision(tuple(thresholds), tuple(masks), moved, notes)

    def _read_new(self, plans: Sequence[Plan], progress: Progress) -> None:
        """Read, check and score the pruned targets that were not read before."""
        new = {
            target.name: (plan, target)
            for plan in plans
            for target in plan.targets
            if plan.scopes[target.scope].rank and target.name not in self._nonfinite
        }
        if new:
            progress.stage("scoring", sum(target.nbytes for _, target in new.values()))
            with open_targets(self._checkpoint) as read:
                for plan, target in new.values():
                    self._read(plan, target, read(target))
                    progress.advance(target.nbytes)
        nonfinite.refuse(plans, self._nonfinite)

    def _read(self, plan: Plan, target: Target, raw: memoryview) -> None:
        """Read a target for the first time; keep its scores, or count them if its scope has other targets."""
        if self._choice.calibration:
            self._choice.calibration.check_weight(target.layer.diffusers, hashlib.sha256(raw).hexdigest())
        weights = to_weights(target, raw, self._device)
        if self._keeps or self._is_shared(plan):
            scores = self._score(self._layer(plan, target, weights), weights)
            if self._keeps:
                self._kept[target.name] = _TargetScores(scores, weights.zero)
            else:
                tally = target.layer.group, target.layer.kind
                self._upper[tally] = self._upper.get(tally, 0) + selection.count_upper(scores)
        self._nonfinite[target.name] = 0 if weights.broken is None else int(weights.broken.sum())

    def _is_shared(self, plan: Plan) -> bool:
        """Whether weights of several targets are compared with each other."""
        return self._choice.compare == "block" and plan.match.family.scope == "group"

    def _layer(self, plan: Plan, target: Target, weights: Weights) -> Layer:
        statistics: dict[str, Tensor] = {}
        for name in self._criterion.statistics:
            assert self._choice.calibration
            values = self._choice.calibration.read(target.layer.diffusers, name, target.shape)
            # Apple's GPUs have no float64.
            statistics[name] = (values.float() if self._device.type == "mps" else values).to(self._device)
        return Layer(target.layer.diffusers, weights.values, statistics, plan.scopes[target.scope].ratio)

    def _score(self, layer: Layer, weights: Weights) -> Tensor:
        """Score a layer and check the scores; they are infinite for weights that are not finite."""
        spec, calibration = self._choice.spec, self._choice.calibration
        with self._criterion_errors():
            scores = self._criterion.score(replace(layer, ratio=math.nan)).detach().to(self._device, torch.float32)
        if scores.shape != layer.weight.shape:
            raise CalibrationError(
                f"{layer.name}: {spec} gives scores of {list(scores.shape)} for weights of {list(layer.weight.shape)}",
                "Each weight needs one; ask whoever made the criterion.",
            )
        if not selection.finite(scores):
            wrong = scores.numel() - int(torch.isfinite(scores).sum())
            hint = "The numbers in the calibration are too large or make no sense; calibrate again."
            if spec.name not in SCORED:
                again = "Calibrate again, or ask" if calibration else "Ask"
                hint = f"{again} whoever made the criterion: layer.ratio is NaN while it scores."
            raise CalibrationError(
                f"{calibration.path if calibration else spec}: {wrong} scores of {layer.name} are not finite ({spec})",
                hint,
            )
        return scores if weights.broken is None else scores.masked_fill(weights.broken, torch.inf)

    def _limits(self, plan: Plan, progress: Progress) -> Mapping[int, float]:
        """Return the thresholds of scopes whose targets are compared with each other, by index of the scope."""
        members: defaultdict[int, list[Target]] = defaultdict(list)
        for target in plan.targets if self._is_shared(plan) else ():
            if plan.scopes[target.scope].rank:
                members[target.scope].append(target)
        if not self._keeps:
            return self._streamed(plan, members, progress)
        limits: dict[int, float] = {}
        for scope, targets in members.items():
            every = torch.cat([self._kept[target.name].scores.flatten() for target in targets])
            limits[scope] = float(selection.kth(every, plan.scopes[scope].rank))
        return limits

    def _streamed(self, plan: Plan, members: Mapping[int, Sequence[Target]], progress: Progress) -> dict[int, float]:
        """Compute the thresholds from histograms: that of the upper bits exists, the other takes a pass."""
        upper: dict[int, tuple[int, int]] = {}
        limits: dict[int, float] = {}
        for scope, targets in members.items():
            tallies = {(target.layer.group, target.layer.kind) for target in targets}
            counts = torch.stack([self._upper[tally] for tally in tallies]).sum(0)
            k = min(plan.scopes[scope].rank, int(counts.sum()))
            limits[scope] = -torch.inf
            if k:  # otherwise no score is finite
                index, before = selection.locate(counts, k, self._choice.spec)
                upper[scope] = index, k - before
        again = [target for scope in upper for target in members[scope]]
        progress.stage("ranking", sum(target.nbytes for target in again))
        lower = {scope: torch.zeros(selection.SIZE, dtype=torch.int64, device=self._device) for scope in upper}
        with open_targets(self._checkpoint) as read:
            for target in again:
                weights = to_weights(target, read(target), self._device)
                scores = self._score(self._layer(plan, target, weights), weights)
                lower[target.scope] += selection.count_lower(scores, upper[target.scope][0])
                progress.advance(target.nbytes)
        for scope, (index, k) in upper.items():
            limits[scope] = selection.value(index, selection.locate(lower[scope], k, self._choice.spec)[0])
        return limits

    def _choose(
        self, plan: Plan, target: Target, limit: float | None, read: Callable[[Target], memoryview]
    ) -> tuple[Mask, NDArray[Any] | None]:
        """Return a target's mask and, if the criterion moves weights, the bits of all of its weights."""
        ratio, stored, compare = plan.scopes[target.scope].ratio, self._kept.get(target.name), self._choice.compare
        criterion: Any = self._criterion
        if stored and not self._choice.moves:
            return Mask.pack(_mask(stored.scores, stored.zero, limit, ratio, compare).cpu().numpy()), None
        weights = to_weights(target, read(target), self._device)
        layer = self._layer(plan, target, weights)
        if compare == "layer":
            with self._criterion_errors():
                mask, moved = criterion.choose(layer)
        else:
            scores = stored.scores if stored else self._score(layer, weights)
            mask = _mask(scores, weights.zero, limit, ratio, compare)
            if not self._choice.moves:
                return Mask.pack(mask.cpu().numpy()), None
            with self._criterion_errors():
                moved = criterion.compensate(layer, mask)
        return rounded(target, weights, mask, moved, self._choice.spec)

    def _notes(self, layers: Sequence[str]) -> tuple[str, ...]:
        """Return the criterion's notes on these layers, with its name."""
        notes: Any = getattr(self._criterion, "notes", None)
        if not (notes and layers):
            return ()
        with self._criterion_errors():
            return tuple(f"{self._choice.spec.name}: {text}" for text in notes(layers))

    def _criterion_errors(self) -> AbstractContextManager[None]:
        return foreign_errors(CriterionError, str(self._choice.spec), "Report it to the criterion's author.")


def _mask(scores: Tensor, zero: Tensor | None, limit: float | None, ratio: float, compare: str) -> Tensor:
    """Return the mask of a target; `limit` is its scope's threshold, None if the target or its rows have their own."""
    if compare == "row":
        k = int(scores.shape[1] * ratio)
        threshold = selection.kth(scores, k) if k else scores.new_full((len(scores), 1), -torch.inf)
    elif limit is None:
        threshold = selection.kth(scores.flatten(), int(scores.numel() * ratio))
    else:
        threshold = scores.new_full((1,), limit)
    mask = scores <= threshold.clamp(max=_LARGEST)
    return mask if zero is None else mask | zero


def _device(name: str) -> torch.device:
    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise PlanError(
            f"device {name}: {str(error).splitlines()[0]}",
            "Leave --device out to compute the scores on the CPU, where their last bits may differ.",
        ) from error
    return device
