"""How good are the ratios that each method finds: `python benchmarks/search_methods.py` (minutes on one core).

A surface over (down, mid, up) in 0 to 0.9 stands for the mean score, in ImageReward's units: a narrow bump of height 1
and width 0.15 to 0.25, a broad one of height 0.5 to 0.7 and width 0.25 to 0.4, centres anywhere in the box, a
ripple of 0.05, and a floor of -0.5. Each seed is another surface. Noise is drawn once per point, as a fixed set of
prompts and seeds gives it. All begin with the dense model and 0.3/0.3/0.3, and these two count.

Regret is the surface's maximum minus its true value at the point whose noisy score was best. `anneal (paper)` is the
public code's box, 0.1 to 0.8; `anneal` is ours. Both stop where Algorithm 1 does. The Gaussian process takes half a
minute a search: name it with `--methods`.
"""

import argparse
import os
import platform
import random
import statistics
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
from scipy.optimize import minimize

from crdiff_export.search.methods import METHODS, PointScore, SearchMethod, TrialHistory, suggest
from crdiff_export.search.space import Point, RatioSpace

GROUPS = ("down", "mid", "up")
SPACE = RatioSpace(GROUPS)
PAPER = RatioSpace(GROUPS, 0.1, 0.8)
START: Point = (0.3, 0.3, 0.3)
WAYS = ("anneal (paper)", "anneal", "sobol", "tpe", "cmaes", "gp")


@dataclass(frozen=True)
class Surface:
    """One surface, and its noise."""

    seed: int
    noise: float = 0.0

    def true(self, point: Point) -> float:
        chance = random.Random(self.seed)
        centres = np.array([[chance.uniform(0.05, 0.85) for _ in GROUPS] for _ in range(2)])
        widths = np.array([chance.uniform(0.15, 0.25), chance.uniform(0.25, 0.4)])
        heights = np.array([1.5, 0.5 + chance.uniform(0.5, 0.7)])
        bumps = heights * np.exp(-((centres - np.array(point)) ** 2).sum(1) / (2 * widths**2))
        phases = [chance.uniform(0, 6.28) for _ in GROUPS]
        ripple = 0.05 * np.mean([np.sin(20 * at + phase) for at, phase in zip(point, phases, strict=True)])
        return float(max(bumps) - 0.5 + ripple)

    def score(self, point: Point) -> float:
        salt = sha256(struct.pack("<q3d", self.seed, *point)).digest()
        return self.true(point) + random.Random(salt).gauss(0, self.noise)

    def top(self) -> float:
        """The maximum: the best of a fine random cover of the box, climbed from."""
        cover = np.random.default_rng(self.seed).uniform(SPACE.low, SPACE.high, (4000, len(GROUPS)))
        values = [self.true(tuple(point)) for point in cover]
        best = cover[np.argsort(values)[-3:]]
        found = [
            minimize(lambda x: -self.true(tuple(x)), at, method="Nelder-Mead", bounds=SPACE.bounds).fun for at in best
        ]
        return -float(min(found))


def search(way: str, score: Callable[[Point], float], seed: int, trials: int) -> Point:
    """The point whose score was best."""
    name, _, paper = way.partition(" (")
    space = PAPER if paper else SPACE
    method = SearchMethod(next(known for known in METHODS if known == name), seed)
    scores = [(point, score(point)) for point in (space.dense, START)]
    while len(scores) < trials:
        point = suggest(method, TrialHistory(space, START, len(scores), [PointScore(*pair) for pair in scores]))
        if point is None:
            break
        scores.append((point, score(point)))
    return max(scores, key=lambda pair: pair[1])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.1, 0.2])
    parser.add_argument("--methods", nargs="+", choices=WAYS, default=list(WAYS[:-1]))
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print(f"Python {platform.python_version()}, optuna {optuna.__version__}, {args.trials} trials, {args.seeds} seeds")
    tops = [Surface(seed).top() for seed in range(args.seeds)]
    print("| method | " + " | ".join(f"noise {noise:g}: mean regret (worst tenth)" for noise in args.noise) + " | s |")
    print("|---" * (len(args.noise) + 2) + "|")
    for way in args.methods:
        cells, began = [], time.process_time()
        for noise in args.noise:
            surfaces = [Surface(seed, noise) for seed in range(args.seeds)]
            regrets = [
                top - surface.true(search(way, surface.score, surface.seed, args.trials))
                for surface, top in zip(surfaces, tops, strict=True)
            ]
            tenth = sorted(regrets)[-max(1, len(regrets) // 10) :]
            cells.append(f"{statistics.fmean(regrets):.3f} ({statistics.fmean(tenth):.3f})")
        seconds = (time.process_time() - began) / (len(args.noise) * args.seeds)
        print(f"| {way} | " + " | ".join(cells) + f" | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
