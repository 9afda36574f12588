"""The pictures of a preview: every column drawn with one open pipeline."""

from crdiff_export.evaluate.comparison import PRUNED, Renderer, black_note
from crdiff_export.evaluate.preview import report_text
from crdiff_export.evaluate.preview.request import Preview, PreviewJob, PreviewPicture
from crdiff_export.progress import Progress
from crdiff_export.sampling import poa
from crdiff_export.sampling.poa import Schedule
from crdiff_export.sampling.session import Placement, open_session


def draw_all(job: PreviewJob, source: poa.Source, progress: Progress) -> Preview:
    """Draw every picture.

    Args:
        job: The job.
        source: The thresholds or masks of the pruned model.
        progress: Is told the passes of the model.

    Returns:
        All pictures, row by row.

    Raises:
        PreviewError: The pipeline cannot be opened, or the memory is too small.
    """
    family, drawing, request = job.plan.match.family.id, job.drawing, job.request
    # A single small picture is drawn no faster by several threads, and on a busy machine much slower.
    place = Placement(drawing.device, drawing.dtype, request.offload, threads=1 if family == "demo" else None)
    pairs = [(prompt, seed) for prompt in request.prompts for seed in request.seeds]
    with open_session(drawing.opening, family, place, drawing.base.name) as pipeline:
        renderer = Renderer(pipeline, request, progress)
        renderer.start(len(pairs), job.weights, job.size)

        def draw_column(weight: float) -> list[PreviewPicture]:
            return [
                PreviewPicture(weight, prompt, seed, image, seconds)
                for ((prompt, seed),), (image,), seconds in renderer.draw(pairs, job.size, weight)
            ]

        dense, *others = job.weights
        columns = []
        # The dense pictures come last: a base that the thresholds do not fit is refused before any picture.
        with poa.enabled(pipeline.pipe, source, PRUNED) as switch:
            for weight in others:
                ends = () if weight == PRUNED else (request.start, request.stop)
                switch.schedule = Schedule(weight, *ends)
                columns.append(draw_column(weight))
        rows = zip(draw_column(dense), *columns, strict=True)
        pictures = tuple(picture for row in rows for picture in row)
        style = renderer.style(job.size)
        facts = report_text.facts(job, style, pipeline)
        black = sum(not picture.image.getbbox() for picture in pictures)
        notes = (*source.notes, *black_note(black, len(pictures)))
        return Preview(job, pictures, style.steps, style.guidance, pipeline.scheduler, facts, notes)
