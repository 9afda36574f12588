"""`crdiff inspect`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from crdiff_export.commands.options import output_options


@click.command(epilog="Example: crdiff inspect sdxl-2048.safetensors")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--metadata", "raw", is_flag=True, help="All metadata of the header as well.")
@output_options
def inspect(file: Path, *, raw: bool, as_json: bool, quiet: bool) -> None:
    """Show what FILE is (family, layout, dtypes, sizes) and, if crdiff made it, what was pruned and on whose word.

    Reads headers only. FILE may be any checkpoint or diffusers folder, pruned or not.
    """
    from crdiff_export import ui
    from crdiff_export.inspection import inspect as look

    found = look(file)
    if as_json:
        ui.print_json(found.as_json() | ({"metadata": dict(found.metadata)} if raw else {}))
        return
    for name, text in found.facts():
        ui.line(f"{name + ':':<12}{text}")
    if found.rows:
        ui.line("")
        ui.table(found.columns, found.rows, numeric=found.columns[1:])
    if raw:
        _show_metadata(found.metadata)
    if not quiet:
        for text in found.notes:
            ui.note(text)


def _show_metadata(metadata: Mapping[str, Any]) -> None:
    from crdiff_export import ui

    ui.line("")
    for key, text in sorted(metadata.items()):
        short = text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"
        ui.line(f"{key}: {short!r}" if not short.isprintable() else f"{key}: {short}")
