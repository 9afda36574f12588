"""The objective of a search: an open pipeline, pruned on the fly, and a scorer, on the same pairs every time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version

from crdiff_export.bake.metadata import tool_version
from crdiff_export.errors import PreviewError
from crdiff_export.evaluate import evidence, scorers
from crdiff_export.formats.hashing import hash_data_once
from crdiff_export.progress import Progress
from crdiff_export.prune.criterion_choice import MAGNITUDE
from crdiff_export.prune.plan import with_ratios
from crdiff_export.sampling import fingerprint as pipeline_fingerprint
from crdiff_export.sampling import pipelines, poa
from crdiff_export.sampling.session import Placement, Session, Style, open_session
from crdiff_export.search.prepare import SearchJob
from crdiff_export.search.space import Candidate


@contextmanager
def open_objective(job: SearchJob, progress: Progress, on_step: Callable[[], None]) -> "Iterator[PictureObjective]":
    """Hash and count the weights of a job's base, and open its pipeline and scorer until the block ends.

    Args:
        job: The job of the search.
        progress: Told of the reading of the base.
        on_step: Called after every step of sampling.

    Yields:
        The objective.

    Raises:
        PreviewError: The pipeline cannot be opened, or memory is short.
        CrdiffError: The scorer cannot be opened.
    """
    drawing = job.drawing
    job.criterion.calibrated(progress)  # whose hash the fingerprint has
    counted = poa.BaseRanking([job.plan], drawing.base.name, progress, criterion=job.criterion, device=drawing.device)
    base_hash = _hash_base(job, progress)
    progress.stage("opening", 0)  # so that its time is not taken for that of the counting
    scorer = scorers.load(job.scorer, job.scorer_device)
    try:
        placement = Placement(drawing.device, drawing.dtype)
        with open_session(drawing.opening, placement, drawing.base.name) as pipeline:
            yield PictureObjective(job, counted, base_hash, pipeline, scorer, on_step)
    except PreviewError as error:
        if not error.message.endswith("not enough memory"):
            raise
        raise PreviewError(error.message, "Give a smaller --batch, --scorer-device cpu or --dtype fp16.") from error
    finally:
        scorer.close()


class PictureObjective:
    """Scores pictures that the model of a candidate draws; `fingerprint` is all that the scores depend on."""

    def __init__(
        self, job: SearchJob, counted: poa.BaseRanking, base_hash: str, pipeline: Session, scorer: scorers.Scorer,
        on_step: Callable[[], None],
    ) -> None:  # fmt: skip
        request = job.request
        self.pairs, self.batch = len(job.pairs.search), job.batch
        self.counted = counted
        self._job, self._session, self._scorer = job, pipeline, scorer
        self._on_step = on_step
        self._style = pipeline.style(request.size, request.steps, request.guidance, request.negative)
        self.fingerprint = make_fingerprint(job, base_hash, pipeline, scorer, self._style)
        self._source: tuple[Candidate, poa.Source] | None = None  # of the latest candidate: a trial asks several times
        self._checked: set[str] = set()  # layers whose weights in memory are those that were counted

    def scores(self, candidate: Candidate, pairs: Sequence[int]) -> list[float]:
        prompts, seeds = map(list, zip(*(self._job.pairs.search[pair] for pair in pairs), strict=True))
        with self._pruned(candidate):
            images = self._session.draw(prompts, seeds, self._style, self._on_step)
        return [score.value for score in self._scorer.score(images, prompts)]

    @contextmanager
    def _pruned(self, candidate: Candidate) -> Iterator[None]:
        """Turn the pipeline into the candidate's model until the block ends."""
        source = self._source_of(candidate)
        if source is None:
            yield
            return
        weight = 1.0 if candidate.poa_weight is None else candidate.poa_weight
        layers = set(source.masks.diffusers)
        check, keep = not layers <= self._checked, self._session.has_room()
        with poa.enabled(self._session.pipe, source, weight, check=check, keep=keep):
            self._checked |= layers
            yield

    def _source_of(self, candidate: Candidate) -> poa.Source | None:
        """Look up the thresholds of a candidate; None where not a single weight is pruned."""
        if self._source and self._source[0] == candidate:
            return self._source[1]
        plan = with_ratios(self._job.plan, candidate.by_group)
        if not any(scope.rank for scope in plan.scopes):
            return None
        self._source = candidate, self.counted.source(plan)
        return self._source[1]


def make_fingerprint(
    job: SearchJob, base: str, pipeline: Session, scorer: scorers.Scorer, style: Style
) -> dict[str, str]:
    """Return everything the scores depend on, under names for error messages."""
    pipe = pipeline.pipe
    criterion, told = job.criterion, pipelines.told_size(pipeline.usage)
    return {
        "base": base,
        "family": job.plan.match.family.id,
        "size": str(style.size),
        "targets": ", ".join(job.plan.kinds),
        **({} if criterion.name == MAGNITUDE else {"criterion": criterion.name}),
        **({"calibration": criterion.calibration.hash} if criterion.calibration else {}),
        "steps": str(style.steps),
        "guidance": repr(style.guidance),
        "negative": style.negative or "none",
        **({"told size": str(told)} if told else {}),
        "prompts and seeds": evidence.pairs_digest(job.pairs.search),
        "dtype": job.drawing.dtype,
        "device": job.drawing.device.partition(":")[0],
        "batch": str(job.batch),
        "other parts": pipeline_fingerprint.other_parts(pipe, getattr(pipe, job.drawing.opening.pipeline.folder)),
        "scheduler": pipeline_fingerprint.scheduler(pipe),
        "crdiff": tool_version(),
        **{package: version(package) for package in ("diffusers", "torch", "transformers")},
        **{f"scorer {key}": str(value) for key, value in scorer.fingerprint().items()},
    }


def _hash_base(job: SearchJob, progress: Progress) -> str:
    """Hash the base's data sections: one of a file, several of shards."""
    files = job.plan.checkpoint.files
    progress.stage("hashing", sum(file.data_size for file in files))
    hashes = [hash_data_once(file, progress, rehash=job.request.rehash) for file in files]
    return f"sha256:{hashes[0]}" if len(hashes) == 1 else pipeline_fingerprint.digest("".join(hashes).encode())
