"""`crdiff calibrate`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from crdiff_export.calibrate import CalibrateRequest, CalibrationJob, CalibrationResult, prepare, run
from crdiff_export.cli import drawing, options
from crdiff_export.cli.blocks import Facts
from crdiff_export.cli.command import command, gather, option, option_group
from crdiff_export.cli.output import Output, Result
from crdiff_export.cli.signals import Stopped
from crdiff_export.formats.text import amount


@command(
    "crdiff calibrate demo --res 96x64 --criterion wanda -o demo.safetensors",
    "crdiff calibrate sdxl --res 512 --prompts prompts.txt --criterion wanda --criterion taylor",
    "crdiff calibrate sdxl --res 512 --prompts prompts.txt --criterion obs --memory 8GB -o sdxl.safetensors",
    more="The same command again goes on with a run that was stopped: what is finished is kept in OUTPUT.part.",
)
@options.base_argument
@option_group(
    "Size", option("--res", "The size to draw at, which is to be pruned for.", options.SIZE, "size", required=True)
)
@option_group(
    "Criterion",
    option("--criterion NAME[:OPTION=VALUE,…]", "What the file is for, such as wanda, taylor, obs or adverse; may be "
           "given several times.", dest="criteria", multiple=True, required=True),
    options.targets,
    option("--loss-samples N", "For criteria with gradients: time steps, each with noise, of every picture.",
           click.IntRange(1, 10_000), "samples", default=4, show_default=True),
)  # fmt: skip
@drawing.prompt_options(
    "Prompts to draw, one a line. Default for the demo models: 16 scenes that they were never shown.",
    options.prompt,
    drawing.pictures,
    limit=" Default for the demo models: 16.",
)
@drawing.options
@option_group("Drawing", drawing.batch, options.rehash)
@option_group(
    "Memory",
    option("--memory", "For what is collected of a group of layers at once. Default: half of what is free.",
           options.BYTES),
    option("--layers-at-once N", "At most N layers in a group. Default: as many as fit.", options.COUNT, "layers"),
)  # fmt: skip
@option_group(
    "Output",
    option("-o, --output FILE", "The calibration (.safetensors). Default: BASE-SIZE-calibration.safetensors.",
           options.FILE),
    options.force,
)  # fmt: skip
@gather("request", CalibrateRequest)
def calibrate(out: Output, request: CalibrateRequest) -> Result:
    """Measure what criteria other than magnitude need to know of BASE at a size, and write it to a file.

    Wanda and OBS-Diff look at what goes into every layer while BASE draws the prompts; Taylor and our own take the
    gradient of its training loss on pictures that it drew. `crdiff export --criterion NAME --calibration FILE` prunes
    by the file, for any ratios, without running the model. BASE is what `crdiff preview` takes.
    """
    job = drawing.prepare(out, request, prepare, _describe)
    with _resumable(job), out.progress() as display:
        out.stopper.check()
        calibrated = run(job, display)
    path = str(calibrated.path)
    return Result(_as_json(job, calibrated), [Facts(_facts(calibrated)), "", path], bare=[path], notes=calibrated.notes)


@contextmanager
def _resumable(job: CalibrationJob) -> Iterator[None]:
    """If a signal ends a run that has begun, say what is kept and how it goes on."""
    try:
        yield
    except Stopped as stop:
        part = job.target.with_name(f"{job.target.name}.part")
        if part.is_dir():
            stop.outcome = f"what is finished is kept in {part}"
            stop.hint = "Run the same command again to go on."
        raise


def _describe(job: CalibrationJob) -> list[str]:
    pairs = job.setting.pairs
    return [
        f"{', '.join(job.setting.statistics)} of {len(job.plan.targets)} layers",
        f"{len(pairs)} pictures of {len({prompt for prompt, _ in pairs})} prompts, {drawing.device_text(job)}",
    ]


def _facts(calibrated: CalibrationResult) -> list[tuple[str, str]]:
    resumed = [("kept from before", f"{calibrated.resumed} groups of layers")] if calibrated.resumed else []
    return [
        ("statistics", ", ".join(calibrated.statistics)), ("layers", str(calibrated.layers)),
        ("size", amount(calibrated.size)), *resumed,
        *((name.replace("_", " "), text) for name, text in calibrated.facts),
    ]  # fmt: skip


def _as_json(job: CalibrationJob, calibrated: CalibrationResult) -> dict[str, Any]:
    return {
        "base": job.drawing.base.name, "family": job.plan.match.family.id, "resolution": str(job.setting.size),
        "native": str(job.setting.native), "criteria": list(job.request.criteria),
        "statistics": list(calibrated.statistics), "layers": calibrated.layers, "size": calibrated.size,
        "facts": dict(calibrated.facts), "notes": [*job.notes, *calibrated.notes], "resumed": calibrated.resumed,
        "file": str(calibrated.path),
    }  # fmt: skip
