"""`crdiff export`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from crdiff_export.bake.residual import NONE, WAYS, expected
from crdiff_export.cli.options import (
    POA_WEIGHT,
    PUSH_OPTIONS,
    KindsType,
    SizeType,
    announce,
    by_group,
    complete_alias,
    criterion_options,
    device_option,
    examples,
    output_options,
    push_options,
    quiet_client,
    ratio_options,
)
from crdiff_export.cli.push import describe, show, transfer
from crdiff_export.cli.signals import Stopper
from crdiff_export.errors import OptionError
from crdiff_export.export import Baked, ExportJob, ExportRequest, prepare, run
from crdiff_export.formats.dtypes import DTYPES
from crdiff_export.formats.text import amount
from crdiff_export.prune.criterion_choice import MAGNITUDE
from crdiff_export.publish.commit import Pushed
from crdiff_export.publish.request import PushRequest, check_request
from crdiff_export.publish.request import prepare as check_destination
from crdiff_export.publish.target import Destination
from crdiff_export.publish.upload import Upload
from crdiff_export.sizes import Size
from crdiff_export.verify.inspect import GROUP_COLUMNS, group_rows, provenance


@click.command(
    epilog=examples(
        "crdiff export sdxl --res 2048 -o sdxl-2048.safetensors",
        "crdiff export my-sd15.safetensors --res 400x560 --ratio 0.2 --up 0.3",
        "crdiff export sdxl --res 2048 --push my-org/sdxl-crdiff",
        "crdiff export sdxl --res 512 --criterion wanda:compare=row --calibration sdxl-512.safetensors",
        "crdiff export demo --res 96x64 --dry-run",
    )
)
@click.argument("base", shell_complete=complete_alias)
@click.option("--res", type=SizeType(), required=True, help="The size to prune for, in pixels.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Where to write. Default: STEM-crdiff-WxH.safetensors in the current folder; a folder for a sharded base or a "
    "diffusers folder.",
)
@click.option("--recipe", type=click.Path(path_type=Path), help="A recipe instead of the built-in one (.toml, .json).")
@click.option("--prompt", metavar="TEXT", help="Take the recipe's numbers for this prompt, where it has some.")
@ratio_options
@click.option(
    "--poa-weight",
    type=POA_WEIGHT,
    metavar="W",
    help="POA weight to recommend in the header; 1 is the pruned model alone.",
)
@click.option("--targets", type=KindsType(), help="Layers to prune, such as attn,ff. Default: the model family's.")
@criterion_options
@device_option
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads on the CPU. Default: all cores.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Cast all float tensors. Default: keep each as it is.")
@click.option("--variant", metavar="NAME", help="Weights to take from a folder that has several, such as fp16.")
@click.option(
    "--residual",
    type=click.Choice(list(WAYS)),
    default=NONE,
    show_default=True,
    help="Keep what is pruned away, for crdiff restore: in the file itself, or in a sidecar beside it.",
)
@click.option("--no-hash", is_flag=True, help="Leave the SHA-256 of base and output out of the header.")
@click.option("--allow-nonfinite", is_flag=True, help="Keep and count target weights that are infinite or not numbers.")
@click.option("--dry-run", is_flag=True, help="Show what would be done; read headers only, write nothing.")
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@click.option("--push", "repo", metavar="REPO", help="Then push it to the Hub repository REPO (ORG/NAME), with a card.")
@push_options
@output_options
@click.pass_obj
def export(
    stopper: Stopper, /, base: str, res: Size, *, down: float | None, mid: float | None, up: float | None,
    no_hash: bool, dry_run: bool, json: bool, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Prune BASE for a size and write a new checkpoint with everything about it in its header.

    BASE is a path to a checkpoint or diffusers folder, a Hub id (ORG/NAME), hf://ORG/NAME/FILE, or an alias
    (`crdiff recipes list`). The output appears under its name only when it is complete and checked.
    """
    from crdiff_export.cli import output

    pushing = _pushing(options)
    request = ExportRequest(
        base=base,
        size=res,
        ratios=by_group(down, mid, up),
        hashing=not no_hash,
        **options,
    )
    silent = quiet or json
    announce(base, quiet=silent)
    destination = _destination(pushing, request, silent=silent) if pushing and not dry_run else None
    job = prepare(request)
    if not silent:
        for text in job.plan.notes:
            output.note(text)
    if dry_run:
        _show_plan(job, pushing, as_json=json, quiet=quiet)
        return
    with output.progress(quiet=silent) as shown, stopper.watch(shown) as progress:
        baked = run(job, progress)
    if not silent:
        for text in baked.notes:
            output.note(text)
    sent = None
    if pushing and destination:
        sent = transfer(pushing, baked.written.path, destination, stopper, quiet=silent, checked=True)
    _show_result(baked, sent, as_json=json, quiet=quiet)


def _pushing(options: dict[str, Any]) -> PushRequest | None:
    """What is asked for of a push, taken out of the options; None for an export alone."""
    repo = options.pop("repo")
    given = {name: options.pop(name) for name in PUSH_OPTIONS}
    if repo is None:
        for name, value in given.items():
            if value != PUSH_OPTIONS[name]:
                flag = {"path": "path-in-repo", "private": "private/--public"}.get(name, name.replace("_", "-"))
                raise OptionError(f"--{flag} is for a push", "Give --push ORG/NAME, too, or leave it out.")
        return None
    request = PushRequest(repo, **given)
    check_request(request)
    return request


def _destination(pushing: PushRequest, request: ExportRequest, *, silent: bool) -> Destination:
    """Where the export will go, known to be open before the base is fetched."""
    from crdiff_export.hub import bases

    quiet_client(quiet=silent)
    source = bases.remote(request.base) or request.base
    name = request.output.name if request.output else f"{Path(request.base).stem}-crdiff-{request.size}"
    return check_destination(pushing, source, name)


