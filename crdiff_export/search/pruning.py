"""When a trial is stopped early: Optuna's WilcoxonPruner, a paired test against the best trial over the same pairs."""

import warnings
from typing import Final

import optuna

THRESHOLD: Final = 0.1  # WilcoxonPruner's p_threshold
STARTUP: Final = 4  # ours: pairs before the first test; with one-sided p < 0.1 three in a row cannot decide (2**-3)


def pruner(threshold: float = THRESHOLD) -> optuna.pruners.WilcoxonPruner:
    """The pruner; it is told nothing and keeps nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.pruners.WilcoxonPruner(p_threshold=threshold, n_startup_steps=STARTUP)
