"""`crdiff search`."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, Self

import click

from crdiff_export.cli import drawing, options
from crdiff_export.cli.blocks import Block, Facts
from crdiff_export.cli.command import Invocation, command, gather, option, option_group
from crdiff_export.cli.evaluation_json import pairs_json, subject_json
from crdiff_export.cli.output import Output, Result
from crdiff_export.cli.signals import Stopped
from crdiff_export.evaluate import scorers
from crdiff_export.evaluate.results import Evaluation
from crdiff_export.formats.text import plural
from crdiff_export.search import (
    METHODS,
    SearchJob,
    SearchProgress,
    SearchRequest,
    SearchResult,
    TrialEvent,
    check_and_write,
    prepare,
    report_text,
)
from crdiff_export.search import search as run_search

if TYPE_CHECKING:
    from crdiff_export.cli.progress_display import ProgressDisplay


@command(
    "crdiff search demo --res 48 --trials 8 --limit 16 --held-out-limit 32 --steps 15 -o found.toml",
    "crdiff search sdxl --res 512 --prompts prompts.txt --scorer image-reward -o sdxl-512.toml -o sdxl-512.html",
    "crdiff search sdxl --res 512 --prompts prompts.txt --scorer image-reward -o sdxl-512.toml --worker",
    more="The same command again goes on with a search that was stopped; several at once share its trials, on machines "
    "that share its --storage. Give --worker to all but one: they leave the check and the outputs to that one.",
)
@options.base_argument
@option_group("Size", option("--res", "The size to find ratios for.", options.SIZE, "size", required=True))
@drawing.prompt_options(
    "Prompts to search by, one a line. Default for the demo models: scenes that they were never shown.",
    options.prompts_file("--held-out FILE", "Prompts for the check, one a line, none of --prompts. Default: the last "
                         "third of those; demo models: other scenes.", "held_out"),
    option("--prompt TEXT", "Search for this prompt alone, by many pictures of it."),
    option("--held-out-limit N", "Only the first N prompts of the check.", options.COUNT),
    option("--pictures N", "Pictures of each prompt, each from its own noise. Default: 1; with --prompt 16, and as "
           "many in the check.", click.IntRange(1, 10_000)),
    limit=" Default for the demo models: 32.",
    seed="noise",
)  # fmt: skip
@option_group(
    "Search",
    option("--method", "How to search. Default: tpe.", click.Choice(METHODS)),
    option("--method-seed N", "The method's seed.", click.IntRange(0), "seed", default=42, show_default=True),
    option("--trials N", "Trials in all, of all runs and workers. Default: 60; with --hours as many as there is time "
           "for.", click.IntRange(2)),
    option("--hours H", "Begin no trial after H hours.", options.FiniteRange(0, min_open=True)),
    option("--low R", "The smallest ratio to try. Default: 0.", options.RATIO),
    option("--high R", "The largest. Default: 0.9.", options.RATIO),
    option("--paper", "Annealing from 0.1 to 0.8 with the constants of the paper's public code."),
    option("--poa", "Search the POA weight as well, from 1 to 2.5."),
    option("--poa-range LOW HIGH", "The same from LOW to HIGH.", options.POA_WEIGHT, nargs=2),
    option("--early-stop/--no-early-stop", "Stop trials that are clearly worse than the best. Default: yes.",
           default=True),
    options.recipe,
    options.targets,
    option("--native/--no-native", "Look at the native size in the check. Default: yes.", default=True),
    option("--storage FILE|URL", "Where trials are kept: a .db file (default: beside the first output), or "
           "postgresql://… for many machines."),
    option("--study NAME", "The search's name there. Default: from the base, the size, the prompt."),
    option("--worker", "Only work on the search: no check, no outputs."),
)  # fmt: skip
@options.criterion_options
@drawing.options
@option_group("Drawing", drawing.batch, options.rehash)
@drawing.scorer_options
@option_group(
    "Output",
    option("-o, --output FILE", "The recipe (.toml), a page (.html), a plot (.png, .svg); may be given several times. "
           "Default: the recipe.", options.FILE, "outputs", multiple=True),
    option("--pictures-of-best FILE", "A sheet (.png) or page (.html) of the check's pictures, dense beside the best.",
           options.FILE, "sheet"),
    options.force,
)  # fmt: skip
@gather("request", SearchRequest)
def search(out: Output, request: SearchRequest) -> Result:
    """Search for ratios that make BASE better at a size, by a scorer, and check what was found on other prompts.

    Trial 0 is the dense model, trial 1 the recipe's variant. At the end the best and the dense model draw prompts that
    the search never saw; the recipe carries what that showed, and nothing is called better unless a 95 % interval
    says so. Where the dense model is best, there is no recipe. BASE is what `crdiff preview` takes.
    """
    job = drawing.prepare(out, request, prepare, _describe)
    with out.progress() as display, _Watcher(out, display, request.storage) as watcher:
        with out.stopper.watch(display) as progress:
            result = run_search(job, progress, watcher.trial, out.stopper.check)
        result = check_and_write(result, display)
    files = [str(path) for path in result.files]
    return Result(_as_json(result), [*_text(result), *files], bare=files, notes=_notes(result))


class _Watcher:
    """A bar of trials on a terminal, elsewhere a line for each; after a signal, what is kept and how it goes on."""

    def __init__(self, out: Output, display: "ProgressDisplay", storage: str | None) -> None:
        self._out, self._display, self._storage = out, display, storage
        self._progress: SearchProgress | None = None
        self._stack = ExitStack()
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: object, _traceback: object) -> None:
        self._stack.close()
        if isinstance(error, Stopped) and self._progress:
            where = self._progress.where
            invocation = click.get_current_context().find_object(Invocation) or Invocation()
            error.outcome = f"{plural(self._progress.over, 'finished trial')} kept in {where}"
            error.hint = f"To go on: {_again(invocation.words, self._storage, where)}"

    def trial(self, event: TrialEvent, progress: SearchProgress) -> None:
        if not self._progress:
            self._begin(progress)
        self._progress = progress
        if sys.stderr.isatty() and not self._out.silent:
            self._draw(event, progress)
        elif text := report_text.event_text(event, progress):
            self._out.log(text)
        if event.kind == "ended":
            self._stack.close()
            self._bar = None
        self._out.stopper.check()

    def _begin(self, progress: SearchProgress) -> None:
        self._stack.enter_context(self._display.paused())
        if text := report_text.resumed_text(progress):
            self._out.notes([text])

    def _draw(self, event: TrialEvent, progress: SearchProgress) -> None:
        from crdiff_export.cli.terminal import TrialsBar

        if self._bar is None:
            self._bar = self._stack.enter_context(closing(TrialsBar(max(1, progress.trials or 0))))
        part = event.done / event.pairs if event.kind == "scored" and event.pairs else 0
        title = "searched" if event.number is None else f"trial {event.number}"
        self._bar.draw(title, progress.over + part, report_text.progress_text(progress))


def _again(words: Sequence[str], storage: str | None, where: str) -> str:
    """Give a command line again; `where` is its storage without the password of a server."""
    without_password = {storage: where, f"--storage={storage}": f"--storage={where}"} if storage else {}
    return shlex.join(["crdiff", *(without_password.get(word, word) for word in words)])


def _describe(job: SearchJob) -> list[str]:
    searched, checked = (len({prompt for prompt, _ in pairs}) for pairs in (job.pairs.search, job.pairs.check))
    pictures = f"{len(job.pairs.search)} pictures of {plural(searched, 'prompt')}"
    check = f"{len(job.pairs.check)} of {checked}" if job.request.prompt is None else f"{len(job.pairs.check)} others"
    return [f"a trial is {pictures}, the check {check}; {drawing.device_text(job)}"]


def _text(result: SearchResult) -> list[Block]:
    from crdiff_export.cli.evaluation_text import score_tables

    text: list[Block] = [Facts(report_text.facts(result))]
    if result.evaluation:
        text += ["", *score_tables(result.evaluation)]
    return [*text, "", report_text.conclusion(result)]


def _notes(result: SearchResult) -> tuple[str, ...]:
    """Give the notes of the check, if there was one."""
    return result.evaluation.notes if result.evaluation else ()


def _as_json(result: SearchResult) -> dict[str, Any]:
    job, variant = result.job, result.variant if result.recipe else None
    return {
        "base": job.drawing.base.name, "family": job.plan.match.family.id, "resolution": str(job.request.size),
        "native": str(job.drawing.native), "scorer": scorers.public(job.scorer), "storage": result.where,
        "study": job.study, "method": job.setup.method.name, "verdict": result.verdict,
        "conclusion": report_text.conclusion(result),
        "ratios": dict(variant.ratios) if variant else None, "poa_weight": variant.poa_weight if variant else None,
        "best": result.best.number, "notes": [*job.notes, *_notes(result)],
        "trials": [
            {
                "place": trial.number, "state": trial.state, "ratios": trial.candidate.by_group,
                "poa_weight": trial.candidate.poa_weight, "score": trial.value, "pictures": len(trial.scores),
                "seconds": trial.seconds, "reason": trial.reason,
            }
            for trial in result.trials
        ],
        "check": _check_json(result.evaluation) if result.evaluation else None,
        "files": [str(path) for path in result.files],
    }  # fmt: skip


def _check_json(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "pairs": pairs_json(evaluation),
        "sizes": [subject_json(evaluation, subject) for subject in evaluation.subjects],
    }
