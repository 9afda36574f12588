"""The evaluation that several tests share, pictures without crdiff, and command lines written as in a shell."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from crdiff_export import Size
from crdiff_export.evaluate import EvaluateRequest, Evaluation
from crdiff_export.evaluate.comparison import Pair
from crdiff_export.models import demo
from crdiff_export.progress import Silent
from crdiff_export.sampling.quiet import quiet_libraries
from crdiff_export.sampling.session import Session
from tests.support.isolation import Ran
from tests.support.scoring import noise

Line = Callable[[str], Ran]
# Eight prompts at two sizes, the second of which is the native one, by three models.
REQUEST = EvaluateRequest("demo", (Size(48, 48), Size(64, 64)), limit=8, ratio=0.4, steps=1, batch=8, weights=(1.5,))


class Steps(Silent):
    """A progress that adds up."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[int, str]] = {}
        self.done: dict[str, int] = {}

    def stage(self, title: str, size: int, unit: str = "bytes") -> None:
        self.stages[title], self.done[title] = (size, unit), 0
        self._now = title

    def advance(self, size: int) -> None:
        self.done[self._now] += size


def failing(error: Exception) -> Callable[..., None]:
    """A function that raises this."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def of_pairs(evaluation: Evaluation, pairs: Iterable[Pair], pictures: int = 1) -> Evaluation:
    """The same scores of other pairs, with so many pictures of each prompt."""
    job = evaluation.job
    request = replace(job.request, pictures=pictures)
    return replace(evaluation, job=replace(job, request=request, pairs=tuple(pairs)))


def open_plainly(file: Path) -> Any:
    """A pipeline as somebody opens it who has never heard of crdiff."""
    import diffusers

    with quiet_libraries("diffusers", "transformers"):
        pipe = diffusers.StableDiffusionPipeline.from_single_file(
            str(file), config=str(demo.config()), local_files_only=True
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_plainly(pipe: Any, pairs: Iterable[Pair], size: Size, steps: int, **options: Any) -> list[bytes]:
    """The pixels that a pipeline draws of prompts and seeds, all at once."""
    prompts, seeds = zip(*pairs, strict=True)
    with quiet_libraries("diffusers", "transformers"):
        images = pipe(
            list(prompts), width=size.width, height=size.height, num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], **options,
        ).images  # fmt: skip
    return [image.tobytes() for image in images]


def noise_for_pictures(
    _: Session, _prompts: list[str], seeds: list[int], style: Any, _on_step: Any
) -> list[Image.Image]:
    """Other noise for each seed, in place of what `Session.draw` draws."""
    return [noise([(style.size.width, style.size.height)], seed)[0] for seed in seeds]
