"""The search for good ratios: what to try next, trials that outlive their worker, and any number of workers.

    study = search.open_study("sdxl-512.journal", "sdxl-512", setup, objective.fingerprint())
    search.run(study, objective, setup.method, budget=search.Budget(trials=120))
    search.best(study)

Importing this package imports no Optuna, no NumPy and no torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from crdiff_export.errors import SearchError

if TYPE_CHECKING:
    from crdiff_export.search.anneal import Constants
    from crdiff_export.search.board import Finished
    from crdiff_export.search.methods import METHODS, Method
    from crdiff_export.search.space import Candidate, Objective, Space
    from crdiff_export.search.study import (
        Setup,
        Study,
        best,
        check,
        dense,
        history,
        load_study,
        open_study,
        study_names,
        time_left,
    )
    from crdiff_export.search.worker import Budget, Event, run

_WHERE: Final = {
    "anneal": ("Constants",),
    "board": ("Finished",),
    "methods": ("METHODS", "Method"),
    "space": ("Candidate", "Objective", "Space"),
    "study": (
        *("Setup", "Study", "best", "check", "dense", "history", "load_study", "open_study", "study_names"),
        *("time_left",),
    ),
    "worker": ("Budget", "Event", "run"),
}

__all__ = [
    "METHODS",
    "Budget",
    "Candidate",
    "Constants",
    "Event",
    "Finished",
    "Method",
    "Objective",
    "Setup",
    "Space",
    "Study",
    "best",
    "check",
    "dense",
    "history",
    "load_study",
    "open_study",
    "run",
    "study_names",
    "time_left",
]


def __getattr__(name: str) -> Any:
    """What the modules of this package offer, imported when it is asked for."""
    for module, names in _WHERE.items():
        if name in names:
            if module in ("study", "worker"):
                _require()
            return getattr(import_module(f"crdiff_export.search.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _require() -> None:
    """Refuse to search without the packages that it takes."""
    missing = [name for name in ("optuna", "scipy", "cmaes") if not find_spec(name)]
    if missing:
        hint = "Install it: pip install 'crdiff-export[search]'."
        raise SearchError(f"a search needs {', '.join(missing)}, which is not installed", hint)
