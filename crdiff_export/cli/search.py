"""`crdiff search`."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click
from click.core import ParameterSource

from crdiff_export.cli.drawing import (
    announce_drawing,
    batch_option,
    drawing_options,
    quiet_parts,
    scorer_device_option,
    scorer_option,
)
from crdiff_export.cli.findings import finding_json
from crdiff_export.cli.options import (
    POA_WEIGHT,
    RATIO,
    KindsType,
    SizeType,
    announce,
    complete_alias,
    criterion_options,
    examples,
    listed_prompts,
    output_options,
)
from crdiff_export.cli.signals import Stopped, Stopper
from crdiff_export.errors import SearchError
from crdiff_export.evaluate import scorers
from crdiff_export.evaluate.findings import Evaluation
from crdiff_export.formats.text import plural
from crdiff_export.search import report_text
from crdiff_export.search.engine import METHODS
from crdiff_export.search.tuning import (
    Found,
    Job,
    SearchRequest,
    Standing,
    finish,
    prepare,
    work,
)

if TYPE_CHECKING:
    from crdiff_export.cli.output import Shown
    from crdiff_export.search.engine import Event

HELD_OUT = "Prompts for the check, one a line, none of --prompts. Default: the last third of those; demo: other scenes."


@click.command(
    epilog=examples(
        "crdiff search demo --res 96x64 --trials 8",
        "crdiff search sdxl --res 512 --prompts prompts.txt --scorer image-reward -o sdxl-512.toml -o sdxl-512.html",
        "crdiff search sdxl --res 512 --prompts prompts.txt --scorer image-reward -o sdxl-512.toml --worker",
    )
    + "\n\nThe same command again goes on with a search that was stopped; several at once share its trials, on machines"
    " that share its --storage. Give --worker to all but one: they leave the check and the outputs to that one."
)
@click.argument("base", shell_complete=complete_alias)
@click.option("--res", "size", type=SizeType(), required=True, help="The size to find ratios for.")
@click.option(
    "--prompts", "listed", type=click.Path(path_type=Path), metavar="FILE",
    help="Prompts to search by, one a line. Default for the demo model: scenes that it was never shown.",
)  # fmt: skip
@click.option("--held-out", "kept", type=click.Path(path_type=Path), metavar="FILE", help=HELD_OUT)
@click.option("--prompt", metavar="TEXT", help="Search for this prompt alone, by many pictures of it.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N prompts. Default for demo: 32.")
@click.option("--held-out-limit", type=click.IntRange(1), metavar="N", help="Only the first N prompts of the check.")
@click.option(
    "--pictures", type=click.IntRange(1, 10_000), metavar="N",
    help="Pictures of each prompt, each from its own noise. Default: 1; with --prompt 16, and as many in the check.",
)  # fmt: skip
@click.option("--noise", type=click.IntRange(0), default=0, metavar="N", help="The first picture's seed. Default: 0.")
@scorer_option
@click.option("--method", type=click.Choice(METHODS), help="How to search. Default: tpe.")
@click.option("--seed", type=click.IntRange(0), default=42, metavar="N", show_default=True, help="The method's seed.")
@click.option(
    "--trials", type=click.IntRange(2), metavar="N",
    help="Trials in all, of all runs and workers. Default: 60; with --hours as many as there is time for.",
)  # fmt: skip
@click.option("--hours", type=click.FloatRange(0, min_open=True), metavar="H", help="Begin no trial after H hours.")
@click.option("--low", type=RATIO, metavar="R", help="The smallest ratio to try. Default: 0.")
@click.option("--high", type=RATIO, metavar="R", help="The largest. Default: 0.9.")
@click.option("--paper", is_flag=True, help="Annealing from 0.1 to 0.8 with the constants of the paper's public code.")
@click.option("--poa", is_flag=True, help="Search the POA weight as well, from 1 to 2.5.")
@click.option("--poa-range", type=POA_WEIGHT, nargs=2, metavar="LOW HIGH", help="The same from LOW to HIGH.")
@click.option(
    "--early-stop/--no-early-stop", default=True, help="Stop trials that are clearly worse than the best. Default: yes."
)
@click.option("--recipe", type=click.Path(path_type=Path), help="Begin at this recipe instead of the built-in one.")
@criterion_options
@click.option("--targets", type=KindsType(), help="Kinds of layers to prune. Default: the recipe's.")
@click.option("--native/--no-native", default=True, help="Look at the native size in the check. Default: yes.")
@drawing_options
@batch_option
@scorer_device_option
@click.option(
    "--storage", metavar="FILE|URL",
    help="Where trials are kept: a .journal file (default: beside the first output), or postgresql://… for many hosts.",
)  # fmt: skip
@click.option("--study", metavar="NAME", help="The search's name there. Default: from the base, the size, the prompt.")
@click.option("--worker", is_flag=True, help="Only work on the search: no check, no outputs.")
@click.option(
    "-o", "--output", "outputs", type=click.Path(path_type=Path), multiple=True, metavar="FILE",
    help="The recipe (.toml), a page (.html), a plot (.png, .svg); may be given several times. Default: the recipe.",
)  # fmt: skip
@click.option(
    "--pictures-of-best", "sheet", type=click.Path(path_type=Path), metavar="FILE",
    help="A sheet (.png) or page (.html) of the check's pictures, dense beside the best.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace outputs that exist.")
@output_options
@click.pass_context
def search(
    context: click.Context, /, listed: Path | None, kept: Path | None, *, json: bool, quiet: bool, **options: Any
) -> None:
    """Search for ratios that make BASE better at a size, by a scorer, and check what was found on other prompts.

    Trial 0 is the dense model, trial 1 the recipe's variant. At the end the best and the dense model draw prompts that
    the search never saw; the recipe carries what that showed, and nothing is called better unless a 95 % interval
    says so. Where the dense model is best, there is no recipe. BASE is what `crdiff preview` takes.
    """
    from crdiff_export.cli import output

    stopper = context.find_object(Stopper) or Stopper()
    request = SearchRequest(
        prompts=listed_prompts(listed) if listed else (), held_out=listed_prompts(kept) if kept else (), **options
    )
    silent = quiet or json
    announce(request.base, quiet=silent)
    job = prepare(request)
    if not silent:
        _announce(job)
    quiet_parts(job.easel, quiet=silent)
    with output.progress(quiet=silent) as shown, _resumable(context) as standings:
        with _Watching(shown, stopper, standings, quiet=silent) as watch, stopper.watch(shown) as progress:
            found = work(job, progress, watch)
        found = finish(found, shown)
    if json:
        output.print_json(_as_json(found))
        return
    if not quiet:
        _show(found)
    for path in found.files:
        output.line(str(path))


class _Watching:
    """A bar of trials on a terminal, elsewhere a line for each; any step may be the last that a signal leaves."""

    def __init__(self, shown: "Shown", stopper: Stopper, standings: list[Standing], *, quiet: bool) -> None:
        self._shown, self._stopper, self._standings, self._quiet = shown, stopper, standings, quiet
        self._stack = ExitStack()
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def step(self) -> None:
        self._stopper.check()

    def trial(self, event: "Event", standing: Standing) -> None:
        if not self._standings:
            self._begin(standing)
        self._standings[:] = [standing]
        if not self._quiet:
            if sys.stderr.isatty():
                self._draw(event, standing)
            elif text := report_text.trial(event, standing):
                click.echo(text, err=True)
        if event.kind == "ended":
            self._stack.close()
            self._bar = None
        self._stopper.check()

    def _begin(self, standing: Standing) -> None:
        from crdiff_export.cli import output

        self._stack.enter_context(self._shown.paused())
        if not self._quiet and (text := report_text.resumed(standing)):
            output.note(text)

    def _draw(self, event: "Event", standing: Standing) -> None:
        if self._bar is None:
            self._bar = self._stack.enter_context(
                click.progressbar(
                    length=max(1, standing.trials or 0) * 1000, file=sys.stderr, width=24, show_eta=False,
                    show_percent=False, bar_template="%(label)s %(bar)s %(info)s",
                    item_show_func=lambda text: text,
                )
            )  # fmt: skip
        part = event.done / event.pairs if event.kind == "scored" and event.pairs else 0
        self._bar.label = "searched" if event.place is None else f"trial {event.place}"
        self._bar.pos = min(self._bar.length, round(1000 * (standing.over + part)))
        self._bar.current_item = report_text.progressed(standing)
        self._bar.render_progress()


@contextmanager
def _resumable(context: click.Context) -> Iterator[list[Standing]]:
    """Where a signal ends a search that has begun, say what is kept and how it goes on."""
    standings: list[Standing] = []
    try:
        yield standings
    except Stopped as stop:
        if not standings:
            raise
        raise _interrupted(stop, standings[-1], _again(context, standings[-1].where)) from stop


def _interrupted(stop: Stopped, standing: Standing, command: str) -> SearchError:
    class Interrupted(SearchError):
        exit_code = stop.exit_code
        code = stop.word

    kept = plural(standing.over, "finished trial")
    return Interrupted(f"{stop.word}; {kept} kept in {standing.where}", f"To go on: {command}")


def _again(context: click.Context, where: str) -> str:
    """The command line as it was given; the address of a server without its password."""
    words = context.command_path.split()
    for param in context.command.params:
        name = str(param.name)
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = where if name == "storage" else context.params[name]
        several = value if isinstance(param, click.Option) and param.multiple else (value,)
        words += [word for one in several for word in _spelled(param, one)]
    return shlex.join(words)


def _spelled(param: click.Parameter, value: Any) -> list[str]:
    if not isinstance(param, click.Option):
        return [str(value)]
    if param.is_flag:
        return [param.opts[-1] if value else param.secondary_opts[-1]]
    if isinstance(param.type, KindsType):
        return [param.opts[-1], ",".join(value)]
    several = value if isinstance(value, tuple) else (value,)
    return [param.opts[-1], *map(str, several)]


def _announce(job: Job) -> None:
    searched, checked = (len({prompt for prompt, _ in pairs}) for pairs in (job.pairs.search, job.pairs.check))
    pictures = f"{len(job.pairs.search)} pictures of {plural(searched, 'prompt')}"
    check = f"{len(job.pairs.check)} of {checked}" if job.request.prompt is None else f"{len(job.pairs.check)} others"
    place = f"on {job.easel.device} in {job.easel.dtype}"
    announce_drawing(job.easel, *job.notes, f"a trial is {pictures}, the check {check}; {place}")


def _show(found: Found) -> None:
    from crdiff_export.cli import output
    from crdiff_export.evaluate import report_text as of_evaluation

    for text in _notes(found):
        output.note(text)
    output.facts(report_text.facts(found))
    if found.evaluation:
        output.line("")
        columns, rows = of_evaluation.table(found.evaluation)
        output.table(columns, rows, of_evaluation.NUMERIC)
    output.line("")
    output.line(report_text.conclusion(found))


def _notes(found: Found) -> tuple[str, ...]:
    """What the check has shown besides."""
    return found.evaluation.notes if found.evaluation else ()


def _as_json(found: Found) -> dict[str, Any]:
    job, variant = found.job, found.variant if found.recipe else None
    return {
        "base": job.easel.base.name, "family": job.plan.match.family.id, "resolution": str(job.request.size),
        "native": str(job.easel.native), "scorer": scorers.public(job.scorer), "storage": found.where,
        "study": job.study, "method": job.setup.method.name, "verdict": found.verdict,
        "conclusion": report_text.conclusion(found),
        "ratios": dict(variant.ratios) if variant else None, "poa_weight": variant.poa_weight if variant else None,
        "best": found.best.place, "notes": [*job.notes, *_notes(found)],
        "trials": [
            {
                "place": one.place, "state": one.state, "ratios": one.candidate.by_group,
                "poa_weight": one.candidate.poa_weight, "score": one.value, "pictures": len(one.scores),
                "seconds": one.seconds, "reason": one.reason,
            }
            for one in found.trials
        ],
        "check": _check_json(found.evaluation) if found.evaluation else None,
        "files": [str(path) for path in found.files],
    }  # fmt: skip


def _check_json(made: Evaluation) -> dict[str, Any]:
    pairs: Sequence[tuple[str, int]] = made.pairs
    return {
        "pairs": [{"prompt": prompt, "seed": seed} for prompt, seed in pairs],
        "sizes": [
            {"resolution": str(subject.size), "models": [finding_json(one) for one in made.of(subject)]}
            for subject in made.subjects
        ],
    }
