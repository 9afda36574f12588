"""What is searched, from what was asked for: the box, where to begin, the method, and when to stop."""

from typing import TYPE_CHECKING, Final

from crdiff_export.errors import OptionError
from crdiff_export.prune.criteria.spec import Spec
from crdiff_export.prune.criterion_choice import UNIFORM
from crdiff_export.prune.plan import Plan
from crdiff_export.search import engine
from crdiff_export.search.anneal import SEED
from crdiff_export.search.engine import Candidate, Method, Space
from crdiff_export.search.space import HIGH, LOW

if TYPE_CHECKING:
    from crdiff_export.search.engine import Budget, Setup
    from crdiff_export.search.tuning import SearchRequest

TRIALS: Final = 60  # ours
# PARAM_RANGES of the public code's BWP_strategy.py; and all trials that it can take: start, 120, 2 restarts; and dense.
PAPER_BOX: Final = (0.1, 0.8)
PAPER_TRIALS: Final = 124
# Ours, around the public code's 1.5: 1 is the pruned model alone.
WEIGHTS: Final = (1.0, 2.5)

__all__ = ["SEED", "budget", "setup"]


def budget(request: "SearchRequest") -> "Budget":
    """Trials, hours, or both; without either a number of trials."""
    trials = request.trials
    if trials is None and request.hours is None:
        trials = PAPER_TRIALS if request.paper else TRIALS
    return engine.Budget(trials, None if request.hours is None else request.hours * 3600)


def setup(request: "SearchRequest", planned: Plan, pairs: int, scorer: str) -> "tuple[Setup, tuple[str, ...]]":
    """The search, begun at the plan's variant, and what should be known about it."""
    if request.paper and (
        request.method not in (None, "anneal") or request.low is not None or request.high is not None
    ):
        raise OptionError("--paper has its own method and range", "Leave out --method, --low and --high, or --paper.")
    if Spec.parse(request.criterion).name == UNIFORM:
        hint = "Leave --criterion out, and compare with it in `crdiff evaluate`, or search one of the others."
        raise OptionError("a search finds a ratio for each group, uniform has one for all", hint)
    low, high = PAPER_BOX if request.paper else (LOW, HIGH)
    if request.low is not None:
        low = request.low
    if request.high is not None:
        high = request.high
    weights = request.poa_range or (WEIGHTS if request.poa else None)
    if weights and weights[0] <= 0:
        raise OptionError("a POA weight of 0 is the dense model", "Begin the --poa-range above 0, as in 1 2.5.")
    space = Space(planned.groups, low, high, weights)
    method = Method(
        request.method or ("anneal" if request.paper else "tpe"), seed=request.seed, pruning=request.early_stop
    )
    variant = planned.variant
    ratios = {group: planned.ratio(group) for group in planned.groups}
    point = space.point(Candidate.of(ratios, variant.poa_weight if weights else None))
    start = space.candidate(space.clip(point))
    notes = []
    if space.point(start) != point:
        notes.append("the recipe's variant lies outside what is searched; trial 1 is the nearest point within")
    if not weights:
        notes.append("the pruned model alone is searched, so the recipe will say POA weight 1: no other was tried")
    if method.name == "anneal" and scorer != "image-reward":
        unlock = method.constants.unlock
        notes.append(f"the annealing reheats once a score passes {unlock:g}, a number in ImageReward's units")
    return engine.Setup(space, start, pairs, method), tuple(notes)
