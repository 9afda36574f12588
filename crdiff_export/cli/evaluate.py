"""`crdiff evaluate`."""

from pathlib import Path
from typing import Any

import click

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
    SizeType,
    announce,
    by_group,
    complete_alias,
    criterion_options,
    examples,
    listed_prompts,
    output_options,
    ratio_options,
)
from crdiff_export.cli.signals import Stopper
from crdiff_export.evaluate import (
    EvaluateRequest,
    Evaluation,
    Job,
    Subject,
    count,
    prepare,
    run,
    write,
)
from crdiff_export.evaluate.scorers import inception


@click.command(
    epilog=examples(
        "crdiff evaluate demo --res 96x64 --limit 16",
        "crdiff evaluate sdxl --res 512 --prompts prompts.txt --scorer image-reward -o sdxl-512.html",
        "crdiff evaluate sdxl --res 512 --recipe mine.toml --prompts prompts.txt --scorer clip-score -o found.toml",
    )
)
@click.argument("base", shell_complete=complete_alias)
@click.option(
    "--res", "sizes", type=SizeType(), multiple=True, help="The size to draw and to prune for; may be given again."
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to draw; may be given several times.")
@click.option(
    "--prompts", "listed", type=click.Path(path_type=Path), metavar="FILE",
    help="Prompts, one a line, that nobody tuned on. Default for the demo model: scenes that it was never shown.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N prompts.")
@click.option(
    "--pictures", type=click.IntRange(1, 10_000), default=1, metavar="N", show_default=True,
    help="Pictures of each prompt, each from its own noise.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, metavar="N", help="The first picture's seed. Default: 0.")
@scorer_option
@click.option(
    "--poa-weight", "weights", type=POA_WEIGHT, multiple=True, metavar="W",
    help="POA with this weight; may be given several times. Default: the recipe's.",
)  # fmt: skip
@click.option("--recipe", type=click.Path(path_type=Path), help="A recipe instead of the built-in one (.toml, .json).")
@ratio_options
@click.option(
    "--native/--no-native", default=True, help="Look at the native size, too: does it hurt there? Default: yes."
)
@criterion_options
@drawing_options
@batch_option
@scorer_device_option
@click.option(
    "--fid", metavar="DIR|dense",
    help="Also an FID of each model's pictures, against those in a folder or the dense model's at the native size.",
)  # fmt: skip
@click.option(
    "--fid-weights", type=click.Path(path_type=Path), metavar="FILE",
    help="FID's Inception network. Default: torch's cache, into which it is fetched once.",
)  # fmt: skip
@click.option(
    "-o", "--output", "outputs", type=click.Path(path_type=Path), multiple=True, metavar="FILE",
    help="A page (.html), a plot (.png, .svg), or a recipe with the evidence (.toml); may be given several times.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace outputs that exist.")
@output_options
@click.pass_obj
def evaluate(
    stopper: Stopper, /, base: str, prompts: tuple[str, ...], listed: Path | None, scorer: str | None, *,
    down: float | None, mid: float | None, up: float | None, json: bool, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Score what BASE, its pruned model and POA make of the same prompts and noise, and say what the scores show.

    Differences are paired, picture by picture, and come with 95 % intervals; a model is called better or worse only
    where its interval does not reach 0. Nothing but the outputs is written. BASE is what `crdiff preview` takes.
    """
    from crdiff_export.cli import output

    request = EvaluateRequest(
        base=base,
        prompts=(*prompts, *(listed_prompts(listed) if listed else ())),
        scorer=scorer,
        ratios=by_group(down, mid, up),
        **options,
    )
    silent = quiet or json
    announce(base, quiet=silent)
    job = prepare(request)
    if not silent:
        _announce(job)
    quiet_parts(job.easel, quiet=silent)
    with output.progress(quiet=silent) as shown:
        with stopper.watch(shown) as progress:
            counted = count(job, progress)
        found = run(job, counted, shown)
    if json:
        output.print_json(_as_json(job, found))
    else:
        _show(found, quiet=quiet)  # first of all, for it took long
    write(job, found)
    for path in () if json else job.outputs:
        output.line(str(path))


def _announce(job: Job) -> None:
    prompts = len({prompt for prompt, _ in job.pairs})
    fetched = job.fid and not job.fid.weights and (url := inception.absent())
    announce_drawing(
        job.easel,
        *job.notes,
        f"{job.pictures} pictures of {prompts} prompts, on {job.easel.device} in {job.easel.dtype}",
        *((f"FID's network, 91 MiB, comes from {url}",) if fetched else ()),
    )


def _show(found: Evaluation, *, quiet: bool) -> None:
    from crdiff_export.cli import output
    from crdiff_export.evaluate import report_text

    if not quiet:
        for text in found.notes:
            output.note(text)
        output.facts(found.facts)
        output.line("")
    columns, rows = report_text.table(found)
    output.table(columns, rows, report_text.NUMERIC)


def _as_json(job: Job, found: Evaluation) -> dict[str, Any]:
    return {
        "base": found.base, "family": found.family, "native": str(found.native), "scorer": found.scorer,
        "scorer_fingerprint": dict(found.fingerprint), "facts": dict(found.facts), "notes": [*job.notes, *found.notes],
        "fid": dict(found.fid) if found.fid else None,
        "pairs": [{"prompt": prompt, "seed": seed} for prompt, seed in found.pairs],
        "sizes": [_subject_json(found, subject) for subject in found.subjects],
        "files": [str(path) for path in job.outputs],
    }  # fmt: skip


def _subject_json(found: Evaluation, subject: Subject) -> dict[str, Any]:
    return {
        "resolution": str(subject.size), "ratios_for": str(subject.of), "ratios": dict(subject.ratios),
        "provenance": subject.variant.provenance, "ratios_from": subject.variant.source,
        "models": [finding_json(finding) for finding in found.of(subject)],
    }  # fmt: skip
