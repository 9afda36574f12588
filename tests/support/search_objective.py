"""A search to test with: a smooth hill, a noise of its own for each pair, and a worker's command line.

    python search_objective.py STORAGE METHOD TRIALS DELAY [LEASE]

works on the search and prints one JSON object for each event.
"""

import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from crdiff_export.errors import CrdiffError, PreviewError
from crdiff_export.search.engine import (
    Budget,
    Candidate,
    Event,
    Finished,
    Method,
    Setup,
    Space,
    history,
    open_study,
    run,
)

NAME = "tiny"
PRINTS = {"base": "0123", "steps": "20", "size": "64x64"}
START = Candidate.of({"down": 0.3, "mid": 0.3, "up": 0.3})
SPACE = Space(("down", "mid", "up"))


@dataclass
class Hill:
    """The higher the nearer to 0.45; `fail` names calls of `scores` that raise, `stop` one that is interrupted."""

    pairs: int = 8
    batch: int = 4
    delay: float = 0.0
    fail: Sequence[int] = ()
    stop: int = -1
    calls: int = 0

    def scores(self, candidate: Candidate, pairs: Sequence[int]) -> list[float]:
        self.calls += 1
        if self.calls - 1 == self.stop:
            raise KeyboardInterrupt
        if self.calls - 1 in self.fail:
            raise PreviewError("the machine is too small", "Take a larger one.")
        time.sleep(self.delay)
        weight = 0.0 if candidate.poa_weight is None else (candidate.poa_weight - 1.4) ** 2
        height = -4 * sum((ratio - 0.45) ** 2 for _, ratio in candidate.ratios) - weight
        return [height + random.Random(f"{pair}").gauss(0, 1) + self._own(candidate, pair) for pair in pairs]

    def _own(self, candidate: Candidate, pair: int) -> float:
        return random.Random(f"{candidate}:{pair}").gauss(0, 0.05)

    def fingerprint(self) -> Mapping[str, str]:
        return PRINTS


class Flat(Hill):
    """Every candidate is as good as every other."""

    def scores(self, candidate: Candidate, pairs: Sequence[int]) -> list[float]:
        super().scores(candidate, pairs)
        return [float(pair) for pair in pairs]


def setup(name: str = "anneal", *, pairs: int = 8, space: Space = SPACE, pruning: bool = True) -> Setup:
    """A search with a method."""
    method = next(Method(known, seed=7, pruning=pruning) for known in ("tpe", "anneal", "cmaes", "gp", "sobol")
                  if known == name)  # fmt: skip
    return Setup(space, START, pairs, method)


def told(found: Sequence[Finished]) -> list[tuple[object, ...]]:
    """What a history is apart from who made it, when, and how often it was tried."""
    return [(one.place, one.state, one.candidate, one.value, dict(one.scores)) for one in found]


PYTHON = [sys.executable, "-c"]


def searched(
    path: Path, search: Setup, trials: int, objective: Hill | None = None, lease: float = 120.0
) -> tuple[Finished, ...]:
    """Work on a search in a journal until it has so many trials."""
    objective = objective or Hill(search.pairs)
    with open_study(path, NAME, search, objective.fingerprint()) as study:
        run(study, objective, search.method, budget=Budget(trials), lease=lease, poll=0.02)
        return history(study)


def main() -> None:
    storage, name, trials, delay, *lease = sys.argv[1:]
    objective = Hill(delay=float(delay))

    def say(event: Event) -> None:
        print(json.dumps(asdict(event)), flush=True)  # noqa: T201

    search = setup(name)
    try:
        with open_study(storage, NAME, search, objective.fingerprint()) as study:
            budget = Budget(trials=int(trials))
            seconds = float(lease[0]) if lease else 120.0
            run(study, objective, search.method, budget=budget, on_event=say, lease=seconds, poll=0.05)
    except CrdiffError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
