"""`crdiff export`."""

import shlex
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crdiff_export.bake.residual import NONE, WAYS, largest_size
from crdiff_export.cli import options, sheet
from crdiff_export.cli.blocks import Facts, Table
from crdiff_export.cli.command import command, gather, option, option_group
from crdiff_export.cli.output import Output, Result
from crdiff_export.cli.progress_display import rate_text
from crdiff_export.cli.push import push_result, transfer
from crdiff_export.errors import CrdiffError, OptionError
from crdiff_export.export import Baked, ExportJob, ExportRequest, prepare, run
from crdiff_export.formats.dtypes import DTYPES
from crdiff_export.formats.text import amount
from crdiff_export.models.evidence_text import evidence_text
from crdiff_export.prune import kernels
from crdiff_export.prune.criterion_choice import MAGNITUDE
from crdiff_export.prune.plan import CASTABLE
from crdiff_export.publish.request import PushRequest, check_request
from crdiff_export.publish.request import prepare as check_destination
from crdiff_export.publish.target import Destination
from crdiff_export.sizes import Size
from crdiff_export.verify.inspect import GROUP_COLUMNS, group_rows, provenance, total_row

if TYPE_CHECKING:
    from crdiff_export.sampling.drawing_setup import DrawingSetup


@command(
    "crdiff export sdxl --res 2048 -o sdxl-2048.safetensors",
    "crdiff export my-sd15.safetensors --res 400x560 --ratio 0.2 --up 0.3",
    "crdiff export sdxl --res 2048 --push my-org/sdxl-crdiff",
    "crdiff export sdxl --res 512 --criterion wanda:compare=row --calibration sdxl-512.safetensors",
    "crdiff export demo --res 96x64 --dry-run",
)
@options.base_argument
@option_group("Base", options.variant, options.family)
@option_group(
    "Size",
    option("--res", "The size to prune for, in pixels.", options.SIZE, required=True),
    option("--native", "The size that BASE was trained at. Default: what it says itself, or its family's.",
           options.SIZE),
)  # fmt: skip
@options.ratio_options
@option_group(
    "Ratios",
    option("--prompt TEXT", "Take the recipe's numbers for this prompt, where it has some."),
    option("--poa-weight W", "POA weight to recommend in the header; 1 is the pruned model alone.", options.POA_WEIGHT),
)
@options.criterion_options
@option_group("Criterion", options.targets)
@option_group("Computing", options.device, options.threads)
@option_group(
    "Output",
    option("-o, --output FILE", "Where to write; a folder that exists gets the default name. Default: "
           "STEM-crdiff-WxH.safetensors in the current folder; a folder for a sharded base or a diffusers folder.",
           options.FILE),
    option("--dtype", "Cast all float tensors. Default: keep each as it is.", click.Choice(list(DTYPES))),
    option("--residual", "Keep what is pruned away, for crdiff restore: in the file itself, or in a sidecar beside it.",
           click.Choice(list(WAYS)), default=NONE, show_default=True),
    option("--thumbnail PROMPT", "Draw a picture of the pruned model into the header, for programs that show it. Its "
           "bytes depend on the device; crdiff verify does not look at it."),
    option("--no-hash", "Leave the SHA-256 of base and output out of the header."),
    option("--allow-nonfinite", "Keep and count target weights that are infinite or not numbers."),
    option("--all-files", "Copy all files of a diffusers folder. Default: those of its pipeline."),
    option("--dry-run", "Show what would be done; read headers only, write nothing."),
    options.force,
)  # fmt: skip
@option_group(
    "Hub", option("--push REPO", "Then push it to the Hub repository REPO (ORG/NAME), with a card.", dest="repo")
)
@options.push_options
@gather("push", partial(PushRequest, ""))
def export(
    out: Output, base: str, res: Size, *, family: Path | None, native: Size | None, output: Path | None,
    recipe: Path | None, prompt: str | None, ratio: float | None, ratios: Mapping[str, float], poa_weight: float | None,
    targets: tuple[str, ...] | None, criterion: str, calibration: Path | None, device: str, threads: int | None,
    dtype: str | None, variant: str | None, residual: str, no_hash: bool, allow_nonfinite: bool, all_files: bool,
    dry_run: bool, force: bool, repo: str | None, push: PushRequest, thumbnail: str | None,
    previews: tuple[str, ...],
) -> Result:  # fmt: skip
    """Prune BASE for a size and write a new checkpoint with everything about it in its header.

    BASE is a path to a checkpoint or diffusers folder, a Hub id (ORG/NAME), hf://ORG/NAME/FILE, or an alias
    (`crdiff recipes list`). The output appears under its name only when it is complete and checked.
    """
    out.quiet_hub_client()
    pushing = _push_request(repo, push, previews)
    request = ExportRequest(
        base, res, output, recipe=recipe, prompt=prompt, ratio=ratio, ratios=ratios, poa_weight=poa_weight,
        targets=targets, criterion=criterion, calibration=calibration, device=device, dtype=dtype, variant=variant,
        residual=residual, hashing=not no_hash, force=force, allow_nonfinite=allow_nonfinite, all_files=all_files,
        threads=threads, family=family, native=native,
    )  # fmt: skip
    out.announce_base(base)
    destination = _destination(pushing, request) if pushing and not dry_run else None
    job = prepare(request)
    out.notes(job.plan.notes)
    thumbnail_setup = _prepare_thumbnail(job, thumbnail) if thumbnail else None
    if dry_run:
        if device not in ("auto", "cpu"):
            kernels.load(device)  # raises where it is not there
        return _planned(job, pushing)
    began = time.monotonic()
    if thumbnail and thumbnail_setup:
        job = _with_thumbnail(out, job, thumbnail_setup, thumbnail)
    with out.threads_progress() as progress:
        baked = run(job, progress)
    out.notes(baked.notes)
    done = _done(baked, time.monotonic() - began)
    if not (pushing and destination):
        return done
    path = baked.written.path
    with sheet.with_sheet(out, pushing, previews, path, base, family) as pushing:
        pushed = push_result(*transfer(out, pushing, path, destination, checked=True))
    return done.followed_by(pushed, "push")


