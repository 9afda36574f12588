"""`crdiff restore`."""

from pathlib import Path

from crdiff_export.cli import options
from crdiff_export.cli.command import command, option, option_group
from crdiff_export.cli.output import Output, Result


@command(
    "crdiff export demo --res 96x64 --residual embed -o both.safetensors",
    "crdiff restore both.safetensors -o base.safetensors",
)
@options.file_argument
@option_group(
    "Output",
    option("-o, --output FILE", "Where to write the base; a folder if FILE is one.", options.FILE, required=True),
    options.force,
)
def restore(out: Output, file: Path, output: Path, *, force: bool) -> Result:
    """Give back the base of FILE bit by bit, from the residual that it was exported with, and prove it by hash.

    FILE is what `crdiff export --residual embed` or `--residual sidecar` has written; a sidecar lies beside it. Exit
    code 3 if either was merged, altered or damaged since: nothing is written then.
    """
    from crdiff_export.verify.reopen import FILE_HASH
    from crdiff_export.verify.restore import restore as run

    with out.threads_progress() as progress:
        restored = run(file, output, progress, force=force)
    notes = [
        f"{file.path}: the base's {'file' if file.key == FILE_HASH else 'tensors'}, bit by bit ({file.hash})"
        for file in restored.files
    ]
    if restored.whole and any(file.key != FILE_HASH for file in restored.files):
        notes.append("the base's header was restored, too; it was kept without a hash")
    if restored.source_layout:
        notes.append(f"the base has the {restored.source_layout} layout; this is the layout of the baked file")
    elif not restored.whole:
        notes.append("the base was no safetensors file; its tensors are in one now")
    return Result(
        {
            "output": str(restored.path), "bytes": sum(file.size for file in restored.files), "whole": restored.whole,
            "files": [
                {"path": str(f.path), "bytes": f.size, f.key.rpartition(".")[2]: f.hash, "whole": f.whole}
                for f in restored.files
            ],
        },
        [str(restored.path)],
        notes=notes,
    )  # fmt: skip
