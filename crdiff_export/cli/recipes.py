"""`crdiff recipes`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from crdiff_export.cli.options import Group, complete_alias, examples, output_options
from crdiff_export.errors import CrdiffError, RecipeError
from crdiff_export.models.recipe import Evidence, Recipe


@click.group(
    cls=Group,
    invoke_without_command=True,
    epilog=examples("crdiff recipes", "crdiff recipes show sdxl", "crdiff recipes validate my-sdxl.toml"),
)
@click.pass_context
def recipes(context: click.Context) -> None:
    """List, show and check recipes: which share of each group is pruned at which size, and on whose word.

    Without a command it lists them.
    """
    if context.invoked_subcommand is None:
        _list(as_json=False)


@recipes.command("list", short_help="List the built-in recipes.", epilog=examples("crdiff recipes list"))
@output_options
def list_(*, json: bool, quiet: bool) -> None:  # noqa: ARG001  nothing but the result is printed
    """List the built-in recipes; their names are aliases for their bases."""
    _list(as_json=json)


def _list(*, as_json: bool) -> None:
    from crdiff_export.cli import output
    from crdiff_export.models import recipe_files

    found = recipe_files.builtin()
    if as_json:
        output.print_json({"recipes": [_as_json(r) for r in found]})
        return
    rows = [
        [Path(r.name).stem, r.title, str(r.native), ", ".join(sorted({v.provenance for v in r.variants})),
         " ".join(str(v.resolution) for v in r.variants)]
        for r in found
    ]  # fmt: skip
    output.table(["alias", "model", "native", "ratios", "sizes"], rows)


@recipes.command(
    short_help="Show a recipe.",
    epilog=examples("crdiff recipes show sdxl", "crdiff recipes show sdxl --toml > my-sdxl.toml"),
)
@click.argument("recipe", shell_complete=complete_alias)
@click.option("--toml", is_flag=True, help="As TOML, to start a recipe of your own from.")
@output_options
def show(recipe: str, *, toml: bool, json: bool, quiet: bool) -> None:  # noqa: ARG001  nothing but the result is printed
    """Show every variant of RECIPE, an alias or a file."""
    from crdiff_export.cli import output
    from crdiff_export.models import recipe_files, recipe_toml

    if toml and json:
        raise click.UsageError("--toml and --json do not go together.", click.get_current_context())
    found = recipe_files.by_alias(recipe) or recipe_files.load(recipe)
    if json:
        output.print_json(_as_json(found))
    elif toml:
        output.line(recipe_toml.dump(found).rstrip("\n"))
    else:
        _show(found)


def _show(recipe: Recipe) -> None:
    from crdiff_export.cli import output
    from crdiff_export.formats.text import printable
    from crdiff_export.verify.inspect import provenance

    base = f"hf://{recipe.repo}{f'/{recipe.file}' if recipe.file else ''}" if recipe.repo else None
    standings = [printable(provenance(v.provenance, v.source)) for v in recipe.variants]
    alike = len(set(standings)) == 1
    shown = {"model": f"{printable(recipe.title)} ({recipe.family}), native {recipe.native}"}
    shown |= {"base": base or ("built in" if recipe.family == "demo" else "none")}
    shown |= {"ratios": standings[0]} if alike else {}
    output.facts(shown)
    output.line("")
    groups = tuple(dict.fromkeys(group for v in recipe.variants for group in v.ratios))
    prompts = any(v.prompt for v in recipe.variants)
    columns = ["size", *groups, "POA weight", *(["prompt"] if prompts else []), *([] if alike else ["ratios"])]
    rows = [
        [
            str(v.resolution), *(f"{v.ratios[g]:g}" if g in v.ratios else "-" for g in groups), f"{v.poa_weight:g}",
            *([printable(v.prompt) if v.prompt else "any"] if prompts else []), *([] if alike else [standing]),
        ]
        for v, standing in zip(recipe.variants, standings, strict=True)
    ]  # fmt: skip
    output.table(columns, rows, numeric=(*groups, "POA weight"))


@recipes.command(short_help="Check recipe files.", epilog=examples("crdiff recipes validate my-sdxl.toml"))
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@output_options
def validate(files: tuple[Path, ...], *, json: bool, quiet: bool) -> None:
    """Check recipe FILES: form, sizes and groups against the family they are for."""
    from crdiff_export.cli import output

    for file in files:
        title, count = _check(file)
        if not json and not quiet:
            output.line(f"{file}: a recipe for {title} with {count} variants")
    if json:
        output.print_json({"valid": [str(file) for file in files]})


def _check(file: Path) -> tuple[str, int]:
    """The title of the recipe's family and how many variants it has; RecipeError for what an export would refuse."""
    from crdiff_export.models import families, recipe_files
    from crdiff_export.models.recipe import check_groups
    from crdiff_export.sizes import check_grid

    found = recipe_files.load(file)
    with _placed(str(file)):
        family = families.by_id(found.family)
    for number, variant in enumerate(found.variants, 1):
        where = f"{file}: variant {number} ({variant.resolution})"
        check_groups(variant, family.groups, where)
        with _placed(where):
            check_grid(variant.resolution, family.grid, family.title)
        for kind in variant.targets or ():
            if kind not in family.kinds:
                raise RecipeError(
                    f"{where}: targets names {kind}, which {family.title} does not have",
                    f"Write some of: {', '.join(family.kinds)}.",
                )
    return family.title, len(found.variants)


@contextmanager
def _placed(where: str) -> Iterator[None]:
    """Put the place in the recipe before what is wrong."""
    try:
        yield
    except CrdiffError as error:
        raise RecipeError(f"{where}: {error.message}", error.hint) from error


def _as_json(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name, "family": recipe.family, "title": recipe.title, "native": str(recipe.native),
        "repo": recipe.repo, "file": recipe.file,
        "variants": [
            {
                "resolution": str(v.resolution), "ratios": dict(v.ratios), "poa_weight": v.poa_weight,
                "targets": list(v.targets) if v.targets else None, "provenance": v.provenance, "source": v.source,
                "prompt": v.prompt, "evidence": _evidence(v.evidence) if v.evidence else None,
            }
            for v in recipe.variants
        ],
    }  # fmt: skip


def _evidence(evidence: Evidence) -> dict[str, Any]:
    known = {
        "scorer": evidence.scorer, "pruned": evidence.pruned, "dense": evidence.dense, "prompts": evidence.prompts,
        "interval": evidence.interval,
    }  # fmt: skip
    return {**evidence.extra, **{key: value for key, value in known.items() if value is not None}}
