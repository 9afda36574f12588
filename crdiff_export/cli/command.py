"""The frame of every command: an Output, --json and -q, options under headings in --help, examples."""

import inspect
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import click

from crdiff_export.cli.output import Output, Result
from crdiff_export.cli.signals import Stopper
from crdiff_export.formats.text import printable

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
# Gives the decorator that adds an option under a heading.
OptionMaker = Callable[[str], Decorator]


@dataclass(frozen=True)
class Invocation:
    """One run of crdiff: the words of its command line, and what a signal does meanwhile.

    `variables` are the environment variables that give options a value, each with its option.
    """

    words: Sequence[str] = ()
    stopper: Stopper = field(default_factory=Stopper)
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def is_help(self) -> bool:
        """Whether the run shows a help text or the version, and nothing else."""
        return not self.words or not {"-h", "--help", "--version"}.isdisjoint(self.words)


def variable_of(context: click.Context, param: click.Parameter) -> str | None:
    """Return the environment variable that a parameter's value comes from, if it comes from one."""
    from_variable = context.get_parameter_source(param.name or "") is click.core.ParameterSource.ENVIRONMENT
    if not (from_variable and isinstance(param, HeadedOption)):
        return None
    return param.variable(context)


class HeadedOption(click.Option):
    """An option that stands under a heading of --help."""

    def __init__(self, *args: Any, heading: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.heading = heading

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Read the variable that is called as the option is, whatever its parameter is called."""
        return os.environ.get(self.variable(ctx)) or None

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """Take a text or a path as it stands, with its spaces: several of them are lines."""
        value = self.resolve_envvar_value(ctx)
        if value is not None and self.multiple and isinstance(self.type, click.types.StringParamType | click.Path):
            return value.splitlines()
        return super().value_from_envvar(ctx)

    def variable(self, ctx: click.Context) -> str:
        """Return the name of its environment variable."""
        name = max(self.opts, key=len).lstrip("-").replace("-", "_").upper()
        return f"{ctx.auto_envvar_prefix}_{name}"


def option(name: str, help_text: str, type_: Any = None, dest: str | None = None, **settings: Any) -> OptionMaker:
    """Describe an option; `option_group` adds it to a command.

    Args:
        name: Its name as --help shows it, such as `--ratio R` or `-o, --output FILE`.
        help_text: What --help says about it.
        type_: The type of its value. Without one, and without a word for a value after its name, it is a flag.
        dest: The parameter of the command's function, if it is not called like the option.
        settings: What else `click.option` takes.

    Returns:
        A function from the heading to a decorator.

    """
    words = name.split()
    declaration = [*(word.rstrip(",") for word in words if word.startswith("-")), *([dest] if dest else [])]
    metavar = " ".join(word for word in words if not word.startswith("-"))
    if type_ is None and not metavar and "/" not in name:
        settings["is_flag"] = True
    return lambda heading: click.option(
        *declaration, cls=HeadedOption, heading=heading, help=help_text, type=type_, metavar=metavar or None, **settings
    )


def option_group(heading: str, *options: OptionMaker) -> Decorator:
    """Add options to a command, under one heading of its --help."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for make in reversed(options):
            function = make(heading)(function)
        return function

    return add


def gather(name: str, make: Callable[..., Any]) -> Decorator:
    """Give a command's function one parameter instead of the options that it is made from.

    Args:
        name: The parameter, such as `request`.
        make: Makes its value, such as the class of a request; its parameters are called like the options. A parameter
            `command` gets the command line.

    Returns:
        A decorator, which stands below the options.

    """
    taken = inspect.signature(make).parameters

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            parts = {key: options.pop(key) for key in list(options) if key in taken}
            if "command" in taken:
                parts["command"] = command_line()
            return function(*args, **{name: make(**parts)}, **options)

        return run

    return decorate


def command_line() -> str:
    """Return the command line of this run as a shell takes it, without secrets; "" outside of `main`."""
    invocation = click.get_current_context().find_object(Invocation)
    if not (invocation and invocation.words):
        return ""
    variables = [
        f"{name}={shlex.quote(_public(option, os.environ[name]))}"
        for name, option in invocation.variables.items()
        if name in os.environ
    ]
    words, before = ["crdiff"], ""
    for word in invocation.words:
        name, equals, value = word.partition("=")
        is_joined = bool(equals) and name.startswith("--")
        words.append(f"{name}={_public(name, value)}" if is_joined else _public(before, word))
        before = word
    return printable(" ".join([*variables, shlex.join(words)]), limit=4000)


def _public(name: str, value: str) -> str:
    """Return what a page may show of an option's value: no words of a scorer's command, no address of a server."""
    if name == "--scorer":
        from crdiff_export.evaluate import scorers

        return scorers.public(value)
    if name == "--storage" and "://" in value:
        return f"{value.partition('://')[0]}://***"
    return value


class Command(click.Command):
    """A command with --json and -q, whose --help shows its options by heading."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for names, text in (
            (["--json"], "One JSON object on stdout, or on stderr if it fails."),
            (["-q", "--quiet"], "The bare result: no progress, no notes, no explanations."),
            (["--debug"], "Show the traceback of an error, too."),
        ):
            self.params.append(HeadedOption(names, heading="Output", is_flag=True, help=text))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, each below its heading."""
        headings: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                headings.setdefault(getattr(param, "heading", "Help"), []).append(record)
        for heading, records in headings.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class Group(click.Group):
    """A group that answers a misspelt command with the nearest one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command that the first argument names."""
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(args[0], names, n=1)
            advice = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(names)}."
            raise click.UsageError(f"No such command {args[0]!r}. {advice}", ctx)
        return super().resolve_command(ctx, args)


def examples(*lines: str, more: str = "") -> str:
    """Format the end of a command's --help: examples, then a paragraph."""
    title = "Example" if len(lines) == 1 else "Examples"
    return "\n".join(("\b", f"{title}:", *(f"  {line}" for line in lines))) + (f"\n\n{more}" if more else "")


def command(
    *example_lines: str, more: str = "", group: click.Group | None = None, **settings: Any
) -> Callable[[Callable[..., Result | None]], click.Command]:
    """Make a click command of a function that takes an Output and the options, and returns a Result to show.

    Args:
        example_lines: Command lines for the end of --help.
        more: A paragraph below them.
        group: The group to add the command to; a command of `crdiff` itself is found by the name of its module.
        settings: What else `click.command` takes.

    Returns:
        A decorator that gives a `click.Command` with --json and -q, whose value is the exit code.

    """

    def make(function: Callable[..., Result | None]) -> click.Command:
        @wraps(function)
        def run(*, json: bool, quiet: bool, debug: bool, **options: Any) -> int:  # noqa: ARG001  # `main` reads --debug
            context = click.get_current_context()
            invocation = context.find_object(Invocation) or Invocation()
            for param in context.command.params:
                if variable := variable_of(context, param):
                    invocation.variables[variable] = max(param.opts, key=len)
            out = Output(invocation.stopper, as_json=json, quiet=quiet)
            result = function(out, **options)
            if result is None:
                return 0
            out.show(result)
            return result.exit_code

        decorate = group.command if group else click.command
        return decorate(cls=Command, epilog=examples(*example_lines, more=more), **settings)(run)

    return make
