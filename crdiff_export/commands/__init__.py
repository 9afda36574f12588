"""The command line: parse, build one request, call one function, show its result."""

import os
import signal
import sys
import types
from importlib import import_module
from typing import Any, ClassVar

import click

COMMANDS = {
    "export": "Prune a base for a size and write a new checkpoint.",
    "inspect": "Show what a checkpoint is and, if crdiff made it, how.",
    "verify": "Check a baked file against its header, and against its base.",
    "recipes": "List, show and check recipes.",
}
TERMINATED = 143
INTERRUPTED = 130


class Commands(click.Group):
    """Knows its commands' names and first lines without loading them, so that --help is quick."""

    packages: ClassVar[str] = "crdiff_export.commands"

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a user's work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, loaded."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"{self.packages}.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in --help."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """A misspelt command is answered with the nearest one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(args[0], COMMANDS, n=1)
            meant = f" Did you mean {close[0]}?" if close else f" There are: {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command {args[0]!r}.{meant}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "CRDIFF"})
@click.version_option(package_name="crdiff-export", prog_name="crdiff")
def crdiff() -> None:
    r"""Make diffusion checkpoints good at sizes they were not trained for.

    crdiff sets the smallest self-attention and feed-forward weights of a checkpoint to zero, block by block
    (CR-Diff, arXiv 2604.05524), and writes a new checkpoint that any loader opens.

    \b
    Example, offline and in seconds:
      crdiff export demo --res 96x64 -o demo-96x64.safetensors
    """


class _Terminated(KeyboardInterrupt):
    """SIGTERM; unwinds like Ctrl-C, so that temp files go."""


def _terminate(_signum: int, _frame: types.FrameType | None) -> None:
    raise _Terminated


def main(args: list[str] | None = None) -> None:
    """Run a command and exit: 0, 1 failure, 2 usage, 3 not verified, 4 Hub, 130 interrupted, 143 terminated."""
    from crdiff_export.errors import CrdiffError

    signal.signal(signal.SIGTERM, _terminate)
    given = sys.argv[1:] if args is None else args
    try:
        code = crdiff.main(given, prog_name="crdiff", standalone_mode=False)
    except CrdiffError as error:
        from crdiff_export import ui

        ui.print_error(error, as_json="--json" in given)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        # click turns a KeyboardInterrupt into an Abort
        if isinstance(error, _Terminated) or isinstance(error.__cause__, _Terminated):
            code = _say("terminated; nothing was left behind", TERMINATED)
        else:
            code = _say("interrupted; nothing was left behind", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _say(text: str, code: int) -> int:
    click.echo(f"crdiff: {text}", err=True)
    return code
