"""`crdiff inspect`."""

from collections.abc import Mapping
from pathlib import Path

import click

from crdiff_export.cli.options import examples, output_options


@click.command(
    epilog=examples("crdiff inspect sdxl-2048.safetensors", "crdiff inspect model.safetensors --json | jq .family")
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--metadata", is_flag=True, help="All metadata of the header as well.")
@output_options
def inspect(file: Path, *, metadata: bool, json: bool, quiet: bool) -> None:  # noqa: ARG001  all of it is the result
    """Show what FILE is (family, layout, dtypes, sizes) and, if crdiff made it, what was pruned and on whose word.

    Reads headers only. FILE may be any checkpoint or diffusers folder, pruned or not.
    """
    from crdiff_export.cli import output
    from crdiff_export.verify.inspect import inspect as look

    found = look(file)
    if json:
        output.print_json(found.as_json() | ({"metadata": dict(found.metadata)} if metadata else {}))
        return
    output.facts(tuple(found.facts()))
    if found.rows:
        output.line("")
        output.table(found.columns, found.rows, numeric=found.columns[1:])
    if metadata:
        _show_metadata(found.metadata)


def _show_metadata(metadata: Mapping[str, str]) -> None:
    from crdiff_export.cli import output
    from crdiff_export.formats.text import printable

    output.line("")
    for key, text in sorted(metadata.items()):
        output.line(f"{printable(key)}: {printable(text)}")
