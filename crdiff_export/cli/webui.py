"""`crdiff webui`."""

from pathlib import Path

import click

from crdiff_export.cli.command import Group, command, examples, option, option_group
from crdiff_export.cli.options import FILE
from crdiff_export.cli.output import Output, Result

path_argument = click.argument("path", type=FILE)


@click.group(
    cls=Group, epilog=examples("crdiff webui install ~/stable-diffusion-webui", "crdiff webui uninstall ~/forge")
)
def webui() -> None:
    """Add the accordion "CR-Diff" to A1111, Forge, Forge Classic, reForge or SD.Next, or take it out again."""


@command(
    "crdiff webui install ~/stable-diffusion-webui",
    group=webui,
    short_help="Add the accordion to a web UI.",
)
@path_argument
@option_group("Output", option("--force", "Move an extension sd-webui-crdiff that somebody else put there."))
def install(_out: Output, path: Path, *, force: bool) -> Result:
    """Write the extension sd-webui-crdiff into the web UI at PATH, or bring it up to date.

    Which UI that is, its files tell. The UI's own Python needs nothing installed for it; it must be 3.10 or newer.
    """
    from crdiff_export.sampling.webui.install import install as run

    extension = run(path, force=force)
    done = extension.installed
    assert done
    return Result(
        {
            "installed": str(done.folder), "ui": extension.ui.name, "version": done.version, "replaced": done.replaced,
            "aside": str(done.aside) if done.aside else None,
        },
        [str(done.folder)],
        notes=[
            *([f"what was there is now {done.aside}"] if done.aside else []),
            *([f"version {done.replaced} is replaced by {done.version}"] if done.replaced else []),
            f"restart {extension.ui.name}; the accordion CR-Diff is in txt2img and img2img",
        ],
    )  # fmt: skip


@command("crdiff webui uninstall ~/stable-diffusion-webui", group=webui, short_help="Take it out of a web UI.")
@path_argument
def uninstall(_out: Output, path: Path) -> Result:
    """Remove what `crdiff webui install` wrote, and nothing else."""
    from crdiff_export.sampling.webui.install import uninstall as run

    extension = run(path)
    folder = [str(extension.installed.folder)] if extension.installed else []
    notes = [] if extension.installed else [f"{path}: the extension is not installed"]
    return Result({"removed": folder[0] if folder else None, "ui": extension.ui.name}, folder, notes=notes)
