"""Good ratios for a model and a size, from a request to a recipe. READ FIRST.

The story in its order: prepare (`prepare.py`), search (`worker.py` takes trials from the study in `study.py` and judges
them by `objective.py`), check the best trial on prompts that the search never saw (`check.py`), write (`files.py`).
Ratios are called better than the dense model only where the check says so.
"""

import time
from collections.abc import Callable

from crdiff_export.errors import SearchError
from crdiff_export.progress import Progress, Silent
from crdiff_export.search.check import check_best, plan_of_best
from crdiff_export.search.prepare import SearchJob, prepare
from crdiff_export.search.request import SearchRequest
from crdiff_export.search.result import SearchResult
from crdiff_export.search.trials import SearchProgress, TrialEvent, best_trial, dense_trial


def tune(request: SearchRequest, progress: Progress | None = None) -> SearchResult:
    """Search for ratios, check the best of them and write the outputs.

    Args:
        request: What to search for, and how.
        progress: Told of the work on files and of the pictures of the check.

    Returns:
        All trials, the best one, and what may be said of it.

    Raises:
        CrdiffError: The search cannot begin or go on; finished trials are kept.
    """
    progress = progress or Silent()
    job = prepare(request)
    result = search(job, progress)
    return check_and_write(result, progress)


def search(
    job: SearchJob,
    progress: Progress,
    on_event: Callable[[TrialEvent, SearchProgress], None] = lambda *_: None,
    on_step: Callable[[], None] = lambda: None,
) -> SearchResult:
    """Begin a search or join it, and work on it until its budget is spent; everything opened is closed again.

    Args:
        job: A job of `prepare`.
        progress: Told of the reading of the base.
        on_event: Called at each event of a trial or of this worker; may end the search by raising.
        on_step: Called after each step of sampling; may end the search by raising.

    Returns:
        All trials and the best one, without a check.

    Raises:
        SearchError: The dense model's trial is not over, so there is nothing to compare with.
        CrdiffError: The search cannot go on; finished trials are kept.
    """
    from crdiff_export.search.objective import open_objective
    from crdiff_export.search.study import open_study
    from crdiff_export.search.worker import run_trials

    with (
        open_objective(job, progress, on_step) as objective,
        open_study(job.storage, job.study, job.setup, objective.fingerprint) as study,
    ):
        began = time.monotonic()
        run_trials(study, objective, job.budget, lambda event: on_event(event, study.progress(job.budget, began)))
        trials, where, counted = study.trials(), study.where, objective.counted
    best, dense = best_trial(trials), dense_trial(trials)
    if best is None or dense is None:
        message = f"{where}: the dense model's trial is not over yet, so nothing can be compared with it"
        raise SearchError(message, "Run the same command again, with more time.")
    result = SearchResult(job, counted, where, trials, best, dense)
    if not (job.request.worker or best.candidate.dense):
        result.counted.source(plan_of_best(result))  # now, as weights may be read again, in several threads
    return result


def check_and_write(result: SearchResult, progress: Progress) -> SearchResult:
    """Check the best trial on held-out pairs and write the outputs; a worker leaves both to others.

    Args:
        result: The result of `search`.
        progress: Told of the pictures of the check.

    Returns:
        The result with its check, and the files that were written.

    Raises:
        CrdiffError: The check cannot be made, or an output cannot be written.
    """
    if result.job.request.worker:
        return result
    from crdiff_export.search import files

    if not result.best.candidate.dense:
        result = check_best(result, progress)
    return files.write(result)
