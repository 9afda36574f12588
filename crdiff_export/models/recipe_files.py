"""Load recipes: the built-in ones, a file of the user, or the config.json that the search of the public code writes."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from crdiff_export.errors import RecipeError
from crdiff_export.formats.text import did_you_mean
from crdiff_export.formats.text_file import read_text_file
from crdiff_export.models.recipe import START_POA_WEIGHT, START_RATIO, START_SOURCE, Recipe, Variant
from crdiff_export.models.recipe_toml import RecipeTable, parse, parse_variant, shown
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from crdiff_export.models.families import Family


def builtin_path() -> Path:
    """Return the folder of the built-in recipes: inside an installed package, beside the package in a checkout.

    Raises:
        RecipeError: The folder is missing.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise RecipeError("the built-in recipes are missing from this installation", "Install the package again.")


def aliases() -> tuple[str, ...]:
    """Return the names of the built-in recipes, sorted."""
    return tuple(sorted(path.stem for path in builtin_path().glob("*.toml")))


def builtin() -> tuple[Recipe, ...]:
    """Load every built-in recipe, sorted by alias."""
    return tuple(load(builtin_path() / f"{alias}.toml") for alias in aliases())


def by_alias(name: str) -> Recipe | None:
    """Load the built-in recipe with this name; None for any other text, even the path of one."""
    return load(builtin_path() / f"{name}.toml") if name in aliases() else None


def of_family(family: "Family", size: Size) -> Recipe:
    """Return a family's built-in recipe, or the starting point if it has no recipe.

    Args:
        family: The family, with the groups that the model has.
        size: The size that the starting point is for.

    Returns:
        The recipe.
    """
    recipe = None if family.table else by_alias(family.id)
    if recipe:
        return recipe
    ratios = dict.fromkeys(family.groups, START_RATIO)
    variant = Variant(size, ratios, START_POA_WEIGHT, "starting-point", START_SOURCE)
    return Recipe(family.id, family.title, None, None, None, (variant,), "starting-point")


def unknown_alias_hint(name: str) -> str:
    """Return the hint for a name that is not an alias: the nearest alias, and all of them."""
    return did_you_mean(name, aliases(), "built-in recipes")


def load(path: str | Path) -> Recipe:
    """Load a recipe in TOML, or the .json file that the search of the public code writes.

    Raises:
        RecipeError: The file cannot be read or is not a recipe.
    """
    path = Path(path)
    hint = "Name a recipe in TOML; `crdiff recipes list` shows the built-in ones."
    parse_text = from_public_config if path.suffix.lower() == ".json" else parse
    return parse_text(read_text_file(path, "recipe", hint, RecipeError), path.name)


# --- config.json: {"model_config": {...}, "best_avg_score": ..., "best_global_params_ratio": {...}} ---

PUBLIC_EXAMPLES: Final = {
    "model_config": '"model_config": {"name": "sdxl", "width": 512, "height": 512}',
    "name": '"name": "sdxl", or "sd1.5", or "sd2.1"',
    "width": '"width": 512',
    "height": '"height": 512',
    "best_avg_score": '"best_avg_score": 0.42',
    "best_global_params_ratio": '"best_global_params_ratio": {"down_ratio": 0.3, "up_ratio": 0.3, "mid_ratio": 0.3}',
    "down_ratio": '"down_ratio": 0.3',
    "mid_ratio": '"mid_ratio": 0.3',
    "up_ratio": '"up_ratio": 0.3',
    "best_global_params_sd3": '"best_global_params_sd3": {"shared_ratio": 0.3}',
    "shared_ratio": '"shared_ratio": 0.3',
    "pruning_method": '"pruning_method": "ratio"; the other method\'s numbers are thresholds, not ratios',
}
PUBLIC_ORDER: Final = ("down", "up", "mid")  # the order of a list in the public code's command lines
FAMILY_PATTERNS: Final = (
    ("refiner", "sdxl-refiner"),
    ("xl", "sdxl"),
    ("flux.*schnell", "flux-schnell"),
    ("flux", "flux-dev"),
    ("(sd|diffusion)-?3-?5.*large", "sd35-large"),
    ("(sd|diffusion)-?3-?5.*medium", "sd35-medium"),
    ("(sd|diffusion)-?3(?!-?5)", "sd3-medium"),
    ("(sd|diffusion|^v)-?v?1-?5", "sd15"),
    ("(sd|diffusion|^v)-?v?2-?1", "sd21"),
)


