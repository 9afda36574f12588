"""`crdiff publish`."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from crdiff_export.cli import options
from crdiff_export.cli.blocks import Facts, Table
from crdiff_export.cli.command import command, option, option_group
from crdiff_export.cli.output import Output, Result
from crdiff_export.cli.push import log_upload
from crdiff_export.errors import OptionError
from crdiff_export.publish import report
from crdiff_export.publish.run import Outcome, TagResult, exit_code, set_tags
from crdiff_export.publish.run import publish as run
from crdiff_export.publish.worklist import PublishRequest, Worklist, make_worklist


@command(
    "crdiff publish variants.toml --dry-run",
    "crdiff publish variants.toml -o out",
    "crdiff publish variants.toml --keep none --json > report.json",
)
@click.argument("plan", type=options.FILE)
@option_group("Computing", options.device, options.threads, options.rehash)
@option_group(
    "Hub",
    option("--no-push", "Write the files, and leave the Hub alone."),
    option("--create-pr", "Commit to a pull request; a second run continues it."),
)
@option_group(
    "Output",
    option("-o, --output DIRECTORY", "Folder to write to. Default: the current one.",
           click.Path(path_type=Path, file_okay=False), "folder", default=Path()),
    option("--keep", "none: make, push and remove one variant after the other, for a small disk.",
           click.Choice(["all", "none"]), default="all", show_default=True),
    option("--dry-run", "Show what would be done; write and push nothing."),
)  # fmt: skip
def publish(
    out: Output, plan: Path, folder: Path, *, keep: str, no_push: bool, create_pr: bool, dry_run: bool, device: str,
    threads: int | None,
    rehash: bool,
) -> Result:  # fmt: skip
    """Make all variants that PLAN asks for and push them, with their model cards.

    PLAN is a TOML file with bases, sizes and repositories (docs/publishing.md). What the Hub holds already, made from
    the same base with the same numbers, is skipped. A base is read once for all of its variants. One that fails does
    not stop the others; a second run does what is missing.
    """
    if no_push and keep == "none":
        raise OptionError("--no-push and --keep none do not go together", "Nothing would be left.")
    if no_push and create_pr:
        raise OptionError("--no-push and --create-pr do not go together", "Leave one of them out.")
    request = PublishRequest(
        plan,
        folder,
        keep=keep == "all",
        push=not no_push,
        create_pr=create_pr,
        device=device,
        threads=threads,
        rehash=rehash,
    )
    out.quiet_hub_client()
    worklist = make_worklist(request, out.threads_progress)
    out.notes(report.planned_notes(worklist))
    if dry_run:
        return _planned(out, worklist)
    outcomes: list[Outcome] = []
    tags: list[TagResult] = []
    try:
        _run(out, worklist, outcomes)
        if request.push:
            tags += set_tags(outcomes)
    finally:
        outcomes = report.in_order(worklist, outcomes)
        report.write_github_summary(worklist, outcomes, tags)
    return _done(out, worklist, outcomes, tags)


def _run(out: Output, worklist: Worklist, outcomes: list[Outcome]) -> None:
    """Make and push the variants; the list of outcomes is filled as far as that gets."""
    seconds = 0.0
    with out.progress() as display, out.stopper.watch(display) as progress:

        @contextmanager
        def pausing() -> Iterator[None]:
            nonlocal seconds
            began = time.monotonic()
            with display.paused(), out.stopper.unwatched():
                yield
            seconds = time.monotonic() - began

        for outcome in run(worklist, progress, pausing):
            outcomes.append(outcome)
            if outcome.status == "published":  # the last pause was for its upload
                log_upload(out, outcome.size or 0, report.where(outcome.item), seconds)


def _planned(out: Output, worklist: Worklist) -> Result:
    failing = [Outcome(item, "failed", error=item.error) for item in worklist.items if item.error]
    _show_errors(out, failing)
    table = Table(report.PLANNED, [report.planned_row(item) for item in worklist.items], optional=["ratios"])
    return Result(
        {"dry_run": True, **report.planned_json(worklist)},
        [table, "", Facts(report.planned_totals(worklist))],
        bare=[table],
        exit_code=exit_code(failing),
    )


def _done(out: Output, worklist: Worklist, outcomes: list[Outcome], tags: list[TagResult]) -> Result:
    _show_errors(out, outcomes)
    for tag in tags:
        if tag.error:
            out.error(tag.error)
    tag_lines = [f"tag {tag.tag} of {tag.repo}: {tag.commit[:10]}" for tag in tags if tag.commit]
    done = [outcome for outcome in outcomes if not outcome.error]
    return Result(
        report.done_json(outcomes, tags),
        [
            Table(report.DONE, [report.done_row(outcome) for outcome in outcomes], optional=["bytes", "commit"]),
            *tag_lines,
        ],
        bare=[outcome.pushed.url if outcome.pushed else report.where(outcome.item) for outcome in done],
        notes=list(report.done_notes(worklist, outcomes)),
        exit_code=exit_code(outcomes, tags),
    )


def _show_errors(out: Output, outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.error:
            out.error(outcome.error, f"{outcome.item.entry}: ")
