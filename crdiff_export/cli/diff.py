"""`crdiff diff`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crdiff_export.cli import options
from crdiff_export.cli.blocks import Block, Facts, Table
from crdiff_export.cli.command import command, option, option_group
from crdiff_export.cli.inspect import local_path
from crdiff_export.cli.output import Output, Result
from crdiff_export.errors import OptionError

if TYPE_CHECKING:
    from crdiff_export.verify.diff import Change, Comparison
    from crdiff_export.verify.inspect import Inspection

# Tensors and keys that are shown without --all, and names in one line.
MAX_ROWS, MAX_NAMES = 20, 3
GROUP_COLUMNS = ("group", "tensors", "differ", "weights differ", "share", "newly zero", "zero in both")
TENSOR_COLUMNS = ("tensor", "weights", "differ", "share", "newly zero", "zero in A only", "largest", "relative")
# Of `git diff --exit-code` that is 1, which here is a failure.
DIFFER = 3


@command(
    "crdiff diff demo demo-96x64.safetensors",
    "crdiff diff base.safetensors finetune.safetensors --all",
    "crdiff diff a.safetensors b.safetensors -q --exit-code",
    more="relative is the L2 norm of the difference, divided by that of A; largest is the largest absolute difference.",
)
@click.argument("a", type=options.FILE)
@click.argument("b", type=options.FILE)
@option_group(
    "Output",
    option("--all", f"All tensors and metadata that differ, instead of the first {MAX_ROWS}.", dest="all_"),
    option("--exit-code", f"Exit with {DIFFER} if the weights differ."),
)
def diff(out: Output, a: Path, b: Path, *, all_: bool, exit_code: bool) -> Result:
    """Show which tensors and groups differ between the checkpoints A and B, and by how much.

    Tensors are compared by name: first headers, then bytes, then weight by weight where bytes differ. A and B are what
    `crdiff inspect` takes; of a diffusers folder its unet/ or transformer/ is compared. Other metadata alone is shown,
    but such files are equal. -q says only whether they are.
    """
    from crdiff_export.packs import is_pack
    from crdiff_export.verify.diff import compare
    from crdiff_export.verify.inspect import inspect

    if pack := next((path for path in (a, b) if is_pack(path)), None):
        raise OptionError(f"{pack}: a pack has no weights to compare", "`crdiff pack show` shows what it holds.")
    left, right = inspect(local_path(a)), inspect(local_path(b))
    with out.progress() as progress:
        comparison = compare(left, right, progress)
    verdict = "equal" if comparison.equal else "differ"
    return Result(
        _as_json(comparison),
        _text(comparison, all_=all_),
        bare=[verdict],
        notes=comparison.notes,
        exit_code=DIFFER if exit_code and not comparison.equal else 0,
    )


def _text(comparison: "Comparison", *, all_: bool) -> list[Block]:
    header, total = comparison.header, comparison.total
    pairs = [(name, _describe(side)) for name, side in (("A", comparison.a), ("B", comparison.b))]
    counts = (
        f": {total.differing_tensors:,} of {total.tensors:,} compared tensors, "
        f"{total.differing:,} of {total.weights:,} weights"
    )
    pairs.append(("result", "equal" if comparison.equal else f"differ{counts if total.tensors else ''}"))
    pairs += [
        (name, _list_names([*map(_one_line, entries)]))
        for name, entries in (
            ("only in A", header.only_a), ("only in B", header.only_b), ("other shape", header.shapes),
            ("other dtype", header.dtypes),
        )
        if entries
    ]  # fmt: skip
    text: list[Block] = [Facts(pairs)]
    if comparison.groups:
        groups = comparison.groups if len(comparison.groups) == 1 else (*comparison.groups, total)
        rows = [
            [
                group.group, f"{group.tensors:,}", f"{group.differing_tensors:,}", f"{group.differing:,}",
                f"{group.share:.4f}", f"{group.newly_zero:,}", f"{group.zero_in_both:,}",
            ]
            for group in groups
        ]  # fmt: skip
        text += ["", Table(GROUP_COLUMNS, rows, GROUP_COLUMNS[1:], ("zero in both", "tensors"))]
    if comparison.tensors:
        text += ["", _tensor_table(comparison, all_=all_), *_more(len(comparison.tensors), all_=all_)]
    if header.metadata:
        shown = header.metadata if all_ else header.metadata[:MAX_ROWS]
        text += ["", "metadata:", Facts([_metadata(change) for change in shown])]
        text += _more(len(header.metadata), all_=all_)
    return text


def _describe(side: "Inspection") -> str:
    facts = dict(side.facts())
    return f"{facts['file']}, {facts['family'] if side.match else 'of no known family'}"


def _tensor_table(comparison: "Comparison", *, all_: bool) -> Table:
    from crdiff_export.formats.text import printable

    match = comparison.a.match or comparison.b.match
    prefix = match.prefix if match else ""
    rows = [
        [
            printable(tensor.name.removeprefix(prefix).removesuffix(".weight")),
            f"{tensor.weights:,}",
            f"{tensor.differing:,}",
            f"{tensor.share:.4f}",
            f"{tensor.newly_zero:,}",
            f"{tensor.no_longer_zero:,}",
            _number(tensor.largest),
            _number(tensor.relative),
        ]
        for tensor in (comparison.tensors if all_ else comparison.tensors[:MAX_ROWS])
    ]
    optional = ("weights", "zero in A only", "differ", "largest", "share")
    return Table(TENSOR_COLUMNS, rows, TENSOR_COLUMNS[1:], optional, name_column="tensor")


def _more(count: int, *, all_: bool) -> list[str]:
    return [] if all_ or count <= MAX_ROWS else [f"and {count - MAX_ROWS:,} more: --all"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _one_line(entry: "str | Change") -> str:
    """Return a tensor's name, with its shape or dtype in A and B where these differ."""
    from crdiff_export.formats.text import printable

    return printable(entry) if isinstance(entry, str) else f"{printable(entry.name)} ({entry.a}, {entry.b})"


def _list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return f"{len(names):,}: {', '.join(names[:MAX_NAMES])}{more}"


def _metadata(change: "Change") -> tuple[str, str]:
    from crdiff_export.formats.text import printable

    a, b = ("none" if value is None else printable(value, 60) for value in (change.a, change.b))
    if change.a is None:
        return printable(change.name, 60), f"only in B: {b}"
    return printable(change.name, 60), f"only in A: {a}" if change.b is None else f"{a} in A, {b} in B"


def _as_json(comparison: "Comparison") -> dict[str, Any]:
    header = comparison.header
    return {
        "equal": comparison.equal,
        "a": str(comparison.a.path), "b": str(comparison.b.path),
        "only_in_a": header.only_a, "only_in_b": header.only_b, "common": header.common,
        **{
            name: [change._asdict() for change in changes]
            for name, changes in (("shapes", header.shapes), ("dtypes", header.dtypes), ("metadata", header.metadata))
        },
        "groups": {group.group: {**asdict(group), "share": group.share} for group in comparison.groups},
        "tensors": [{**asdict(tensor), "share": tensor.share} for tensor in comparison.tensors],
        "notes": comparison.notes,
    }  # fmt: skip
