"""Simulated annealing as the paper's Algorithm 1 has it: a walk that depends on its seed and the scores alone.

CR-Diff, arXiv 2604.05524; every constant and the order of the draws are those of the public code's BWP_strategy.py.
Nothing is kept: the walk is taken again from its seed and the scores of its finished trials each time a point is asked
for, so that a search that was killed goes on as if it had not been. No trial of a walk is pruned, for the walk needs
the mean over all pairs: a trial is complete, or it failed for good and counts `failed`.
"""

import math
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Final

from crdiff_export.errors import SearchError
from crdiff_export.search.space import Point, Space

ORDER: Final = ("down", "up", "mid")  # PARAM_RANGES, from which the public code draws the ratio to change


@dataclass(frozen=True, slots=True)
class Constants:
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


PAPER: Final = Constants()
SEED: Final = 42  # random.seed(42)


def walk(space: Space, start: Point, seed: int | str, constants: Constants = PAPER) -> Generator[Point, float, None]:
    """Yield the points to try, taking the score of each; it ends after the iterations, or when restarts are used up."""
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
        found = yield point
        better = found - score
        idle += 1
        if better > 0 or chance.random() < math.exp(better / temperature):
            current, score = point, found
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


def following(
    space: Space, start: Point, seed: int, chain: int, told: Sequence[tuple[Point, float]], constants: Constants = PAPER
) -> Point | None:
    """The point that follows the finished trials of a chain, in order; None where the chain has ended.

    Chain 0 is the public code's walk. Those of further workers (ours) begin anywhere in the box.
    SearchError where the trials are not the chain's.
    """
    path = walk(space, start if chain == 0 else _anywhere(space, seed, chain), _seed(seed, chain), constants)
    try:
        point = next(path)
        for number, (tried, score) in enumerate(told):
            if tried != point:
                message = f"trial {number} of chain {chain} is at {tried}, where this seed leads to {point}"
                raise SearchError(message, "The study was changed, or begun by another version; begin a new one.")
            point = path.send(score)
    except StopIteration:
        return None
    return point


def _seed(seed: int, chain: int) -> int | str:
    return seed if chain == 0 else f"{seed}:{chain}"


def _anywhere(space: Space, seed: int, chain: int) -> Point:
    chance = random.Random(f"{seed}:{chain}:start")  # noqa: S311 - not a secret
    return space.scale([chance.random() for _ in space.names])


def _order(space: Space) -> list[int]:
    """The coordinates in the order in which the public code draws one; what it does not have comes last."""
    known = [space.names.index(name) for name in ORDER if name in space.names]
    return [*known, *(at for at in range(len(space.names)) if at not in known)]
