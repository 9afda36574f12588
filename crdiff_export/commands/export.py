"""`crdiff export`."""

from pathlib import Path
from typing import Any

import click

from crdiff_export.commands.options import SizeType, device_option, output_options
from crdiff_export.export import Baked, ExportRequest, Job, prepare, run
from crdiff_export.floats import DTYPES
from crdiff_export.inspection import GROUP_COLUMNS, group_rows
from crdiff_export.recipe import Size


@click.command(epilog="Example: crdiff export sdxl --res 2048 -o sdxl-2048.safetensors")
@click.argument("base")
@click.option("--res", "size", type=SizeType(), required=True, help="The size to prune for, in pixels.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: STEM-crdiff-WxH.safetensors here.")
@click.option("--recipe", type=click.Path(path_type=Path), help="A recipe instead of the built-in one (.toml, .json).")
@click.option("--ratio", type=float, metavar="R", help="One share for all groups, 0 <= R < 1.")
@click.option("--down", type=float, metavar="R", help="Share of the down blocks' weights to set to zero.")
@click.option("--mid", type=float, metavar="R", help="Share of the mid block's.")
@click.option("--up", type=float, metavar="R", help="Share of the up blocks'.")
@click.option(
    "--poa-weight", type=float, metavar="W", help="POA weight to recommend in the header; 1 is the pruned model."
)
@click.option("--targets", metavar="KINDS", help="Which layers: attn, ff or attn,ff; the default is the family's.")
@click.option(
    "--criterion",
    type=click.Choice(["magnitude"]),
    default="magnitude",
    show_default=True,
    help="How weights are ranked.",
)
@device_option
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads on the CPU; default: all cores.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Cast all float tensors; default: keep each as it is.")
@click.option("--variant", metavar="NAME", help="Weights to take from a folder that has several, such as fp16.")
@click.option("--no-hash", is_flag=True, help="Leave the SHA-256 of base and output out of the header.")
@click.option("--allow-nonfinite", is_flag=True, help="Keep and count target weights that are infinite or not numbers.")
@click.option("--dry-run", is_flag=True, help="Show what would be done; read headers only, write nothing.")
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@output_options
def export(
    base: str, size: Size, targets: str | None, *, down: float | None, mid: float | None, up: float | None,
    no_hash: bool, dry_run: bool, as_json: bool, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Prune BASE for a size and write a new checkpoint with everything about it in its header.

    BASE is a path to a checkpoint or diffusers folder, a Hub id (ORG/NAME), hf://ORG/NAME/FILE, or an alias
    (`crdiff recipes list`). The output appears under its name only when it is complete and checked.
    """
    from crdiff_export import ui

    per_group = {"down": down, "mid": mid, "up": up}
    request = ExportRequest(
        base=base,
        size=size,
        ratios={group: ratio for group, ratio in per_group.items() if ratio is not None},
        targets=tuple(kind.strip() for kind in targets.split(",") if kind.strip()) if targets is not None else None,
        hashing=not no_hash,
        **options,
    )
    job = prepare(request)
    if not quiet:
        for text in job.plan.notes:
            ui.note(text)
    if dry_run:
        _show_plan(job, as_json=as_json)
        return
    with ui.progress(quiet=quiet or as_json) as progress:
        baked = run(job, progress)
    _show_result(baked, as_json=as_json, quiet=quiet)


def _show_plan(job: Job, *, as_json: bool) -> None:
    from crdiff_export import ui

    plan = job.plan
    groups = {
        name: {
            "targets": sum(t.group == name for t in plan.targets),
            "weights": sum(t.count for t in plan.targets if t.group == name),
            "ratio": plan.ratio(name),
            "to_prune_at_least": sum(s.rank for s in plan.scopes if s.group == name),
        }
        for name in plan.groups
    }
    if as_json:
        ui.print_json({
            "dry_run": True, "base": str(plan.checkpoint.path), "family": plan.match.family.id,
            "layout": plan.match.layout.name, "resolution": str(plan.size), "recipe": plan.recipe,
            "variant": str(plan.variant.resolution), "provenance": plan.variant.provenance,
            "targets": list(plan.kinds), "groups": groups, "bytes": plan.data_size, "dtype": plan.cast,
            "output": str(job.target), "files": [o.source.name for o in plan.outputs],
            "disk_needed": job.space.needed, "disk_free": job.space.free, "notes": list(plan.notes),
        })  # fmt: skip
        return
    _lines(
        {
            "base": f"{plan.checkpoint.path} ({plan.match.family.title}, {plan.match.layout.name} layout)",
            "for": f"{plan.size}, {_provenance(job)}",
            "targets": f"{', '.join(plan.kinds)}: {len(plan.targets)} layers, a threshold per {plan.match.family.scope}",
            "dtype": plan.cast or "as in the base",
        }
    )
    ui.table(
        ["group", "layers", "weights", "ratio", "to zero"],
        [
            [name, str(g["targets"]), f"{g['weights']:,}", f"{g['ratio']:.4g}", f"{g['to_prune_at_least']:,}"]
            for name, g in groups.items()
        ],
        numeric=["layers", "weights", "ratio", "to zero"],
    )  # fmt: skip
    _lines(
        {
            "output": f"{job.target} ({ui.gigabytes(plan.data_size)} of tensors)",
            "disk": f"{ui.gigabytes(job.space.needed)} needed, {ui.gigabytes(job.space.free)} free",
        }
    )


def _show_result(baked: Baked, *, as_json: bool, quiet: bool) -> None:
    from crdiff_export import ui

    stamp, written = baked.stamp, baked.written
    if as_json:
        ui.print_json({
            "output": str(written.path), "bytes": written.size, "family": stamp.family, "layout": stamp.layout,
            "resolution": str(stamp.resolution), "recipe": stamp.recipe, "provenance": stamp.provenance,
            "poa_weight": stamp.poa_weight,
            "groups": {
                name: {
                    "ratio": group.ratio, "pruned": group.pruned, "total": group.total,
                    "threshold": group.threshold and group.threshold.hex(), "nonfinite": group.nonfinite,
                }
                for name, group in stamp.groups.items()
            },
            "files": [
                {
                    "path": str(file.path), "bytes": file.size,
                    "hash_sha256": file.output_hash, "source_hash_sha256": file.source_hash,
                }
                for file in written.files
            ],
            "notes": list(baked.job.plan.notes),
        })  # fmt: skip
        return
    if not quiet:
        ui.table(GROUP_COLUMNS, group_rows(stamp), numeric=GROUP_COLUMNS[1:])
        _lines({"for": f"{stamp.resolution}, {_provenance(baked.job)}", "size": ui.gigabytes(written.size)})
    ui.line(str(written.path))


def _provenance(job: Job) -> str:
    variant = job.plan.variant
    standing = {"starting-point": "starting point, tuned by nobody"}.get(variant.provenance, variant.provenance)
    return f"ratios: {standing} ({variant.source})"


def _lines(facts: dict[str, str]) -> None:
    from crdiff_export import ui

    for name, text in facts.items():
        ui.line(f"{name + ':':<9}{text}")
