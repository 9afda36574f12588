"""Options and first steps of the commands that draw pictures."""

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import click

from crdiff_export.cli.command import Decorator, OptionMaker, gather, option, option_group
from crdiff_export.cli.options import COUNT, DEVICE, TOLD_SIZE, FiniteRange, family, join_prompts, prompts_file, variant
from crdiff_export.cli.output import Output
from crdiff_export.formats.dtypes import DTYPES
from crdiff_export.sampling.drawing_setup import DrawingSetup
from crdiff_export.sampling.request_checks import DrawingRequest

batch = option("--batch N", "Pictures to draw at once. Default: the family's, or 4 on a GPU.", COUNT)
pictures = option("--pictures N", "Pictures of each prompt, each from its own noise.", click.IntRange(1, 10_000),
                  default=1, show_default=True)  # fmt: skip
beside = option("--beside WHAT", "Draw something else beside the models: native-size (SDXL is told its native size), "
                "two-pass (drawn at the native size, resized, above it refined), lora:FILE, or module:function. May be "
                "given several times.", multiple=True)  # fmt: skip
scorer_options = option_group(
    "Scoring",
    option("--scorer NAME|module:function|command:…", "What says how good a picture is, or a sum such as "
           "0.5*clip-score+0.5*aesthetic. Default for the demo models: their judge."),
    option("--scorer-device", "Where to score. Default: where pictures are drawn.", DEVICE),
)  # fmt: skip
options = option_group(
    "Drawing",
    option("--steps N", "Steps of sampling. Default: the family's, or 25.", click.IntRange(1, 1000)),
    option("--guidance G", "Guidance scale. Default: the family's, or diffusers'.", FiniteRange(0, 100)),
    option("--negative TEXT", "Negative prompt."),
    option("--told-size", "The size that SDXL is told, in place of the size drawn; native is its own.", TOLD_SIZE),
    option("--device", "Where to draw: auto takes a GPU.", DEVICE, default="auto", show_default=True),
    option("--dtype", "Default: fp16 or bf16 on a GPU, fp32 on a CPU.", click.Choice(list(DTYPES))),
    option("--config DIR|ORG/NAME", "For a single file: a folder for diffusers with the model's configuration, or a "
           "repository on the Hub."),
    variant, family,
)  # fmt: skip


def prompt_options(prompts: str, *more: OptionMaker, limit: str = "", seed: str = "seed") -> Decorator:
    """Describe the options that name prompts and their noise.

    Args:
        prompts: What --help says about --prompts, a file.
        more: Further options under the same heading, which come after --prompts.
        limit: The end of what --help says about --limit.
        seed: The parameter that gets the first picture's seed.

    Returns:
        A decorator that adds them to a command, whose parameter `prompts` gets all prompts.

    """
    add = option_group(
        "Prompts",
        prompts_file("--prompts FILE", prompts),
        *more,
        option("--limit N", f"Only the first N prompts.{limit}", COUNT),
        option("--seed N", "The first picture's seed. Default: 0.", click.IntRange(0), seed, default=0),
    )
    return lambda function: add(gather("prompts", join_prompts)(function))


class DrawingJob(Protocol):
    """Checked work of a command that draws."""

    @property
    def drawing(self) -> DrawingSetup:
        """The base, and how and where it draws."""
        ...

    @property
    def notes(self) -> Iterable[str]:
        """Notes for the user before it begins."""
        ...


Request = TypeVar("Request", bound=DrawingRequest)
Job = TypeVar("Job", bound=DrawingJob)


def prepare(
    out: Output, request: Request, check: Callable[[Request], Job], describe: Callable[[Job], Iterable[str]]
) -> Job:
    """Check a request, and note what a user should know before the first picture.

    Args:
        out: Where the notes go.
        request: What is wanted of which base.
        check: Checks it; a base may be fetched from the Hub for that.
        describe: Says what will be done, in notes.

    Returns:
        What `check` returns.

    """
    out.announce_base(request.base)
    with out.waiting("loading torch and diffusers"):
        job = check(request)
    out.notes([*job.notes, *describe(job)])
    if source := job.drawing.opening.remote:
        out.quiet_hub_client()
        out.notes([f"what {job.drawing.base.name} lacks comes from {source}, unless it is in the local cache"])
    return job


def device_text(job: DrawingJob) -> str:
    """Name the device and the dtype that pictures are drawn with."""
    return f"on {job.drawing.device} in {job.drawing.dtype}"
