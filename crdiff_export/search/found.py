"""What a search has come to: while it runs, and in the end."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from crdiff_export.evaluate.results import Evaluation, Finding, Subject
from crdiff_export.evaluate.statistics import Verdict
from crdiff_export.models.recipe import Recipe, Variant
from crdiff_export.sampling import poa
from crdiff_export.search import engine
from crdiff_export.search.board import Finished

if TYPE_CHECKING:
    from crdiff_export.search.engine import Budget, Study
    from crdiff_export.search.tuning import Job


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a search is: trials that are over, of how many, the best and the dense one, and seconds left."""

    where: str
    over: int
    trials: int | None
    best: Finished | None
    dense: Finished | None
    left: float | None
    since: float

    @classmethod
    def of(cls, study: "Study", budget: "Budget", since: float | None = None) -> Self:
        """How far a study is; `since` is when this worker began."""
        began = time.monotonic() if since is None else since
        history = engine.history(study)
        left = engine.time_left(study, budget.trials) if budget.trials else None
        if budget.seconds is not None:
            mine = max(0.0, began + budget.seconds - time.monotonic())
            left = mine if left is None else min(left, mine)
        complete = [one for one in history if one.value is not None]
        best = max(complete, key=lambda one: (one.value, -one.place), default=None)
        dense = next((one for one in complete if one.place == 0), None)
        return cls(study.where, len(history), budget.trials, best, dense, left, began)


@dataclass(frozen=True)
class Found:
    """All trials, the best of them, and the check of it on held-out pairs, where it is not the dense model itself.

    `variant` is what was checked, with its evidence. `files` are those that were written.
    """

    job: "Job"
    counted: poa.Counted = field(repr=False)
    where: str
    trials: Sequence[Finished]
    best: Finished
    dense: Finished
    evaluation: Evaluation | None = None
    subject: Subject | None = None
    variant: Variant | None = None
    files: tuple[Path, ...] = field(default=())

    @property
    def finding(self) -> Finding | None:
        """What the check found of the model that was searched for: the pruned one, or POA at the weight found."""
        if not (self.evaluation and self.subject):
            return None
        weight = self.subject.variant.poa_weight
        return next(one for one in self.evaluation.of(self.subject) if one.model.weight == weight)

    @property
    def verdict(self) -> Verdict | Literal["dense is best", "not checked"]:
        """What may be said of it."""
        if self.best.candidate.dense:
            return "dense is best"
        if not self.finding:
            return "not checked"
        assert self.finding.difference
        return self.finding.difference.verdict

    @property
    def recipe(self) -> Recipe | None:
        """What to write; None where the dense model scored higher, in the search or in the check."""
        if self.variant is None or self.verdict in ("dense is best", "not checked", "worse"):
            return None
        from crdiff_export.search import check

        return check.recipe(self)
