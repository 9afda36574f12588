"""`crdiff recipes`."""

from pathlib import Path
from typing import Any

import click

from crdiff_export.commands.options import output_options
from crdiff_export.recipe import Recipe, Variant


@click.group(epilog="Example: crdiff recipes show sdxl")
def recipes() -> None:
    """List, show and check recipes: which share of each group is pruned at which size, and on whose word."""


@recipes.command("list", epilog="Example: crdiff recipes list")
@output_options
def list_(*, as_json: bool, quiet: bool) -> None:  # noqa: ARG001  nothing but the result is printed
    """List the built-in recipes; their names are aliases for their bases."""
    from crdiff_export import recipe_files, ui

    found = recipe_files.builtin()
    if as_json:
        ui.print_json({"recipes": [_as_json(r) for r in found]})
        return
    rows = [
        [Path(r.name).stem, r.title, str(r.native), ", ".join(sorted({v.provenance for v in r.variants})),
         " ".join(str(v.resolution) for v in r.variants)]
        for r in found
    ]  # fmt: skip
    ui.table(["alias", "model", "native", "ratios", "sizes"], rows)


@recipes.command(epilog="Example: crdiff recipes show sdxl")
@click.argument("recipe")
@output_options
def show(recipe: str, *, as_json: bool, quiet: bool) -> None:  # noqa: ARG001  nothing but the result is printed
    """Show every variant of RECIPE, an alias or a file."""
    from crdiff_export import recipe_files, ui

    found = recipe_files.by_alias(recipe) or recipe_files.load(recipe)
    if as_json:
        ui.print_json(_as_json(found))
        return
    ui.line(f"model:   {found.title} ({found.family}), native {found.native}")
    ui.line(f"base:    {f'hf://{found.repo}/{found.file}' if found.repo else 'built in'}")
    ui.table(
        ["size", "ratios", "POA weight", "provenance", "source"],
        [[str(v.resolution), _ratios(v), f"{v.poa_weight:g}", v.provenance, v.source] for v in found.variants],
        numeric=["POA weight"],
    )


@recipes.command(epilog="Example: crdiff recipes validate my-sdxl.toml")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@output_options
def validate(files: tuple[Path, ...], *, as_json: bool, quiet: bool) -> None:
    """Check recipe FILES: form, sizes and groups against the family they are for."""
    from crdiff_export import families, recipe_files, ui
    from crdiff_export.recipe import check_grid, check_groups

    for file in files:
        found = recipe_files.load(file)
        family = families.by_id(found.family)
        for variant in found.variants:
            check_groups(variant, family.groups, f"{file}: variant {variant.resolution}")
            check_grid(variant.resolution, family.grid, f"{file}: {family.title}")
        if not as_json and not quiet:
            ui.line(f"{file}: a recipe for {family.title} with {len(found.variants)} variants")
    if as_json:
        ui.print_json({"valid": [str(file) for file in files]})


def _ratios(variant: Variant) -> str:
    return " ".join(f"{group}={ratio:g}" for group, ratio in variant.ratios.items())


def _as_json(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name, "family": recipe.family, "title": recipe.title, "native": str(recipe.native),
        "repo": recipe.repo, "file": recipe.file,
        "variants": [
            {
                "resolution": str(v.resolution), "ratios": dict(v.ratios), "poa_weight": v.poa_weight,
                "provenance": v.provenance, "source": v.source, "prompt": v.prompt,
            }
            for v in recipe.variants
        ],
    }  # fmt: skip
