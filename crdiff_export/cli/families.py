"""`crdiff families`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crdiff_export.cli.blocks import Block, Facts, Table
from crdiff_export.cli.command import Group, command, examples
from crdiff_export.cli.options import FILE
from crdiff_export.cli.output import Output, Result
from crdiff_export.errors import FamilyError, OptionError

if TYPE_CHECKING:
    from crdiff_export.models.families import Family, Match


@click.group(
    cls=Group,
    invoke_without_command=True,
    epilog=examples(
        "crdiff families", "crdiff families show flux-dev > my-model.toml",
        "crdiff families validate my-model.toml my-model.safetensors",
    ),
)  # fmt: skip
@click.pass_context
def families(context: click.Context) -> None:
    """List, show and check families: how a model is recognised, and which of its tensors are pruned.

    Without a command it lists them. docs/families.md says how to write one.
    """
    if context.invoked_subcommand is None:
        context.invoke(list_)


@command("crdiff families list", group=families, name="list", short_help="List the families.")
def list_(_out: Output) -> Result:
    """List the built-in families, and those of other packages."""
    from crdiff_export.models.families import all_families, installed_families

    records = (*all_families(), *installed_families())
    rows = [
        [family.id, family.title, " ".join(family.groups), " ".join(family.default_kinds),
         " ".join(layout.name for layout in family.layouts)]
        for family in records
    ]  # fmt: skip
    return Result(
        {"families": [_as_json(f) for f in records]}, [Table(["id", "model", "groups", "targets", "layouts"], rows)]
    )


@command(
    "crdiff families show sdxl",
    "crdiff families show flux-dev > my-model.toml",
    group=families,
    short_help="Show the table of a family.",
)
@click.argument("family")
def show(_out: Output, family: str) -> Result:
    """Show the table of FAMILY, to start one of your own from."""
    from crdiff_export.models.families import by_id, table_of

    try:
        shown = by_id(family)
    except FamilyError as error:
        raise OptionError(error.message, error.hint) from error
    return Result(_as_json(shown), [table_of(shown).rstrip("\n")])


@command(
    "crdiff families validate my-model.toml",
    "crdiff families validate my-model.toml my-model.safetensors",
    group=families,
    short_help="Check a family's table, and what it would prune in a file.",
)
@click.argument("file", type=FILE)
@click.argument("checkpoint", type=FILE, required=False)
def validate(_out: Output, file: Path, checkpoint: Path | None) -> Result:
    """Check the table of a family in FILE and, with CHECKPOINT, show what it would prune there."""
    from crdiff_export.formats.checkpoint import open_checkpoint
    from crdiff_export.models.families import load_family
    from crdiff_export.prune.plan import recognise

    family = load_family(file)
    layers = ", ".join(f"{len(layout.layers)} layers in the {layout.name} layout" for layout in family.layouts)
    text: list[Block] = [f"{file}: a family of {layers}"]
    if checkpoint is None:
        return Result({"valid": str(file), **_as_json(family)}, text, bare=())
    opened = open_checkpoint(checkpoint)
    match = recognise(opened, family)
    groups = _groups(match, opened.shapes)
    rows = [[name, str(group["layers"]), f"{group['weights']:,}"] for name, group in groups.items()]
    facts = {
        "checkpoint": f"{checkpoint} ({match.title}, {match.layout.name} layout, prefix {match.prefix!r})",
        "targets": ", ".join(family.default_kinds),
        "the first": match.prefix + next(t.tensor for t in match.layout.layers if t.kind in family.default_kinds),
    }
    text += ["", Table(["group", "layers", "weights"], rows, ("layers", "weights")), "", Facts(facts)]
    record = {"valid": str(file), **_as_json(family), "checkpoint": str(checkpoint), "would_prune": groups}
    return Result(record, text, bare=())


def _groups(match: "Match", shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, int]]:
    """Count the layers and weights that the family prunes by default, by group."""
    groups = {name: {"layers": 0, "weights": 0} for name in match.family.groups}
    for layer in match.layout.layers:
        if layer.kind in match.family.default_kinds:
            shape = shapes[match.prefix + layer.tensor]
            start, stop = layer.rows(shape)
            groups[layer.group]["layers"] += 1
            groups[layer.group]["weights"] += (stop - start) * shape[1]
    return groups


def _as_json(family: "Family") -> dict[str, Any]:
    return {
        "id": family.id, "title": family.title, "architecture": family.architecture or None,
        "native": family.native and f"{family.native[0]}x{family.native[1]}", "grid": family.grid,
        "groups": list(family.groups), "scope": family.scope, "kinds": list(family.kinds),
        "targets": list(family.default_kinds), "layouts": [layout.name for layout in family.layouts],
    }  # fmt: skip