def _prepare_thumbnail(job: ExportJob, prompt: str) -> "DrawingSetup":
    from crdiff_export.evaluate.preview import thumbnail

    return thumbnail.prepare(job, prompt)


def _with_thumbnail(out: Output, job: ExportJob, setup: "DrawingSetup", prompt: str) -> ExportJob:
    """Draw the picture that the header will have."""
    from crdiff_export.evaluate.preview import thumbnail

    with out.progress() as display, out.stopper.watch(display) as progress:
        picture = thumbnail.draw(job, setup, prompt, progress)
    return replace(job, request=replace(job.request, thumbnail=picture))


def _push_request(repo: str | None, push: PushRequest, previews: tuple[str, ...]) -> PushRequest | None:
    """Complete and check the request of a push; None for an export alone, which takes no options of a push."""
    if repo is not None:
        request = replace(push, repo=repo)
        check_request(request)
        sheet.check(request, previews)
        return request
    unset, context = PushRequest(""), click.get_current_context()
    values = {field.name: getattr(push, field.name) for field in fields(push)} | {"previews": previews}
    for name, value in values.items():
        # A variable of the environment is for those runs that push.
        is_typed = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if is_typed and value != getattr(unset, name, ()):
            flags = {"path": "path-in-repo", "private": "private/--public", "previews": "preview"}
            flag = flags.get(name, name.replace("_", "-"))
            raise OptionError(f"--{flag} is for a push", "Give --push ORG/NAME, too, or leave it out.")
    return None


def _destination(pushing: PushRequest, request: ExportRequest) -> Destination:
    """Check where the file will go before its base is fetched."""
    from crdiff_export.hub import bases

    source = bases.hub_uri(request.base) or request.base
    name = request.output.name if request.output else f"{Path(request.base).stem}-crdiff-{request.size}"
    return check_destination(pushing, source, name)


def _planned(job: ExportJob, pushing: PushRequest | None) -> Result:
    plan, calibration = job.plan, job.request.calibration
    groups = _planned_groups(job)
    record = {
        "dry_run": True, "base": str(plan.checkpoint.path), "family": plan.match.family.id,
        "layout": plan.match.layout.name, "resolution": str(plan.size), "recipe": plan.recipe,
        "variant": str(plan.variant.resolution), "provenance": plan.variant.provenance,
        "borrowed_from": plan.variant.borrowed_from and str(plan.variant.borrowed_from),
        "criterion": job.criterion.name, "calibration": calibration and str(calibration),
        "poa_weight": plan.variant.poa_weight, "targets": list(plan.kinds), "groups": groups,
        "bytes": plan.data_size, "dtype": plan.cast, "output": str(job.target),
        "residual": job.request.residual, "residual_bytes": _residual_size(job),
        "push": pushing.repo if pushing else None,
        "files": [o.source.name for o in plan.outputs],
        "disk_needed": job.space.needed, "disk_free": job.space.free, "notes": list(plan.notes),
    }  # fmt: skip
    rows = [
        [name, str(g["layers"]), f"{g['weights']:,}", f"{g['ratio']:.4g}", f"{g['to_prune_at_least']:,}"]
        for name, g in groups.items()
    ]
    columns = ["group", "layers", "weights", "ratio", "to zero"]
    facts = {
        "base": f"{plan.checkpoint.path} ({plan.match.title}, {plan.match.layout.name} layout)",
        **_choice(job),
        "targets": f"{', '.join(plan.kinds)} in {len(plan.targets)} layers, {_chosen_by(job)}",
        "dtype": plan.cast or "as in the base",
        "size": f"{amount(plan.data_size)} of tensors",
        **_residual_facts(job),
        "disk": f"{amount(job.space.needed)} needed, {amount(job.space.free)} free",
        "would write": str(job.target),
        **({"would push to": pushing.repo} if pushing else {}),
    }
    return Result(record, [Table(columns, rows, columns[1:]), "", Facts(facts)], bare=[str(job.target)])


