"""`crdiff comfyui`."""

from pathlib import Path

import click

from crdiff_export.cli.options import Group, examples, output_options

PATH = click.argument("path", type=click.Path(path_type=Path))


@click.group(cls=Group, epilog=examples("crdiff comfyui install ~/ComfyUI", "crdiff comfyui uninstall ~/ComfyUI"))
def comfyui() -> None:
    """Add the nodes "CR-Diff POA" and "CR-Diff Info" to a ComfyUI, or take them out again."""


@comfyui.command(
    short_help="Add the nodes to a ComfyUI.",
    epilog=examples("crdiff comfyui install ~/ComfyUI", "crdiff comfyui install ~/ComfyUI --link"),
)
@PATH
@click.option("--link", is_flag=True, help="Use the crdiff that is installed here, instead of a copy.")
@click.option("--force", is_flag=True, help="Rename a folder custom_nodes/crdiff that somebody else put there.")
@output_options
def install(path: Path, *, link: bool, force: bool, json: bool, quiet: bool) -> None:
    """Write custom_nodes/crdiff in the ComfyUI at PATH, or bring it up to date.

    ComfyUI's own Python needs nothing installed for it; it must be 3.11 or newer.
    """
    from crdiff_export.cli import output
    from crdiff_export.sampling.comfyui import install as installer

    done = installer.install(path, link=link, force=force)
    if json:
        output.print_json({
            "installed": str(done.folder), "version": done.version, "linked": str(done.linked) if done.linked else None,
            "replaced": done.replaced, "aside": str(done.aside) if done.aside else None,
        })  # fmt: skip
        return
    output.line(str(done.folder))
    if quiet:
        return
    if done.aside:
        output.note(f"what was there is now {done.aside}")
    if done.replaced:
        output.note(f"version {done.replaced} is replaced by {done.version}")
    output.note("restart ComfyUI; the nodes are under model_patches/crdiff")


@comfyui.command(short_help="Take the nodes out of a ComfyUI.", epilog=examples("crdiff comfyui uninstall ~/ComfyUI"))
@PATH
@output_options
def uninstall(path: Path, *, json: bool, quiet: bool) -> None:
    """Remove what `crdiff comfyui install` wrote, and nothing else."""
    from crdiff_export.cli import output
    from crdiff_export.sampling.comfyui import install as installer

    removed = installer.uninstall(path)
    if json:
        output.print_json({"removed": str(removed.folder) if removed else None})
    elif removed:
        output.line(str(removed.folder))
    elif not quiet:
        output.note(f"{path}: the nodes are not installed")
