"""`crdiff inspect`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crdiff_export.cli import options, pack_text
from crdiff_export.cli.blocks import Block, Facts, Table
from crdiff_export.cli.command import command, command_line, option, option_group
from crdiff_export.cli.output import Output, Result, for_each
from crdiff_export.errors import OptionError

if TYPE_CHECKING:
    from crdiff_export.verify.inspect import Inspection
    from crdiff_export.verify.layers import GroupZeros, LayerZeros


@command(
    "crdiff inspect sdxl-2048.safetensors",
    "crdiff inspect model.safetensors --json | jq .family",
    "crdiff inspect sdxl-2048.safetensors --layers -o sdxl-2048.html",
)
@options.files_argument
@option_group(
    "Layers",
    option("--layers", "The share of zero weights of every layer that may be pruned, or of a file by crdiff of every "
           "target; reads their weights."),
    option("-o, --output FILE", "With --layers: a heat map of blocks and projections, as a plot (.png) or a page "
           "(.html); may be given several times.", options.FILE, "outputs", multiple=True),
    options.force,
)  # fmt: skip
@option_group("Output", option("--metadata", "All metadata of the header as well."))
def inspect(
    out: Output, files: tuple[Path, ...], outputs: tuple[Path, ...], *, layers: bool, force: bool, metadata: bool
) -> Result:
    """Show what FILE is (family, layout, dtypes, sizes) and, if crdiff made it, what was pruned and why so.

    Reads headers only, without --layers. FILE may be any checkpoint or diffusers folder, pruned or not. Several files
    follow one another.
    """
    maps = _check_outputs(files, outputs, layers=layers, force=force)
    return for_each(out, files, lambda file: _inspect(out, file, maps, layers=layers, force=force, metadata=metadata))


def _check_outputs(files: Sequence[Path], outputs: Sequence[Path], *, layers: bool, force: bool) -> Sequence[Path]:
    """Check the files of a heat map before anything is read."""
    if not outputs:
        return ()
    if not layers:
        raise OptionError(f"--output {outputs[0]}: only --layers makes a heat map", "Give --layers, too.")
    if len(files) > 1:
        raise OptionError(f"--output {outputs[0]}: a heat map is of one file", "Give one FILE.")
    for output in outputs:
        if output.resolve() == files[0].resolve():
            raise OptionError(f"--output {output}: the checkpoint itself", "Give the heat map a name of its own.")
    from crdiff_export.evaluate import layer_map

    return layer_map.check(outputs, force=force)


def _inspect(out: Output, file: Path, maps: Sequence[Path], *, layers: bool, force: bool, metadata: bool) -> Result:
    from crdiff_export.formats.text import printable
    from crdiff_export.packs import is_pack, open_pack
    from crdiff_export.verify.inspect import inspect as run

    if is_pack(file):
        if layers:
            raise OptionError(f"{file}: a pack has no weights for --layers", "Give a file that was exported.")
        return pack_text.describe(open_pack(file), metadata=metadata)

    inspection = run(local_path(file))
    layer_zeros = _count(out, inspection) if layers else ()
    text: list[Block] = [Facts(inspection.facts())]
    if inspection.rows and (inspection.stamp or not layers):
        text += ["", Table(inspection.columns, inspection.rows, inspection.columns[1:])]
    result: dict[str, Any] = inspection.as_json()
    if layers:
        text += _layer_tables(inspection, layer_zeros)
        result["layers"] = [_layer_json(layer) for layer in layer_zeros]
    if metadata:
        result["metadata"] = dict(inspection.checkpoint.metadata)
        text += ["", *(f"{printable(key)}: {printable(value)}" for key, value in sorted(result["metadata"].items()))]
    if maps:
        from crdiff_export.evaluate import layer_map

        layer_map.write(maps, layer_map.LayerMap(inspection, layer_zeros), command_line(), replace=force)
        text += ["", *map(str, maps)]
        result["outputs"] = [str(path) for path in maps]
    return Result(result, text)


def _count(out: Output, inspection: "Inspection") -> "tuple[LayerZeros, ...]":
    from crdiff_export.verify.layers import count_zeros

    with out.progress() as progress:
        return count_zeros(inspection, progress)


def _layer_tables(inspection: "Inspection", layers: "Sequence[LayerZeros]") -> list[Block]:
    """Return a table of the groups and, for each of them, one of its layers, with bars."""
    from crdiff_export.verify.layers import group_zeros

    prefix = inspection.match.prefix if inspection.match else ""
    columns = ("weights", "zeros", "share", "bar")
    groups = group_zeros(layers)
    rows = [[group.group, str(group.layers), *_numbers(group)] for group in groups]
    text: list[Block] = ["", Table(("group", "layers", *columns), rows, ("layers", *columns[:-1]), ("bar",))]
    for group in groups:
        rows = [
            [layer.name.removeprefix(prefix).replace(".weight", ""), *_numbers(layer)]
            for layer in layers if layer.group == group.group
        ]  # fmt: skip
        layer_table = Table(("layer", *columns), rows, columns[:-1], ("weights", "bar"), name_column="layer")
        text += ["", f"{group.group}:", layer_table]
    return text


def _numbers(zeros: "LayerZeros | GroupZeros") -> list[str]:
    from crdiff_export.cli.text_table import share_bar

    return [f"{zeros.weights:,}", f"{zeros.zeros:,}", f"{zeros.share:.4f}", share_bar(zeros.share)]


def _layer_json(layer: "LayerZeros") -> dict[str, Any]:
    return {
        "name": layer.name, "group": layer.group, "kind": layer.kind, "weights": layer.weights, "zeros": layer.zeros,
        "share": layer.share,
    }  # fmt: skip


def local_path(file: Path) -> Path:
    """Return the path of a demo model for its name, and any other path as it is.

    Raises:
        CheckpointError: It is the name of a base on the Hub, which is not fetched to be looked at.
    """
    return _base_of_alias(file) or file


def _base_of_alias(file: Path) -> Path | None:
    """Return a demo model's file for its name; None for a path. A base on the Hub is not fetched to be looked at."""
    from crdiff_export.errors import CheckpointError
    from crdiff_export.models import demo, recipe_files

    name = str(file)
    if file.exists() or name not in recipe_files.aliases():
        return None
    recipe = recipe_files.by_alias(name)
    if recipe is None or recipe.repo is None:
        return demo.path(name)
    where = f"{recipe.repo}/{recipe.file}" if recipe.file else recipe.repo
    hint = f"Give the file itself, which `crdiff export {name} --res N --dry-run` fetches."
    raise CheckpointError(f"{name}: the alias of {where} on the Hub, not a file", hint)