def from_public_config(text: str, name: str) -> Recipe:
    """Read the config.json of the public code's search as a recipe with one searched variant.

    The file does not say for certain which checkpoint was searched on.

    Args:
        text: The JSON.
        name: The file, for messages.

    Returns:
        The recipe, for the family that the model's name or path suggests.

    Raises:
        RecipeError: The file is not of that kind, its runs failed, or the family is unknown.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "A .json recipe is what the public code's search leaves."
        raise RecipeError(f"{name}: not JSON: {error}", hint) from error
    document = RecipeTable(values if isinstance(values, dict) else {}, name, examples=PUBLIC_EXAMPLES)
    model = document.table("model_config")
    method = values.get("pruning_method", "ratio")
    if method != "ratio":
        raise document.wrong("pruning_method", f"is {shown(method)}")
    score = document.number("best_avg_score")
    if score == -2:
        hint = "The search stores -2 for a failed run: repair it and run it again."
        raise document.wrong("best_avg_score", "is -2, so every run failed", hint)
    names = {key: model.string(key) for key in ("name", "model_path") if model.values.get(key) is not None}
    builtin_recipe = _recipe_of(model, names)
    variant = {
        "resolution": f"{model.count('width')}x{model.count('height')}",
        "ratios": _public_ratios(document, tuple(builtin_recipe.variants[0].ratios)),
        "poa_weight": START_POA_WEIGHT,
        "provenance": "searched",
        "source": "the ratio search of the CR-Diff public code, which never scores the dense model",
        "evidence": {"scorer": "ImageReward", "pruned": score, "model": _shareable(names)},
    }
    return replace(builtin_recipe, repo=None, file=None, variants=(parse_variant(variant, name),), name=name)


def _recipe_of(model: RecipeTable, names: dict[str, str]) -> Recipe:
    """Load the built-in recipe of the model's family, which its name or the end of its path shows."""
    for word in names.values():
        for part in reversed(re.split(r"[/\\]", word)[-2:]):
            slug = re.sub(r"[^a-z0-9]+", "-", part.lower())
            for pattern, family in FAMILY_PATTERNS:
                if re.search(pattern, slug):
                    return load(builtin_path() / f"{family}.toml")
    for key, word in names.items():
        raise model.wrong(key, f"is {shown(word)}, no family known here", f"Write {PUBLIC_EXAMPLES['name']}.")
    raise model.wrong("name", "is missing")


def _shareable(names: dict[str, str]) -> str:
    """Return a Hub id or a name unchanged, and only the last part of a path, since recipes are shared."""
    *_, model = names.values()
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        return model
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1] or names["name"]


def _public_ratios(document: RecipeTable, family_groups: tuple[str, ...]) -> dict[str, float]:
    if family_groups == ("blocks",):
        return {"blocks": document.table("best_global_params_sd3").number("shared_ratio")}
    ratios = document.values.get("best_global_params_ratio")
    if isinstance(ratios, list) and len(ratios) == len(PUBLIC_ORDER):
        ratios = dict(zip(PUBLIC_ORDER, ratios, strict=True))
        document = replace(document, values={**document.values, "best_global_params_ratio": ratios})
    table = document.table("best_global_params_ratio")
    groups = {key: re.sub("(_ratio|_blocks?)$", "", key) for key in table.values}
    for key, group in groups.items():
        if group not in PUBLIC_ORDER:
            raise table.wrong(key, "is none of its ratios", document.wrong("best_global_params_ratio", "").hint)
        if list(groups.values()).count(group) > 1:
            raise table.wrong(key, f"is one of two ratios for {group}", "Keep one of the two.")
    spelled = {group: key for key, group in groups.items()}
    return {group: table.number(spelled.get(group, f"{group}_ratio")) for group in family_groups}
