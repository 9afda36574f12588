"""`crdiff recipes`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from crdiff_export.cli.blocks import Block, Facts, Table
from crdiff_export.cli.command import Group, command, examples, option, option_group
from crdiff_export.cli.options import FILE, complete_base
from crdiff_export.cli.output import Output, Result
from crdiff_export.errors import CrdiffError, OptionError, RecipeError
from crdiff_export.models.recipe import Recipe


@click.group(
    cls=Group,
    invoke_without_command=True,
    epilog=examples("crdiff recipes", "crdiff recipes show sdxl", "crdiff recipes validate my-sdxl.toml"),
)
@click.pass_context
def recipes(context: click.Context) -> None:
    """List, show and check recipes: which share of each group is pruned at which size, and where the number is from.

    Without a command it lists them.
    """
    if context.invoked_subcommand is None:
        context.invoke(list_)


@command("crdiff recipes list", group=recipes, name="list", short_help="List the built-in recipes.")
def list_(_out: Output) -> Result:
    """List the built-in recipes; their names are aliases for their bases."""
    from crdiff_export.models import recipe_files

    builtin = recipe_files.builtin()
    rows = [
        [Path(r.name).stem, r.title, str(r.native), _provenance({v.provenance for v in r.variants}),
         " ".join(str(v.resolution) for v in r.variants)]
        for r in builtin
    ]  # fmt: skip
    table = Table(["alias", "model", "native", "ratios", "sizes"], rows, optional=["native"])
    return Result({"recipes": [_as_json(r) for r in builtin]}, [table])


@command(
    "crdiff recipes show sdxl",
    "crdiff recipes show sdxl --toml > my-sdxl.toml",
    group=recipes,
    short_help="Show a recipe.",
)
@click.argument("recipe", shell_complete=complete_base)
@option_group("Output", option("--toml", "As TOML, to start a recipe of your own from."))
def show(out: Output, recipe: str, *, toml: bool) -> Result:
    """Show every variant of RECIPE, an alias or a file."""
    from crdiff_export.models import recipe_files, recipe_toml

    if toml and out.as_json:
        raise click.UsageError("--toml and --json do not go together.", click.get_current_context())
    loaded = recipe_files.by_alias(recipe)
    if loaded is None and "." not in recipe and not Path(recipe).exists():
        hint = f"{recipe_files.unknown_alias_hint(recipe)} A file is named with its ending."
        raise OptionError(f"no built-in recipe is called {recipe!r}", hint)
    loaded = loaded or recipe_files.load(recipe)
    return Result(_as_json(loaded), [recipe_toml.dump(loaded).rstrip("\n")] if toml else _blocks(loaded))


def _blocks(recipe: Recipe) -> list[Block]:
    from crdiff_export.formats.text import printable
    from crdiff_export.hub import bases
    from crdiff_export.models.evidence_text import evidence_text
    from crdiff_export.verify.inspect import provenance

    base = f"hf://{recipe.repo}{f'/{recipe.file}' if recipe.file else ''}" if recipe.repo else None
    origins: dict[str, list[str]] = {}
    for v in recipe.variants:
        origins.setdefault(provenance(v.provenance, v.source), []).append(str(v.resolution))
    alike = len(origins) == 1
    facts = {
        "model": f"{printable(recipe.title)} ({recipe.family}), native {recipe.native}",
        "base": base or ("built in" if recipe.family in bases.BUILT_IN else "none"),
        **{"ratios" if alike else ", ".join(sizes): origin for origin, sizes in origins.items()},
    }
    groups = tuple(dict.fromkeys(group for v in recipe.variants for group in v.ratios))
    columns = {"size": [str(v.resolution) for v in recipe.variants]}
    for group in groups:
        columns[group] = [f"{v.ratios[group]:g}" if group in v.ratios else "-" for v in recipe.variants]
    columns["POA weight"] = [f"{v.poa_weight:g}" for v in recipe.variants]
    if any(v.prompt for v in recipe.variants):
        columns["prompt"] = [printable(v.prompt) if v.prompt else "any" for v in recipe.variants]
    if not alike:
        columns["ratios"] = [v.provenance.replace("-", " ") for v in recipe.variants]
    if any(v.evidence for v in recipe.variants):
        columns["measured"] = [evidence_text(v.evidence.values()) if v.evidence else "-" for v in recipe.variants]
    rows = list(zip(*columns.values(), strict=True))
    return [Facts(facts), "", Table(list(columns), rows, (*groups, "POA weight"))]


@command("crdiff recipes validate my-sdxl.toml", group=recipes, short_help="Check recipe files.")
@click.argument("files", nargs=-1, required=True, type=FILE)
def validate(out: Output, files: tuple[Path, ...]) -> Result:
    """Check recipe FILES: form, sizes and groups against the family they are for."""
    text: list[Block] = []
    valid, errors = [], []
    for file in files:
        try:
            title, count = _check(file)
        except CrdiffError as error:
            errors.append(error)
            continue
        valid.append(str(file))
        text.append(f"{file}: a recipe for {title} with {count} variants")
    if len(files) == 1 and errors:
        raise errors[0]
    for each in errors:
        out.error(each)
    wrong = [{"code": each.code, "message": each.message, "hint": each.hint} for each in errors]
    record = {"valid": valid, **({"errors": wrong} if wrong else {})}
    return Result(record, text, bare=(), exit_code=max((each.exit_code for each in errors), default=0))


def _check(file: Path) -> tuple[str, int]:
    """Check a recipe as an export would; gives the title of its family and the number of its variants."""
    from crdiff_export.models import families, recipe_files
    from crdiff_export.models.recipe import check_groups
    from crdiff_export.sizes import check_grid

    recipe = recipe_files.load(file)
    with _prefix_errors(str(file)):
        family = families.by_id(recipe.family)
    for number, variant in enumerate(recipe.variants, 1):
        where = f"{file}: variant {number} ({variant.resolution})"
        check_groups(variant, family.groups, where)
        with _prefix_errors(where):
            check_grid(variant.resolution, family.grid, family.title)
        for kind in variant.targets or ():
            if kind not in family.kinds:
                raise RecipeError(
                    f"{where}: targets names {kind}, which {family.title} does not have",
                    f"Write some of: {', '.join(family.kinds)}.",
                )
    return family.title, len(recipe.variants)


@contextmanager
def _prefix_errors(where: str) -> Iterator[None]:
    """Begin the message of an error with the file and the variant."""
    try:
        yield
    except CrdiffError as error:
        raise RecipeError(f"{where}: {error.message}", error.hint) from error


def _provenance(kinds: set[str]) -> str:
    """Say where the ratios of a recipe come from, in few words: the list has 80 columns."""
    return kinds.pop() if len(kinds) == 1 else f"partly {min(kinds - {'starting-point'})}"


def _as_json(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name, "family": recipe.family, "title": recipe.title, "native": str(recipe.native),
        "repo": recipe.repo, "file": recipe.file,
        "variants": [
            {
                "resolution": str(v.resolution), "ratios": dict(v.ratios), "poa_weight": v.poa_weight,
                "targets": list(v.targets) if v.targets else None, "provenance": v.provenance, "source": v.source,
                "prompt": v.prompt, "evidence": v.evidence.values() if v.evidence else None,
            }
            for v in recipe.variants
        ],
    }  # fmt: skip