def _chosen_by(job: ExportJob) -> str:
    """Say by what the weights are chosen."""
    criterion = job.criterion
    scope = job.plan.match.family.scope
    if not criterion.masks:
        return f"with a threshold for each {scope}" + (f" ({criterion.name})" if criterion.name != MAGNITUDE else "")
    within = scope if criterion.compare == "block" else criterion.compare
    moved = ", which moves what stays" if criterion.moves else ""
    calibration = f" and {job.request.calibration}" if job.request.calibration else ""
    return f"with a mask by {criterion.name}{calibration}, compared within each {within}{moved}"


def _residual_size(job: ExportJob) -> int:
    """About how much a residual will be; ties with a threshold can make it more."""
    plan = job.plan
    return 0 if job.request.residual == NONE else largest_size(plan, [scope.rank for scope in plan.scopes])


def _residual_facts(job: ExportJob) -> Mapping[str, str]:
    where = {"embed": "in the file itself", "sidecar": "in a sidecar"}.get(job.request.residual)
    return {"residual": f"about {amount(_residual_size(job))} {where}"} if where else {}


def _planned_groups(job: ExportJob) -> dict[str, dict[str, Any]]:
    plan = job.plan
    return {
        name: {
            "layers": sum(t.layer.group == name for t in plan.targets),
            "weights": sum(t.count for t in plan.targets if t.layer.group == name),
            "ratio": plan.ratio(name),
            "to_prune_at_least": sum(s.rank for s in plan.scopes if s.group == name),
        }
        for name in plan.groups
    }


def _done(baked: Baked, seconds: float) -> Result:
    stamp, written, plan = baked.stamp, baked.written, baked.job.plan
    pruned = sum(group.pruned for group in stamp.groups.values())
    weights = sum(tensor.count for _, tensor in plan.checkpoint.tensors() if tensor.dtype in CASTABLE)
    record = {
        "output": str(written.path), "bytes": written.size, "seconds": round(seconds, 3),
        "family": stamp.family, "layout": stamp.layout,
        "resolution": str(stamp.resolution), "native": str(stamp.native), "recipe": stamp.recipe,
        "provenance": stamp.provenance, "borrowed_from": stamp.borrowed_from and str(stamp.borrowed_from),
        "pruned": pruned, "weights": weights, "poa_weight": stamp.poa_weight, "residual": stamp.residual,
        "criterion": stamp.criterion, "calibration": stamp.calibrated and stamp.calibrated.hash, "moved": stamp.moved,
        "groups": {
            name: {
                "ratio": group.ratio, "pruned": group.pruned, "total": group.total,
                "threshold": group.threshold_text, "nonfinite": group.nonfinite,
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
    }  # fmt: skip
    criterion = {"criterion": stamp.criterion} if stamp.criterion != MAGNITUDE else {}
    path = str(written.path)
    facts = {
        "base": f"{stamp.source_name} ({plan.match.title}, native {stamp.native})",
        **_choice(baked.job),
        **criterion,
        **({"evidence": evidence_text(stamp.evidence)} if stamp.evidence else {}),
        "POA weight": f"{stamp.poa_weight:g}",
        "zeroed": f"{pruned:,} weights, {pruned / max(weights, 1):.1%} of {weights:,} in the file",
        "written": f"{amount(written.size)} in {rate_text(written.size, seconds)}",
    }
    table = Table(GROUP_COLUMNS, [*group_rows(stamp), *total_row(stamp)], GROUP_COLUMNS[1:])
    return Result(record, [table, "", Facts(facts), f"next: {_next_command(baked)}", path], bare=[path])


def _next_command(baked: Baked) -> str:
    """Return the command that shows pictures of the output, or its header if `crdiff preview` does not draw with it."""
    from crdiff_export.prune import architecture
    from crdiff_export.sampling import pipelines

    job, path = baked.job, shlex.quote(str(baked.written.path))
    plan, request = job.plan, job.request
    try:
        model = architecture.find(plan)
        pipelines.choose(job.base, plan.checkpoint, plan.match, model, config=None, variant=request.variant)
    except CrdiffError:
        return f"crdiff inspect {path}"
    given = {"--family": request.family, "--variant": request.variant}
    options = "".join(f" {option} {shlex.quote(str(value))}" for option, value in given.items() if value)
    return f"crdiff preview {shlex.quote(request.base)} --baked {path}{options} --prompt TEXT"


def _choice(job: ExportJob) -> Mapping[str, str]:
    variant = job.plan.variant
    return {
        "pruned for": str(job.plan.size),
        "ratios": provenance(variant.provenance, variant.source, variant.borrowed_from),
    }
