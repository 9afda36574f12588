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
from crdiff_export.search.outputs import check_outputs, name_stem, storage_path
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
    _check_packages()
    pipelines.check_packages(offload=False)
    budget = choose_budget(request)
    check_request(request)
    scorer = scorers.choose(request.scorer, request.base)
    pairs = choose_pairs(request)
    request_checks.check_seeds(pairs.check[-1][1], "--seed")
    scorers.check_prompts(scorer, [prompt for prompt, _ in (*pairs.search, *pairs.check)])
    criterion = CriterionChoice.of(request.criterion, request.calibration)
    base = drawing_setup.read_base(request)
    plan = drawing_setup.plan_export(
        base,
        ExportRequest(
            request.base, request.size, recipe=request.recipe, targets=request.targets, criterion=request.criterion,
            calibration=request.calibration, variant=request.variant, family=request.family, force=True,
        ),
        criterion,
    )  # fmt: skip
    stem = name_stem(base.base.stem or base.checkpoint.stem, request)
    outputs = check_outputs(request, stem)
    setup, setup_notes = choose_setup(request, plan, len(pairs.search), scorer)
    storage, study = request.storage or str(storage_path(request, stem)), request.study or stem
    from crdiff_export.search.study import check_settings

    check_settings(storage, study, setup)
    drawing = drawing_setup.set_up(request, base, plan)
    from crdiff_export.sampling import session

    return SearchJob(
        request, drawing, plan, criterion, pairs, setup, budget, storage, study,
        batch=request.batch or session.usual_batch(drawing.opening.pipeline, drawing.device),
        scorer=scorer,
        scorer_device=session.choose_device(request.scorer_device or drawing.device, offload=False),
        outputs=outputs,
        notes=tuple(dict.fromkeys((*plan.notes, *setup_notes, *pairs.notes))),
    )  # fmt: skip


def _check_packages() -> None:
    missing = [name for name in ("optuna", "sqlalchemy", "scipy", "cmaes") if not find_spec(name)]
    if missing:
        hint = f"`python -m pip install {' '.join(missing)}`."
        raise SearchError(f"a search needs {', '.join(missing)}, which is not installed", hint)
