"""The command line: each command builds one request, calls one function, and shows one result.

`main` is the entry point. A command lives in the module of its name and is loaded when it is used; `command` is the
frame that all of them share, `options` what several of them take, `output` how results are shown.
"""

import codecs
import contextlib
import io
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, TextIO, cast

import click

from crdiff_export.cli.command import Group, Invocation, examples, variable_of
from crdiff_export.cli.output import print_error
from crdiff_export.cli.signals import Stopped
from crdiff_export.errors import CrdiffError, OptionError, PlanFileError

__all__ = ["main"]

COMMANDS = {
    "export": "Prune a base for a size and write a new checkpoint.",
    "convert": "Write a checkpoint in the other layout, without pruning it.",
    "pack": "Keep what is pruned at many sizes in one small file, without weights.",
    "inspect": "Show what a checkpoint is and, if crdiff made it, how.",
    "diff": "Show which tensors differ between two checkpoints, and by how much.",
    "verify": "Check a baked file against its header, and against its base.",
    "restore": "Give the base back, from a file exported with its residual.",
    "preview": "Draw what a base, its pruned model and POA make of a prompt.",
    "evaluate": "Score a base, its pruned model and POA on many prompts, with intervals.",
    "search": "Search for ratios that make a base better at a size, and check them.",
    "calibrate": "Measure what criteria other than magnitude need to know of a base.",
    "push": "Push a baked file to the Hub, with its model card.",
    "card": "Print the model card of a baked file, without a push.",
    "publish": "Make and push all variants that a plan file asks for.",
    "comfyui": "Add nodes for sampling with POA to a ComfyUI.",
    "webui": "Add sampling with POA to A1111, Forge, reForge or SD.Next.",
    "recipes": "List, show and check recipes.",
    "families": "List, show and check families of models.",
    "docs": "List the pages of the documentation, or print one.",
    "env": "Show versions, devices and folders, for bug reports.",
}


class LazyGroup(Group):
    """A group that knows its commands' names and first lines without loading them, so that --help is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names in the order of a user's work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"crdiff_export.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands in --help."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _show_version(ctx: click.Context, _param: click.Parameter, wanted: object) -> None:
    if wanted and not ctx.resilient_parsing:
        from crdiff_export.bake.metadata import tool_version

        click.echo(f"crdiff, version {tool_version()}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "CRDIFF"},
    epilog=examples(
        "crdiff export demo --res 96x64      offline, in seconds",
        "crdiff export sdxl --res 2048 -o sdxl-2048.safetensors",
        more="`crdiff docs` lists the documentation. "
        "Every option has an environment variable: CRDIFF_EXPORT_RES=2048 is export's --res 2048. "
        "CRDIFF_DEBUG=1 is --debug of every command.",
    ),
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version,
              help="Show the version and exit.")  # fmt: skip
def crdiff() -> None:
    """Prune diffusion checkpoints for sizes they were not trained for.

    crdiff sets the smallest self-attention and feed-forward weights of a checkpoint to zero, block by block
    (CR-Diff, arXiv 2604.05524), and writes a new checkpoint that any loader opens. Whether that helps a model at a
    size, `crdiff evaluate` measures.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0, 1 failure, 2 usage, 3 not verified, 4 Hub, 128 + the signal that ended it."""
    invocation = Invocation(sys.argv[1:] if args is None else list(args))
    as_json, stopper = _wants(invocation.words, "json"), invocation.stopper
    with _opened_streams():
        try:
            stopper.install()
            code = _flush(_run(invocation, as_json=as_json))
            stopper.remove()
        except Stopped as stop:
            print_error(stop.word, f"{stop.word}; {stop.outcome}", stop.hint, as_json=as_json)
            code = stop.exit_code
            _exit_past_hub_threads(code)
        sys.exit(code)


def _exit_past_hub_threads(code: int) -> None:
    """End at once if the Hub's client is still at work: Python would wait for its threads, they for an answer."""
    from crdiff_export.hub.daemon_threads import THREAD

    if any(thread.name == THREAD for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def _run(invocation: Invocation, *, as_json: bool) -> int:
    try:
        code = crdiff.main(invocation.words, prog_name="crdiff", standalone_mode=False, obj=invocation)
    except CrdiffError as error:
        hint = error.hint
        named = [
            name for name, flag in invocation.variables.items()
            if flag in error.message or os.environ.get(name, "") in error.message
        ]  # fmt: skip
        if error.exit_code == OptionError.exit_code and named:
            hint = f"{hint} In effect: {', '.join(named)}.".lstrip()
        problems = error.problems if isinstance(error, PlanFileError) else ()
        trace = (
            "".join(traceback.format_exception(error.__cause__ or error)) if _wants(invocation.words, "debug") else None
        )
        print_error(error.code, error.message, hint, problems, as_json=as_json, trace=trace)
        return error.exit_code
    except click.ClickException as error:
        return _explain_usage(error, as_json=as_json)
    except OSError as error:
        if not invocation.is_help:
            raise
        print_error("failed", f"standard output: {error.strerror}", "Free some space, or send the output elsewhere.")
        return 1
    return code if isinstance(code, int) else 0


def _wants(words: Sequence[str], option: str) -> bool:
    """Whether --json or --debug is given, judged by the words alone: they may be what is wrong."""
    names = [word.upper() for word in words if not word.startswith("-")]
    # CRDIFF_DEBUG is for every command; other options have a variable for each command.
    depths = range(0 if option == "debug" else 1, 3)
    variables = (f"CRDIFF_{'_'.join([*names[:depth], option.upper()])}" for depth in depths)
    on = any(os.environ.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on") for name in variables)
    return f"--{option}" in words or on


def _explain_usage(error: click.ClickException, *, as_json: bool) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":  # from click 8.2 on; its text is the help
        error.show()
        return error.exit_code
    context, param = getattr(error, "ctx", None), getattr(error, "param", None)
    if isinstance(error, click.MissingParameter) and param and "--res" in param.opts:
        from crdiff_export.sampling.request_checks import NO_SIZE

        print_error("usage", *NO_SIZE, as_json=as_json)
        return error.exit_code
    path = context.command_path if context else "crdiff"
    variable = variable_of(context, param) if context and param else None
    prefix, message = f"{variable}: " if variable else "", error.format_message()
    if isinstance(error, click.NoSuchOption) and context:
        names = [name for param in context.command.params for name in param.opts if name.startswith("--")]
        if guess := next((name for name in names if error.option_name.startswith(name)), None):
            message = f"No such option: {error.option_name}. Did you mean {guess}?"  # click's guess is another one
    print_error("usage", prefix + message, f"`{path} -h` explains it.", as_json=as_json)
    return error.exit_code


class _BestEffort:
    """A stream whose reader may be gone or whose disk may be full: what cannot be written there is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


@contextlib.contextmanager
def _opened_streams() -> Iterator[None]:
    """Open the null device for a stream that was closed, and let stdout take file names of any bytes.

    A result is worth more than what is said about it, so nothing fails because stderr is full.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    usual = sys.stderr
    sys.stderr = cast(TextIO, _BestEffort(usual))
    try:
        yield
    finally:
        sys.stderr = usual


def _flush(code: int) -> int:
    """Write all output out; the exit code is 1 if it cannot be, without Python's own complaint at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or 1
    return code
