"""The work on a device: one open pipeline draws every model at every size, and the scorer scores batch by batch."""

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from crdiff_export.evaluate import beside, comparison, fid, scorers
from crdiff_export.evaluate.comparison import DENSE, Renderer, black_note
from crdiff_export.evaluate.frechet import Moments
from crdiff_export.evaluate.request import EvaluateJob, Subject
from crdiff_export.evaluate.results import Evaluation, ModelScores
from crdiff_export.formats.text import plural
from crdiff_export.progress import Progress
from crdiff_export.prune import criterion_choice
from crdiff_export.sampling import poa
from crdiff_export.sizes import Size
from crdiff_export.verify.inspect import provenance

if TYPE_CHECKING:
    from PIL.Image import Image

    from crdiff_export.sampling.session import Session, Style

# How many pictures of a model at a size are kept to be shown: more do not fit in memory, nor on a page.
SHOWN = 64
ADVICE = "a smaller --batch, or --scorer-device cpu"


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
    from crdiff_export.sampling.session import Placement, open_session

    drawing = job.drawing
    placement = Placement(drawing.device, drawing.dtype, advice=ADVICE)
    with ExitStack() as stack:
        scorer = scorers.load(job.scorer, job.scorer_device)
        stack.callback(scorer.close)
        fingerprint = scorer.fingerprint()
        meter = fid.open_meter(job.fid, job.scorer_device, progress)
        session = stack.enter_context(open_session(drawing.opening, placement, drawing.base.name))
        renderer = Renderer(session, job.request, progress, job.batch)
        scoring = _ScoringRenderer(job, renderer, scorer, meter, counted)
        models = scoring.draw_all()
        facts = comparison.printable_facts(_facts(job, renderer.style(drawing.native), session))
        notes = (*scoring.notes, *black_note(scoring.black, job.pictures - len(job.reference_pairs)))
        record = meter.record(len(job.pairs)) if meter else None
        return Evaluation(job, scorer.name, fingerprint, models, facts, notes, record)


class _ScoringRenderer:
    """Draws every model, and shows the pictures to the scorer and to the FID meter."""

    def __init__(
        self, job: EvaluateJob, renderer: Renderer, scorer: scorers.Scorer, meter: fid.FidMeter | None,
        counted: poa.BaseRanking,
    ) -> None:  # fmt: skip
        self._job, self._renderer, self._scorer, self._meter, self._counted = job, renderer, scorer, meter, counted
        self._dense: dict[Size, ModelScores] = {}
        self.notes: dict[str, None] = {}  # what the ranking has shown, each once
        self.black = 0
        self._checked: set[str] = set()  # layers whose weights in memory are known to be those that were counted

    def draw_all(self) -> tuple[ModelScores, ...]:
        job = self._job
        dense = len({subject.size for subject in job.subjects}) + bool(job.reference_pairs)
        pruned = [weight for subject in job.subjects for weight in subject.weights if weight != DENSE]
        steps = self._renderer.style(job.drawing.native).steps
        rivals = [(rival, job.setting(subject)) for subject in job.subjects for rival in job.rivals_of(subject)]
        beside.check_opening(rivals, self._renderer.session)
        more = sum(beside.passes(rival, setting, steps) for rival, setting in rivals)
        self._renderer.start(len(job.pairs), [DENSE] * dense + pruned, job.drawing.native, more)
        for _, images, _ in self._renderer.draw(job.reference_pairs, job.drawing.native, DENSE):
            assert self._meter
            self._meter.add(self._meter.reference, images)
        models = [self._draw_model(subject, weight) for subject in job.subjects for weight in subject.weights]
        # Last of all: a user's function may change the pipeline, but none of the numbers of the models.
        for rival in job.rivals:
            models += [self._draw_rival(subject, rival) for subject in job.subjects if rival in job.rivals_of(subject)]
        return tuple(models)

    def _draw_rival(self, subject: Subject, rival: beside.Rival) -> ModelScores:
        with beside.opened(rival, self._renderer.session, self._job.setting(subject)) as draw:
            return replace(self._score(subject, DENSE, draw), beside=rival.name)

    def _draw_model(self, subject: Subject, weight: float) -> ModelScores:
        """Draw and score one model; the dense model of a size is drawn once for all subjects."""
        if weight == DENSE and subject.size in self._dense:
            return replace(self._dense[subject.size], subject=subject)
        with self._pruned(subject, weight):
            model = self._score(subject, weight)
        if weight == DENSE:
            self._dense[subject.size] = model
        return model

    def _score(self, subject: Subject, weight: float, draw: beside.Draw | None = None) -> ModelScores:
        """Draw every pair with the pipeline as it is now, and score the pictures."""
        seconds = 0.0
        scores: list[scorers.Score] = []
        shown: list[bytes] = []
        moments = Moments()
        for pairs, images, took in self._renderer.draw(self._job.pairs, subject.size, weight, draw):
            seconds += took
            self.black += sum(not image.getbbox() for image in images)
            scores += self._scorer.score(images, [prompt for prompt, _ in pairs])
            shown += map(_png, images[: SHOWN - len(shown)])
            if self._meter:
                self._meter.add(moments, images)
        distance = self._meter.reference.distance(moments) if self._meter else None
        return ModelScores(subject, weight, tuple(scores), tuple(shown), seconds, distance)

    def _pruned(self, subject: Subject, weight: float) -> AbstractContextManager[object]:
        """Prune the open model inside the block, unless the weight is the dense model's."""
        if weight == DENSE:
            return nullcontext()
        source = self._counted.source(subject.plan)
        self.notes |= dict.fromkeys(source.notes)
        layers = set(source.masks.diffusers)
        check = not layers <= self._checked
        self._checked |= layers
        session = self._renderer.session
        return poa.enabled(session.pipe, source, weight, check=check, keep=session.has_room())


def _png(image: "Image") -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def _facts(job: EvaluateJob, style: "Style", session: "Session") -> Iterator[tuple[str, str]]:
    """Yield what everyone who sees the numbers should know."""
    request, drawing, criterion = job.request, job.drawing, job.criterion
    yield "base", f"{drawing.base.name} ({job.plan.match.family.title}), native {drawing.native}"
    yield "scorer", scorers.public(job.scorer)
    prompts = len({prompt for prompt, _ in job.pairs})
    yield "pictures", f"{plural(prompts, 'prompt')}, {request.pictures} of each, seeds from {request.seed}"
    for subject in job.subjects:
        if not subject.is_native_check:
            variant = subject.plan.variant
            origin = provenance(variant.provenance, variant.source, variant.borrowed_from)
            yield f"ratios for {subject.plan.size}", f"{comparison.ratios_text(subject.plan)}: {origin}"
    if criterion.name != criterion_choice.MAGNITUDE:
        size = f", calibrated at {criterion.calibration.size}" if criterion.calibration else ""
        yield "criterion", criterion.name + size
    yield from comparison.sampling_facts(style, session)
    targets = [subject for subject in job.subjects if not subject.is_native_check]
    for number, subject in enumerate(targets):
        for rival, (name, text) in zip(job.rivals, beside.facts(job.rivals, job.setting(subject)), strict=True):
            if rival.kind == "two-pass" and len(targets) > 1:
                yield f"{name} at {subject.size}", text
            elif not number:
                yield name, text
    of = "prompts" if prompts > 1 else "the pictures of this one prompt, which says nothing about others"
    yield "intervals", f"95 % each, so that one of 20 misses; over {of}; differences are paired, picture by picture"
    if job.fid:
        yield "FID", job.fid.describe(drawing.native)
    yield from comparison.closing_facts(job.notes, drawing, f", {job.batch} at once")
