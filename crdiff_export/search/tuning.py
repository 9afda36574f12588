"""Good ratios for a model and a size: a search on some prompts, and a check on others that it never saw.

The whole story, as in `export.py`: plan, search (`objective.py`, and the engine in `search/`), check what was found
against the dense model as `crdiff evaluate` does (`check.py`), write. Nothing is called better but by the check.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from crdiff_export.errors import OptionError, SearchError
from crdiff_export.evaluate import scorers
from crdiff_export.export import ExportRequest
from crdiff_export.hub import bases
from crdiff_export.models import recipe
from crdiff_export.models.demo.scenes import Scene
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import criterion_choice
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan
from crdiff_export.sampling import drawing_setup, pipelines, request_checks
from crdiff_export.sampling.drawing_setup import DrawingSetup
from crdiff_export.sampling.request_checks import DrawingRequest
from crdiff_export.search import engine, files, pairs, setting
from crdiff_export.search.found import Found, Standing
from crdiff_export.search.pairs import Pairs
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from crdiff_export.search.engine import Budget, Event, Setup, Study
    from crdiff_export.search.methods import Name
    from crdiff_export.search.objective import Read


@dataclass(frozen=True, slots=True)
class SearchRequest(DrawingRequest):
    """What someone wants: good ratios of which base, for which size, by which scorer, on which prompts.

    The search judges by `prompts`, or by many pictures of one `prompt`; `held_out` are for the check, and without them
    a third of the prompts is kept for it. `noise` is the seed of the first picture; all others count up from it.
    `trials` are those of all workers together, `hours` this one's. A `worker` only works on the search.
    """

    size: Size
    scorer: str | None = None
    prompts: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    prompt: str | None = None
    limit: int | None = None
    held_out_limit: int | None = None
    pictures: int | None = None
    noise: int = 0
    method: "Name | None" = None
    seed: int = setting.SEED
    trials: int | None = None
    hours: float | None = None
    low: float | None = None
    high: float | None = None
    paper: bool = False
    poa: bool = False
    poa_range: tuple[float, float] | None = None
    early_stop: bool = True
    recipe: Path | None = None
    targets: tuple[str, ...] | None = None
    criterion: str = criterion_choice.MAGNITUDE
    calibration: Path | None = None
    native: bool = True
    batch: int | None = None
    scorer_device: str | None = None
    storage: str | None = None
    study: str | None = None
    worker: bool = False
    outputs: tuple[Path, ...] = ()
    sheet: Path | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A request that nothing stands against."""

    request: SearchRequest
    drawing: DrawingSetup
    plan: Plan
    criterion: CriterionChoice
    pairs: Pairs
    setup: "Setup"
    budget: "Budget"
    storage: str
    study: str
    batch: int
    scorer: str
    scorer_device: str
    outputs: tuple[Path, ...]
    notes: tuple[str, ...]


class Watch(Protocol):
    """Whoever follows a search, and may end it by raising."""

    def trial(self, event: "Event", standing: Standing) -> None:
        """Something happened to a trial, or to this worker."""
        ...

    def step(self) -> None:
        """A step of sampling is over."""
        ...


class Unwatched:
    """Nobody does."""

    def trial(self, event: "Event", standing: Standing) -> None:
        """Say nothing."""

    def step(self) -> None:
        """Go on."""


def tune(request: SearchRequest, progress: Progress | None = None, watch: Watch | None = None) -> Found:
    """Search, check and write; raises a CrdiffError if it cannot, and then keeps the trials that are finished."""
    watched = progress or Silent()
    return finish(work(prepare(request), watched, watch or Unwatched()), watched)


