"""Simulated annealing, the paper's Algorithm 1: a walk that depends on its seed and the scores alone.

Source: CR-Diff, arXiv 2604.05524; every constant and the order of the random draws are those of the public code's
BWP_strategy.py. A walk keeps no state: it is taken again from the finished trials whenever a point is wanted, so any
worker can continue it. No trial of a walk is stopped early, because the walk needs the mean over all pairs.
"""

import math
import random
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Final

from crdiff_export.search.space import Point, RatioSpace

ORDER: Final = ("down", "up", "mid")  # PARAM_RANGES, from which the public code draws the ratio to change


@dataclass(frozen=True, slots=True)
class AnnealingConstants:
    """The constants of the public code; its names are in the comments."""

    iterations: int = 120  # ITERATION_COUNT
    patience: float = 0.2  # PATIENCE_FACTOR, of the iterations
    least_patience: int = 5  # max(5, ...)
    temperature: float = 0.1  # INITIAL_TEMPERATURE
    cooling: float = 0.95  # COOLING_RATE
    step: float = 0.10  # INITIAL_NEIGHBOR_STEP_SIZE
    least_step: float = 0.005  # MIN_NEIGHBOR_STEP_SIZE
    unlock: float = 0.8  # REHEAT_UNLOCK_THRESHOLD, in ImageReward's units
    reheat: float = 1.5  # REHEAT_FACTOR
    reheats: int = 3  # MAX_REHEATS_AFTER_THRESHOLD
    restarts: int = 2  # MAX_RESTARTS
    jump: float = 3.0  # LARGE_MUTATION_FACTOR
    failed: float = -2.0  # what a failed run counts


PAPER: Final = AnnealingConstants()
SEED: Final = 42  # random.seed(42)


def walk(
    space: RatioSpace, start: Point, seed: int | str, constants: AnnealingConstants = PAPER
) -> Generator[Point, float, None]:
    """Yield the points to try and take the score of each; end after the iterations, or when no restart is left."""
    chance = random.Random(seed)  # noqa: S311 - the public code's generator
    order = _order(space)
    side = space.high - space.low

    def near(point: Point, temperature: float) -> Point:
        at = chance.choice(order)
        half = max(constants.least_step, constants.step * (temperature / constants.temperature))
        low, high = space.bounds[at]
        # A POA weight (ours) moves by the same share of its range; for a ratio the factor is 1.
        half *= (high - low) / side
        return space.clip((*point[:at], point[at] + chance.uniform(-half, half), *point[at + 1 :]))

    patience = max(constants.least_patience, int(constants.iterations * constants.patience))
    current = best = start
    score = top = yield start
    temperature = constants.temperature
    unlocked, idle, reheats, restarts = False, 0, 0, 0
    for _ in range(constants.iterations):
        point = near(current, temperature)
        new = yield point
        change = new - score
        idle += 1
        if change > 0 or chance.random() < math.exp(change / temperature):
            current, score = point, new
            if score > top:
                best, top, idle = current, score, 0
                unlocked = unlocked or top > constants.unlock
        temperature *= constants.cooling
        if idle < patience:
            continue
        idle = 0
        if unlocked and reheats < constants.reheats:
            reheats += 1
            temperature *= constants.reheat
        elif restarts < constants.restarts:
            restarts += 1
            current = near(best, constants.temperature * constants.jump)
            score = yield current
            temperature = constants.temperature
            if score > top:
                best, top = current, score
        else:
            return


def next_point(
    space: RatioSpace,
    start: Point,
    seed: int,
    scores: Mapping[Point, float],
    running: Collection[Point] = (),
    constants: AnnealingConstants = PAPER,
) -> Point | None:
    """Choose the point to try next, as the continuation of a walk that no worker is at.

    Walk 0 is the public code's. Where workers are at all walks (ours, for several workers), another one begins at a
    random point of the box, unless one has ended already. Walks are recognised by their points alone. Two workers that
    choose the same point at the same moment therefore do no harm: the point counts once.

    Args:
        space: The box to search.
        start: Where walk 0 begins.
        seed: The seed of walk 0; the other walks derive theirs from it.
        scores: The score at each point that was tried. Failed points count `constants.failed`.
        running: The points that workers are at.
        constants: The constants of the annealing.

    Returns:
        A point, or None once a walk has ended and workers are at all others.
    """
    ended = False
    for number in count():
        begin, walk_seed = (
            (start, seed) if number == 0 else (_random_point(space, f"{seed}:{number}"), f"{seed}:{number}")
        )
        path = walk(space, begin, walk_seed, constants)
        point = next(path)
        begun = point in scores or point in running
        try:
            while point in scores:
                point = path.send(scores[point])
        except StopIteration:
            ended = True
            continue
        if point not in running:
            return None if ended and not begun else point
    raise AssertionError("unreachable")


def _random_point(space: RatioSpace, seed: str) -> Point:
    chance = random.Random(f"{seed}:start")  # noqa: S311 - not a secret
    return space.scale([chance.random() for _ in space.names])


def _order(space: RatioSpace) -> list[int]:
    """Return the coordinates in the public code's order; those that it does not have come last."""
    ordered = [space.names.index(name) for name in ORDER if name in space.names]
    return [*ordered, *(at for at in range(len(space.names)) if at not in ordered)]