def _show_plan(job: ExportJob, pushing: PushRequest | None, *, as_json: bool, quiet: bool) -> None:
    from crdiff_export.cli import output

    plan = job.plan
    groups = _planned_groups(job)
    if as_json:
        output.print_json({
            "dry_run": True, "base": str(plan.checkpoint.path), "family": plan.match.family.id,
            "layout": plan.match.layout.name, "resolution": str(plan.size), "recipe": plan.recipe,
            "variant": str(plan.variant.resolution), "provenance": plan.variant.provenance, **_ranked(job),
            "poa_weight": plan.variant.poa_weight, "targets": list(plan.kinds), "groups": groups,
            "bytes": plan.data_size, "dtype": plan.cast, "output": str(job.target),
            "residual": job.request.residual, "residual_bytes": _residual_size(job),
            "push": pushing.repo if pushing else None,
            "files": [o.source.name for o in plan.outputs],
            "disk_needed": job.space.needed, "disk_free": job.space.free, "notes": list(plan.notes),
        })  # fmt: skip
        return
    if not quiet:
        rows = [
            [name, str(g["layers"]), f"{g['weights']:,}", f"{g['ratio']:.4g}", f"{g['to_prune_at_least']:,}"]
            for name, g in groups.items()
        ]
        columns = ["group", "layers", "weights", "ratio", "to zero"]
        output.table(columns, rows, numeric=columns[1:])
        output.line("")
        output.facts({
            "base": f"{plan.checkpoint.path} ({plan.match.family.title}, {plan.match.layout.name} layout)",
            **_choice(job),
            "targets": f"{', '.join(plan.kinds)} in {len(plan.targets)} layers, {_by(job)}",
            "dtype": plan.cast or "as in the base",
            "size": f"{amount(plan.data_size)} of tensors",
            **_residual_facts(job),
            "disk": f"{amount(job.space.needed)} needed, {amount(job.space.free)} free",
            "would write": str(job.target),
            **({"would push to": pushing.repo} if pushing else {}),
        })  # fmt: skip
    else:
        output.line(str(job.target))


def _ranked(job: ExportJob) -> dict[str, str | None]:
    request = job.request
    calibration = str(request.calibration) if request.calibration else None
    return {"criterion": job.criterion.name, "calibration": calibration}


def _by(job: ExportJob) -> str:
    """What decides which weights go."""
    criterion = job.criterion
    scope = job.plan.match.family.scope
    if not criterion.masks:
        return f"with a threshold for each {scope}" + (f" ({criterion.name})" if criterion.name != MAGNITUDE else "")
    within = scope if criterion.loaded.compare == "block" else criterion.loaded.compare
    moved = ", which moves what stays" if criterion.moves else ""
    made = f" and {job.request.calibration}" if job.request.calibration else ""
    return f"with a mask by {criterion.name}{made}, compared within each {within}{moved}"


def _residual_size(job: ExportJob) -> int:
    """About how much a residual will be; ties with a threshold can make it more."""
    plan = job.plan
    return 0 if job.request.residual == NONE else expected(plan, [scope.rank for scope in plan.scopes])


def _residual_facts(job: ExportJob) -> Mapping[str, str]:
    where = {"embed": "in the file itself", "sidecar": "in a sidecar"}.get(job.request.residual)
    return {"residual": f"about {amount(_residual_size(job))} {where}"} if where else {}


def _planned_groups(job: ExportJob) -> dict[str, dict[str, Any]]:
    plan = job.plan
    return {
        name: {
            "layers": sum(t.group == name for t in plan.targets),
            "weights": sum(t.count for t in plan.targets if t.group == name),
            "ratio": plan.ratio(name),
            "to_prune_at_least": sum(s.rank for s in plan.scopes if s.group == name),
        }
        for name in plan.groups
    }


def _show_result(baked: Baked, sent: tuple[Upload, Pushed] | None, *, as_json: bool, quiet: bool) -> None:
    from crdiff_export.cli import output

    stamp, written = baked.stamp, baked.written
    if as_json:
        pushed = {"push": describe(*sent)} if sent else {}
        output.print_json(pushed | {
            "output": str(written.path), "bytes": written.size, "family": stamp.family, "layout": stamp.layout,
            "resolution": str(stamp.resolution), "recipe": stamp.recipe, "provenance": stamp.provenance,
            "poa_weight": stamp.poa_weight, "residual": stamp.residual, "criterion": stamp.criterion,
            "calibration": stamp.calibrated and stamp.calibrated.hash, "moved": stamp.moved,
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
                    "hash_sha256": file.hashes and file.hashes.output,
                    "source_hash_sha256": file.hashes and file.hashes.source,
                    "source_file_sha256": file.hashes and file.hashes.source_file,
                    "sidecar": str(file.sidecar.path) if file.sidecar else None,
                }
                for file in written.files
            ],
            "notes": [*baked.job.plan.notes, *baked.notes],
        })  # fmt: skip
        return
    if not quiet:
        output.table(GROUP_COLUMNS, group_rows(stamp), numeric=GROUP_COLUMNS[1:])
        output.line("")
        criterion = {"criterion": stamp.criterion} if stamp.criterion != MAGNITUDE else {}
        output.facts({**_choice(baked.job), **criterion, "size": amount(written.size)})
    output.line(str(written.path))
    if sent:
        show(*sent, as_json=False, quiet=quiet)


def _choice(job: ExportJob) -> Mapping[str, str]:
    variant = job.plan.variant
    return {"pruned for": str(job.plan.size), "ratios": provenance(variant.provenance, variant.source)}
