"""`crdiff preview`."""

from pathlib import Path
from typing import Any

import click

from crdiff_export.cli.drawing import announce_drawing, drawing_options, quiet_parts
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
from crdiff_export.evaluate.preview import (
    Job,
    Preview,
    PreviewRequest,
    draw,
    measure,
    prepare,
)
from crdiff_export.evaluate.preview.wording import criterion_of, ratios_of, standing
from crdiff_export.formats.text import plural

FRACTION = click.FloatRange(0, 1)


@click.command(
    epilog=examples(
        'crdiff preview demo --res 96x64 --prompt "a red circle left of a blue square on white"',
        'crdiff preview sdxl --res 512 --prompt "a red fox" --seed 1 --seed 2 --poa-weight 1.5 --poa-weight 2',
        "crdiff preview sdxl --baked sdxl-512.safetensors --prompts prompts.txt -o sheet.png",
    )
)
@click.argument("base", shell_complete=complete_alias)
@click.option(
    "--res", "size", type=SizeType(), help="The size to draw and to prune for. Default with --baked: the file's."
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to draw; may be given several times.")
@click.option("--prompts", "listed", type=click.Path(path_type=Path), metavar="FILE", help="Prompts, one a line.")
@click.option(
    "--seed", "seeds", type=int, multiple=True, default=(0,), metavar="N",
    help="Seed of the noise, the same for all pictures of a row; may be given several times. Default: 0.",
)  # fmt: skip
@click.option(
    "--poa-weight", "weights", type=POA_WEIGHT, multiple=True, metavar="W",
    help="A column with this POA weight; may be given several times. Default: the recipe's.",
)  # fmt: skip
@click.option("--start", type=FRACTION, default=0.0, metavar="F", help="Fraction of the steps at which POA begins.")
@click.option("--stop", type=FRACTION, default=1.0, metavar="F", help="Fraction at which it ends; dense outside.")
@click.option("--recipe", type=click.Path(path_type=Path), help="A recipe instead of the built-in one (.toml, .json).")
@ratio_options
@criterion_options
@click.option(
    "--baked", type=click.Path(path_type=Path), metavar="FILE",
    help="Prune as this exported file is pruned, instead of by a recipe; BASE is what it was made from.",
)  # fmt: skip
@drawing_options
@click.option("--offload", is_flag=True, help="For small GPUs: keep idle parts in main memory, decode in tiles.")
@click.option(
    "-o", "--output", "outputs", type=click.Path(path_type=Path), multiple=True, metavar="FILE",
    help="A .png sheet or an .html page; may be given twice. Default: both, as STEM-preview-WxH in the current folder.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace outputs that exist.")
@output_options
@click.pass_obj
def preview(
    stopper: Stopper, /, base: str, prompts: tuple[str, ...], listed: Path | None, *,
    down: float | None, mid: float | None, up: float | None, json: bool, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Draw what BASE, its pruned model and POA make of the same prompts and noise, side by side on one sheet.

    Nothing else is written: ratios come from the recipe, and one copy of the weights serves all columns. BASE is what
    `crdiff export` takes, with all of its parts: a safetensors checkpoint, a diffusers folder, a Hub id or an alias.
    """
    from crdiff_export.cli import output

    request = PreviewRequest(
        base=base,
        prompts=(*prompts, *(listed_prompts(listed) if listed else ())),
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
            source = measure(job, progress)
        made = draw(job, source, shown)
    if json:
        output.print_json(_as_json(made))
        return
    if not quiet:
        for text in made.notes:
            output.note(text)
        output.facts((*made.facts, ("pictures", _times(made))))
    for path in made.files:
        output.line(str(path))


def _announce(job: Job) -> None:
    rows, names = job.pictures // len(job.columns), ", ".join(column.name for column in job.columns)
    place = f"on {job.easel.device} in {job.easel.dtype}"
    announce_drawing(
        job.easel, *job.notes, f"{plural(job.pictures, 'picture')}, {plural(rows, 'row')} of {names}, {place}"
    )


def _times(made: Preview) -> str:
    columns = made.job.columns
    seconds = {c: [p.seconds for p in made.taken.pictures if p.column == c] for c in columns}
    each = ", ".join(f"{column.name} {sum(times) / len(times):.1f} s" for column, times in seconds.items())
    return f"{len(made.taken.pictures)} ({each} each)"


def _as_json(made: Preview) -> dict[str, Any]:
    job, taken = made.job, made.taken
    provenance = job.baked.stamp.provenance if job.baked else job.plan.variant.provenance
    return {
        "files": [str(path) for path in made.files], "base": job.easel.base.name, "family": job.plan.match.family.id,
        "resolution": str(job.size), "native": str(job.easel.native), "ratios": ratios_of(job),
        "provenance": provenance, "ratios_from": standing(job),
        "criterion": criterion_of(job), "baked": str(job.request.baked) if job.request.baked else None,
        "columns": [{"name": column.name, "poa_weight": column.weight} for column in job.columns],
        "poa_start": job.request.start, "poa_stop": job.request.stop, "steps": taken.steps,
        "guidance": taken.guidance, "scheduler": taken.scheduler, "negative": job.request.negative,
        "device": job.easel.device, "dtype": job.easel.dtype,
        "pictures": [
            {"column": p.column.name, "prompt": p.prompt, "seed": p.seed, "seconds": round(p.seconds, 3)}
            for p in taken.pictures
        ],
        "notes": [*job.notes, *made.notes],
    }  # fmt: skip
