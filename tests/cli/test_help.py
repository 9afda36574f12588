"""The shape of the whole command line: --help, options that all commands have, and the environment."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from crdiff_export.cli import COMMANDS
from crdiff_export.cli import crdiff as group
from crdiff_export.models import recipe_files
from tests.support.isolation import Crdiff, Ran

pytestmark = pytest.mark.usefixtures("here")


def commands(inside: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and group, as words."""
    context = click.Context(inside)
    found = [path]
    for name in inside.list_commands(context):
        command = inside.get_command(context, name)
        found += commands(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


COMMAND_PATHS = commands(group)


@pytest.mark.parametrize("path", COMMAND_PATHS, ids=" ".join)
def test_help_has_an_example(crdiff: Crdiff, path: tuple[str, ...]) -> None:
    ran = crdiff(*path, "-h")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"Usage: {' '.join(('crdiff', *path))} ")
    assert "\n  Example" in ran.out
    assert "\n    crdiff " in ran.out
    assert "\\b" not in ran.out
    assert "..." not in ran.out.partition("\n")[2].replace("[ARGS]...", "")  # no sentence was cut


def test_help_has_headings(crdiff: Crdiff) -> None:
    ran = crdiff("export", "--help")
    headings = [line for line in ran.out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Base:", "Size:", "Ratios:", "Criterion:", "Computing:", "Output:", "Hub:", "Help:"]
    assert "Ratios:\n  --recipe FILE" in ran.out


def test_every_command_has_json_and_quiet() -> None:
    for path in COMMAND_PATHS:
        command: Any = group
        for name in path:
            command = command.get_command(click.Context(command), name)
        if not isinstance(command, click.Group):
            options = {text for option in command.params for text in option.opts}
            assert {"--json", "-q", "--quiet"} <= options, path


def test_help_says_which_ratio_wins(crdiff: Crdiff) -> None:
    assert " ".join(crdiff("export", "-h").out.split()).count("wins over --ratio") == 3


def test_the_list_of_commands_is_that_of_the_modules() -> None:
    folder = Path(sys.modules["crdiff_export.cli"].__file__ or "").parent
    assert set(COMMANDS) == {path.stem for path in folder.glob("*.py")} - {
        "__init__", "blocks", "command", "drawing", "evaluation_json", "evaluation_text", "export_text",
        "options", "output", "pack_text", "progress_display", "sheet", "signals", "terminal", "text_table",
    }  # fmt: skip


def test_without_arguments_help_is_shown(crdiff: Crdiff) -> None:
    ran = crdiff()
    assert ran.code in (0, 2)  # before and from click 8.2 on
    assert "Commands:" in ran.out + ran.err


def test_version(crdiff: Crdiff) -> None:
    assert crdiff("--version").out.startswith("crdiff, version ")


@pytest.mark.parametrize(
    ("name", "text", "check"),
    [
        ("CRDIFF_EXPORT_RES", "96x64", lambda ran: "96x64" in ran.out),
        ("CRDIFF_EXPORT_JSON", "1", lambda ran: ran.result["dry_run"]),
        ("CRDIFF_EXPORT_QUIET", "true", lambda ran: ran.out == "demo-crdiff-64x64.safetensors\n"),
        ("CRDIFF_EXPORT_RATIO", "0.5", lambda ran: "0.5" in ran.out),
        ("CRDIFF_EXPORT_OUTPUT", "env.safetensors", lambda ran: "env.safetensors" in ran.out),
        ("CRDIFF_EXPORT_NO_HASH", "1", lambda ran: ran.code == 0),
        ("CRDIFF_EXPORT_PUSH", "org/name", lambda ran: "would push to: org/name" in ran.out),
    ],
)
def test_options_from_the_environment(
    crdiff: Crdiff, monkeypatch: pytest.MonkeyPatch, name: str, text: str, check: Callable[[Ran], bool]
) -> None:
    monkeypatch.setenv(name, text)
    res = [] if name.endswith("RES") else ["--res", "64"]
    assert check(crdiff("export", "demo", "--dry-run", *res))


def test_a_bad_variable_is_named(crdiff: Crdiff, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRDIFF_EXPORT_RES", "abc")
    monkeypatch.setenv("CRDIFF_EXPORT_JSON", "yes")
    ran = crdiff("export", "demo")
    assert ran.code == 2
    assert "'abc' is not a size" in ran.error["message"]


def test_a_bug_keeps_its_traceback(crdiff: Crdiff, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(recipe_files, "builtin", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        crdiff("recipes", "list")
