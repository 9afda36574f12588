"""`crdiff evaluate`."""

from typing import Any

from crdiff_export.cli import drawing, options
from crdiff_export.cli.blocks import Block, Facts
from crdiff_export.cli.command import command, gather, option, option_group
from crdiff_export.cli.evaluation_json import beside_json, pairs_json, subject_json
from crdiff_export.cli.output import Output, Result
from crdiff_export.evaluate import EvaluateJob, EvaluateRequest, Evaluation, draw, measure, prepare, write
from crdiff_export.evaluate.scorers import inception
from crdiff_export.formats.text import plural


@command(
    "crdiff evaluate demo --res 96x64 --limit 16",
    "crdiff evaluate sdxl --res 512 --prompts prompts.txt --scorer image-reward -o sdxl-512.html",
    "crdiff evaluate sdxl --res 512 --prompts prompts.txt --scorer image-reward --beside native-size --beside two-pass",
    "crdiff evaluate sdxl --res 512 --recipe mine.toml --prompts prompts.txt --scorer clip-score -o found.toml",
)
@options.base_argument
@option_group(
    "Size",
    option("--res", "The size to draw and to prune for; may be given again.", options.SIZE, "sizes", multiple=True),
    option("--native/--no-native", "Look at the native size, too: does it hurt there? Default: yes.", default=True),
)
@drawing.prompt_options(
    "Prompts, one a line, that were not used for tuning. Default for the demo models: held-out scenes.",
    options.prompt,
    drawing.pictures,
)
@options.ratio_options
@options.criterion_options
@option_group(
    "POA",
    option("--poa-weight W", "POA with this weight; may be given several times. Default: the recipe's.",
           options.POA_WEIGHT, "weights", multiple=True),
)  # fmt: skip
@drawing.options
@option_group("Drawing", drawing.batch, drawing.beside)
@drawing.scorer_options
@option_group(
    "Scoring",
    option("--fid DIR|dense", "Also an FID of each model's pictures, against those in a folder or the dense model's at "
           "the native size."),
    option("--fid-weights FILE", "FID's Inception network. Default: torch's cache, into which it is fetched once.",
           options.FILE),
)  # fmt: skip
@option_group(
    "Output",
    option("-o, --output FILE", "A page (.html), a plot (.png, .svg), or a recipe with the evidence (.toml); may be "
           "given several times.", options.FILE, "outputs", multiple=True),
    options.force,
)  # fmt: skip
@gather("request", EvaluateRequest)
def evaluate(out: Output, request: EvaluateRequest) -> None:
    """Score what BASE, its pruned model and POA make of the same prompts and noise, and say what the scores show.

    Differences are paired, picture by picture, and come with 95 % intervals; a model is called better or worse only
    where its interval does not reach 0. Nothing but the outputs is written. BASE is what `crdiff preview` takes.
    """
    job = drawing.prepare(out, request, prepare, _describe)
    with out.progress() as display:
        with out.stopper.watch(display) as progress:
            counted = measure(job, progress)
        evaluation = draw(job, counted, display)
    out.show(_result(evaluation))  # before anything is written, for it took long
    write(evaluation)
    out.print(str(path) for path in job.outputs)


def _describe(job: EvaluateJob) -> list[str]:
    prompts = len({prompt for prompt, _ in job.pairs})
    fetched = job.fid and not job.fid.weights and (url := inception.absent())
    return [
        f"{plural(job.pictures, 'picture')} of {plural(prompts, 'prompt')}, {drawing.device_text(job)}",
        *([f"FID's network, 91 MiB, comes from {url}"] if fetched else []),
    ]


def _result(evaluation: Evaluation) -> Result:
    from crdiff_export.cli.evaluation_text import score_tables, sentences

    tables, lines = score_tables(evaluation), sentences(evaluation)
    text: list[Block] = [Facts(evaluation.facts), "", *tables, "", *lines]
    return Result(_as_json(evaluation), text, bare=[*tables, "", *lines], notes=evaluation.notes)


def _as_json(evaluation: Evaluation) -> dict[str, Any]:
    job = evaluation.job
    sizes = [
        subject_json(evaluation, subject) | {
            "ratios_for": str(subject.plan.size), "ratios": subject.ratios,
            "provenance": subject.plan.variant.provenance, "ratios_from": subject.plan.variant.source,
            "borrowed_from": subject.plan.variant.borrowed_from and str(subject.plan.variant.borrowed_from),
            "beside": beside_json(evaluation, subject),
        }
        for subject in evaluation.subjects
    ]  # fmt: skip
    facts = {name: text for name, text in evaluation.facts if name != "note"}  # all notes are in `notes`
    return {
        "base": job.drawing.base.name, "family": job.plan.match.family.id, "native": str(job.drawing.native),
        "scorer": evaluation.scorer, "scorer_fingerprint": dict(evaluation.fingerprint),
        "facts": facts, "notes": [*job.notes, *evaluation.notes],
        "fid": dict(evaluation.fid) if evaluation.fid else None, "pairs": pairs_json(evaluation), "sizes": sizes,
        "files": [str(path) for path in job.outputs],
    }  # fmt: skip
