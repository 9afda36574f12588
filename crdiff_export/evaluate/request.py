"""What to evaluate, and everything that is decided before a weight is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from crdiff_export.evaluate.beside import Rival, RivalSizes
from crdiff_export.evaluate.comparison import DENSE, PRUNED, ComparisonRequest, Pair
from crdiff_export.evaluate.fid import FidReference
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan
from crdiff_export.sampling.drawing_setup import DrawingSetup
from crdiff_export.sizes import Size


@dataclass(frozen=True, slots=True)
class EvaluateRequest(ComparisonRequest):
    """Which base to evaluate, at which sizes, by which scorer, on which prompts.

    Each prompt is drawn `pictures` times, and no two pictures have the same noise: the seeds count up from `seed`.
    With `native` the pruned models are also drawn at the native size, where they may do harm. `fid` is a folder of
    pictures, or "dense", to take an FID against; `fid_weights` is the file of the network for it.
    """

    sizes: tuple[Size, ...]
    scorer: str | None = None
    limit: int | None = None
    pictures: int = 1
    seed: int = 0
    native: bool = True
    batch: int | None = None
    scorer_device: str | None = None
    fid: str | None = None
    fid_weights: Path | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A size to draw at, and the plan of the pruned model that is drawn, which may be for another size.

    `weights` are the POA weights of its models. A plan that prunes nothing has the dense model alone.
    """

    size: Size
    plan: Plan
    weights: tuple[float, ...]

    @classmethod
    def of_plan(cls, size: Size, plan: Plan, weights: Sequence[float]) -> Self:
        """Make the subject of a plan at a size.

        Args:
            size: The size to draw at.
            plan: The plan of the pruned model.
            weights: POA weights to draw with; without any, the variant's own.

        Returns:
            The subject.
        """
        if not any(scope.rank for scope in plan.scopes):
            return cls(size, plan, (DENSE,))
        every = (DENSE, PRUNED, *map(float, weights or (plan.variant.poa_weight,)))
        return cls(size, plan, tuple(dict.fromkeys(every)))

    @property
    def ratios(self) -> dict[str, float]:
        """The share of each group that the pruned model lacks."""
        return {group: self.plan.ratio(group) for group in self.plan.groups}

    @property
    def is_native_check(self) -> bool:
        """Whether this shows what the ratios for another size do at the native size."""
        return self.size != self.plan.size


@dataclass(frozen=True, slots=True)
class EvaluateJob:
    """A request that has been checked and planned. `pairs` are the prompts and the seeds of their noise."""

    request: EvaluateRequest
    drawing: DrawingSetup
    plan: Plan
    criterion: CriterionChoice
    subjects: tuple[Subject, ...]
    pairs: tuple[Pair, ...]
    batch: int
    scorer: str
    scorer_device: str
    outputs: tuple[Path, ...]
    notes: tuple[str, ...]
    fid: FidReference | None = None
    rivals: tuple[Rival, ...] = ()

    @property
    def pictures(self) -> int:
        """How many pictures will be drawn; those of the dense model at a size are drawn once."""
        sizes = {subject.size for subject in self.subjects}
        models = len(sizes) + sum(len(subject.weights) - 1 + len(self.rivals_of(subject)) for subject in self.subjects)
        return len(self.pairs) * models + len(self.reference_pairs)

    def rivals_of(self, subject: Subject) -> tuple[Rival, ...]:
        """Return what is drawn beside the models of a subject; nothing beside a check of the native size."""
        return () if subject.is_native_check else self.rivals

    def setting(self, subject: Subject) -> RivalSizes:
        """Return what rivals have to know at a subject's size."""
        return RivalSizes(self.drawing.native, subject.size, self.plan.match.family.grid)

    @property
    def reference_pairs(self) -> tuple[Pair, ...]:
        """The same prompts with noise that no other picture has, for an FID against the dense model.

        From the same noise a model at the native size would be near the reference for that reason alone, and the dense
        model at 0. From other noise, the dense model's own FID is what chance does to sets of this many pictures.
        """
        if not (self.fid and self.fid.is_drawn):
            return ()
        return tuple((prompt, seed + len(self.pairs)) for prompt, seed in self.pairs)
