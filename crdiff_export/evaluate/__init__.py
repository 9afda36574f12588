"""Whether pruning does a model any good: dense, pruned and POA from the same noise, scored, at one or more sizes.

The whole story, as in `export.py`: plan, draw and score (`measure.py`), compare (`findings.py`), write.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crdiff_export.errors import OptionError
from crdiff_export.evaluate import fid, files, scorers
from crdiff_export.evaluate.fid import Against
from crdiff_export.evaluate.findings import Evaluation, Subject
from crdiff_export.evaluate.scorers import Scorer
from crdiff_export.export import ExportRequest
from crdiff_export.hub import bases
from crdiff_export.models import recipe
from crdiff_export.models.demo.scenes import Scene
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import criterion_choice
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan
from crdiff_export.sampling import drawing_setup, pipelines, poa, prompts, request_checks
from crdiff_export.sampling.drawing_setup import Easel
from crdiff_export.sampling.request_checks import DrawingRequest
from crdiff_export.sizes import Size


@dataclass(frozen=True, slots=True)
class EvaluateRequest(DrawingRequest):
    """What someone wants to know: of which base, at which sizes, by which scorer, on which prompts.

    Each prompt is drawn `pictures` times, and no two pictures have the same noise: the seeds count up from `seed`.
    Ratios come from the recipe or from `ratio` and `ratios`, as in an export. No `weights` means the recommended one.
    `criterion` and `calibration` are those of an export. With `native` the pruned models are drawn at the native size
    as well: what helps at one size may hurt there. `fid` is a folder of pictures, or `dense`, to take an FID against.
    """

    sizes: tuple[Size, ...]
    scorer: str | None = None
    prompts: tuple[str, ...] = ()
    limit: int | None = None
    pictures: int = 1
    seed: int = 0
    recipe: Path | None = None
    ratio: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    criterion: str = criterion_choice.MAGNITUDE
    calibration: Path | None = None
    weights: tuple[float, ...] = ()
    native: bool = True
    batch: int | None = None
    scorer_device: str | None = None
    fid: str | None = None
    fid_weights: Path | None = None
    outputs: tuple[Path, ...] = ()
    force: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A request that nothing stands against. `pairs` are prompts and the seeds of their noise."""

    request: EvaluateRequest
    easel: Easel
    plan: Plan
    criterion: CriterionChoice
    subjects: tuple[Subject, ...]
    pairs: tuple[tuple[str, int], ...]
    batch: int
    scorer: str
    scorer_device: str
    outputs: tuple[Path, ...]
    notes: tuple[str, ...]
    fid: Against | None = None

    @property
    def pictures(self) -> int:
        """How many there will be; the dense model's at a size are drawn once."""
        sizes = {subject.size for subject in self.subjects}
        models = len(sizes) + sum(len(subject.drawn) - 1 for subject in self.subjects)
        return len(self.pairs) * models + len(self.reference_pairs)

    @property
    def reference_pairs(self) -> tuple[tuple[str, int], ...]:
        """What is drawn of the dense model to take an FID against: the same prompts, from noise that no other has.

        From the same noise a model at that size would be near for that reason alone, and the dense one at 0; so its own
        number there is what chance does to sets of this many.
        """
        if not (self.fid and self.fid.drawn):
            return ()
        return tuple((prompt, seed + len(self.pairs)) for prompt, seed in self.pairs)


def evaluate(request: EvaluateRequest, progress: Progress | None = None) -> Evaluation:
    """Draw, score, compare and write; raises a CrdiffError and writes nothing if it cannot."""
    job, watched = prepare(request), progress or Silent()
    found = run(job, count(job, watched), watched)
    write(job, found)
    return found


