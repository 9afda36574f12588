"""`crdiff inspect`."""

from pathlib import Path

from crdiff_export.cli.blocks import Block, Facts, Table
from crdiff_export.cli.command import command, option, option_group
from crdiff_export.cli.options import files_argument
from crdiff_export.cli.output import Output, Result, for_each


@command("crdiff inspect sdxl-2048.safetensors", "crdiff inspect model.safetensors --json | jq .family")
@files_argument
@option_group("Output", option("--metadata", "All metadata of the header as well."))
def inspect(out: Output, files: tuple[Path, ...], *, metadata: bool) -> Result:
    """Show what FILE is (family, layout, dtypes, sizes) and, if crdiff made it, what was pruned and why so.

    Reads headers only. FILE may be any checkpoint or diffusers folder, pruned or not. Several files follow one another.
    """
    return for_each(out, files, lambda file: _inspect(file, metadata=metadata))


def _inspect(file: Path, *, metadata: bool) -> Result:
    from crdiff_export.formats.text import printable
    from crdiff_export.verify.inspect import inspect as run

    inspection = run(_base_of_alias(file) or file)
    text: list[Block] = [Facts(inspection.facts())]
    if inspection.rows:
        text += ["", Table(inspection.columns, inspection.rows, inspection.columns[1:])]
    keys = dict(inspection.checkpoint.metadata) if metadata else {}
    if metadata:
        text += ["", *(f"{printable(key)}: {printable(value)}" for key, value in sorted(keys.items()))]
    return Result(inspection.as_json() | ({"metadata": keys} if metadata else {}), text)


def _base_of_alias(file: Path) -> Path | None:
    """Return the demo model for its name; None for a path. A base on the Hub is not fetched to be looked at."""
    from crdiff_export.errors import CheckpointError
    from crdiff_export.models import demo, recipe_files

    name = str(file)
    if file.exists() or name not in recipe_files.aliases():
        return None
    recipe = recipe_files.by_alias(name)
    if recipe is None or recipe.repo is None:
        return demo.path()
    where = f"{recipe.repo}/{recipe.file}" if recipe.file else recipe.repo
    hint = f"Give the file itself, which `crdiff export {name} --res N --dry-run` fetches."
    raise CheckpointError(f"{name}: the alias of {where} on the Hub, not a file", hint)
