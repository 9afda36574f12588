"""The story of a preview: prepare, measure the thresholds, draw, write."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from crdiff_export.errors import CrdiffError, OptionError, PoaError, PreviewError
from crdiff_export.evaluate import beside
from crdiff_export.evaluate.comparison import DENSE, check_request
from crdiff_export.evaluate.preview import files
from crdiff_export.evaluate.preview.files import write
from crdiff_export.evaluate.preview.render import draw
from crdiff_export.evaluate.preview.request import Preview, PreviewJob, PreviewRequest
from crdiff_export.evaluate.request import Subject
from crdiff_export.formats.text import printable
from crdiff_export.hub import bases
from crdiff_export.models import demo
from crdiff_export.models.demo.scenes import EXAMPLE, Scene
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import criterion_choice
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.sampling import drawing_setup, pipelines, poa, request_checks
from crdiff_export.sizes import check_grid
from crdiff_export.verify import open_baked


def preview(request: PreviewRequest, progress: Progress | None = None) -> Preview:
    """Draw what a base, its pruned model and POA make of the same prompts and noise, and write the pictures.

    Args:
        request: What to draw.
        progress: Is told how far the work is.

    Returns:
        All pictures.

    Raises:
        CrdiffError: The request cannot be met, or something failed; no file is written then.
    """
    job, progress = prepare(request), progress or Silent()
    return write(draw(job, measure(job, progress), progress))


def prepare(request: PreviewRequest) -> PreviewJob:
    """Check a request and plan the work, from names and headers alone.

    Args:
        request: What to draw.

    Returns:
        The job. No weight has been read yet, and nothing is refused later that could be refused now.

    Raises:
        PreviewError: The baked file is of another family.
        OptionError: Nothing is pruned.
        CrdiffError: Something else of the request cannot be met.
    """
    _check(request)
    pipelines.check_packages(offload=request.offload)
    criterion = None if request.baked else CriterionChoice.of(request.criterion, request.calibration)
    base = drawing_setup.read_base(request)
    family = base.match.family
    if request.baked:
        baked = open_baked(request.baked.expanduser())
        if baked.plan.match.family != family:
            raise PreviewError(
                f"{request.baked}: is of {baked.plan.match.family.title}, {request.base} is {family.title}",
                "Give the base that the file was made from; `crdiff inspect` names it.",
            )
        # The file itself says that it is for the size that it was pruned for.
        plan = replace(baked.plan, native=baked.stamp.native)
    else:
        assert request.size
        baked, plan = None, drawing_setup.plan_export(base, request.export_request(request.size), criterion)
    subject = Subject.of_plan(request.size or plan.size, plan, request.weights)
    check_grid(subject.size, family.grid, family.title)
    if subject.weights == (DENSE,):
        raise OptionError("all ratios are 0, so there is no pruned model to look at", "Give --ratio, or a --recipe.")
    rivals = beside.parse(request.beside)
    outputs = files.choose(request, subject, base.base.stem or base.checkpoint.stem)
    drawing = drawing_setup.set_up(request, base, plan, offload=request.offload)
    beside.check(rivals, drawing.opening.pipeline.pipeline)
    config = drawing.opening.pipeline.config
    in_demo_words = demo_notes(request.prompts, config) if config in bases.BUILT_IN else ()
    rival_notes = beside.rival_notes(rivals, [subject.size], drawing.native, drawing.opening.pipeline)
    notes = (*(() if baked else plan.notes), *rival_notes, *in_demo_words)
    return PreviewJob(request, drawing, subject, baked, outputs, notes, rivals)


def measure(job: PreviewJob, progress: Progress) -> poa.Source:
    """Find the thresholds or masks of the pruned model as an export does, or take them from the baked file.

    Args:
        job: A prepared job.
        progress: Is told how much has been read.

    Returns:
        What `draw` prunes the model with.

    Raises:
        CrdiffError: A weight cannot be read or ranked.
    """
    if job.request.baked:
        return poa.from_baked(job.request.baked)
    return poa.from_recipe(job.request.export_request(job.subject.size), progress)


def demo_notes(prompts: Sequence[str], name: str = demo.DEMO) -> Iterator[str]:
    """Yield a note for the first prompt that a demo model does not know, or has not learnt."""
    learnt = demo.RELATIONS[name]
    for prompt in prompts:
        try:
            scene = Scene.parse(prompt)
            if scene.relation and scene.relation not in learnt:
                yield f'the demo model has not learnt what "{scene.relation}" means, only: {", ".join(learnt)}'
                return
        except CrdiffError as error:
            yield printable(f'{error.message}; it draws scenes like "{EXAMPLE}"', limit=1000)
            return


def _check(request: PreviewRequest) -> None:
    """Refuse what the request alone shows to be impossible."""
    if not request.prompts:
        raise OptionError(*request_checks.NO_PROMPTS)
    check_request(request)
    if not request.seeds or not all(0 <= seed < request_checks.SEEDS for seed in request.seeds):
        last = request_checks.SEEDS - 1
        raise OptionError("a seed is missing or out of range", f"Give --seed a number from 0 to {last}.")
    if request.baked and (request.recipe or request.ratio is not None or request.ratios):
        hint = "Leave out --recipe, --ratio, --down, --mid and --up, or leave out --baked."
        raise OptionError("--baked has its own ratios", hint)
    if request.baked and (request.calibration or request.criterion != criterion_choice.MAGNITUDE):
        raise OptionError("--baked is pruned already", "Leave out --criterion and --calibration, or leave out --baked.")
    if not request.baked and request.size is None:
        raise OptionError(*request_checks.NO_SIZE)
    try:
        poa.Schedule(1.0, request.start, request.stop)
    except PoaError as error:
        raise OptionError(error.message, error.hint) from error
