"""The work on a device: one open pipeline draws every model at every size, and the scorer scores batch by batch."""

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from crdiff_export.bake.metadata import tool_version
from crdiff_export.evaluate import fid, scorers
from crdiff_export.evaluate.findings import DENSE, PRUNED, Drawn, Evaluation, Subject
from crdiff_export.formats.text import printable
from crdiff_export.progress import Progress
from crdiff_export.prune import criterion_choice
from crdiff_export.sampling import poa
from crdiff_export.sampling.session import Place, Session, Style, session
from crdiff_export.sizes import Size
from crdiff_export.verify.inspect import provenance

if TYPE_CHECKING:
    from PIL.Image import Image

    from crdiff_export.evaluate import Job

# Pictures of a model at a size that are there to be shown, the first ones: more do not fit in memory, nor on a page.
KEPT = 64
ADVICE = "a smaller --batch, or --scorer-device cpu"


def take(job: "Job", counted: poa.Counted, progress: Progress) -> Evaluation:
    """Every picture and its score; a CrdiffError where the pipeline or the scorer cannot be opened, or fails."""
    request, family = job.request, job.plan.match.family.id
    easel, criterion = job.easel, job.criterion
    scorer = scorers.load(job.scorer, job.scorer_device)
    try:
        fingerprint = scorer.fingerprint()
        meter = fid.opened(job.fid, job.scorer_device, progress)
        with session(easel.opening, family, Place(easel.device, easel.dtype, advice=ADVICE), easel.base.name) as opened:
            studio = _Studio(job, opened, scorer, meter, counted, progress)
            drawn = studio.take()
            style = opened.style(easel.native, request.steps, request.guidance, request.negative)
            facts = tuple((name, printable(text, limit=1000)) for name, text in _facts(job, style, opened.scheduler))
        notes = (*studio.notes, *_warnings(drawn))
        return Evaluation(
            easel.base.name,
            family,
            easel.native,
            job.pairs,
            request.pictures,
            scorer.name,
            fingerprint,
            drawn,
            facts,
            notes,
            meter.record(len(job.pairs)) if meter else None,
            criterion.name,
            criterion.calibration.hash if criterion.calibration else None,
        )
    finally:
        scorer.close()


