"""What `crdiff export` says: what it would do, and what it has done."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from crdiff_export.bake.metadata import source_layout
from crdiff_export.bake.residual import NONE, largest_size
from crdiff_export.bake.write import Failure
from crdiff_export.cli.blocks import Block, Facts, Table
from crdiff_export.cli.output import Result
from crdiff_export.cli.progress_display import rate_text
from crdiff_export.errors import CrdiffError
from crdiff_export.export import Baked, ExportJob
from crdiff_export.formats.text import amount
from crdiff_export.models.evidence_text import evidence_text, poa_note
from crdiff_export.prune.criterion_choice import MAGNITUDE
from crdiff_export.prune.plan import CASTABLE, Plan
from crdiff_export.publish.request import PushRequest
from crdiff_export.verify.inspect import GROUP_COLUMNS, group_rows, provenance, total_row


def planned(job: ExportJob, pushing: PushRequest | None) -> Result:
    """Describe an export that is not done.

    Args:
        job: The planned export.
        pushing: The push that would follow it.

    Returns:
        What would be done.
    """
    plan, calibration, pack = job.plan, job.request.calibration, job.request.pack
    groups = _planned_groups(job)
    record = {
        "dry_run": True, "base": str(plan.checkpoint.path), "family": plan.match.family.id,
        "layout": plan.match.layout.name,
        "source_layout": source_layout(plan.checkpoint, plan.match.layout.name),
        "resolution": str(plan.size), "recipe": plan.recipe,
        "variant": str(plan.variant.resolution), "provenance": plan.variant.provenance,
        "borrowed_from": plan.variant.borrowed_from and str(plan.variant.borrowed_from),
        "criterion": _criterion(job), "calibration": calibration and str(calibration),
        "poa_weight": plan.variant.poa_weight, "targets": list(plan.kinds), "groups": groups,
        "bytes": plan.data_size, "dtype": plan.cast, "output": str(job.target),
        "residual": job.request.residual, "residual_bytes": _residual_size(job),
        "push": pushing.repo if pushing else None, "pack": pack and str(pack.path),
        "files": [o.source.name for o in plan.outputs],
        "disk_needed": job.space.needed, "disk_free": job.space.free, "notes": list(plan.notes),
    }  # fmt: skip
    rows = [
        [name, str(g["layers"]), f"{g['weights']:,}", f"{g['ratio']:.4g}", f"{g['to_prune_at_least']:,}"]
        for name, g in groups.items()
    ]
    columns = ["group", "layers", "weights", "ratio", "to zero"]
    facts = {
        "base": f"{plan.checkpoint.path} ({plan.match.title}, {_layouts(plan)})",
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


def _layouts(plan: Plan) -> str:
    """Name the layout of a base, and that of the output where it is another one."""
    layout = plan.match.layout.name
    base_layout = source_layout(plan.checkpoint, layout)
    return f"{base_layout} layout, to be written in {layout}" if base_layout else f"{layout} layout"


def _chosen_by(job: ExportJob) -> str:
    """Say by what the weights are chosen."""
    criterion, pack = job.criterion, job.request.pack
    if pack:
        stamp = pack.variants[job.plan.size]
        kind = "masks" if stamp.masked else "thresholds" if job.plan.cast == stamp.cast else "ratios"
        return f"with the {kind} of {pack.path} ({_criterion(job)})"
    scope = job.plan.match.family.scope
    if not criterion.masks:
        return f"with a threshold for each {scope}" + (f" ({criterion.name})" if criterion.name != MAGNITUDE else "")
    within = scope if criterion.compare == "block" else criterion.compare
    moved = ", which moves what stays" if criterion.moves else ""
    calibration = f" and {job.request.calibration}" if job.request.calibration else ""
    return f"with a mask by {criterion.name}{calibration}, compared within each {within}{moved}"


def _criterion(job: ExportJob) -> str:
    """Return the criterion as headers spell it."""
    pack = job.request.pack
    return pack.variants[job.plan.size].criterion if pack else job.criterion.name


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


def done(baked: Baked, seconds: float) -> Result:
    """Describe a finished export.

    Args:
        baked: The export.
        seconds: The time that it took.

    Returns:
        What was done.
    """
    stamp, written, plan = baked.stamp, baked.written, baked.job.plan
    pruned = sum(group.pruned for group in stamp.groups.values())
    weights = sum(tensor.count for _, tensor in plan.checkpoint.tensors() if tensor.dtype in CASTABLE)
    record = {
        "output": str(written.path), "bytes": written.size, "seconds": round(seconds, 3),
        "family": stamp.family, "layout": stamp.layout, "source_layout": stamp.source_layout,
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
        "POA weight": f"{stamp.poa_weight:g}{poa_note(stamp.evidence)}",
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


def all_planned(results: Sequence[Result]) -> Result:
    """Put the plans of one or several exports together.

    Args:
        results: What `planned` gave for each.

    Returns:
        The plan of a single one as it is; of several a JSON object with `variants`.
    """
    if len(results) == 1:
        return results[0]
    text: list[Block] = []
    for result in results:
        text += [*([""] if text else []), *result.text]
    bare = [block for result in results for block in result.bare or ()]
    return Result({"dry_run": True, "variants": [result.json for result in results]}, text, bare=bare)


def all_done(
    jobs: Sequence[ExportJob],
    outcomes: Sequence[Baked | Failure],
    pushes: Sequence[Result | CrdiffError | None],
    seconds: float,
) -> Result:
    """Describe several exports from one reading of their base.

    Args:
        jobs: The planned exports.
        outcomes: What became of each.
        pushes: What became of its push, if there was one.
        seconds: The time that all of them took.

    Returns:
        One summary; its exit code is that of the worst.
    """
    records, rows, paths, codes, size = [], [], [], [0], 0
    for job, outcome, push in zip(jobs, outcomes, pushes, strict=True):
        if isinstance(outcome, Failure):
            codes.append(outcome.error.exit_code)
            records.append({"resolution": str(job.plan.size), "error": _error(outcome.error)})
            rows.append([str(job.plan.size), "", "", "", "failed", str(job.target)])
            continue
        record = dict(done(outcome, seconds).json)
        del record["seconds"]
        stamp, written = outcome.stamp, outcome.written
        pruned, total = (sum(getattr(group, key) for group in stamp.groups.values()) for key in ("pruned", "total"))
        state = "written"
        if isinstance(push, Result):
            record["push"], state = push.json, "pushed" if push.json["changed"] else "on the Hub already"
        elif push:
            record["push"], state = {"error": _error(push)}, "written, not pushed"
            codes.append(push.exit_code)
        records.append(record)
        share = f"{pruned / max(total, 1):.4f}"
        rows.append([str(job.plan.size), f"{pruned:,}", share, f"{stamp.poa_weight:g}", state, str(written.path)])
        paths.append(str(written.path))
        size += written.size
    plan = jobs[0].plan
    facts = {
        "base": f"{jobs[0].base.name} ({plan.match.title})",
        "written": f"{amount(size)} in {rate_text(size, seconds)}",
    }
    table = Table(("size", "zeroed", "share", "POA weight", "result", "file"), rows, ("zeroed", "share", "POA weight"))
    text: list[Block] = [table, "", Facts(facts)]
    if baked := [outcome for outcome in outcomes if isinstance(outcome, Baked)]:
        text.append(f"next: {_next_command(baked[0])}")
    return Result({"seconds": round(seconds, 3), "variants": records}, text, bare=paths, exit_code=max(codes))


def _error(error: CrdiffError) -> dict[str, str]:
    return {"code": error.code, "message": error.message, "hint": error.hint}
