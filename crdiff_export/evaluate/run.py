"""The story of an evaluation: prepare, measure the thresholds, draw and score, write."""

from collections.abc import Iterator, Sequence

from crdiff_export.errors import OptionError
from crdiff_export.evaluate import fid, files, scorers
from crdiff_export.evaluate.comparison import DENSE, Pair, check_request
from crdiff_export.evaluate.request import EvaluateJob, EvaluateRequest
from crdiff_export.evaluate.results import Evaluation, Subject
from crdiff_export.hub import bases
from crdiff_export.models.demo.scenes import Scene
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan
from crdiff_export.sampling import drawing_setup, pipelines, poa, prompts, request_checks
from crdiff_export.sizes import Size


def evaluate(request: EvaluateRequest, progress: Progress | None = None) -> Evaluation:
    """Evaluate a pruned model: draw it, its base and POA from the same noise, score the pictures, write the files.

    Args:
        request: What to evaluate.
        progress: Is told how far the work is.

    Returns:
        All scores, and what they show.

    Raises:
        CrdiffError: The request cannot be met, or something failed; no file is written then.
    """
    job, progress = prepare(request), progress or Silent()
    evaluation = draw(job, measure(job, progress), progress)
    write(job, evaluation)
    return evaluation


def prepare(request: EvaluateRequest) -> EvaluateJob:
    """Check a request and plan the work, from names and headers alone.

    Args:
        request: What to evaluate.

    Returns:
        The job. No weight has been read yet, and nothing is refused later that could be refused now.

    Raises:
        CrdiffError: The request cannot be met.
    """
    _check(request)
    pipelines.check_packages(offload=False)
    outputs = files.check(request.outputs, force=request.force)
    scorer = _choose_scorer(request)
    criterion = CriterionChoice.of(request.criterion, request.calibration)
    base = drawing_setup.read_base(request)
    sizes = dict.fromkeys(request.sizes)
    plans = [drawing_setup.plan_export(base, request.export_request(size), criterion) for size in sizes]
    pairs = _choose_pairs(request, scorer)
    reference = fid.choose(request.fid, request.fid_weights, len(pairs))
    request_checks.check_seeds(pairs[-1][1] + (len(pairs) if reference and reference.is_drawn else 0))
    drawing = drawing_setup.set_up(request, base, plans[0])
    from crdiff_export.sampling import session

    notes = [note for plan in plans for note in plan.notes]
    return EvaluateJob(
        request,
        drawing,
        plans[0],
        criterion,
        subjects=tuple(_subjects(plans, drawing.native, request)),
        pairs=pairs,
        batch=request.batch or session.usual_batch(base.match.family.id, drawing.device),
        scorer=scorer,
        scorer_device=session.choose_device(request.scorer_device or drawing.device, offload=False),
        outputs=outputs,
        notes=tuple(dict.fromkeys((*notes, *(reference.notes(len(pairs)) if reference else ())))),
        fid=reference,
    )


def measure(job: EvaluateJob, progress: Progress) -> poa.BaseRanking:
    """Read the weights once for all sizes and find the thresholds or masks of every pruned model.

    Args:
        job: A prepared job.
        progress: Is told how much has been read.

    Returns:
        What `draw` prunes the models with.

    Raises:
        CrdiffError: A weight cannot be read or ranked.
    """
    job.criterion.calibrated(progress)  # opens the calibration, whose hash the evidence names
    plans = [subject.plan for subject in job.subjects]
    counted = poa.BaseRanking(
        plans, job.drawing.base.name, progress, criterion=job.criterion, device=job.drawing.device
    )
    for subject in job.subjects:
        if len(subject.weights) > 1:
            counted.source(subject.plan)  # if the weights must be read again, it happens here
    return counted


def draw(job: EvaluateJob, counted: poa.BaseRanking, progress: Progress) -> Evaluation:
    """Open the base once, draw every model at every size with it, and score the pictures.

    Args:
        job: A prepared job.
        counted: What `measure` returned.
        progress: Is told the passes of the model.

    Returns:
        All scores, and what they show.

    Raises:
        CrdiffError: The pipeline or the scorer cannot be opened, or fails.
    """
    from crdiff_export.evaluate import render

    return render.draw_and_score(job, counted, progress)


def write(job: EvaluateJob, evaluation: Evaluation) -> None:
    """Write the requested files; each has its name only once it is complete.

    Args:
        job: The job that names the files.
        evaluation: What they show.

    Raises:
        BakeError: A file could not be written.
    """
    files.write(evaluation, job.outputs, replace=job.request.force)


def _check(request: EvaluateRequest) -> None:
    """Refuse what the request alone shows to be impossible."""
    if not request.sizes:
        raise OptionError("there is no size", "Give --res.")
    check_request(request)
    if request.pictures < 1 or (request.limit is not None and request.limit < 1):
        raise OptionError("there is nothing to draw", "Ask for one picture and one prompt at least.")
    if request.seed < 0:
        raise OptionError("a seed is negative", "Count from 0.")


def _choose_scorer(request: EvaluateRequest) -> str:
    is_demo = request.base == bases.BUILT_IN
    if request.scorer:
        scorers.check(request.scorer)
    elif not is_demo:
        names = ", ".join(scorers.names())
        raise OptionError("there is no scorer", f"Give --scorer: {names}, module:function or command:PROGRAM.")
    if not (request.prompts or is_demo):
        raise OptionError("there are no prompts", "Give --prompts FILE, one a line, or --prompt TEXT.")
    return request.scorer or "demo"


def _choose_pairs(request: EvaluateRequest, scorer: str) -> tuple[Pair, ...]:
    """Give every picture of every prompt a seed of its own."""
    texts = prompts.choose(request.prompts, request.limit)
    if "demo" in (name for _, name in scorers.parse(scorer)):
        for text in texts:
            Scene.parse(text)  # raises for a prompt that the demo's scorer cannot judge
    pictures = [text for text in texts for _ in range(request.pictures)]
    return tuple((text, request.seed + number) for number, text in enumerate(pictures))


def _subjects(plans: Sequence[Plan], native: Size, request: EvaluateRequest) -> Iterator[Subject]:
    """Yield every size with its ratios; then the native size, with each set of ratios that is for another size."""
    subjects = [Subject.of_plan(plan.size, plan, request.weights) for plan in plans]
    yield from subjects
    if not request.native:
        return
    known = [(subject.ratios, subject.plan.kinds) for subject in subjects if subject.size == native]
    for plan in plans:
        subject = Subject.of_plan(native, plan, request.weights)
        if subject.weights != (DENSE,) and (subject.ratios, plan.kinds) not in known:
            known.append((subject.ratios, plan.kinds))
            yield subject
