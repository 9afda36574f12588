"""The search for good ratios of a model at a size, and the check of its result on prompts that it never saw.

Begin with `run.py`, which tells the whole story. Importing this package loads no Optuna, NumPy or torch.

    result = tune(SearchRequest("demo", Size(96, 64), limit=8, trials=8, outputs=(Path("demo-96x64.toml"),)))
"""

from crdiff_export.search.methods import METHODS
from crdiff_export.search.prepare import SearchJob, prepare
from crdiff_export.search.request import SearchRequest
from crdiff_export.search.result import SearchResult
from crdiff_export.search.run import check_and_write, search, tune
from crdiff_export.search.space import Candidate, RatioSpace
from crdiff_export.search.trials import FinishedTrial, SearchProgress, TrialEvent

__all__ = [
    "METHODS",
    "Candidate",
    "FinishedTrial",
    "RatioSpace",
    "SearchJob",
    "SearchProgress",
    "SearchRequest",
    "SearchResult",
    "TrialEvent",
    "check_and_write",
    "prepare",
    "search",
    "tune",
]
