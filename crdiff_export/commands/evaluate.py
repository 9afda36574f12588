"""`crdiff evaluate`."""

from pathlib import Path
from typing import Any

import click

from crdiff_export.commands.options import (
    POA_WEIGHT,
    RATIO,
    DeviceType,
    SizeType,
    announce,
    complete_alias,
    criterion_options,
    examples,
    listed_prompts,
    output_options,
    quiet_client,
)
from crdiff_export.commands.signals import Stopper
from crdiff_export.evaluation import EvaluateRequest, Evaluation, Job, Subject, count, prepare, run, write
from crdiff_export.evaluation.findings import Finding
from crdiff_export.evaluation.statistics import Estimate
from crdiff_export.floats import DTYPES
from crdiff_export.scorers import inception


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
@click.option(
    "--scorer", metavar="NAME|module:function|command:…",
    help="What says how good a picture is, or a sum such as 0.5*clip-score+0.5*aesthetic. Default for demo: its judge.",
)  # fmt: skip
@click.option(
    "--poa-weight", "weights", type=POA_WEIGHT, multiple=True, metavar="W",
    help="POA with this weight; may be given several times. Default: the recipe's.",
)  # fmt: skip
@click.option("--recipe", type=click.Path(path_type=Path), help="A recipe instead of the built-in one (.toml, .json).")
@click.option("--ratio", type=RATIO, metavar="R", help="Share of every group's weights to set to zero.")
@click.option("--down", type=RATIO, metavar="R", help="Share for the down blocks of a UNet; wins over --ratio.")
@click.option("--mid", type=RATIO, metavar="R", help="Share for its mid block; wins over --ratio.")
@click.option("--up", type=RATIO, metavar="R", help="Share for its up blocks; wins over --ratio.")
@click.option(
    "--native/--no-native", default=True, help="Look at the native size, too: does it hurt there? Default: yes."
)
@criterion_options
@click.option("--steps", type=click.IntRange(1, 1000), metavar="N", help="Steps of sampling. Default: 25; schnell: 4.")
@click.option(
    "--guidance", type=click.FloatRange(0, 100), metavar="G", help="Guidance scale. Default: diffusers'; demo: 4."
)
@click.option("--negative", metavar="TEXT", help="Negative prompt.")
@click.option(
    "--batch", type=click.IntRange(1), metavar="N", help="Pictures to draw at once. Default: 4 on a GPU; demo: 16."
)
@click.option("--device", type=DeviceType(), default="auto", show_default=True, help="Where to draw: auto takes a GPU.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Default: fp16 or bf16 on a GPU, fp32 on a CPU.")
@click.option("--scorer-device", type=DeviceType(), help="Where to score. Default: where pictures are drawn.")
@click.option(
    "--fid", metavar="DIR|dense",
    help="Also an FID of each model's pictures, against those in a folder or the dense model's at the native size.",
)  # fmt: skip
@click.option(
    "--fid-weights", type=click.Path(path_type=Path), metavar="FILE",
    help="FID's Inception network. Default: torch's cache, into which it is fetched once.",
)  # fmt: skip
@click.option(
    "--config", metavar="DIR|ORG/NAME",
    help="For a single file: a folder for diffusers with the model's configuration, or a repository on the Hub.",
)  # fmt: skip
@click.option("--variant", metavar="NAME", help="Weights to take from a folder that has several, such as fp16.")
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
    from crdiff_export import ui

    per_group = {"down": down, "mid": mid, "up": up}
    request = EvaluateRequest(
        base=base,
        prompts=(*prompts, *(listed_prompts(listed) if listed else ())),
        scorer=scorer,
        ratios={group: ratio for group, ratio in per_group.items() if ratio is not None},
        **options,
    )
    silent = quiet or json
    announce(base, quiet=silent)
    job = prepare(request)
    if not silent:
        _announce(job)
    if job.opening.remote:
        quiet_client(quiet=silent)
    with ui.progress(quiet=silent) as shown:
        with stopper.watch(shown) as progress:
            counted = count(job, progress)
        found = run(job, counted, shown)
    if json:
        ui.print_json(_as_json(job, found))
    else:
        _show(found, quiet=quiet)  # first of all, for it took long
    write(job, found)
    for path in () if json else job.outputs:
        ui.line(str(path))


def _announce(job: Job) -> None:
    from crdiff_export import ui

    for text in job.notes:
        ui.note(text)
    prompts = len({prompt for prompt, _ in job.pairs})
    ui.note(f"{job.pictures} pictures of {prompts} prompts, on {job.device} in {job.dtype}")
    if job.fid and not job.fid.weights and (url := inception.absent()):
        ui.note(f"FID's network, 91 MiB, comes from {url}")
    if job.opening.remote:
        ui.note(f"what {job.base.name} lacks comes from {job.opening.remote}, unless it is in the local cache")


def _show(found: Evaluation, *, quiet: bool) -> None:
    from crdiff_export import ui
    from crdiff_export.evaluation import wording

    if not quiet:
        for text in found.notes:
            ui.note(text)
        ui.facts(found.facts)
        ui.line("")
    columns, rows = wording.table(found)
    ui.table(columns, rows, wording.NUMERIC)


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
        "models": [_finding_json(finding) for finding in found.of(subject)],
    }  # fmt: skip


def _finding_json(finding: Finding) -> dict[str, Any]:
    def said(estimate: Estimate | None) -> dict[str, float | None] | None:
        if not estimate:
            return None
        ends = (estimate.low, estimate.high) if estimate.bounded else (None, None)
        return {"value": estimate.value, "low": ends[0], "high": ends[1]}

    return {
        "model": finding.drawn.name, "poa_weight": finding.drawn.weight, "score": said(finding.mean),
        "minus_dense": said(finding.difference), "right": said(finding.right), "fid": finding.drawn.fid,
        "parts": dict(finding.parts), "verdict": finding.difference.verdict if finding.difference else None,
        "scores": [score.value for score in finding.drawn.scores], "seconds": round(finding.drawn.seconds, 3),
    }  # fmt: skip
