"""`crdiff calibrate`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from crdiff_export.calibrate import Calibrated, CalibrateRequest, Job, prepare, run
from crdiff_export.cli.drawing import announce_drawing, batch_option, drawing_options, quiet_parts
from crdiff_export.cli.options import (
    KindsType,
    SizeType,
    announce,
    complete_alias,
    examples,
    listed_prompts,
    output_options,
)
from crdiff_export.cli.signals import Stopped, Stopper
from crdiff_export.errors import CalibrationError

UNITS: Final = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class AmountType(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.5 on
    """Bytes, as `4GB` or `500MB`."""

    name = "amount"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """How --help calls it."""
        return "BYTES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """A number of bytes; a usage error for any other text."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([KMGT]?B)?\s*", value, re.IGNORECASE)
        size = int(float(match[1]) * UNITS[(match[2] or "B").upper()]) if match else 0
        if size < 1:
            self.fail(f"{value!r} is no amount of memory. Write it as 4GB or 500MB.", param, ctx)
        return size


@click.command(
    epilog=examples(
        "crdiff calibrate demo --res 96x64 --criterion wanda -o demo.safetensors",
        "crdiff calibrate sdxl --res 512 --prompts prompts.txt --criterion wanda --criterion taylor",
        "crdiff calibrate sdxl --res 512 --prompts prompts.txt --criterion obs --memory 8GB -o sdxl.safetensors",
    )
    + "\n\nThe same command again goes on with a run that was stopped: what is finished is kept in OUTPUT.part."
)
@click.argument("base", shell_complete=complete_alias)
@click.option("--res", "size", type=SizeType(), required=True, help="The size to draw at, which is to be pruned for.")
@click.option(
    "--criterion", "criteria", multiple=True, required=True, metavar="NAME[:OPTION=VALUE,…]",
    help="What the file is for, such as wanda, taylor, obs or adverse; may be given several times.",
)  # fmt: skip
@click.option(
    "--prompts", "listed", type=click.Path(path_type=Path), metavar="FILE",
    help="Prompts to draw, one a line. Default for the demo model: 16 scenes that it was never shown.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N prompts. Default for demo: 16.")
@click.option(
    "--pictures", type=click.IntRange(1, 10_000), default=1, metavar="N", show_default=True,
    help="Pictures of each prompt, each from its own noise.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, metavar="N", help="The first picture's seed. Default: 0.")
@click.option(
    "--loss-samples", "samples", type=click.IntRange(1, 10_000), default=4, metavar="N", show_default=True,
    help="For criteria with gradients: time steps, each with noise, of every picture.",
)  # fmt: skip
@click.option("--targets", type=KindsType(), help="Kinds of layers. Default: the recipe's.")
@click.option(
    "--memory",
    type=AmountType(),
    help="For what is collected of a group of layers at once. Default: half of what is free.",
)
@click.option(
    "--layers-at-once", "layers", type=click.IntRange(1), metavar="N",
    help="At most N layers in a group. Default: as many as fit.",
)  # fmt: skip
@drawing_options
@batch_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
    help="The calibration (.safetensors). Default: BASE-SIZE-calibration.safetensors.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an output that exists, and start over where settings changed.")
@output_options
@click.pass_obj
def calibrate(stopper: Stopper, /, base: str, listed: Path | None, *, json: bool, quiet: bool, **options: Any) -> None:
    """Measure what criteria other than magnitude need to know of BASE at a size, and write it to a file.

    Wanda and OBS-Diff look at what goes into every layer while BASE draws the prompts; Taylor and our own take the
    gradient of its training loss on pictures that it drew. `crdiff export --criterion NAME --calibration FILE` prunes
    by the file, for any ratios, without running the model. BASE is what `crdiff preview` takes.
    """
    from crdiff_export.cli import output

    request = CalibrateRequest(base=base, prompts=listed_prompts(listed) if listed else (), **options)
    silent = quiet or json
    announce(base, quiet=silent)
    job = prepare(request)
    if not silent:
        _announce(job)
    quiet_parts(job.easel, quiet=silent)
    with _resumable(job), output.progress(quiet=silent) as shown:
        stopper.check()
        found = run(job, shown)
    if json:
        output.print_json(_as_json(job, found))
        return
    if not quiet:
        for text in found.notes:
            output.note(text)
        output.facts(_facts(found))
        output.line("")
    output.line(str(found.path))


@contextmanager
def _resumable(job: Job) -> Iterator[None]:
    """Where a signal ends a run that has begun, say what is kept and how it goes on."""
    try:
        yield
    except Stopped as stop:
        part = job.target.with_name(f"{job.target.name}.part")
        if not part.is_dir():
            raise
        raise _interrupted(stop, part) from stop


def _interrupted(stop: Stopped, part: Path) -> CalibrationError:
    class Interrupted(CalibrationError):
        exit_code = stop.exit_code
        code = stop.word

    return Interrupted(f"{stop.word}; what is finished is kept in {part}", "Run the same command again to go on.")


def _announce(job: Job) -> None:
    pairs, easel = job.setting.pairs, job.easel
    prompts = len({prompt for prompt, _ in pairs})
    announce_drawing(
        easel,
        *job.notes,
        f"{', '.join(job.setting.statistics)} of {len(job.plan.targets)} layers",
        f"{len(pairs)} pictures of {prompts} prompts, on {easel.device} in {easel.dtype}",
    )


def _facts(found: Calibrated) -> list[tuple[str, str]]:
    from crdiff_export.formats.text import amount

    kept = [("kept from before", f"{found.resumed} groups of layers")] if found.resumed else []
    return [
        ("statistics", ", ".join(found.statistics)), ("layers", str(found.layers)), ("size", amount(found.size)), *kept,
        *((name.replace("_", " "), text) for name, text in found.facts),
    ]  # fmt: skip


def _as_json(job: Job, found: Calibrated) -> dict[str, Any]:
    return {
        "base": job.easel.base.name, "family": job.plan.match.family.id, "resolution": str(job.setting.size),
        "native": str(job.setting.native), "criteria": list(job.request.criteria),
        "statistics": list(found.statistics), "layers": found.layers, "size": found.size, "facts": dict(found.facts),
        "notes": [*job.notes, *found.notes], "resumed": found.resumed, "file": str(found.path),
    }  # fmt: skip
