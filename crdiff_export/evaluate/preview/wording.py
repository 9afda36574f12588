"""What is said about pictures: names of columns, facts above them, parameters in the files."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from crdiff_export.bake.metadata import tool_version
from crdiff_export.errors import CrdiffError
from crdiff_export.evaluate.report import Contact, Row, Shot
from crdiff_export.formats.text import printable
from crdiff_export.models.demo.scenes import EXAMPLE, LEARNT, Scene
from crdiff_export.prune.criteria.spec import Spec
from crdiff_export.prune.criterion_choice import MAGNITUDE
from crdiff_export.verify.inspect import provenance

if TYPE_CHECKING:
    from PIL.Image import Image

    from crdiff_export.evaluate.preview import Job


@dataclass(frozen=True, slots=True)
class Column:
    """A model to look at: 0 is the dense one, 1 the pruned one, any other weight POA."""

    weight: float

    @property
    def name(self) -> str:
        """What stands above its pictures."""
        return "dense" if self.weight == 0 else "pruned" if self.weight == 1 else f"POA {self.weight:g}"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, what it is of, and how long it took."""

    column: Column
    prompt: str
    seed: int
    image: "Image"
    seconds: float


@dataclass(frozen=True, slots=True)
class Taken:
    """All pictures, row by row, and how they were made."""

    pictures: tuple[Picture, ...]
    steps: int
    guidance: float
    scheduler: str


def columns(weights: Sequence[float]) -> tuple[Column, ...]:
    """The dense model, the pruned one, and POA with each weight that is neither."""
    return tuple(map(Column, dict.fromkeys((0.0, 1.0, *map(float, weights)))))


def facts(job: "Job", taken: Taken) -> tuple[tuple[str, str], ...]:
    """What everybody who sees the pictures should know."""
    return tuple((name, printable(text, limit=1000)) for name, text in _facts(job, taken))


def _facts(job: "Job", taken: Taken) -> Iterator[tuple[str, str]]:
    request = job.request
    yield "base", f"{job.easel.base.name} ({job.plan.match.family.title})"
    yield "size", f"{job.size}, native {job.easel.native}"
    ratios = ", ".join(f"{group} {ratio:g}" for group, ratio in ratios_of(job).items())
    yield "ratios", f"{ratios}: {standing(job)}"
    if (criterion := criterion_of(job)) != MAGNITUDE:
        yield "criterion", criterion
    if job.baked:
        yield "baked file", f"{job.baked.checkpoint.path.name}, pruned for {job.baked.stamp.resolution}"
    yield "sampling", f"{taken.steps} steps of {taken.scheduler}, guidance {taken.guidance:g}"
    if request.negative:
        yield "negative", request.negative
    if (request.start, request.stop) != (0, 1):
        yield "POA", f"from {request.start:g} to {request.stop:g} of the steps"
    for note in job.notes:
        yield "note", note
    yield "drawn on", f"{job.easel.device}, {job.easel.dtype}"
    yield "made by", f"crdiff {tool_version()}, diffusers {version('diffusers')}, torch {version('torch')}"


def ratios_of(job: "Job") -> dict[str, float]:
    """The share of each group that the pruned model lacks."""
    return {group: job.plan.ratio(group) for group in job.plan.groups}


def standing(job: "Job") -> str:
    """Where the ratios come from."""
    if job.baked:
        return provenance(job.baked.stamp.provenance, job.baked.stamp.provenance_source)
    return provenance(job.plan.variant.provenance, job.plan.variant.source)


def criterion_of(job: "Job") -> str:
    """How weights were ranked, as headers spell it."""
    return job.baked.stamp.criterion if job.baked else str(Spec.parse(job.request.criterion))


def contact(job: "Job", said: tuple[tuple[str, str], ...], taken: Taken) -> Contact:
    """The sheet."""
    count = len(job.columns)
    rows = tuple(
        Row(row[0].prompt, row[0].seed, tuple(Shot(one.image, _parameters(job, taken, one)) for one in row))
        for row in (taken.pictures[start : start + count] for start in range(0, len(taken.pictures), count))
    )
    title = f"{printable(job.easel.base.name)} at {job.size}"
    return Contact(title, said, tuple(column.name for column in job.columns), rows)


def _parameters(job: "Job", taken: Taken, picture: Picture) -> str:
    """How a picture was made, as A1111 writes it into PNG files, which many programs read."""
    last = {
        "Steps": str(taken.steps), "Sampler": taken.scheduler, "CFG scale": f"{taken.guidance:g}",
        "Seed": str(picture.seed), "Size": str(job.size), "Model": printable(job.easel.base.name),
        "crdiff": picture.column.name,
    }  # fmt: skip
    if picture.column.weight:
        last["ratios"] = "/".join(f"{ratio:g}" for ratio in ratios_of(job).values())
        if (criterion := criterion_of(job)) != MAGNITUDE:
            last["criterion"] = criterion
    negative = [f"Negative prompt: {job.request.negative}"] if job.request.negative else []
    # A1111 quotes what has a comma or a colon in it.
    quoted = (f"{key}: {json.dumps(text) if set(text) & set(',:') else text}" for key, text in last.items())
    return "\n".join([picture.prompt, *negative, ", ".join(quoted)])


def warnings(taken: Taken) -> tuple[str, ...]:
    """What is to be said about the pictures before anybody wonders."""
    black = sum(not picture.image.getbbox() for picture in taken.pictures)
    if not black:
        return ()
    return (f"{black} of {len(taken.pictures)} pictures are all black: try another --dtype, such as bf16 or fp32",)


def foreign(prompts: Sequence[str]) -> Iterator[str]:
    """A note for the first prompt that the demo model does not know, or has not learnt."""
    for prompt in prompts:
        try:
            scene = Scene.parse(prompt)
            if not scene.learnt:
                yield f'the demo model has not learnt what "{scene.relation}" means, only: {", ".join(LEARNT)}'
                return
        except CrdiffError as error:
            yield printable(f'{error.message}; it draws scenes like "{EXAMPLE}"', limit=1000)
            return
