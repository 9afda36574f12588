"""The story of an evaluation: prepare, measure the thresholds, draw and score, write."""

from collections.abc import Iterator, Sequence

from crdiff_export.errors import OptionError
from crdiff_export.evaluate import beside, fid, files, scorers
from crdiff_export.evaluate.comparison import DENSE, Pair, check_request
from crdiff_export.evaluate.files import write
from crdiff_export.evaluate.render import draw
from crdiff_export.evaluate.request import EvaluateJob, EvaluateRequest, Subject
from crdiff_export.evaluate.results import Evaluation
from crdiff_export.hub import bases
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
    write(evaluation)
    return evaluation


def prepare(request: EvaluateRequest) -> EvaluateJob:
    """Check a request and plan the work, from names and headers alone.

    Args:
        request: What to evaluate.

    Returns:
        The job. No weight has been read yet, and nothing is refused later that could be refused now.

    Raises:
        OptionError: There is no size, or another option cannot be.
        CrdiffError: The request cannot be met.
    """
    if not request.sizes:
        raise OptionError(*request_checks.NO_SIZE)
    check_request(request)
    pipelines.check_packages(offload=False)
    outputs = files.check(request.outputs, force=request.force)
    scorer = scorers.choose(request.scorer, request.base)
    pairs = _choose_pairs(request, scorer)
    criterion = CriterionChoice.of(request.criterion, request.calibration)
    base = drawing_setup.read_base(request)
    sizes = dict.fromkeys(request.sizes)
    plans = [drawing_setup.plan_export(base, request.export_request(size), criterion) for size in sizes]
    rivals = beside.parse(request.beside)
    reference = fid.choose(request.fid, request.fid_weights, len(pairs))
    request_checks.check_seeds(pairs[-1][1] + (len(pairs) if reference and reference.is_drawn else 0))
    drawing = drawing_setup.set_up(request, base, plans[0])
    beside.check(rivals, drawing.opening.pipeline.pipeline)
    from crdiff_export.sampling import session

    rival_notes = beside.rival_notes(rivals, sizes, drawing.native, drawing.opening.pipeline)
    notes = [*(note for plan in plans for note in plan.notes), *rival_notes]
    return EvaluateJob(
        request,
        drawing,
        plans[0],
        criterion,
        subjects=tuple(_subjects(plans, drawing.native, request)),
        pairs=pairs,
        batch=request.batch or session.usual_batch(drawing.opening.pipeline, drawing.device),
        scorer=scorer,
        scorer_device=session.choose_device(request.scorer_device or drawing.device, offload=False),
        outputs=outputs,
        notes=tuple(dict.fromkeys((*notes, *(reference.notes(len(pairs)) if reference else ())))),
        fid=reference,
        rivals=rivals,
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


def _choose_pairs(request: EvaluateRequest, scorer: str) -> tuple[Pair, ...]:
    """Give every picture of every prompt a seed of its own."""
    if not (request.prompts or request.base in bases.BUILT_IN):
        raise OptionError(*request_checks.NO_PROMPTS)
    texts = prompts.choose(request.prompts, request.limit, request.base)
    scorers.check_prompts(scorer, texts)
    pictures = [text for text in texts for _ in range(request.pictures)]
    return tuple((text, request.seed + number) for number, text in enumerate(pictures))


def _subjects(plans: Sequence[Plan], native: Size, request: EvaluateRequest) -> Iterator[Subject]:
    """Yield every size with its ratios; then the native size, with each set of ratios that is for another size."""
    subjects = [Subject.of_plan(plan.size, plan, request.weights) for plan in plans]
    yield from subjects
    if not request.native:
        return
    yielded = [(subject.ratios, subject.plan.kinds) for subject in subjects if subject.size == native]
    for plan in plans:
        subject = Subject.of_plan(native, plan, request.weights)
        if subject.weights != (DENSE,) and (subject.ratios, plan.kinds) not in yielded:
            yielded.append((subject.ratios, plan.kinds))
            yield subject
