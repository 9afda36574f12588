"""What judges a candidate: an open pipeline that is pruned on the fly, and a scorer, on the same pairs every time."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from crdiff_export.bake.metadata import tool_version
from crdiff_export.errors import PreviewError
from crdiff_export.evaluate import scorers
from crdiff_export.formats.hashing import hash_data
from crdiff_export.progress import Progress
from crdiff_export.prune import criterion_choice
from crdiff_export.prune.plan import Plan, with_ratios
from crdiff_export.sampling import fingerprint as parts
from crdiff_export.sampling import poa
from crdiff_export.sampling.session import Place, Session, Style, session
from crdiff_export.search.engine import Candidate
from crdiff_export.search.pairs import Some

if TYPE_CHECKING:
    from crdiff_export.search.tuning import Job


@dataclass(frozen=True, slots=True)
class Read:
    """A base that has been read once: the hash of its weights, and how its thresholds are looked up."""

    hash: str
    counted: poa.Counted


def read(job: "Job", progress: Progress) -> Read:
    """Hash and count a base's weights."""
    drawing = job.drawing
    job.criterion.calibrated(progress)  # whose hash the fingerprint has
    counted = poa.Counted([job.plan], drawing.base.name, progress, criterion=job.criterion, device=drawing.device)
    found = Read(_base(job, progress), counted)
    progress.stage("opening", 0)  # so that its time is not taken for that of the counting
    return found


@contextmanager
def opened(job: "Job", base: Read, on_step: Callable[[], None]) -> "Iterator[Objective]":
    """An objective, open until the block ends; a CrdiffError where the pipeline or the scorer cannot be opened."""
    drawing = job.drawing
    scorer = scorers.load(job.scorer, job.scorer_device)
    try:
        with session(
            drawing.opening, job.plan.match.family.id, Place(drawing.device, drawing.dtype), drawing.base.name
        ) as pipeline:
            request = job.request
            style = pipeline.style(request.size, request.steps, request.guidance, request.negative)
            prints = fingerprint(job, base.hash, pipeline, scorer, style)
            yield Objective(
                pipeline, scorer, base.counted, job.plan, style, job.pairs.search, job.batch, prints, on_step
            )
    except PreviewError as error:
        if not error.message.endswith("not enough memory"):
            raise
        raise PreviewError(error.message, "Give a smaller --batch, --scorer-device cpu or --dtype fp16.") from error
    finally:
        scorer.close()


class Objective:
    """The engine's `Objective`: the scores of some pairs, drawn by the model that a candidate stands for."""

    def __init__(
        self, pipeline: Session, scorer: scorers.Scorer, counted: poa.Counted, plan: Plan, style: Style, pairs: Some,
        batch: int, prints: Mapping[str, str], on_step: Callable[[], None],
    ) -> None:  # fmt: skip
        self._session, self._scorer, self._counted, self._plan = pipeline, scorer, counted, plan
        self._style, self._pairs, self._prints, self._on_step = style, pairs, prints, on_step
        self.batch = batch
        self._source: tuple[Candidate, poa.Source] | None = None  # of the last candidate: a trial asks several times
        self._checked: set[str] = set()  # layers whose weights in memory are known to be those that were counted

    @property
    def pairs(self) -> int:
        return len(self._pairs)

    def scores(self, candidate: Candidate, pairs: Sequence[int]) -> list[float]:
        prompts, seeds = map(list, zip(*(self._pairs[pair] for pair in pairs), strict=True))
        with self._pruned(candidate):
            images = self._session.draw(prompts, seeds, self._style, self._on_step)
        return [score.value for score in self._scorer.score(images, prompts)]

    def fingerprint(self) -> Mapping[str, str]:
        return self._prints

    @contextmanager
    def _pruned(self, candidate: Candidate) -> Iterator[None]:
        """The pipeline as the candidate's model; without POA it is the dense one."""
        source = self._find(candidate)
        if source is None:
            yield
            return
        weight = 1.0 if candidate.poa_weight is None else candidate.poa_weight
        layers = set(source.masks.diffusers)
        check, keep = not layers <= self._checked, self._session.has_room()
        with poa.enabled(self._session.pipe, source, weight, check=check, keep=keep):
            self._checked |= layers
            yield

    def _find(self, candidate: Candidate) -> poa.Source | None:
        """The thresholds of a candidate, by look-up; None where not a single weight is pruned."""
        if self._source and self._source[0] == candidate:
            return self._source[1]
        planned = with_ratios(self._plan, candidate.by_group)
        if not any(scope.rank for scope in planned.scopes):
            return None
        self._source = candidate, self._counted.source(planned)
        return self._source[1]


def pairs_digest(pairs: Some) -> str:
    """Prompts and seeds as a short hash."""
    return hashlib.sha256("\n".join(f"{prompt}\t{seed}" for prompt, seed in pairs).encode()).hexdigest()[:16]


def fingerprint(job: "Job", base: str, pipeline: Session, scorer: scorers.Scorer, style: Style) -> dict[str, str]:
    """Everything the scores depend on, under names that an error can tell people."""
    pipe = pipeline.pipe
    return {
        "base": base,
        "family": job.plan.match.family.id,
        "other parts": parts.others(pipe, getattr(pipe, job.drawing.opening.pipeline.folder)),
        "size": str(style.size),
        "targets": ", ".join(job.plan.kinds),
        **_criterion(job),
        "scheduler": parts.scheduler(pipe),
        "steps": str(style.steps),
        "guidance": repr(style.guidance),
        "negative": style.negative or "none",
        "prompts and seeds": pairs_digest(job.pairs.search),
        "dtype": job.drawing.dtype,
        "device": job.drawing.device.partition(":")[0],
        "batch": str(job.batch),
        "crdiff": tool_version(),
        **{package: version(package) for package in ("diffusers", "torch", "transformers")},
        **{f"scorer {key}": str(value) for key, value in scorer.fingerprint().items()},
    }


def _criterion(job: "Job") -> dict[str, str]:
    criterion = job.criterion
    if criterion.name == criterion_choice.MAGNITUDE:
        return {}  # which searches of earlier versions have not said
    return {
        "criterion": criterion.name,
        **({"calibration": criterion.calibration.hash} if criterion.calibration else {}),
    }


def _base(job: "Job", progress: Progress) -> str:
    """The hash of the base's data sections, of which a file may have one and shards have several."""
    files = job.plan.checkpoint.files
    progress.stage("hashing", sum(file.data_size for file in files))
    found = [hash_data(file, progress) for file in files]
    return f"sha256:{found[0]}" if len(found) == 1 else parts.digest("".join(found).encode())
