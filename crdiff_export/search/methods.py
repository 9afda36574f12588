"""What to try next: pure functions of the seed, the trial's place in the search and what is known of the others."""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from crdiff_export.errors import SearchError
from crdiff_export.formats.text import did_you_mean
from crdiff_export.search import anneal
from crdiff_export.search.space import Point, Space

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

Name = Literal["tpe", "anneal", "cmaes", "gp", "sobol"]
METHODS: Final[tuple[Name, ...]] = ("tpe", "anneal", "cmaes", "gp", "sobol")

STARTUP: Final = 10  # Optuna's n_startup_trials for TPE and GP; ours come from a Sobol sequence
SIGMA: Final = 0.2  # of the box's side: CMA-ES's first step, with which it did well on the surfaces of the benchmark


@dataclass(frozen=True, slots=True)
class Method:
    """A way to search. `pruning` stops bad trials early; `anneal`, which takes its `constants`, never does."""

    name: Name = "tpe"
    seed: int = anneal.SEED
    pruning: bool = True
    constants: anneal.Constants = field(default=anneal.PAPER)

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise SearchError(f"no method is called {self.name!r}", did_you_mean(self.name, METHODS, "methods"))

    @property
    def prunes(self) -> bool:
        """Whether trials are stopped early."""
        return self.pruning and self.name != "anneal"


@dataclass(frozen=True, slots=True)
class Known:
    """A trial that is over, with its score: the mean over all pairs, or an estimate of it."""

    point: Point
    score: float


@dataclass(frozen=True, slots=True)
class Question:
    """What a method is asked: the point of the trial in this place, given the trials that are over and those that run.

    Places 0 and 1 are the dense model's and the recipe's, and asked of no method.
    """

    space: Space
    start: Point
    seed: int
    place: int
    known: Sequence[Known] = ()
    running: Sequence[Point] = ()


def suggest(name: Name, question: Question) -> Point:
    """The point to try next. `anneal` is asked elsewhere, by `anneal.following`."""
    ways: Mapping[Name, Callable[[Question], Point]] = {"tpe": _tpe, "gp": _gp, "cmaes": _cmaes, "sobol": _sobol}
    return ways[name](question)


def _seed(question: Question) -> int:
    """A seed for one place alone: what a sampler draws there depends on no generator that a restart would lose."""
    return int.from_bytes(hashlib.sha256(f"{question.seed}:{question.place}".encode()).digest()[:4])


def _sobol(question: Question) -> Point:
    """A scrambled Sobol sequence; it depends on nothing but seed and place, so no two workers try one point."""
    import numpy as np
    from scipy.stats import qmc

    sequence = qmc.Sobol(len(question.space.names), scramble=True, rng=np.random.default_rng(question.seed))
    if question.place > 2:  # a step of 0 is an error
        sequence.fast_forward(question.place - 2)
    with warnings.catch_warnings():
        # It says that its balance needs powers of 2, which is of no use to whoever takes one point at a time.
        warnings.filterwarnings("ignore", "The balance properties of Sobol", UserWarning)
        return question.space.scale(sequence.random(1)[0].tolist())


def _tpe(question: Question) -> Point:
    """Optuna's tree of Parzen estimators over all coordinates together; what runs counts as bad (constant liar)."""
    from optuna.samplers import TPESampler

    return _optuna(
        question,
        lambda seed: TPESampler(n_startup_trials=1, multivariate=True, constant_liar=True, seed=seed),
    )


def _gp(question: Question) -> Point:
    """Optuna's Gaussian process, for scores that are noisy; it needs torch and scipy."""
    from optuna.samplers import GPSampler

    return _optuna(question, lambda seed: GPSampler(n_startup_trials=1, deterministic_objective=False, seed=seed))


def _optuna(question: Question, sampler: Callable[[int], "BaseSampler"]) -> Point:
    """Ask a sampler that is told all trials anew, of a study in memory: it has no state that could be lost."""
    import optuna

    space = question.space
    known = [one for one in question.known if space.contains(one.point)]
    if len(known) < STARTUP:
        return _sobol(question)
    sides = {
        name: optuna.distributions.FloatDistribution(*bounds)
        for name, bounds in zip(space.names, space.bounds, strict=True)
    }

    def trial(point: Point, score: float | None) -> optuna.trial.FrozenTrial:
        return optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING if score is None else optuna.trial.TrialState.COMPLETE,
            params=dict(zip(space.names, point, strict=True)),
            distributions=dict(sides),
            value=score,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(direction="maximize", sampler=sampler(_seed(question)))
        study.add_trials([trial(one.point, one.score) for one in known])
        study.add_trials([trial(point, None) for point in question.running if space.contains(point)])
        found = study.ask(dict(sides)).params
    return space.clip(tuple(float(found[name]) for name in space.names))


def _cmaes(question: Question) -> Point:
    """CMA-ES, its generations told again from the trials, in their order: nothing is kept, and nothing unpickled.

    Optuna's own sampler pickles its optimizer into the storage, which a journal from elsewhere could abuse.
    """
    import numpy as np
    from cmaes import CMA

    space = question.space
    # It is at home in two dimensions and more: where there is one coordinate, a second one does nothing.
    idle = [0.5] if len(space.names) == 1 else []
    mean = np.clip([*space.unit(question.start), *idle], 0.0, 1.0)
    bounds = np.array([[0.0, 1.0]] * len(mean))
    optimizer = CMA(mean=mean, sigma=SIGMA, bounds=bounds, seed=_seed(question))
    told = [
        (np.array([*space.unit(one.point), *idle]), -one.score) for one in question.known if one.point != space.dense
    ]
    size = optimizer.population_size
    for generation in range(len(told) // size):
        optimizer.tell(told[generation * size : (generation + 1) * size])
    return space.scale(optimizer.ask().tolist()[: len(space.names)])
