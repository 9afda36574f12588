"""`crdiff preview`."""

from typing import Any

from crdiff_export.cli import drawing, options
from crdiff_export.cli.blocks import Facts
from crdiff_export.cli.command import command, gather, option, option_group
from crdiff_export.cli.output import Output, Result
from crdiff_export.evaluate.comparison import model_name
from crdiff_export.evaluate.preview import Preview, PreviewJob, PreviewRequest, draw, measure, prepare, write
from crdiff_export.formats.text import plural

FRACTION = options.FiniteRange(0, 1)


@command(
    'crdiff preview demo --res 48 --prompt "a yellow triangle above a blue circle on grey" --seed 1',
    'crdiff preview sdxl --res 512 --prompt "a red fox" --seed 1 --seed 2 --poa-weight 1.5 --poa-weight 2',
    "crdiff preview sdxl --baked sdxl-512.safetensors --prompts prompts.txt -o sheet.png",
)
@options.base_argument
@option_group(
    "Size",
    option("--res", "The size to draw and to prune for. Default with --baked: the file's.", options.SIZE, "size"),
)
@option_group(
    "Prompts",
    options.prompt,
    options.prompts_file("--prompts FILE", "Prompts, one a line."),
    option("--seed N", "Seed of the noise, the same for all pictures of a row; may be given several times. Default: 0.",
           int, "seeds", multiple=True, default=(0,)),
)  # fmt: skip
@options.ratio_options
@option_group(
    "Ratios",
    option("--baked FILE", "Prune as this exported file is pruned, instead of by a recipe; BASE is what it was made "
           "from.", options.FILE),
)  # fmt: skip
@options.criterion_options
@option_group(
    "POA",
    option("--poa-weight W", "A column with this POA weight; may be given several times. Default: the recipe's.",
           options.POA_WEIGHT, "weights", multiple=True),
    option("--start F", "Fraction of the steps at which POA begins.", FRACTION, default=0.0),
    option("--stop F", "Fraction at which it ends; dense outside.", FRACTION, default=1.0),
)  # fmt: skip
@drawing.options
@option_group(
    "Drawing", drawing.beside, option("--offload", "For small GPUs: keep idle parts in main memory, decode in tiles.")
)
@option_group(
    "Output",
    option("-o, --output FILE", "A .png sheet or an .html page; may be given twice. Default: both, as "
           "STEM-preview-WxH in the current folder.", options.FILE, "outputs", multiple=True),
    options.force,
)  # fmt: skip
@gather("prompts", options.join_prompts)
@gather("request", PreviewRequest)
def preview(out: Output, request: PreviewRequest) -> Result:
    """Draw what BASE, its pruned model and POA make of the same prompts and noise, side by side on one sheet.

    Nothing else is written: ratios come from the recipe, and one copy of the weights serves all columns. BASE is what
    `crdiff export` takes, with all of its parts: a safetensors checkpoint, a diffusers folder, a Hub id or an alias.
    """
    job = drawing.prepare(out, request, prepare, _describe)
    with out.progress() as display:
        with out.stopper.watch(display) as progress:
            source = measure(job, progress)
        made = write(draw(job, source, display))
    files = [str(path) for path in job.outputs]
    return Result(
        _as_json(made), [Facts((*made.facts, ("pictures", _times(made)))), *files], bare=files, notes=made.notes
    )


def _describe(job: PreviewJob) -> list[str]:
    rows, pictures = plural(len(job.pairs), "row"), plural(len(job.pairs) * len(job.columns), "picture")
    return [f"{pictures}, {rows} of {', '.join(job.columns)}, {drawing.device_text(job)}"]


def _times(made: Preview) -> str:
    seconds = {name: [p.seconds for p in made.pictures if p.column == name] for name in made.job.columns}
    each = ", ".join(f"{name} {sum(times) / len(times):.1f} s" for name, times in seconds.items())
    return f"{len(made.pictures)} ({each} each)"


def _as_json(made: Preview) -> dict[str, Any]:
    job, subject, style = made.job, made.job.subject, made.style
    return {
        "files": [str(path) for path in job.outputs], "base": job.drawing.base.name,
        "family": subject.plan.match.family.id,
        "resolution": str(subject.size), "native": str(job.drawing.native), "ratios": subject.ratios,
        "provenance": job.provenance, "borrowed_from": job.borrowed_from and str(job.borrowed_from),
        "ratios_from": job.ratios_from,
        "criterion": job.criterion, "baked": str(job.request.baked) if job.request.baked else None,
        "columns": [
            *({"name": model_name(weight), "poa_weight": weight} for weight in subject.weights),
            *({"name": rival.name, "poa_weight": None} for rival in job.rivals),
        ],
        "poa_start": job.request.start, "poa_stop": job.request.stop, "steps": style.steps,
        "guidance": style.guidance, "scheduler": made.scheduler, "negative": job.request.negative,
        "device": job.drawing.device, "dtype": job.drawing.dtype,
        "pictures": [
            {"column": p.column, "prompt": p.prompt, "seed": p.seed, "seconds": round(p.seconds, 3)}
            for p in made.pictures
        ],
        "notes": [*job.notes, *made.notes],
    }  # fmt: skip
