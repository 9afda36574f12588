"""What several commands share: types of options, their completion, and a group that knows a misspelt command."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from crdiff_export.errors import CrdiffError, OptionError
from crdiff_export.formats.text_file import read_text_file
from crdiff_export.models.recipe import MAX_POA_WEIGHT, TARGETS
from crdiff_export.sizes import Size

Command = TypeVar("Command", bound=Callable[..., Any])


class Group(click.Group):
    """Answers a misspelt command with the nearest one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command that the first argument names."""
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(args[0], names, n=1)
            meant = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(names)}."
            raise click.UsageError(f"No such command {args[0]!r}. {meant}", ctx)
        return super().resolve_command(ctx, args)


class SizeType(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.5 on
    """`N` or `WxH` in pixels."""

    name = "size"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """How --help calls it."""
        return "N|WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Size:
        """A Size; a usage error for any other text."""
        if isinstance(value, Size):
            return value
        try:
            return Size.parse(value)
        except CrdiffError as error:
            self.fail(f"{error.message}. {error.hint}", param, ctx)


class KindsType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Kinds of layers with commas between them."""

    name = "kinds"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """How --help calls it."""
        return "KINDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The kinds; a usage error for one that no model has."""
        if isinstance(value, tuple):
            return value
        kinds = tuple(kind.strip() for kind in value.split(",") if kind.strip())
        unknown = next((kind for kind in kinds if kind not in TARGETS), None)
        if unknown is not None or not kinds:
            wrong = "nothing is named" if unknown is None else f"{unknown!r} is no kind of layer"
            self.fail(f"{wrong}. Give some of {', '.join(TARGETS)}, with commas between them.", param, ctx)
        return kinds


class DeviceType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A torch device, or `auto`. Whether this machine has it shows when it is used."""

    name = "device"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """How --help calls it."""
        return "DEVICE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The device; a usage error for any other text."""
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", value):
            self.fail(f"{value!r} is no device. Give auto, cpu, cuda, cuda:N or mps.", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Those that a shell offers."""
        return [CompletionItem(name) for name in ("auto", "cpu", "cuda", "mps") if name.startswith(incomplete)]


RATIO = click.FloatRange(0, 1, max_open=True)
POA_WEIGHT = click.FloatRange(0, MAX_POA_WEIGHT)


def complete_alias(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The built-in recipes, whose names stand for their bases, and files."""
    from crdiff_export.models.recipe_files import aliases

    names = [CompletionItem(alias) for alias in aliases() if alias.startswith(incomplete)]
    return [*names, CompletionItem(incomplete, type="file")]


def announce(base: str, *, quiet: bool) -> None:
    """Say that a base may have to be fetched first, and keep the Hub client's bars to a terminal that wants them."""
    from crdiff_export.cli import output
    from crdiff_export.hub import bases

    if place := bases.remote(base):
        quiet_client(quiet=quiet)
        if not quiet:
            output.note(f"{place} comes from the Hub, unless it is in the local cache")


def quiet_client(*, quiet: bool) -> None:
    """Keep the Hub client's bars to a terminal that wants them, and its warnings to people, before it is imported."""
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if quiet:
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def examples(*lines: str) -> str:
    """The end of a command's --help."""
    title = "Example" if len(lines) == 1 else "Examples"
    return "\n".join(("\b", f"{title}:", *(f"  {line}" for line in lines)))


def output_options(command: Command) -> Command:
    """--json and -q."""
    as_json = click.option("--json", is_flag=True, help="One JSON object on stdout, or on stderr if it fails.")
    quiet = click.option("-q", "--quiet", is_flag=True, help="The bare result: no progress, no notes, no explanations.")
    return quiet(as_json(command))


def ratio_options(command: Command) -> Command:
    """Ratios instead of the recipe's; `by_group` takes those of single groups."""
    for option in reversed((
        click.option("--ratio", type=RATIO, metavar="R", help="Share of every group's weights to set to zero."),
        click.option("--down", type=RATIO, metavar="R",
                     help="Share for the down blocks of a UNet; wins over --ratio."),
        click.option("--mid", type=RATIO, metavar="R", help="Share for its mid block; wins over --ratio."),
        click.option("--up", type=RATIO, metavar="R", help="Share for its up blocks; wins over --ratio."),
    )):  # fmt: skip
        command = option(command)
    return command


def by_group(down: float | None, mid: float | None, up: float | None) -> dict[str, float]:
    """The ratios that were given for single groups."""
    return {group: ratio for group, ratio in (("down", down), ("mid", mid), ("up", up)) if ratio is not None}


device_option = click.option(
    "--device", type=DeviceType(), default="auto", show_default=True,
    help="Where weights are counted and zeroed: auto, cpu, cuda, cuda:N or mps. The result does not depend on it.",
)  # fmt: skip


def criterion_options(command: Command) -> Command:
    """How weights are ranked, and by what."""
    criterion = click.option(
        "--criterion", metavar="NAME[:OPTION=VALUE,…]", default="magnitude", show_default=True,
        shell_complete=complete_criterion,
        help="How weights are ranked: magnitude, uniform (the same ratio everywhere), random, wanda, taylor, obs or "
        "adverse (docs/criteria.md).",
    )  # fmt: skip
    calibration = click.option(
        "--calibration", type=click.Path(path_type=Path), metavar="FILE",
        help="What crdiff calibrate has made for this base and size, where the criterion ranks by that.",
    )  # fmt: skip
    return criterion(calibration(command))


def complete_criterion(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The criteria that there are."""
    from crdiff_export.prune.criteria.spec import names

    return [CompletionItem(name) for name in names() if name.startswith(incomplete)]


# Their defaults; another value asks for a push.
PUSH_OPTIONS = {
    "path": None, "revision": None, "create_pr": False, "message": None, "tag": None, "private": None,
    "base_model": None, "relation": "finetune",
}  # fmt: skip


def push_options(command: Command) -> Command:
    """How a push goes."""
    for option in reversed((
        click.option("--path-in-repo", "path", metavar="PATH",
                     help="Where in the repository. Default: the file's name; of a folder the root."),
        click.option("--revision", metavar="BRANCH",
                     help="Branch to commit to, made if it is not there. Default: main."),
        click.option("--create-pr", is_flag=True, help="Open a pull request; a second run continues it."),
        click.option("--message", metavar="TEXT", help="Message of the commit, title of the pull request."),
        click.option("--tag", metavar="NAME", help="Tag the commit; a tag that exists elsewhere is not moved."),
        click.option("--private/--public", "private", default=None, help="Visibility of a repository that has to be "
                     "created. Default: private if the base is gated or its licence is unknown or other."),
        click.option("--base-model", metavar="ORG/NAME", help="The base on the Hub, where it was a local file."),
        click.option("--relation", type=click.Choice(["finetune", "quantized", "merge", "adapter"]), default="finetune",
                     show_default=True, help="base_model_relation of a new card; the Hub knows no word for pruned."),
    )):  # fmt: skip
        command = option(command)
    return command


def listed_prompts(path: Path) -> tuple[str, ...]:
    """The prompts in a file, one a line; OptionError where it is no such file."""
    hint = "Give --prompts a text file with one prompt a line."
    text = read_text_file(path, "prompts", hint, OptionError)
    found = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not found:
        raise OptionError(f"{path}: has no prompt", hint)
    return found
