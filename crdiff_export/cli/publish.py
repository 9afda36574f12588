"""`crdiff publish`."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from crdiff_export.cli.options import device_option, examples, output_options, quiet_client
from crdiff_export.cli.signals import Stopper
from crdiff_export.errors import OptionError
from crdiff_export.progress import Progress
from crdiff_export.publish import report
from crdiff_export.publish.run import Outcome, exit_code, tags
from crdiff_export.publish.run import publish as carry_out
from crdiff_export.publish.worklist import PublishRequest, Survey, survey


@click.command(
    epilog=examples(
        "crdiff publish variants.toml --dry-run",
        "crdiff publish variants.toml -o out",
        "crdiff publish variants.toml --keep none --json > report.json",
    )
)
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("-o", "--output", "folder", type=click.Path(path_type=Path, file_okay=False), default=Path(),
              help="Folder to write to. Default: the current one.")  # fmt: skip
@click.option("--keep", type=click.Choice(["all", "none"]), default="all", show_default=True,
              help="none: make, push and remove one variant after the other, for a small disk.")  # fmt: skip
@click.option("--no-push", is_flag=True, help="Write the files, and leave the Hub alone.")
@click.option("--create-pr", is_flag=True, help="Commit to a pull request; a second run continues it.")
@click.option("--dry-run", is_flag=True, help="Show the matrix and what would be done; write and push nothing.")
@device_option
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads on the CPU. Default: all cores.")
@output_options
@click.pass_obj
def publish(
    stopper: Stopper, /, plan: Path, folder: Path, *, keep: str, no_push: bool, dry_run: bool, json: bool, quiet: bool,
    **options: Any,
) -> int:  # fmt: skip
    """Make all variants that PLAN asks for and push them, with their model cards.

    PLAN is a TOML file with bases, sizes and repositories (docs/publishing.md). What the Hub holds already, made from
    the same base with the same numbers, is skipped. A base is read once for all of its variants. One that fails does
    not stop the others; a second run does what is missing.
    """
    from crdiff_export.cli import output

    if no_push and keep == "none":
        raise OptionError("--no-push and --keep none do not go together", "Nothing would be left.")
    if no_push and options["create_pr"]:
        raise OptionError("--no-push and --create-pr do not go together", "Leave one of them out.")
    request = PublishRequest(plan, folder, keep=keep == "all", push=not no_push, **options)
    quiet_client(quiet=quiet or json)
    silent = quiet or json

    @contextmanager
    def watching() -> Iterator[Progress]:
        with output.progress(quiet=silent) as shown, stopper.watch(shown) as progress:
            yield progress

    found = survey(request, watching)
    if not silent:
        for note in report.planned_notes(found):
            output.note(note)
    if dry_run:
        failing = [Outcome(item, "failed", error=item.error) for item in found.items if item.error]
        _show_plan(found, failing, as_json=json, quiet=quiet)
        return exit_code(failing)
    outcomes: list[Outcome] = []
    tagged: list[report.Tagged] = []
    try:
        _carry_out(found, outcomes, stopper, silent=silent)
        if not no_push:
            tagged += tags(outcomes)
    finally:
        outcomes = report.in_order(found, outcomes)
        report.for_github(found, outcomes, tagged)
    _show(found, outcomes, tagged, as_json=json, quiet=quiet)
    return exit_code(outcomes, (what for _, _, what in tagged))


def _carry_out(found: Survey, outcomes: list[Outcome], stopper: Stopper, *, silent: bool) -> None:
    """Fill the list of outcomes, as far as it gets."""
    from crdiff_export.cli import output

    took = 0.0
    with output.progress(quiet=silent) as shown, stopper.watch(shown) as progress:

        @contextmanager
        def talking() -> Iterator[None]:
            nonlocal took
            began = time.monotonic()
            with shown.paused(), stopper.unwatched():
                yield
            took = time.monotonic() - began

        for outcome in carry_out(found, progress, talking):
            outcomes.append(outcome)
            if outcome.status == "published" and not silent:  # the last talk was about it
                output.sent(outcome.size or 0, report.where(outcome.item), took)


def _show_plan(found: Survey, failing: Sequence[Outcome], *, as_json: bool, quiet: bool) -> None:
    from crdiff_export.cli import output

    if as_json:
        output.print_json({"dry_run": True, **report.planned(found)})
        return
    _show_errors(failing)
    output.table(report.PLANNED, [report.planned_row(item) for item in found.items])
    if not quiet:
        output.line("")
        output.facts(tuple(report.facts(found)))


def _show(found: Survey, outcomes: list[Outcome], tagged: list[report.Tagged], *, as_json: bool, quiet: bool) -> None:
    from crdiff_export.cli import output

    if as_json:
        output.print_json(report.as_json(outcomes, tagged))
        return
    _show_errors(outcomes)
    for _, _, what in tagged:
        if not isinstance(what, str):
            output.print_error(what.code, what.message, what.hint, as_json=False)
    if not quiet:
        for note in report.done_notes(found, outcomes):
            output.note(note)
        output.table(report.DONE, [report.done_row(outcome) for outcome in outcomes])
        for repo, name, what in tagged:
            if isinstance(what, str):
                output.line(f"tag {name} of {repo}: {what[:10]}")
        return
    for outcome in outcomes:
        if not outcome.error:
            output.line(outcome.pushed.url if outcome.pushed else report.where(outcome.item))


def _show_errors(outcomes: Sequence[Outcome]) -> None:
    from crdiff_export.cli import output

    for outcome in outcomes:
        if error := outcome.error:
            output.print_error(error.code, f"{outcome.item.entry}: {error.message}", error.hint, as_json=False)
