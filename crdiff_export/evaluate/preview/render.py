"""The pictures of a preview: every column drawn with one open pipeline."""

from crdiff_export.evaluate import beside
from crdiff_export.evaluate.comparison import DENSE, PRUNED, Renderer, black_note, model_name, printable_facts
from crdiff_export.evaluate.preview import report_text
from crdiff_export.evaluate.preview.request import Preview, PreviewJob, PreviewPicture
from crdiff_export.progress import Progress
from crdiff_export.sampling import poa
from crdiff_export.sampling.poa import Schedule


def draw(job: PreviewJob, source: poa.Source, progress: Progress) -> Preview:
    """Open the base once and draw every picture with it.

    Args:
        job: A prepared job.
        source: What `measure` returned.
        progress: Is told the passes of the model.

    Returns:
        All pictures, row by row; no file is written yet.

    Raises:
        PreviewError: The pipeline cannot be opened, or the memory is too small.
    """
    from crdiff_export.sampling.session import Placement, open_session

    drawing, request, subject = job.drawing, job.request, job.subject
    # A single small picture is drawn no faster by several threads, and on a busy machine much slower.
    threads = drawing.opening.pipeline.threads
    placement = Placement(drawing.device, drawing.dtype, request.offload, threads=threads)
    with open_session(drawing.opening, placement, drawing.base.name) as session:
        renderer = Renderer(session, request, progress)
        style = renderer.style(subject.size)
        beside.check_opening([(rival, job.setting) for rival in job.rivals], session)
        more = sum(beside.passes(rival, job.setting, style.steps) for rival in job.rivals)
        renderer.start(len(job.pairs), subject.weights, subject.size, more)

        def draw_column(weight: float, name: str = "", by: beside.Draw | None = None) -> list[PreviewPicture]:
            return [
                PreviewPicture(name or model_name(weight), weight, prompt, seed, image, seconds)
                for ((prompt, seed),), (image,), seconds in renderer.draw(job.pairs, subject.size, weight, by)
            ]

        dense, *others = subject.weights
        columns = []
        # The dense pictures come last: a base that the thresholds do not fit is refused before any picture.
        with poa.enabled(session.pipe, source, PRUNED) as switch:
            for weight in others:
                ends = () if weight == PRUNED else (request.start, request.stop)
                switch.schedule = Schedule(weight, *ends)
                columns.append(draw_column(weight))
        columns.insert(0, draw_column(dense))
        for rival in job.rivals:
            with beside.opened(rival, session, job.setting) as by:
                columns.append(draw_column(DENSE, rival.name, by))
        pictures = tuple(picture for row in zip(*columns, strict=True) for picture in row)
        facts = printable_facts(report_text.facts(job, style, session))
        black = sum(not picture.image.getbbox() for picture in pictures)
        notes = (*source.notes, *black_note(black, len(pictures)))
        return Preview(job, pictures, style, session.scheduler, facts, notes)
