"""`crdiff pack`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from crdiff_export.cli import options, pack_text
from crdiff_export.cli.command import Group, command, examples, gather, option, option_group
from crdiff_export.cli.output import Output, Result
from crdiff_export.errors import CheckpointError
from crdiff_export.packs import SUFFIX, create, open_pack
from crdiff_export.packs.create import PackJob, PackRequest
from crdiff_export.prune.plan_request import PlanRequest
from crdiff_export.sizes import Size


@click.group(
    cls=Group,
    epilog=examples(
        "crdiff pack create demo --res 48 --res 96x64 -o demo.crdiff",
        "crdiff export demo --pack demo.crdiff --res 48",
        "crdiff pack show demo.crdiff",
    ),
)
def pack() -> None:
    """Keep what is pruned at many sizes in one small file, without weights.

    A pack belongs to one base. With both, `crdiff export --pack` writes the file that a plain export writes, and
    diffusers and ComfyUI prune while they sample.
    """


def plan_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what is pruned; they become one parameter, `plan`, without base and size."""

    def plan(
        *,
        family: Path | None, native: Size | None, recipe: Path | None, ratio: float | None,
        ratios: Mapping[str, float], prompt: str | None, poa_weight: float | None, criterion: str,
        calibration: Path | None, targets: tuple[str, ...] | None, dtype: str | None, variant: str | None,
        allow_nonfinite: bool,
    ) -> PlanRequest:  # fmt: skip
        return PlanRequest(
            "", Size(1, 1), family=family, native=native, recipe=recipe, ratio=ratio, ratios=ratios, prompt=prompt,
            poa_weight=poa_weight, criterion=criterion, calibration=calibration, targets=targets, dtype=dtype,
            variant=variant, allow_nonfinite=allow_nonfinite,
        )  # fmt: skip

    decorators = [
        option_group("Base", options.variant, options.family),
        option_group("Size", options.sizes, options.native),
        options.ratio_options,
        option_group("Ratios", options.prompt_of_numbers, options.poa_weight),
        options.criterion_options,
        option_group("Criterion", options.targets),
        option_group("Computing", options.device, options.threads, options.rehash),
        option_group("Output", options.dtype, options.allow_nonfinite),
    ]
    decorated = gather("plan", plan)(function)
    for decorate in reversed(decorators):
        decorated = decorate(decorated)
    return decorated


_dry_run = option("--dry-run", "Show what would be done; read headers only, write nothing.")


@command(
    "crdiff pack create sdxl --res 512 --res 768x1024 --res 2048 -o sdxl.crdiff",
    "crdiff pack create demo --res 48 --ratio 0.2",
    group=pack,
    name="create",
    short_help="Make a pack.",
)
@options.base_argument
@plan_options
@option_group(
    "Output",
    option("-o, --output FILE", "Where to write, a name that ends in .crdiff. Default: STEM.crdiff in the current "
           "folder.", options.FILE),
    _dry_run,
    options.force,
)  # fmt: skip
def create_(
    out: Output, base: str, sizes: tuple[Size, ...], *, plan: PlanRequest, device: str, threads: int | None,
    rehash: bool, output: Path | None, dry_run: bool, force: bool,
) -> Result:  # fmt: skip
    """Decide for BASE what goes at each size, as an export does, and keep that instead of the pruned weights.

    BASE is named as for an export, and is read once for all sizes.
    """
    out.announce_base(base)
    plans = tuple(replace(plan, base=base, size=size) for size in dict.fromkeys(sizes))
    target = output or Path(f"{_stem(base)}{SUFFIX}")
    request = PackRequest(plans, target, device, threads, force, rehash)
    return _make(out, create.prepare_new(request), dry_run=dry_run)


@command(
    "crdiff pack add sdxl.crdiff --base sdxl --res 640",
    "crdiff pack add demo.crdiff --res 64x96",
    group=pack,
    short_help="Add sizes to a pack.",
)
@click.argument("file", metavar="PACK", type=options.FILE)
@option_group(
    "Base",
    option("--base BASE", "The base of the pack, as for an export. Default: what the pack calls it.",
           shell_complete=options.complete_base),
)  # fmt: skip
@plan_options
@option_group("Output", _dry_run, option("--force", "Replace sizes that the pack has."))
def add(
    out: Output, file: Path, sizes: tuple[Size, ...], *, base: str | None, plan: PlanRequest, device: str,
    threads: int | None, rehash: bool, dry_run: bool, force: bool,
) -> Result:  # fmt: skip
    """Add sizes to PACK, which keeps those that it has."""
    before = open_pack(file)
    source = base or before.common.source_name
    out.announce_base(source)
    plans = tuple(replace(plan, base=source, size=size) for size in dict.fromkeys(sizes))
    request = PackRequest(plans, file, device, threads, force, rehash)
    try:
        job = create.prepare_more(request, before)
    except CheckpointError as error:
        if base is None and error.message.startswith(source):
            raise CheckpointError(f"{file}: its base is not here: {error.message}", "Give it with --base.") from error
        raise
    return _make(out, job, dry_run=dry_run)


@command("crdiff pack remove demo.crdiff --res 48", group=pack, short_help="Remove sizes from a pack.")
@click.argument("file", metavar="PACK", type=options.FILE)
@option_group(
    "Size",
    option("--res", "The size to remove; may be given several times.", options.SIZE, "sizes", multiple=True,
           required=True),
)  # fmt: skip
def remove(out: Output, file: Path, sizes: tuple[Size, ...]) -> Result:
    """Remove sizes from PACK."""
    before = open_pack(file)
    with out.threads_progress() as progress:
        left = create.remove(before, list(dict.fromkeys(sizes)), progress)
    return pack_text.removed(file, [str(size) for size in dict.fromkeys(sizes)], left)


@command("crdiff pack show demo.crdiff", group=pack, short_help="Show what a pack holds.")
@click.argument("file", metavar="PACK", type=options.FILE)
@option_group("Output", option("--metadata", "All metadata of the header as well."))
def show(_out: Output, file: Path, *, metadata: bool) -> Result:
    """Show the base and the sizes of PACK, as `crdiff inspect` does."""
    return pack_text.describe(open_pack(file), metadata=metadata)


def _stem(base: str) -> str:
    """Name a pack after its base: the alias, or the last part of a path or an address without its ending."""
    from crdiff_export.formats.checkpoint import file_stem

    return file_stem(base.rstrip("/").rsplit("/", 1)[-1].partition("@")[0]) or "model"


def _make(out: Output, job: PackJob, *, dry_run: bool) -> Result:
    out.notes(job.notes)
    if dry_run:
        return pack_text.planned(job)
    with out.threads_progress() as progress:
        packed = create.make(job, progress)
    out.notes(packed.notes)
    result = pack_text.describe(packed.pack)
    return replace(result, json={**result.json, "notes": [*job.notes, *packed.notes]}, bare=[str(packed.pack.path)])
