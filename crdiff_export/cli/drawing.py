"""What commands that draw pictures share: options of how they are drawn and pruned, and what is said before."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from crdiff_export.cli.options import DeviceType, quiet_client
from crdiff_export.formats.dtypes import DTYPES
from crdiff_export.sampling.drawing_setup import Easel

Command = TypeVar("Command", bound=Callable[..., Any])

batch_option = click.option(
    "--batch", type=click.IntRange(1), metavar="N", help="Pictures to draw at once. Default: 4 on a GPU; demo: 16."
)
scorer_option = click.option(
    "--scorer", metavar="NAME|module:function|command:…",
    help="What says how good a picture is, or a sum such as 0.5*clip-score+0.5*aesthetic. Default for demo: its judge.",
)  # fmt: skip
scorer_device_option = click.option(
    "--scorer-device", type=DeviceType(), help="Where to score. Default: where pictures are drawn."
)


def drawing_options(command: Command) -> Command:
    """How pictures are drawn, and with which parts of the base."""
    for option in reversed((
        click.option("--steps", type=click.IntRange(1, 1000), metavar="N",
                     help="Steps of sampling. Default: 25; schnell: 4."),
        click.option("--guidance", type=click.FloatRange(0, 100), metavar="G",
                     help="Guidance scale. Default: diffusers'; demo: 4."),
        click.option("--negative", metavar="TEXT", help="Negative prompt."),
        click.option("--device", type=DeviceType(), default="auto", show_default=True,
                     help="Where to draw: auto takes a GPU."),
        click.option("--dtype", type=click.Choice(list(DTYPES)), help="Default: fp16 or bf16 on a GPU, fp32 on a CPU."),
        click.option("--config", metavar="DIR|ORG/NAME",
                     help="For a single file: a folder for diffusers with the model's configuration, or a repository "
                     "on the Hub."),
        click.option("--variant", metavar="NAME", help="Weights to take from a folder that has several, such as fp16."),
    )):  # fmt: skip
        command = option(command)
    return command


def announce_drawing(easel: Easel, *notes: str) -> None:
    """What a user should know before the first picture: some notes, and what may have to be fetched."""
    from crdiff_export.cli import output

    for text in notes:
        output.note(text)
    if easel.opening.remote:
        output.note(f"what {easel.base.name} lacks comes from {easel.opening.remote}, unless it is in the local cache")


def quiet_parts(easel: Easel, *, quiet: bool) -> None:
    """The same as `quiet_client`, where parts of the pipeline come from the Hub."""
    if easel.opening.remote:
        quiet_client(quiet=quiet)
