"""`crdiff comfyui`."""

from pathlib import Path

import click

from crdiff_export.cli.command import Group, command, examples, option, option_group
from crdiff_export.cli.options import FILE
from crdiff_export.cli.output import Output, Result

path_argument = click.argument("path", type=FILE)


@click.group(cls=Group, epilog=examples("crdiff comfyui install ~/ComfyUI", "crdiff comfyui uninstall ~/ComfyUI"))
def comfyui() -> None:
    """Add the nodes "CR-Diff", "CR-Diff POA" and "CR-Diff Info" to a ComfyUI, or take them out again."""


@command(
    "crdiff comfyui install ~/ComfyUI",
    "crdiff comfyui install ~/ComfyUI --link",
    group=comfyui,
    short_help="Add the nodes to a ComfyUI.",
)
@path_argument
@option_group(
    "Output",
    option("--link", "Use the crdiff that is installed here, instead of a copy."),
    option("--force", "Rename a folder custom_nodes/crdiff that somebody else put there."),
)
def install(_out: Output, path: Path, *, link: bool, force: bool) -> Result:
    """Write custom_nodes/crdiff in the ComfyUI at PATH, or bring it up to date.

    ComfyUI's own Python needs nothing installed for it; it must be 3.11 or newer.
    """
    from crdiff_export.sampling.comfyui.install import install as run

    done = run(path, link=link, force=force)
    return Result(
        {
            "installed": str(done.folder), "version": done.version, "linked": str(done.linked) if done.linked else None,
            "replaced": done.replaced, "aside": str(done.aside) if done.aside else None,
        },
        [str(done.folder)],
        notes=[
            *([f"what was there is now {done.aside}"] if done.aside else []),
            *([f"version {done.replaced} is replaced by {done.version}"] if done.replaced else []),
            "restart ComfyUI; the nodes are under model_patches/crdiff, an example under Workflow > Browse Templates",
        ],
    )  # fmt: skip


@command("crdiff comfyui uninstall ~/ComfyUI", group=comfyui, short_help="Take the nodes out of a ComfyUI.")
@path_argument
def uninstall(_out: Output, path: Path) -> Result:
    """Remove what `crdiff comfyui install` wrote, and nothing else."""
    from crdiff_export.sampling.comfyui.install import uninstall as run

    removed = run(path)
    folder = [str(removed.folder)] if removed else []
    notes = [] if removed else [f"{path}: the nodes are not installed"]
    return Result({"removed": folder[0] if folder else None}, folder, notes=notes)
