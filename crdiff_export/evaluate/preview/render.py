"""The pictures of a preview: every column drawn with one open pipeline."""

import time
from typing import TYPE_CHECKING

from crdiff_export.evaluate.preview.wording import Column, Picture, Taken
from crdiff_export.progress import Progress
from crdiff_export.sampling import poa
from crdiff_export.sampling.poa import Schedule
from crdiff_export.sampling.session import Place, Session, session

if TYPE_CHECKING:
    from crdiff_export.evaluate.preview import Job


def take(job: "Job", source: poa.Source, progress: Progress) -> Taken:
    """Every picture, row by row; PreviewError where the pipeline cannot be opened or the memory is too small."""
    family, easel = job.plan.match.family.id, job.easel
    # A single small picture is drawn no faster by several threads, and on a busy machine much slower.
    place = Place(easel.device, easel.dtype, job.request.offload, threads=1 if family == "demo" else None)
    with session(easel.opening, family, place, easel.base.name) as opened:
        return _Camera(job, opened, progress).take(source)


class _Camera:
    """A pipeline and how it is called."""

    def __init__(self, job: "Job", opened: Session, progress: Progress) -> None:
        request = job.request
        self._job, self._session, self._progress = job, opened, progress
        self._style = opened.style(job.size, request.steps, request.guidance, request.negative)

    def take(self, source: poa.Source) -> Taken:
        """All pictures. Those of the base come last and without POA: what does not fit it is refused before any."""
        job = self._job
        rows = len(job.request.prompts) * len(job.request.seeds)
        self._progress.stage("drawing", rows * sum(map(self._passes, job.columns)), "passes")
        dense, *others = job.columns
        columns = []
        with poa.enabled(self._session.pipe, source, 1.0) as on:
            for column in others:
                on.schedule = self._schedule(column)
                columns.append(self._column(column))
        columns.insert(0, self._column(dense))
        pictures = tuple(picture for row in zip(*columns, strict=True) for picture in row)
        return Taken(pictures, self._style.steps, self._style.guidance, self._session.scheduler)

    def _schedule(self, column: Column) -> Schedule:
        request = self._job.request
        return Schedule(column.weight) if column.weight == 1 else Schedule(column.weight, request.start, request.stop)

    def _passes(self, column: Column) -> int:
        """Calls of the model for a picture: two a step where POA is at work."""
        request = self._job.request
        twice = 0 if column.weight in (0, 1) else round(self._style.steps * (request.stop - request.start))
        return self._style.steps + twice

    def _column(self, column: Column) -> list[Picture]:
        request = self._job.request
        return [self._picture(column, prompt, seed) for prompt in request.prompts for seed in request.seeds]

    def _picture(self, column: Column, prompt: str, seed: int) -> Picture:
        left = self._passes(column)
        each = -(-left // self._style.steps)

        def step() -> None:
            nonlocal left
            done = min(each, left)
            left -= done
            self._progress.advance(done)

        began = time.monotonic()
        (image,) = self._session.draw([prompt], [seed], self._style, step)
        self._progress.advance(left)
        return Picture(column, prompt, seed, image, time.monotonic() - began)