def prepare(request: SearchRequest) -> Job:
    """Find the base, read its headers and plan; any refusal comes from here, before a weight is read."""
    _check(request)
    budget = setting.budget(request)
    scorer = _scorer(request)
    pipelines.check_packages(offload=False)
    criterion = CriterionChoice.of(request.criterion, request.calibration)
    base = drawing_setup.find(request)
    planned = drawing_setup.planned(
        base,
        ExportRequest(
            request.base, request.size, recipe=request.recipe, targets=request.targets, criterion=request.criterion,
            calibration=request.calibration, variant=request.variant, force=True,
        ),
        criterion,
    )  # fmt: skip
    chosen = pairs.choose(request)
    _check_pairs(chosen, scorer)
    setup, said = setting.setup(request, planned, len(chosen.search), scorer)
    stem = files.stem(base.base.stem or base.checkpoint.stem, request)
    outputs = files.check(request, stem)
    storage, study = request.storage or str(files.journal(request, stem)), request.study or stem
    set_up = drawing_setup.set_up(request, base, planned)
    engine.check(storage, study, setup)
    from crdiff_export.sampling import session

    scorer_device = session.device(request.scorer_device, offload=False) if request.scorer_device else set_up.device
    batch = request.batch or session.usual_batch(base.match.family.id, set_up.device)
    notes = tuple(dict.fromkeys((*planned.notes, *said, *chosen.notes)))
    return Job(
        request, set_up, planned, criterion, chosen, setup, budget, storage, study, batch, scorer, scorer_device,
        outputs, notes,
    )  # fmt: skip


def work(job: Job, progress: Progress, watch: Watch) -> Found:
    """Begin the search or join it, and work on it until its budget is spent; all that was opened is closed again."""
    from crdiff_export.search import objective

    base = objective.read(job, progress)
    with (
        objective.opened(job, base, watch.step) as judge,
        engine.open_study(job.storage, job.study, job.setup, judge.fingerprint()) as study,
    ):
        standing = Standing.of(study, job.budget)

        def say(event: "Event") -> None:
            nonlocal standing
            if event.kind != "scored":
                standing = Standing.of(study, job.budget, since=standing.since)
            watch.trial(event, standing)

        engine.run(study, judge, job.setup.method, budget=job.budget, on_event=say)
        found = _ended(job, base, study)
    if not (job.request.worker or found.best.candidate.dense):
        from crdiff_export.search import check

        check.count(found)
    return found


def finish(found: Found, progress: Progress) -> Found:
    """Check the best trial on held-out pairs and write the files; a worker leaves that to others."""
    if found.job.request.worker:
        return found
    if found.best.candidate.dense:
        return files.write(found)
    from crdiff_export.search import check

    return files.write(check.checked(found, progress))


def _ended(job: Job, base: "Read", study: "Study") -> Found:
    best, dense = engine.best(study), engine.dense(study)
    if best is None or dense is None:
        message = f"{study.where}: the dense model's trial is not over yet, so nothing can be compared with it"
        raise SearchError(message, "Run the same command again, with more time.")
    return Found(job, base.counted, study.where, engine.history(study), best, dense)


def _scorer(request: SearchRequest) -> str:
    """The scorer, of which the built-in model has its own; a CrdiffError where it cannot be one."""
    if request.scorer:
        scorers.check(request.scorer)
    elif request.base != bases.BUILT_IN:
        known = ", ".join(scorers.names())
        raise OptionError("there is no scorer", f"Give --scorer: {known}, module:function or command:PROGRAM.")
    return request.scorer or "demo"


def _check_pairs(chosen: Pairs, scorer: str) -> None:
    """Refuse prompts that the scorer cannot judge, and seeds that torch does not tell apart."""
    if "demo" in (name for _, name in scorers.parse(scorer)):
        for prompt, _ in (*chosen.search, *chosen.check):
            Scene.parse(prompt)
    request_checks.check_seeds(chosen.check[-1][1], "--noise")


def _check(request: SearchRequest) -> None:
    """Refuse what the request alone shows to be impossible."""
    texts = (*request.prompts, *request.held_out, *((request.prompt,) if request.prompt is not None else ()))
    request_checks.check(request, texts)
    if request.noise < 0 or request.seed < 0:
        raise OptionError("a seed is negative", "Count from 0.")
    counts = (request.limit, request.held_out_limit, request.pictures, request.batch)
    if any(count is not None and count < 1 for count in counts):
        raise OptionError("there is nothing to draw", "Ask for one picture and one prompt at least.")
    for weight in request.poa_range or ():
        recipe.check_poa_weight("the POA weight", weight)


__all__ = ["Found", "Job", "SearchRequest", "Standing", "Unwatched", "Watch", "finish", "prepare", "tune", "work"]
