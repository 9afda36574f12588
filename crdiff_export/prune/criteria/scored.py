"""Criteria that score each weight: the smallest scores of every scope, or of every output row, are pruned.

The rule is the reference's (`prune_by_ratio`) with the score in place of |w|: k = int(n * ratio), t = the k-th smallest
score, and weights with a score of at most t are pruned. n and t are those of the scope (`compare=block`, the paper's
way) or of each output row (`compare=row`, the way of Wanda, arXiv 2306.11695, section 3). Weights that are already zero
always count as pruned, so that the zeros of the written file are the mask. Weights that are not finite rank last and
are never pruned.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from crdiff_export.errors import CalibrationError, PlanError
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import layer_names
from crdiff_export.prune.criteria import Layer, Loaded, nonfinite, selection
from crdiff_export.prune.criteria.calibration import Calibration
from crdiff_export.prune.criteria.decision import Decision, Mask
from crdiff_export.prune.criteria.reading import Reader, Weights, digest, open_reader, rounded
from crdiff_export.prune.criteria.spec import SCORED
from crdiff_export.prune.plan import Plan, Target
from crdiff_export.prune.threshold import Threshold

# Scores of up to this many bytes stay in memory, so that the many decisions of a search read nothing.
KEEP = 256 << 20
# The largest finite score; infinity marks weights that are never pruned.
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class _TargetScores:
    """A target's scores, infinite for weights that are not finite, and the mask of its zeros."""

    scores: Tensor
    zero: Tensor | None


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The decision about one target."""

    mask: Mask
    pruned: int
    moved: NDArray[Any] | None = None


class Scored:
    """Scores a base's weights, and computes the masks of any ratios.

    Up to `keep` bytes of scores (float32) stay in memory. If there are more, only one target at a time is in memory and
    scores are computed anew in every pass: two passes find the threshold of a scope, a third one makes the masks.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        loaded: Loaded,
        progress: Progress,
        calibration: Calibration | None = None,
        device: str = "cpu",
        keep: int = KEEP,
    ) -> None:
        assert loaded.criterion
        self._loaded, self._criterion = loaded, loaded.criterion
        self._calibration = calibration if self._criterion.statistics else None
        self._files, self._device = plans[0].checkpoint.files, _device(device)
        targets = {target.name: target.count for plan in plans for target in plan.targets}
        self._keeps = 4 * sum(targets.values()) <= keep and loaded.compare != "layer"
        self._kept: dict[str, _TargetScores] = {}
        self._upper: dict[Hashable, Tensor] = {}
        self._known: set[str] = set()
        self._nonfinite: dict[str, int] = {}
        self._see(plans, progress)

    def decide(self, plan: Plan, progress: Progress | None = None) -> Decision:
        """Decide which weights are pruned, for a plan of the same checkpoint and cast with any ratios."""
        progress = progress or Silent()
        self._see([plan], progress)
        names = _names(plan)
        limits = self._limits(plan, names, progress)
        asked = [(number, target) for number, target in enumerate(plan.targets) if plan.scopes[target.scope].rank]
        reads = not self._keeps or self._loaded.moves
        if reads:
            progress.stage("choosing", sum(_size(target) for _, target in asked))
        chosen: dict[int, _Chosen] = {}
        with open_reader(self._files, self._device) as reader:
            for number, target in asked:
                chosen[number] = self._choose(plan, target, names[number], limits.get(target.scope), reader)
                if reads:
                    progress.advance(_size(target))
        masks = tuple(chosen[number].mask if number in chosen else None for number in range(len(plan.targets)))
        moved = {number: one.moved for number, one in chosen.items() if one.moved is not None}
        notes = self._notes([names[number] for number, _ in asked])
        return Decision(self._counts(plan, chosen), masks, moved, notes)

    def _see(self, plans: Sequence[Plan], progress: Progress) -> None:
        """Read, check and score the pruned targets that were not read before."""
        new = {t.name: (plan, i) for plan in plans for i, t in enumerate(plan.targets) if self._is_new(plan, t)}
        if new:
            if self._calibration:
                for plan in plans:
                    self._calibration.check(plan, self._criterion.statistics)
            progress.stage("scoring", sum(_size(p.targets[i]) for p, i in new.values()))
            names = {id(plan): _names(plan) for plan in plans}
            with open_reader(self._files, self._device) as reader:
                for plan, number in new.values():
                    target = plan.targets[number]
                    self._look(plan, target, names[id(plan)][number], reader)
                    progress.advance(_size(target))
        nonfinite.refuse(plans, self._nonfinite)

    def _is_new(self, plan: Plan, target: Target) -> bool:
        return plan.scopes[target.scope].rank > 0 and target.name not in self._known

    def _look(self, plan: Plan, target: Target, name: str, reader: Reader) -> None:
        raw = reader.raw(target)
        if self._calibration:
            self._calibration.check_weight(name, digest(raw))
        weights = reader.weights(target, raw)
        if weights.broken is not None:
            self._nonfinite[target.name] = int(weights.broken.sum())
        if self._keeps or self._is_shared(plan):
            scores = self._score(self._layer(plan, target, name, weights), weights)
            if self._keeps:
                self._kept[target.name] = _TargetScores(scores, weights.zero)
            else:
                counts = selection.count_upper(scores)
                tally = (target.group, target.kind)
                self._upper[tally] = self._upper[tally] + counts if tally in self._upper else counts
        self._known.add(target.name)

    def _is_shared(self, plan: Plan) -> bool:
        """Whether weights of several targets are compared with each other."""
        return self._loaded.compare == "block" and plan.match.family.scope == "group"

    def _layer(self, plan: Plan, target: Target, name: str, weights: Weights) -> Layer:
        shape = (weights.values.shape[0], weights.values.shape[1])
        statistics: dict[str, Tensor] = {}
        for statistic in self._criterion.statistics:
            assert self._calibration
            found = self._calibration.read(name, statistic, shape)
            # Apple's GPUs have no float64.
            statistics[statistic] = (found.float() if self._device.type == "mps" else found).to(self._device)
        return Layer(name, weights.values, statistics, plan.scopes[target.scope].ratio)

    def _score(self, layer: Layer, weights: Weights) -> Tensor:
        """Score a layer and check the scores; they are infinite for weights that are not finite."""
        scores = self._criterion.score(replace(layer, ratio=math.nan)).detach().to(self._device, torch.float32)
        if scores.shape != layer.weight.shape:
            raise CalibrationError(
                f"{layer.name}: {self._loaded.spec} gives scores of {list(scores.shape)} for weights of "
                f"{list(layer.weight.shape)}",
                "Each weight needs one; ask whoever made the criterion.",
            )
        if not selection.finite(scores):
            wrong = scores.numel() - int(torch.isfinite(scores).sum())
            where = self._calibration.path if self._calibration else self._loaded.spec
            hint = "The numbers in the calibration are too large or make no sense; calibrate again."
            if self._loaded.spec.name not in SCORED:
                again = "Calibrate again, or ask" if self._calibration else "Ask"
                hint = f"{again} whoever made the criterion: layer.ratio is NaN while it scores."
            raise CalibrationError(
                f"{where}: {wrong} scores of {layer.name} are not finite ({self._loaded.spec})", hint
            )
        return scores if weights.broken is None else scores.masked_fill(weights.broken, torch.inf)

    def _limits(self, plan: Plan, names: Sequence[str], progress: Progress) -> Mapping[int, float]:
        """Return the thresholds of scopes whose targets are compared with each other, by index of the scope."""
        pruned = [number for number, scope in enumerate(plan.scopes) if scope.rank] if self._is_shared(plan) else []
        members = {scope: [i for i, t in enumerate(plan.targets) if t.scope == scope] for scope in pruned}
        if not self._keeps:
            return self._streamed(plan, names, members, progress)
        limits: dict[int, float] = {}
        for scope, numbers in members.items():
            every = torch.cat([self._kept[plan.targets[i].name].scores.flatten() for i in numbers])
            limits[scope] = float(selection.kth(every, plan.scopes[scope].rank))
        return limits

    def _streamed(
        self, plan: Plan, names: Sequence[str], members: Mapping[int, Sequence[int]], progress: Progress
    ) -> dict[int, float]:
        """Compute the thresholds from histograms: that of the upper bits exists, the other takes a pass."""
        upper: dict[int, tuple[int, int]] = {}
        limits: dict[int, float] = {}
        for scope, numbers in members.items():
            tallies = {(plan.targets[i].group, plan.targets[i].kind) for i in numbers}
            counts = torch.stack([self._upper[tally] for tally in tallies]).sum(0)
            k = min(plan.scopes[scope].rank, int(counts.sum()))
            limits[scope] = -torch.inf
            if k:  # otherwise no score is finite
                index, before = selection.locate(counts, k, self._loaded.spec)
                upper[scope] = index, k - before
        looks = [(scope, i) for scope in upper for i in members[scope]]
        progress.stage("ranking", sum(_size(plan.targets[i]) for _, i in looks))
        lower = {scope: torch.zeros(selection.SIZE, dtype=torch.int64, device=self._device) for scope in upper}
        with open_reader(self._files, self._device) as reader:
            for scope, i in looks:
                target = plan.targets[i]
                weights = reader.weights(target, reader.raw(target))
                scores = self._score(self._layer(plan, target, names[i], weights), weights)
                lower[scope] += selection.count_lower(scores, upper[scope][0])
                progress.advance(_size(target))
        for scope, (index, k) in upper.items():
            limits[scope] = selection.value(index, selection.locate(lower[scope], k, self._loaded.spec)[0])
        return limits

    def _choose(self, plan: Plan, target: Target, name: str, limit: float | None, reader: Reader) -> _Chosen:
        ratio, kept = plan.scopes[target.scope].ratio, self._kept.get(target.name)
        compensate: Any = getattr(self._criterion, "compensate", None)
        choose: Any = getattr(self._criterion, "choose", None)
        if kept and not compensate:
            return _counted(Mask.pack(_mask(kept.scores, kept.zero, limit, ratio, self._loaded.compare).cpu().numpy()))
        weights = reader.weights(target, reader.raw(target))
        layer = self._layer(plan, target, name, weights)
        if self._loaded.compare == "layer":
            mask, moved = choose(layer)
            return _counted(*rounded(target, name, weights, mask, moved, self._loaded.spec))
        scores = kept.scores if kept else self._score(layer, weights)
        mask = _mask(scores, weights.zero, limit, ratio, self._loaded.compare)
        if not compensate:
            return _counted(Mask.pack(mask.cpu().numpy()))
        return _counted(*rounded(target, name, weights, mask, compensate(layer, mask), self._loaded.spec))

    def _notes(self, layers: Sequence[str]) -> tuple[str, ...]:
        """Return the criterion's notes on these layers, with its name."""
        told: Any = getattr(self._criterion, "notes", None)
        return tuple(f"{self._loaded.spec.name}: {text}" for text in told(layers)) if told and layers else ()

    def _counts(self, plan: Plan, chosen: Mapping[int, _Chosen]) -> tuple[Threshold, ...]:
        pruned, broken = [0] * len(plan.scopes), [0] * len(plan.scopes)
        for number, one in chosen.items():
            target = plan.targets[number]
            pruned[target.scope] += one.pruned
            broken[target.scope] += self._nonfinite.get(target.name, 0)
        return tuple(
            Threshold(None, gone, scope.count, odd)
            for scope, gone, odd in zip(plan.scopes, pruned, broken, strict=True)
        )


def _mask(scores: Tensor, zero: Tensor | None, limit: float | None, ratio: float, compare: str) -> Tensor:
    """Return the mask of a target; `limit` is its scope's threshold, None if the target or its rows have their own."""
    if compare == "row":
        k = int(scores.shape[1] * ratio)
        found = selection.kth(scores, k) if k else scores.new_full((len(scores), 1), -torch.inf)
    elif limit is None:
        found = selection.kth(scores.flatten(), int(scores.numel() * ratio))
    else:
        found = scores.new_full((1,), limit)
    mask = scores <= found.clamp(max=_LARGEST)
    return mask if zero is None else mask | zero


def _counted(mask: Mask, moved: NDArray[Any] | None = None) -> _Chosen:
    return _Chosen(mask, mask.pruned, moved)


def _size(target: Target) -> int:
    """Return the bytes of a target in the base."""
    return target.count * target.source.itemsize


def _names(plan: Plan) -> list[str]:
    """Return the diffusers names of the targets."""
    names = layer_names.by_key(plan)
    return [names[layer_names.key(plan, target)][1] for target in plan.targets]


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
