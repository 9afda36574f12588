"""The results of an evaluation: every score, and the estimates that follow from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from crdiff_export.evaluate import statistics
from crdiff_export.evaluate.comparison import DENSE, Facts, model_name, model_weights
from crdiff_export.evaluate.scorers import Score
from crdiff_export.evaluate.statistics import Estimate
from crdiff_export.models.recipe import Variant
from crdiff_export.prune.criterion_choice import MAGNITUDE
from crdiff_export.prune.plan import Plan
from crdiff_export.sizes import Size

# The part of a score that is 1 for a picture that is right as a whole, and 0 for any other.
RIGHT = "right"


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
        prunes = any(scope.rank for scope in plan.scopes)
        return cls(size, plan, model_weights(weights or (plan.variant.poa_weight,)) if prunes else (DENSE,))

    @property
    def ratios_for(self) -> Size:
        """The size that the ratios are for."""
        return self.plan.size

    @property
    def variant(self) -> Variant:
        """The variant that the pruned model is made by."""
        return self.plan.variant

    @property
    def ratios(self) -> dict[str, float]:
        """The share of each group that the pruned model lacks."""
        return {group: self.plan.ratio(group) for group in self.plan.groups}

    @property
    def is_borrowed(self) -> bool:
        """Whether the variant is a recipe's for another size, taken because there was none for this one."""
        return self.variant.resolution != self.ratios_for

    @property
    def is_native_check(self) -> bool:
        """Whether this shows what the ratios for another size do at the native size."""
        return self.size != self.ratios_for


@dataclass(frozen=True, slots=True)
class ModelScores:
    """The scores of one model at one size, in the order of the pairs, and its first pictures as PNG files.

    `seconds` is the time that drawing took; `fid` is that of all pictures, where one was requested.
    """

    subject: Subject
    weight: float
    scores: tuple[Score, ...]
    images: tuple[bytes, ...]
    seconds: float
    fid: float | None = None

    @property
    def name(self) -> str:
        """What the model is called."""
        return model_name(self.weight)

    @property
    def values(self) -> list[float]:
        """The scores as numbers."""
        return [score.value for score in self.scores]


@dataclass(frozen=True, slots=True)
class Finding:
    """One model at one size: its mean score, the difference to the dense model, and the means of the score's parts.

    `right` is the share of pictures that are right as a whole, where the scorer says so.
    """

    model: ModelScores
    mean: Estimate
    difference: Estimate | None
    right: Estimate | None
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """All scores. `facts` say how they were made, `notes` what is odd about them, `fid` what an FID is taken against.

    `calibration` is the hash of the calibration that the criterion ranked by.
    """

    base: str
    family: str
    native: Size
    pairs: tuple[tuple[str, int], ...]
    pictures: int
    scorer: str
    fingerprint: Mapping[str, str]
    models: tuple[ModelScores, ...]
    facts: Facts
    notes: tuple[str, ...]
    fid: Mapping[str, Any] | None = None
    criterion: str = MAGNITUDE
    calibration: str | None = None

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """One for each model and size, in the order in which they were drawn."""
        return tuple(map(self._finding, self.models))

    def of(self, subject: Subject) -> tuple[Finding, ...]:
        """Return the findings of one subject, the dense model first."""
        return tuple(finding for finding in self.findings if finding.model.subject == subject)

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """Every subject once."""
        return tuple(dict.fromkeys(model.subject for model in self.models))

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt once."""
        return tuple(dict.fromkeys(prompt for prompt, _ in self.pairs))

    def dense(self, subject: Subject) -> ModelScores:
        """Return the dense model of a subject."""
        return next(model for model in self.models if model.subject == subject and model.weight == DENSE)

    def by_prompt(self, values: Sequence[float]) -> list[list[float]]:
        """Return one value for each pair as [prompt][picture]."""
        return [list(values[start : start + self.pictures]) for start in range(0, len(values), self.pictures)]

    def most_different(self, subject: Subject, count: int) -> list[int]:
        """Find the pictures that pruning changes most.

        Args:
            subject: The subject to look at.
            count: How many pictures; fewer if fewer were kept.

        Returns:
            Indices of pairs: those where pruning lowers the score most, then those where it raises the score most.
        """
        others = [model for model in self.models if model.subject == subject and model.weight != DENSE]
        if not others:
            return []
        dense = self.dense(subject).values
        gains = [
            sum(model.values[index] for model in others) / len(others) - dense[index]
            for index in range(len(others[0].images))
        ]
        order = sorted(range(len(gains)), key=gains.__getitem__)
        if len(order) <= count:
            return order
        low = count // 2
        return [*order[:low], *order[len(order) - (count - low) :]]

    def _finding(self, model: ModelScores) -> Finding:
        scores, dense = self.by_prompt(model.values), self.by_prompt(self.dense(model.subject).values)
        difference = None if model.weight == DENSE else statistics.difference(scores, dense)
        grades: dict[str, list[float]] = {}
        for score in model.scores:
            for name, grade in score.parts.items():
                grades.setdefault(name, []).append(grade)
        parts = {name: math.fsum(values) / len(values) for name, values in grades.items()}
        right = grades.get(RIGHT, [])
        is_graded = len(right) == len(model.scores) and all(grade in (0, 1) for grade in right)
        return Finding(model, statistics.mean(scores), difference, self._share(right) if is_graded else None, parts)

    def _share(self, grades: Sequence[float]) -> Estimate:
        """Estimate a share of pictures from grades of 0 and 1."""
        if self.pictures == 1:
            return statistics.share(int(sum(grades)), len(grades))
        return statistics.mean(self.by_prompt(grades))
