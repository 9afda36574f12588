"""The methods of a search: each chooses the next point from the seed, the trial's number and the other trials alone.

A method keeps no state, so a search that was killed goes on, and any number of workers can ask. TPE and the Gaussian
process are Optuna's samplers, each time asked of a study in memory: so they begin with points of a Sobol sequence, get
an estimate for trials that were stopped early, and leave out the dense model where it lies outside the box.
CMA-ES is taken from its library: Optuna's sampler unpickles its state from the storage, which may be another's file.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from crdiff_export.errors import OptionError
from crdiff_export.formats.text import did_you_mean
from crdiff_export.search import anneal
from crdiff_export.search.space import Point, RatioSpace

MethodName = Literal["tpe", "anneal", "cmaes", "gp", "sobol"]
METHODS: Final[tuple[MethodName, ...]] = ("tpe", "anneal", "cmaes", "gp", "sobol")

STARTUP: Final = 10  # Optuna's n_startup_trials for TPE and GP; ours come from a Sobol sequence
SIGMA: Final = 0.2  # of the box's side: CMA-ES's first step, with which it did well on the surfaces of the benchmark


@dataclass(frozen=True, slots=True)
class SearchMethod:
    """A way to search. `early_stop` ends bad trials early, except for `anneal`, which takes `constants`."""

    name: MethodName = "tpe"
    seed: int = anneal.SEED
    early_stop: bool = True
    constants: anneal.AnnealingConstants = field(default=anneal.PAPER)

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise OptionError(f"no method is called {self.name!r}", did_you_mean(self.name, METHODS, "methods"))

    @property
    def stops_early(self) -> bool:
        """Whether bad trials are stopped early."""
        return self.early_stop and self.name != "anneal"


class PointScore(NamedTuple):
    """A finished trial: its mean over all pairs, or an estimate of it; None if the trial failed."""

    point: Point
    score: float | None


@dataclass(frozen=True, slots=True)
class TrialHistory:
    """All that a method knows when it chooses the point of the trial with this number.

    Trials 0 and 1 are the dense model and the recipe's variant, which no method chooses.
    """

    space: RatioSpace
    start: Point
    number: int
    finished: Sequence[PointScore] = ()
    running: Sequence[Point] = ()

    @property
    def scores(self) -> list[tuple[Point, float]]:
        """The finished trials without those that failed."""
        return [(point, score) for point, score in self.finished if score is not None]


def suggest(method: SearchMethod, history: TrialHistory) -> Point | None:
    """Return the point to try next; None where an annealing has come to its end."""
    if method.name == "anneal":
        failed = method.constants.failed
        scores = {point: failed if score is None else score for point, score in history.finished}
        return anneal.next_point(history.space, history.start, method.seed, scores, history.running, method.constants)
    if method.name == "sobol":
        return _sobol(history, method.seed)
    return _cmaes(history, method.seed) if method.name == "cmaes" else _ask_optuna(history, method)


def _trial_seed(history: TrialHistory, seed: int) -> int:
    """Derive a seed for one trial alone, so that no generator has to outlive a restart."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{history.number}".encode()).digest()[:4])


def _sobol(history: TrialHistory, seed: int) -> Point:
    """Take the trial's point of a scrambled Sobol sequence; no two trials have the same."""
    import numpy as np
    from scipy.stats import qmc

    sequence = qmc.Sobol(len(history.space.names), scramble=True, rng=np.random.default_rng(seed))
    if history.number > 2:  # a step of 0 is an error
        sequence.fast_forward(history.number - 2)
    with warnings.catch_warnings():
        # The warning that balance needs powers of 2 is of no use where points are taken one by one.
        warnings.filterwarnings("ignore", "The balance properties of Sobol", UserWarning)
        return history.space.scale(sequence.random(1)[0].tolist())


def _ask_optuna(history: TrialHistory, method: SearchMethod) -> Point:
    """Ask a sampler of Optuna in a study in memory that holds the finished and the running trials."""
    import optuna
    from optuna.samplers import BaseSampler, GPSampler, TPESampler
    from optuna.trial import TrialState, create_trial

    space = history.space
    scores = [(point, score) for point, score in history.scores if space.contains(point)]
    if len(scores) < STARTUP:
        return _sobol(history, method.seed)
    seed = _trial_seed(history, method.seed)
    sides: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(*bounds)
        for name, bounds in zip(space.names, space.bounds, strict=True)
    }
    running = [(point, None) for point in history.running if space.contains(point)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: BaseSampler = (
            # Running trials count as bad.
            TPESampler(n_startup_trials=1, multivariate=True, constant_liar=True, seed=seed)
            if method.name == "tpe"
            else GPSampler(n_startup_trials=1, deterministic_objective=False, seed=seed)
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for point, score in (*scores, *running):
            state = TrialState.RUNNING if score is None else TrialState.COMPLETE
            params = dict(zip(space.names, point, strict=True))
            study.add_trial(create_trial(state=state, params=params, distributions=sides, value=score))
        params = study.ask(sides).params
    return space.clip(tuple(float(params[name]) for name in space.names))


def _cmaes(history: TrialHistory, seed: int) -> Point:
    """Ask CMA-ES, whose generations are told again from the finished trials, in their order."""
    import numpy as np
    from cmaes import CMA

    space = history.space
    # CMA-ES needs two dimensions: where the box has one coordinate, a second one without effect is added.
    idle = [0.5] if len(space.names) == 1 else []
    mean = np.clip([*space.unit(history.start), *idle], 0.0, 1.0)
    bounds = np.array([[0.0, 1.0]] * len(mean))
    optimizer = CMA(mean=mean, sigma=SIGMA, bounds=bounds, seed=_trial_seed(history, seed))
    results = [
        (np.array([*space.unit(point), *idle]), -score) for point, score in history.scores if point != space.dense
    ]
    size = optimizer.population_size
    for generation in range(len(results) // size):
        optimizer.tell(results[generation * size : (generation + 1) * size])
    return space.scale(optimizer.ask().tolist()[: len(space.names)])
