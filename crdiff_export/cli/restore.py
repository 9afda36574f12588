"""`crdiff restore`."""

from pathlib import Path

import click

from crdiff_export.cli.options import examples, output_options
from crdiff_export.cli.signals import Stopper


@click.command(
    epilog=examples(
        "crdiff export demo --res 96x64 --residual embed -o both.safetensors",
        "crdiff restore both.safetensors -o base.safetensors",
    )
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Where to write the base; a folder if FILE is one.",
)
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@output_options
@click.pass_obj
def restore(stopper: Stopper, /, file: Path, output: Path, *, force: bool, json: bool, quiet: bool) -> None:
    """Give back the base of FILE bit by bit, from the residual that it was exported with, and prove it by hash.

    FILE is what `crdiff export --residual embed` or `--residual sidecar` has written; a sidecar lies beside it. Exit
    code 3 if either was merged, altered or damaged since: nothing is written then.
    """
    from crdiff_export.cli import output as ui
    from crdiff_export.verify.restore import restore as run

    with ui.progress(quiet=quiet or json) as shown, stopper.watch(shown) as progress:
        found = run(file, output, progress, force=force)
    if json:
        ui.print_json({
            "output": str(found.path), "bytes": sum(f.size for f in found.files), "whole": found.whole,
            "files": [
                {"path": str(f.path), "bytes": f.size, f.key.rpartition(".")[2]: f.hash, "whole": f.whole}
                for f in found.files
            ],
        })  # fmt: skip
        return
    if not quiet:
        for one in found.files:
            what = "the base's file" if one.whole else "the base's tensors"
            ui.note(f"{one.path}: {what}, bit by bit ({one.hash})")
        if not found.whole:
            ui.note("the base was no safetensors file; its tensors are in one now")
    ui.line(str(found.path))