def prepare(request: EvaluateRequest) -> Job:
    """Find the base, read its headers and plan; any refusal comes from here, before a weight is read."""
    _check(request)
    pipelines.check_packages(offload=False)
    outputs = files.check(request.outputs, force=request.force)
    demo = request.base == bases.BUILT_IN
    if request.scorer:
        scorers.check(request.scorer)
    elif not demo:
        known = ", ".join(scorers.names())
        raise OptionError("there is no scorer", f"Give --scorer: {known}, module:function or command:PROGRAM.")
    if not (request.prompts or demo):
        raise OptionError("there are no prompts", "Give --prompts FILE, one a line, or --prompt TEXT.")
    criterion = CriterionChoice.of(request.criterion, request.calibration)
    found = drawing_setup.find(request)
    planned = [
        drawing_setup.planned(
            found,
            ExportRequest(
                request.base, size, recipe=request.recipe, ratio=request.ratio, ratios=request.ratios,
                criterion=request.criterion, calibration=request.calibration, variant=request.variant, force=True,
            ),
            criterion,
        )
        for size in dict.fromkeys(request.sizes)
    ]  # fmt: skip
    chosen = prompts.choose(request.prompts, request.limit)
    pairs = tuple(
        (prompt, request.seed + number * request.pictures + picture)
        for number, prompt in enumerate(chosen)
        for picture in range(request.pictures)
    )
    scorer = request.scorer or "demo"
    if "demo" in (name for _, name in scorers.parse(scorer)):
        for prompt in chosen:
            Scene.parse(prompt)
    against = fid.choose(request.fid, request.fid_weights, len(pairs))
    request_checks.check_seeds(pairs[-1][1] + (len(pairs) if against and against.drawn else 0))
    set_up = drawing_setup.set_up(request, found, planned[0])
    subjects = tuple(_subjects(planned, set_up.native, request))
    from crdiff_export.sampling import session

    scorer_device = session.device(request.scorer_device, offload=False) if request.scorer_device else set_up.device
    batch = request.batch or session.usual_batch(found.match.family.id, set_up.device)
    of_fid = against.notes(len(pairs)) if against else ()
    notes = tuple(dict.fromkeys((*(note for one in planned for note in one.notes), *of_fid)))
    return Job(
        request, set_up, planned[0], criterion, subjects, pairs, batch, scorer, scorer_device, outputs, notes, against
    )


def count(job: Job, progress: Progress) -> poa.Counted:
    """Read the weights, once for all sizes, and find the thresholds."""
    plans = [subject.plan for subject in job.subjects]
    job.criterion.calibrated(progress)  # whose hash is told in the end
    counted = poa.Counted(plans, job.easel.base.name, progress, criterion=job.criterion, device=job.easel.device)
    for subject in job.subjects:
        if len(subject.drawn) > 1:
            counted.source(subject.plan)  # what has to be read again for it is read here
    return counted


def run(job: Job, counted: poa.Counted, progress: Progress) -> Evaluation:
    """Open the base once, draw with it, and score."""
    from crdiff_export.evaluate import measure

    return measure.take(job, counted, progress)


def write(job: Job, found: Evaluation) -> None:
    """Write the files that were asked for; each appears when it is complete."""
    files.write(found, job.outputs, replace=job.request.force)


def _subjects(planned: list[Plan], native: Size, request: EvaluateRequest) -> list[Subject]:
    """Every size with its ratios; then, of each set of ratios that is not for the native size, a look at that size."""
    made = [Subject.of_plan(one.size, one, request.weights) for one in planned]
    if request.native:
        at_home = {(subject.ratios, subject.kinds) for subject in made if subject.size == native}
        for one in planned:
            subject = Subject.of_plan(native, one, request.weights)
            if len(subject.drawn) > 1 and (subject.ratios, subject.kinds) not in at_home:
                at_home.add((subject.ratios, subject.kinds))
                made.append(subject)
    return made


def _check(request: EvaluateRequest) -> None:
    """Refuse what the request alone shows to be impossible."""
    if not request.sizes:
        raise OptionError("there is no size", "Give --res.")
    request_checks.check(request, request.prompts)
    for weight in request.weights:
        recipe.check_poa_weight("the POA weight", weight)
    if request.pictures < 1 or (request.limit is not None and request.limit < 1):
        raise OptionError("there is nothing to draw", "Ask for one picture and one prompt at least.")
    if request.seed < 0:
        raise OptionError("a seed is negative", "Count from 0.")


__all__ = ["EvaluateRequest", "Evaluation", "Job", "Scorer", "Subject", "count", "evaluate", "prepare", "run", "write"]
