"""The setup of a search: the box, the point to begin at, the method, and when to stop."""

from dataclasses import asdict, dataclass
from typing import Final

from crdiff_export.prune.plan import Plan
from crdiff_export.search.methods import SearchMethod
from crdiff_export.search.request import SearchRequest
from crdiff_export.search.space import HIGH, LOW, Candidate, Point, RatioSpace

TRIALS: Final = 60  # ours
# PARAM_RANGES of the public code's BWP_strategy.py; and all trials that it can take: start, 120, 2 restarts; and dense.
PAPER_BOX: Final = (0.1, 0.8)
PAPER_TRIALS: Final = 124
# Ours, around the public code's 1.5: 1 is the pruned model alone.
POA_WEIGHTS: Final = (1.0, 2.5)


@dataclass(frozen=True, slots=True)
class SearchBudget:
    """When to stop: after so many trials of all workers, retries not counted, or after so many seconds of this one.

    A worker finishes the trial that it is at. Workers that begin the last trial at the same moment may do one each.
    """

    trials: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class SearchSetup:
    """What is searched: the box, the candidate to begin at, how many pairs judge a candidate, and the method."""

    space: RatioSpace
    start: Candidate
    pairs: int
    method: SearchMethod

    @property
    def start_point(self) -> Point:
        """Where the search begins, after the dense model."""
        return self.space.point(self.start)

    def settings(self) -> dict[str, str]:
        """Return what has to agree between all who work on a search, under names for error messages."""
        method, space = self.method, self.space
        start = zip(space.names, self.start_point, strict=True)
        settings = {
            "groups": ", ".join(space.groups),
            "ratios": f"{space.low!r} to {space.high!r}",
            "POA weights": "{!r} to {!r}".format(*space.poa_weights) if space.poa_weights else "none",
            "start": ", ".join(f"{name} {at!r}" for name, at in start),
            "pairs": str(self.pairs),
            "method": method.name,
            "search seed": str(method.seed),
            "pruning": "yes" if method.stops_early else "no",
        }
        if method.name == "anneal":
            constants = asdict(method.constants).items()
            settings["annealing"] = ", ".join(f"{name} {value!r}" for name, value in constants)
        return settings


def choose_budget(request: SearchRequest) -> SearchBudget:
    """Take trials, hours or both from a request; the usual number of trials where it has neither."""
    trials = request.trials
    if trials is None and request.hours is None:
        trials = PAPER_TRIALS if request.paper else TRIALS
    return SearchBudget(trials, None if request.hours is None else request.hours * 3600)


def choose_setup(request: SearchRequest, plan: Plan, pairs: int, scorer: str) -> tuple[SearchSetup, tuple[str, ...]]:
    """Set up a search that begins at the plan's variant.

    Args:
        request: The request of the search.
        plan: The plan of the recipe's variant.
        pairs: The number of pairs of prompt and seed that judge a candidate.
        scorer: The scorer's name.

    Returns:
        The setup, and notes on it for people.
    """
    low, high = PAPER_BOX if request.paper else (LOW, HIGH)
    poa_weights = request.poa_range or (POA_WEIGHTS if request.poa else None)
    space = RatioSpace(
        plan.groups,
        low if request.low is None else request.low,
        high if request.high is None else request.high,
        poa_weights,
    )
    method = SearchMethod(
        request.method or ("anneal" if request.paper else "tpe"), request.seed, early_stop=request.early_stop
    )
    ratios = {group: plan.ratio(group) for group in plan.groups}
    point = space.point(Candidate.of(ratios, plan.variant.poa_weight if poa_weights else None))
    start = space.candidate(space.clip(point))
    notes = []
    if space.point(start) != point:
        notes.append("the recipe's variant lies outside what is searched; trial 1 is the nearest point within")
    if not poa_weights:
        notes.append("the pruned model alone is searched, so the recipe will say POA weight 1: no other was tried")
    if method.name == "anneal" and scorer != "image-reward":
        unlock = method.constants.unlock
        notes.append(f"the annealing reheats once a score passes {unlock:g}, a number in ImageReward's units")
    return SearchSetup(space, start, pairs, method), tuple(notes)
