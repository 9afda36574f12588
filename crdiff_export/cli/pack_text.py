"""What `crdiff pack` and `crdiff inspect` say of a pack."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crdiff_export.cli.blocks import Block, Facts, Table
from crdiff_export.cli.output import Result
from crdiff_export.formats.crdiff_keys import PREFIX, Stamp, auto_v2, auto_v3
from crdiff_export.formats.text import amount, plural, printable
from crdiff_export.models.evidence_text import evidence_text
from crdiff_export.packs import Pack
from crdiff_export.packs.create import PackJob
from crdiff_export.verify.inspect import provenance


def describe(pack: Pack, *, metadata: bool = False) -> Result:
    """Describe a pack: its base, and a row for each size.

    Args:
        pack: The pack.
        metadata: Show all keys of its header, too.

    Returns:
        The description.
    """
    common = pack.common
    facts = {
        "pack": f"{pack.path} ({plural(len(pack.variants), 'size')}, {amount(_bytes(pack))})",
        "base": f"{printable(common.source_name)} ({pack.family.title}, {common.layout} layout)",
        "native": str(common.native),
        "hash": "; ".join(_hash(pack)),
        "targets": f"{', '.join(pack.kinds)}, {len(pack.identity.layers)} layers",
        "made by": f"crdiff {printable(common.version)}",
    }
    text: list[Block] = [Facts(facts), "", _table(pack)]
    if lines := _sentences(pack):
        text += ["", Facts(lines)]
    record: dict[str, Any] = {
        "file": str(pack.path), "pack": True, "bytes": _bytes(pack), "family": pack.family.id,
        "layout": common.layout, "prefix": common.prefix, "native": str(common.native),
        "base": common.source_name, "targets": list(pack.kinds), "layers": len(pack.identity.layers),
        "files": [
            {"name": file.name, "hash_sha256": f"0x{file.data_hash}", "file_sha256": _spelt(file.file_hash)}
            for file in pack.files
        ],
        "variants": [_record(pack, stamp) for stamp in pack.variants.values()],
        "notes": [],
    }  # fmt: skip
    if metadata:
        record["metadata"] = dict(pack.file.metadata)
        text += ["", *(f"{printable(key)}: {printable(value)}" for key, value in sorted(record["metadata"].items()))]
    return Result(record, text)


def planned(job: PackJob) -> Result:
    """Describe a pack that is not made.

    Args:
        job: The planned pack.

    Returns:
        What would be done.
    """
    masks, path = job.mask_bytes, str(job.request.output)
    rows = [
        [str(plan.size), _ratios([plan.ratio(group) for group in plan.groups]), f"{plan.variant.poa_weight:g}",
         amount(masks[plan.size]) if masks else "-"]
        for plan in job.plans
    ]  # fmt: skip
    table = Table(("size", _groups(job.plans[0].groups), "POA weight", "masks"), rows, ("POA weight", "masks"))
    first = job.plans[0]
    facts = {
        "base": f"{first.checkpoint.path} ({first.match.title}, {first.match.layout.name} layout)",
        "targets": f"{', '.join(job.kinds)} by {job.criterion.name}",
        "would write": path,
    }
    record = {
        "dry_run": True, "base": str(first.checkpoint.path), "family": first.match.family.id,
        "criterion": job.criterion.name, "output": path, "mask_bytes": sum(masks.values()),
        "variants": [
            {
                "resolution": str(plan.size), "recipe": plan.recipe, "provenance": plan.variant.provenance,
                "ratios": {group: plan.ratio(group) for group in plan.groups}, "poa_weight": plan.variant.poa_weight,
            }
            for plan in job.plans
        ],
        "notes": job.notes,
    }  # fmt: skip
    return Result(record, [table, "", Facts(facts)], bare=[path])


def removed(path: Path, gone: Sequence[str], pack: Pack) -> Result:
    """Describe a pack that has lost some sizes."""
    left = [str(size) for size in pack.variants]
    return Result(
        {"file": str(path), "removed": list(gone), "sizes": left},
        [f"{path}: without {', '.join(gone)}; it has {', '.join(left)}"],
        bare=[str(path)],
    )


def _bytes(pack: Pack) -> int:
    return pack.file.data_start + pack.file.data_size


def _hash(pack: Pack) -> list[str]:
    """Name the base's files by their hashes, in short where there are several."""
    if len(pack.files) > 1:
        return [f"{len(pack.files)} files, the first 0x{pack.files[0].data_hash}"]
    file = pack.files[0]
    whole = [f"file 0x{file.file_hash}, AutoV2 {auto_v2(file.file_hash)}"] if file.file_hash else []
    return [f"0x{file.data_hash}, AutoV3 {auto_v3(file.data_hash)}", *whole]


def _spelt(digest: str | None) -> str | None:
    return digest and f"0x{digest}"


def _groups(groups: Sequence[str]) -> str:
    """Name the column of the ratios after the groups."""
    return "/".join(groups)


def _ratios(ratios: Sequence[float]) -> str:
    return "/".join(f"{ratio:.4g}" for ratio in ratios)


def _table(pack: Pack) -> Table:
    rows = []
    for size, stamp in pack.variants.items():
        decided_by = f"mask, {amount(sum(t.nbytes for t in pack.masks(size)))}" if stamp.masked else "threshold"
        rows.append(
            [str(size), _ratios([stamp.groups[name].ratio for name in pack.family.groups]), f"{_share(stamp):.4f}",
             f"{stamp.poa_weight:g}", decided_by, printable(stamp.provenance.replace("-", " "))]
        )  # fmt: skip
    groups = _groups(pack.family.groups)
    columns = ("size", groups, "zeroed", "POA weight", "by", "ratios")
    return Table(columns, rows, ("zeroed", "POA weight"), ("by",))


def _sentences(pack: Pack) -> list[tuple[str, str]]:
    """Say of every size what was measured, and where ratios come from that are not simply the recipe's."""
    lines = []
    for size, stamp in pack.variants.items():
        origin = provenance(stamp.provenance, stamp.provenance_source, stamp.borrowed_from)
        prompt = f"; for the prompt {printable(stamp.prompt)}" if stamp.prompt else ""
        evidence = f"{evidence_text(stamp.evidence)}; " if stamp.evidence else ""
        lines.append((str(size), f"{evidence}{origin}{prompt}"))
    return lines


def _share(stamp: Stamp) -> float:
    pruned, total = (sum(getattr(group, key) for group in stamp.groups.values()) for key in ("pruned", "total"))
    return float(pruned / max(total, 1))


def _record(pack: Pack, stamp: Stamp) -> dict[str, Any]:
    return {
        "resolution": str(stamp.resolution), "criterion": stamp.criterion, "targets": list(stamp.targets),
        "poa_weight": stamp.poa_weight, "provenance": stamp.provenance, "dtype": stamp.cast,
        "mask_bytes": sum(tensor.nbytes for tensor in pack.masks(stamp.resolution)),
        "groups": {
            name: {
                "ratio": group.ratio, "pruned": group.pruned, "total": group.total, "threshold": group.threshold_text,
            }
            for name, group in stamp.groups.items()
        },
        "crdiff": {key.removeprefix(PREFIX): text for key, text in stamp.to_metadata().items()},
    }  # fmt: skip
