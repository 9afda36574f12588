"""The result of a search: its trials, the check of the best one, and what may be said of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from crdiff_export.evaluate.request import Subject
from crdiff_export.evaluate.results import Evaluation, Finding
from crdiff_export.evaluate.statistics import Verdict
from crdiff_export.hub import bases
from crdiff_export.models import recipe_files
from crdiff_export.models.recipe import Recipe, Variant
from crdiff_export.sampling import poa
from crdiff_export.search.prepare import SearchJob
from crdiff_export.search.trials import FinishedTrial


@dataclass(frozen=True)
class SearchResult:
    """All trials, the best of them, and the check of it on held-out pairs, unless the best is the dense model.

    `variant` is what was checked, with its evidence. `files` are those that were written.
    """

    job: SearchJob
    counted: poa.BaseRanking = field(repr=False)
    where: str
    trials: Sequence[FinishedTrial]
    best: FinishedTrial
    dense: FinishedTrial
    evaluation: Evaluation | None = None
    subject: Subject | None = None
    variant: Variant | None = None
    files: tuple[Path, ...] = ()

    @property
    def finding(self) -> Finding | None:
        """The check's finding on the searched model: the pruned one, or POA at the weight of the best trial."""
        if not (self.evaluation and self.subject):
            return None
        weight = self.subject.plan.variant.poa_weight
        return next(finding for finding in self.evaluation.of(self.subject) if finding.model.weight == weight)

    @property
    def verdict(self) -> Verdict | Literal["dense is best", "not checked"]:
        """What may be said of the best trial."""
        if self.best.candidate.dense:
            return "dense is best"
        if not self.finding:
            return "not checked"
        assert self.finding.difference
        return self.finding.difference.verdict

    @property
    def recipe(self) -> Recipe | None:
        """The family's recipe with what was checked as its one variant; None if the dense model is better.

        It names a base on the Hub only if that base was searched.
        """
        if self.variant is None or self.verdict in ("dense is best", "not checked", "worse"):
            return None
        family = self.job.plan.match.family
        recipe = recipe_files.of_family(family, self.job.plan.size)
        recipe = replace(recipe, native=recipe.native or self.job.drawing.native)
        remote = bases.hub_uri(self.job.request.base)
        if remote is None or remote != bases.hub_uri(family.id):
            recipe = replace(recipe, repo=None, file=None)
        name = next((path.name for path in self.job.outputs), "")
        return replace(recipe, variants=(self.variant,), name=name)
