"""The results of an evaluation: every score, and the estimates that follow from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from crdiff_export.evaluate import statistics
from crdiff_export.evaluate.comparison import DENSE, Facts, model_name
from crdiff_export.evaluate.request import EvaluateJob, Subject
from crdiff_export.evaluate.scorers import Score
from crdiff_export.evaluate.statistics import Estimate

# The part of a score that is 1 for a picture that is right as a whole, and 0 for any other.
RIGHT = "right"


@dataclass(frozen=True, slots=True)
class ModelScores:
    """The scores of one model at one size, in the order of the pairs, and its first pictures as PNG files.

    `seconds` is the time that drawing took; `fid` is that of all pictures, where one was requested. `beside` names what
    was drawn in place of a model; its weight is that of the dense model.
    """

    subject: Subject
    weight: float
    scores: tuple[Score, ...]
    images: tuple[bytes, ...]
    seconds: float
    fid: float | None = None
    beside: str = ""

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.beside or model_name(self.weight)

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense model itself."""
        return self.weight == DENSE and not self.beside

    @property
    def is_pruned(self) -> bool:
        """Whether it is the pruned model or POA."""
        return self.weight != DENSE

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

    `scorer` is the public name of the scorer, `fingerprint` what its scores depend on.
    """

    job: EvaluateJob
    scorer: str
    fingerprint: Mapping[str, str]
    models: tuple[ModelScores, ...]
    facts: Facts
    notes: tuple[str, ...]
    fid: Mapping[str, Any] | None = None

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
        return tuple(dict.fromkeys(prompt for prompt, _ in self.job.pairs))

    def dense(self, subject: Subject) -> ModelScores:
        """Return the dense model of a subject."""
        return next(model for model in self.models if model.subject == subject and model.is_dense)

    def against(self, subject: Subject) -> list[tuple[str, str, Estimate]]:
        """Compare every pruned model of a subject with everything that was drawn beside it.

        Args:
            subject: The subject.

        Returns:
            The name of a pruned model, that of a rival, and the mean difference of their scores, picture by picture.
        """
        models = [model for model in self.models if model.subject == subject]
        return [
            (ours.name, rival.name, statistics.difference(self.by_prompt(ours.values), self.by_prompt(rival.values)))
            for rival in models
            if rival.beside
            for ours in models
            if ours.is_pruned
        ]

    def by_prompt(self, values: Sequence[float]) -> list[list[float]]:
        """Return one value for each pair as [prompt][picture]."""
        pictures = self.job.request.pictures
        return [list(values[start : start + pictures]) for start in range(0, len(values), pictures)]

    def most_different(self, subject: Subject, count: int) -> list[int]:
        """Find the pictures that pruning changes most.

        Args:
            subject: The subject to look at.
            count: How many pictures; fewer if fewer were kept.

        Returns:
            Indices of pairs: those where pruning lowers the score most, then those where it raises the score most.
        """
        others = [model for model in self.models if model.subject == subject and model.is_pruned]
        if not others:
            return []
        dense = self.dense(subject).values
        gains = [
            sum(model.values[index] for model in others) / len(others) - dense[index]
            for index in range(len(others[0].images))
        ]
        order = sorted(range(len(gains)), key=gains.__getitem__)
        low = count // 2
        return [*order[:low], *order[max(low, len(order) - (count - low)) :]]

    def _finding(self, model: ModelScores) -> Finding:
        scores, dense = self.by_prompt(model.values), self.by_prompt(self.dense(model.subject).values)
        difference = None if model.is_dense else statistics.difference(scores, dense)
        grades: dict[str, list[float]] = {}
        for score in model.scores:
            for name, grade in score.parts.items():
                grades.setdefault(name, []).append(grade)
        parts = {name: math.fsum(values) / len(values) for name, values in grades.items()}
        right = grades.get(RIGHT, [])
        is_graded = len(right) == len(model.scores) and all(grade in (0, 1) for grade in right)
        share = statistics.share(self.by_prompt(right)) if is_graded else None
        return Finding(model, statistics.mean(scores), difference, share, parts)
