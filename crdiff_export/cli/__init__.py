"""The command line: parse, build one request, call one function, show its result."""

import codecs
import contextlib
import io
import os
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import ClassVar

import click

from crdiff_export.cli.options import Group, examples
from crdiff_export.cli.signals import Stopped, Stopper
from crdiff_export.errors import CrdiffError, MatrixError

COMMANDS = {
    "export": "Prune a base for a size and write a new checkpoint.",
    "inspect": "Show what a checkpoint is and, if crdiff made it, how.",
    "verify": "Check a baked file against its header, and against its base.",
    "restore": "Give the base back, from a file exported with its residual.",
    "preview": "Draw what a base, its pruned model and POA make of a prompt.",
    "evaluate": "Score a base, its pruned model and POA on many prompts, with intervals.",
    "search": "Search for ratios that make a base better at a size, and check them.",
    "calibrate": "Measure what criteria other than magnitude need to know of a base.",
    "push": "Push a baked file to the Hub, with its model card.",
    "publish": "Make and push all variants that a plan file asks for.",
    "comfyui": "Add nodes for sampling with POA to a ComfyUI.",
    "recipes": "List, show and check recipes.",
}


class Commands(Group):
    """Knows its commands' names and first lines without loading them, so that --help is quick."""

    package: ClassVar[str] = "crdiff_export.cli"

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a user's work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, loaded."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"{self.package}.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in --help."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _show_version(ctx: click.Context, _param: click.Parameter, asked: object) -> None:
    if asked and not ctx.resilient_parsing:
        from crdiff_export.bake.metadata import tool_version

        click.echo(f"crdiff, version {tool_version()}")
        ctx.exit()


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "CRDIFF"},
    epilog=examples(
        "crdiff export demo --res 96x64      offline, in seconds",
        "crdiff export sdxl --res 2048 -o sdxl-2048.safetensors",
    )
    + "\n\nEvery option has an environment variable: CRDIFF_EXPORT_RES=2048 is export's --res 2048.",
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version,
              help="Show the version and exit.")  # fmt: skip
def crdiff() -> None:
    """Make diffusion checkpoints good at sizes they were not trained for.

    crdiff sets the smallest self-attention and feed-forward weights of a checkpoint to zero, block by block
    (CR-Diff, arXiv 2604.05524), and writes a new checkpoint that any loader opens.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0, 1 failure, 2 usage, 3 not verified, 4 Hub, 128 + the signal that ended it."""
    given = sys.argv[1:] if args is None else list(args)
    as_json, stopper = _wants_json(given), Stopper()
    _open_streams()
    try:
        stopper.install()
        code = _drained(_run(given, stopper, as_json=as_json))
        stopper.remove()
    except Stopped as stop:
        message = f"{stop.word}; nothing half-done was left behind"
        code = _fail(stop.word, message, "", stop.exit_code, as_json=as_json)
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> None:
    """End at once where the Hub's client is still at work: Python would wait for its threads, they for an answer."""
    from crdiff_export.hub.daemon_threads import THREAD

    if any(thread.name == THREAD for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def _run(args: Sequence[str], stopper: Stopper, *, as_json: bool) -> int:
    try:
        code = crdiff.main(args, prog_name="crdiff", standalone_mode=False, obj=stopper)
    except MatrixError as error:
        from crdiff_export.cli import output

        output.print_problems(error.code, error.message, error.hint, error.problems, as_json=as_json)
        return error.exit_code
    except CrdiffError as error:
        return _fail(error.code, error.message, error.hint, error.exit_code, as_json=as_json)
    except click.ClickException as error:
        return _misused(error, as_json=as_json)
    return code if isinstance(code, int) else 0


def _wants_json(args: Sequence[str]) -> bool:
    """Whether errors are to be JSON, told from the words themselves: they may be what is wrong."""
    words = [word.upper() for word in args if not word.startswith("-")]
    names = ("_".join(words[:depth]) for depth in (1, 2))
    asked = (os.environ.get(f"CRDIFF_{name}_JSON", "").lower() for name in names)
    return "--json" in args or any(text in ("1", "true", "t", "yes", "y", "on") for text in asked)


def _misused(error: click.ClickException, *, as_json: bool) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":  # from click 8.2 on; its text is the help
        error.show()
        return error.exit_code
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "crdiff"
    return _fail("usage", error.format_message(), f"`{path} -h` explains it.", error.exit_code, as_json=as_json)


def _fail(code: str, message: str, hint: str, exit_code: int, *, as_json: bool) -> int:
    from crdiff_export.cli import output

    output.print_error(code, message, hint, as_json=as_json)
    return exit_code


def _open_streams() -> None:
    """Give a stream that was closed a place to go, and let stdout take file names of any bytes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def _drained(code: int) -> int:
    """The exit code once all output is out; 1 if it cannot get out, without Python's own complaint at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or 1
    return code