class _Studio:
    """An open pipeline, and who looks at its pictures."""

    def __init__(
        self, job: "Job", opened: Session, scorer: scorers.Scorer, meter: fid.Meter | None, counted: poa.Counted,
        progress: Progress,
    ) -> None:  # fmt: skip
        self._job, self._session, self._scorer, self._meter = job, opened, scorer, meter
        self._counted, self._progress = counted, progress
        self._dense: dict[Size, Drawn] = {}
        self.notes: dict[str, None] = {}  # what the ranking has shown, each once
        self._checked: set[str] = set()  # layers whose weights in memory are known to be those that were counted

    def take(self) -> tuple[Drawn, ...]:
        job = self._job
        sizes = {subject.size for subject in job.subjects}
        others = [weight for subject in job.subjects for weight in subject.drawn if weight != DENSE]
        steps = self._style(job.easel.native).steps * len(job.pairs)
        reference = bool(job.reference_pairs)
        passes = len(sizes) + reference + sum(1 if weight == PRUNED else 2 for weight in others)
        self._progress.stage("drawing", steps * passes, "passes")
        if reference:
            self._refer()
        return tuple(self._model(subject, weight) for subject in job.subjects for weight in subject.drawn)

    def _refer(self) -> None:
        """Draw what all models' pictures are compared with as sets."""
        assert self._meter
        moments = self._meter.start()
        for _, _, images in self._pictures(self._job.reference_pairs, self._job.easel.native, 1):
            self._meter.see(moments, images)
        self._meter.refer(moments)

    def _model(self, subject: Subject, weight: float) -> Drawn:
        """One model's pictures of a subject; those of the dense model are the same whatever is pruned otherwise."""
        if weight == DENSE and subject.size in self._dense:
            known = self._dense[subject.size]
            return replace(known, subject=subject, black=0)
        amplified: Any = nullcontext()
        if weight != DENSE:
            source = self._counted.source(subject.plan)
            self.notes |= dict.fromkeys(source.notes)
            layers = set(source.masks.diffusers)
            check, keep = not layers <= self._checked, self._session.has_room()
            amplified = poa.enabled(self._session.pipe, source, weight, check=check, keep=keep)
            self._checked |= layers
        seconds, black = 0.0, 0
        scores: list[scorers.Score] = []
        images: list[bytes] = []
        moments = self._meter.start() if self._meter else None
        with amplified:
            passes = 1 if weight in (DENSE, PRUNED) else 2
            for prompts, took, found in self._pictures(self._job.pairs, subject.size, passes):
                seconds += took
                black += sum(not image.getbbox() for image in found)
                scores += self._scorer.score(found, prompts)
                images += map(_packed, found[: KEPT - len(images)])
                if self._meter and moments:
                    self._meter.see(moments, found)
        apart = self._meter.distance(moments) if self._meter and moments else None
        drawn = Drawn(subject, weight, tuple(scores), tuple(images), seconds, black, apart)
        if weight == DENSE:
            self._dense[subject.size] = drawn
        return drawn

    def _pictures(
        self, pairs: Sequence[tuple[str, int]], size: Size, passes: int
    ) -> Iterator[tuple[list[str], float, "list[Image]"]]:
        """Some prompts, the seconds that drawing them took, and their pictures, until all pairs are drawn."""
        for start in range(0, len(pairs), self._job.batch):
            batch = pairs[start : start + self._job.batch]
            prompts, seeds = [prompt for prompt, _ in batch], [seed for _, seed in batch]
            began = time.monotonic()
            found = self._session.draw(
                prompts, seeds, self._style(size), partial(self._progress.advance, passes * len(batch))
            )
            yield prompts, time.monotonic() - began, found

    def _style(self, size: Size) -> Style:
        request = self._job.request
        return self._session.style(size, request.steps, request.guidance, request.negative)


def _warnings(drawn: Sequence[Drawn]) -> Iterator[str]:
    """What is to be said of the pictures before anybody wonders."""
    if black := sum(one.black for one in drawn):
        yield f"{black} pictures are all black: try another --dtype, such as bf16 or fp32"


def _packed(image: Any) -> bytes:
    """A picture as a PNG."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def _facts(job: "Job", style: Style, scheduler: str) -> Iterator[tuple[str, str]]:
    """What everybody who sees the numbers should know."""
    request, easel, criterion = job.request, job.easel, job.criterion
    yield "base", f"{easel.base.name} ({job.plan.match.family.title}), native {easel.native}"
    yield "scorer", scorers.public(job.scorer)
    prompts = len({prompt for prompt, _ in job.pairs})
    yield "pictures", f"{prompts} prompts, {request.pictures} of each, seeds from {request.seed}"
    for subject in job.subjects:
        if not subject.is_look:
            ratios = ", ".join(f"{group} {ratio:g}" for group, ratio in subject.ratios)
            yield (
                f"ratios for {subject.of}",
                f"{ratios}: {provenance(subject.variant.provenance, subject.variant.source)}",
            )
    if criterion.name != criterion_choice.MAGNITUDE:
        yield (
            "criterion",
            criterion.name + (f", calibrated at {criterion.calibration.size}" if criterion.calibration else ""),
        )
    yield "sampling", f"{style.steps} steps of {scheduler}, guidance {style.guidance:g}"
    if style.negative:
        yield "negative", style.negative
    of = "prompts" if prompts > 1 else "the pictures of this one prompt, which says nothing about others"
    yield "intervals", f"95 % each, so that one of 20 misses; over {of}; differences are paired, picture by picture"
    if job.fid:
        yield "FID", job.fid.fact(easel.native)
    for note in job.notes:
        yield "note", note
    yield "drawn on", f"{easel.device}, {easel.dtype}, {job.batch} at once"
    yield "made by", f"crdiff {tool_version()}, diffusers {version('diffusers')}, torch {version('torch')}"
