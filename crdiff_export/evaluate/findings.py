"""What an evaluation found: every score, and what may be said about them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from crdiff_export.evaluate import statistics
from crdiff_export.evaluate.scorers import Score
from crdiff_export.evaluate.statistics import Estimate
from crdiff_export.models.recipe import Variant
from crdiff_export.prune.criterion_choice import MAGNITUDE
from crdiff_export.prune.plan import Plan
from crdiff_export.sizes import Size

DENSE, PRUNED = 0.0, 1.0
# A part that is 1 for a picture that is right as a whole, and 0 for any other.
RIGHT = "right"


@dataclass(frozen=True, slots=True)
class Subject:
    """A size to draw at, and the variant whose pruned model is drawn, which may be for another size.

    `drawn` are the POA weights of its models, with 0 for the dense and 1 for the pruned one; a variant that prunes
    nothing has the dense one alone.
    """

    size: Size
    of: Size
    variant: Variant = field(hash=False)
    ratios: tuple[tuple[str, float], ...]
    drawn: tuple[float, ...]
    kinds: tuple[str, ...]
    plan: Plan = field(hash=False, compare=False, repr=False)

    @classmethod
    def of_plan(cls, size: Size, planned: Plan, weights: Sequence[float]) -> Self:
        """A plan's variant at a size, with POA of each weight, or of its own if there are none."""
        ratios = tuple((group, planned.ratio(group)) for group in planned.groups)
        prunes = any(scope.rank for scope in planned.scopes)
        others = dict.fromkeys((PRUNED, *map(float, weights or (planned.variant.poa_weight,)))) if prunes else ()
        drawn = (DENSE, *(weight for weight in others if weight != DENSE))
        return cls(size, planned.size, planned.variant, ratios, drawn, planned.kinds, planned)

    @property
    def borrowed(self) -> bool:
        """Whether the variant is a recipe's for another size, taken because there was none for this one."""
        return self.variant.resolution != self.of

    @property
    def is_look(self) -> bool:
        """Whether this is a look at what another size's ratios do here."""
        return self.size != self.of


@dataclass(frozen=True, slots=True)
class Drawn:
    """Scores of every pair by one model at one size, in the order of the pairs, and the first pictures as PNG files.

    `seconds` is the time that drawing took; `black` pictures have no light in them. `fid` is of all pictures.
    """

    subject: Subject
    weight: float
    scores: tuple[Score, ...]
    images: tuple[bytes, ...]
    seconds: float
    black: int = 0
    fid: float | None = None

    @property
    def name(self) -> str:
        """What the model is called."""
        return {DENSE: "dense", PRUNED: "pruned"}.get(self.weight, f"POA {self.weight:g}")


@dataclass(frozen=True, slots=True)
class Finding:
    """One model at one size: its mean score, the difference to the dense model, and the means of the score's parts."""

    drawn: Drawn
    mean: Estimate
    difference: Estimate | None
    right: Estimate | None
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Everything that was drawn. `facts` say how, `notes` what is odd about it, `fid` what an FID is against.

    `calibration` is the hash of the one that the criterion ranked by.
    """

    base: str
    family: str
    native: Size
    pairs: tuple[tuple[str, int], ...]
    pictures: int
    scorer: str
    fingerprint: Mapping[str, str]
    drawn: tuple[Drawn, ...]
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    fid: Mapping[str, Any] | None = None
    criterion: str = MAGNITUDE
    calibration: str | None = None

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """One for each model and size, in the order in which they were drawn."""
        return tuple(self._finding(one) for one in self.drawn)

    def of(self, subject: Subject) -> tuple[Finding, ...]:
        """Those of one subject, the dense model first."""
        return tuple(finding for finding in self.findings if finding.drawn.subject == subject)

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """Every subject once."""
        return tuple(dict.fromkeys(one.subject for one in self.drawn))

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt once."""
        return tuple(dict.fromkeys(prompt for prompt, _ in self.pairs))

    def dense(self, subject: Subject) -> Drawn:
        """The dense model's pictures of a subject."""
        return next(one for one in self.drawn if one.subject == subject and one.weight == DENSE)

    def grid(self, drawn: Drawn) -> list[list[float]]:
        """Scores as [prompt][picture]."""
        values = [score.value for score in drawn.scores]
        return [values[start : start + self.pictures] for start in range(0, len(values), self.pictures)]

    def most_different(self, subject: Subject, count: int) -> Iterator[int]:
        """Places of kept pictures where a subject's models differ most in score, the worst and the best for pruning."""
        others = [one for one in self.drawn if one.subject == subject and one.weight != DENSE]
        if not others:
            return
        dense = self.dense(subject).scores
        kept = len(others[0].images)
        gain = [sum(o.scores[i].value for o in others) / len(others) - dense[i].value for i in range(kept)]
        order = sorted(range(len(gain)), key=lambda place: (gain[place], place))
        ends = [*order[: count // 2], *order[len(order) - (count - count // 2) :]]
        yield from dict.fromkeys(ends if len(order) > count else order)

    def _finding(self, drawn: Drawn) -> Finding:
        grid = self.grid(drawn)
        change = None if drawn.weight == DENSE else statistics.difference(grid, self.grid(self.dense(drawn.subject)))
        names = dict.fromkeys(part for score in drawn.scores for part in score.parts)
        parts = {
            name: math.fsum(values) / len(values)
            for name in names
            if (values := [score.parts[name] for score in drawn.scores if name in score.parts])
        }
        return Finding(drawn, statistics.mean(grid), change, self._right(drawn), parts)

    def _right(self, drawn: Drawn) -> Estimate | None:
        """The share of right pictures, where the scorer says of each whether it is."""
        hits = [score.parts.get(RIGHT) for score in drawn.scores]
        if not all(hit in (0, 1) for hit in hits):
            return None
        if self.pictures == 1:
            return statistics.share(sum(hit == 1 for hit in hits), len(hits))
        ones = [float(hit == 1) for hit in hits]
        return statistics.mean([ones[start : start + self.pictures] for start in range(0, len(ones), self.pictures)])
