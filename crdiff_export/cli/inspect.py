"""`crdiff inspect`."""

from pathlib import Path

from crdiff_export.cli.blocks import Block, Facts, Table
from crdiff_export.cli.command import command, option, option_group
from crdiff_export.cli.options import file_argument
from crdiff_export.cli.output import Output, Result


@command("crdiff inspect sdxl-2048.safetensors", "crdiff inspect model.safetensors --json | jq .family")
@file_argument
@option_group("Output", option("--metadata", "All metadata of the header as well."))
def inspect(_out: Output, file: Path, *, metadata: bool) -> Result:
    """Show what FILE is (family, layout, dtypes, sizes) and, if crdiff made it, what was pruned and why so.

    Reads headers only. FILE may be any checkpoint or diffusers folder, pruned or not.
    """
    from crdiff_export.formats.text import printable
    from crdiff_export.verify.inspect import inspect as run

    inspection = run(file)
    text: list[Block] = [Facts(inspection.facts())]
    if inspection.rows:
        text += ["", Table(inspection.columns, inspection.rows, inspection.columns[1:])]
    keys = dict(inspection.checkpoint.metadata) if metadata else {}
    if metadata:
        text += ["", *(f"{printable(key)}: {printable(value)}" for key, value in sorted(keys.items()))]
    return Result(inspection.as_json() | ({"metadata": keys} if metadata else {}), text)
