"""The preparation of a search: from a request to a job that nothing stands against."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from crdiff_export.errors import SearchError
from crdiff_export.evaluate import scorers
from crdiff_export.export import ExportRequest
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan
from crdiff_export.sampling import drawing_setup, pipelines, request_checks
from crdiff_export.sampling.drawing_setup import DrawingSetup
from crdiff_export.search import files
from crdiff_export.search.pairs import PromptPairs, choose_pairs
from crdiff_export.search.request import SearchRequest, check_request
from crdiff_export.search.setup import SearchBudget, SearchSetup, choose_budget, choose_setup


@dataclass(frozen=True, slots=True)
class SearchJob:
    """A search that can begin: all that follows from its request and from the headers of its base."""

    request: SearchRequest
    drawing: DrawingSetup
    plan: Plan
    criterion: CriterionChoice
    pairs: PromptPairs
    setup: SearchSetup
    budget: SearchBudget
    storage: str
    study: str
    batch: int
    scorer: str
    scorer_device: str
    outputs: tuple[Path, ...]
    notes: tuple[str, ...]


def prepare(request: SearchRequest) -> SearchJob:
    """Find the base, read its headers and plan; any refusal comes from here, before a weight is read.

    Args:
        request: The request of the search.

    Returns:
        The job.

    Raises:
        CrdiffError: The search cannot begin.
    """
    check_request(request)
    _check_packages()
    budget = choose_budget(request)
    scorer = scorers.choose(request.scorer, request.base)
    pipelines.check_packages(offload=False)
    criterion = CriterionChoice.of(request.criterion, request.calibration)
    base = drawing_setup.read_base(request)
    plan = drawing_setup.plan_export(
        base,
        ExportRequest(
            request.base, request.size, recipe=request.recipe, targets=request.targets, criterion=request.criterion,
            calibration=request.calibration, variant=request.variant, force=True,
        ),
        criterion,
    )  # fmt: skip
    pairs = choose_pairs(request)
    scorers.check_prompts(scorer, [prompt for prompt, _ in (*pairs.search, *pairs.check)])
    request_checks.check_seeds(pairs.check[-1][1], "--noise")
    setup, setup_notes = choose_setup(request, plan, len(pairs.search), scorer)
    stem = files.name_stem(base.base.stem or base.checkpoint.stem, request)
    outputs = files.check_outputs(request, stem)
    storage, study = request.storage or str(files.storage_path(request, stem)), request.study or stem
    drawing = drawing_setup.set_up(request, base, plan)
    from crdiff_export.search.study import check_settings

    check_settings(storage, study, setup)
    from crdiff_export.sampling import session

    scorer_device = (
        session.choose_device(request.scorer_device, offload=False) if request.scorer_device else drawing.device
    )
    batch = request.batch or session.usual_batch(base.match.family.id, drawing.device)
    notes = tuple(dict.fromkeys((*plan.notes, *setup_notes, *pairs.notes)))
    return SearchJob(
        request, drawing, plan, criterion, pairs, setup, budget, storage, study, batch, scorer, scorer_device, outputs,
        notes,
    )  # fmt: skip


def _check_packages() -> None:
    missing = [name for name in ("optuna", "sqlalchemy", "scipy", "cmaes") if not find_spec(name)]
    if missing:
        hint = "Install it: pip install 'crdiff-export[search]'."
        raise SearchError(f"a search needs {', '.join(missing)}, which is not installed", hint)
