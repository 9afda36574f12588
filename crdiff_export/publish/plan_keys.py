"""The keys of a plan file: the tables that each may stand in, an example, and the check of its value."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from crdiff_export.errors import CrdiffError, RecipeError
from crdiff_export.formats.checkpoint import file_stem
from crdiff_export.formats.dtypes import DTYPES
from crdiff_export.formats.text import did_you_mean, nearest
from crdiff_export.hub import bases
from crdiff_export.hub.location import cached_location, is_repo_id, parse_id, parse_uri
from crdiff_export.models import families, recipe_files
from crdiff_export.models.families import Family
from crdiff_export.models.recipe import TARGETS, Recipe, check_poa_weight, check_ratio
from crdiff_export.models.recipe_toml import RecipeTable, shown
from crdiff_export.publish.toml_lines import KeyPath, Problems
from crdiff_export.sizes import Size

DEFAULT_NAME: Final = "{base}-crdiff-{size}.safetensors"
PLACEHOLDERS: Final = ("{base}", "{size}", "{width}", "{height}", "{dtype}")
# Placeholders that stand for something else at each size.
OF_ONE_SIZE: Final = ("{size}", "{width}", "{height}")
# A placeholder in a template, a doubled brace, or a brace alone.
FIELD: Final = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class PlanBase:
    """A base of a plan.

    Attributes:
        base: What finds it; a path is absolute.
        short: The text for {base}.
        family: Its family, if known without reading it.
        folder: Whether it is a folder, if known without reading it.
    """

    base: str
    short: str
    family: Family | None = None
    folder: bool | None = None


@dataclass(frozen=True, slots=True)
class PlanRecipe:
    """A recipe file that a plan names, and what is in it."""

    path: Path
    recipe: Recipe
    family: Family


class InheritedValues(dict[str, tuple[Any, KeyPath]]):
    """The values that hold in a table and where each is written; the value is None if it is wrong."""

    def value(self, key: str) -> Any:
        """Return the value of a key; None if it is wrong or missing."""
        return self.get(key, (None, ()))[0]

    def within(self, outer: "InheritedValues") -> "InheritedValues":
        """Return these values and the outer table's where this table has none."""
        return InheritedValues({**outer, **self})


@dataclass(frozen=True, slots=True)
class _Value:
    """A value to check: `key` is its name in messages and in `table`, `path` its place in the plan."""

    table: RecipeTable
    key: str
    path: KeyPath
    folder: Path
    problems: Problems

    def raw(self) -> object:
        return self.table.values[self.key]

    def wrong(self, problem: str, hint: str | None = None) -> RecipeError:
        return self.table.wrong(self.key, problem, hint)

    def text(self) -> str:
        text = self.table.string(self.key)
        if _CONTROL.search(text):
            raise self.wrong(f"is {shown(text)}, which has a control character")
        return text

    def elements(self, kind: str, check: "Callable[[_Value], Any]", *, unique: bool = True) -> dict[KeyPath, Any]:
        """Check each element of an array; the good ones by their paths. Messages call them sizes[2]."""
        items = self.raw()
        if not isinstance(items, list) or not items:
            raise self.wrong("is empty" if items == [] else f"is {shown(items)}, must be an array of {kind}")
        checked: dict[KeyPath, Any] = {}
        for number, item in enumerate(items):
            name, path = f"{self.key}[{number}]", (*self.path, number)
            table = RecipeTable({name: item}, "", examples={name: self.table.examples[self.key]})
            element = _Value(table, name, path, self.folder, self.problems)
            with self.problems.catching(path):
                value = check(element)
                if unique and value in checked.values():
                    again = value if isinstance(value, Size) else shown(value)
                    raise element.wrong(f"is {again} again", "Keep one of the two.")
                checked[path] = value
        return checked


@dataclass(frozen=True, slots=True)
class Key:
    """A key in a table: an example for hints, and the check, which returns the value or raises."""

    example: str
    check: Callable[[_Value], Any]


def read_table(
    values: Mapping[str, object], path: KeyPath, kind: str, folder: Path, problems: Problems
) -> InheritedValues:
    """Check the values of a table; `kind` is one of TABLES, and paths begin in `folder`."""
    keys = TABLES[kind]
    table = RecipeTable(values, "", examples={name: key.example for name, key in keys.items()})
    checked = InheritedValues()
    for name in values:
        with problems.catching((*path, name)):
            if name not in keys:
                other = next((other for other, others in TABLES.items() if name in others), None)
                guess = nearest(name, keys, cutoff=0.8)
                hint = f"It is a key of {other}." if other and not guess else did_you_mean(name, tuple(keys), "keys")
                raise table.wrong(name, f"is not a key of {kind}", hint)
            checked[name] = None, (*path, name)
            checked[name] = keys[name].check(_Value(table, name, (*path, name), folder, problems)), (*path, name)
    return checked


def _template(value: _Value, placeholders: tuple[str, ...] = PLACEHOLDERS) -> str | None:
    text = value.text()
    wrong = [name for name in dict.fromkeys(FIELD.findall(text)) if name not in (*placeholders, "{{", "}}")]
    for name in wrong:
        if len(name) == 1:
            usual = "{size}" if "{size}" in placeholders else "{base}"
            hint = f"Write {name}{name} for the brace itself, or {usual} for the {usual[1:-1]}."
            value.problems.add(value.path, f"{value.key} has a {name} alone", hint)
        elif name in PLACEHOLDERS:
            value.problems.add(value.path, f"{value.key} has {name}, but a pack holds all sizes", f"Leave {name} out.")
        else:
            hint = did_you_mean(name, placeholders, "placeholders")
            value.problems.add(value.path, f"{value.key} has {shown(name)}, which stands for nothing", hint)
    return None if wrong else text


def _pack(value: _Value) -> str | None:
    return _template(value, tuple(name for name in PLACEHOLDERS if name not in OF_ONE_SIZE))


def _flag(value: _Value) -> bool:
    flag = value.raw()
    if isinstance(flag, bool):
        return flag
    raise value.wrong(f"is {shown(flag)}, must be true or false")


def _one_of(words: tuple[str, ...], singular: str, plural: str) -> Callable[[_Value], str]:
    def check(value: _Value) -> str:
        word = value.text()
        if word in words:
            return word
        raise value.wrong(f"is {shown(word)}, no {singular}", did_you_mean(word, words, plural))

    return check


def _hub_id(value: _Value) -> str:
    repo = value.text()
    if is_repo_id(repo):
        return repo
    raise value.wrong(f"is {shown(repo)}, must be ORG/NAME")


def _recipe(value: _Value) -> PlanRecipe:
    path = _expanded(value.text(), value.folder)
    try:
        recipe = recipe_files.load(path)
        return PlanRecipe(path, recipe, families.by_id(recipe.family))
    except CrdiffError as error:
        raise CrdiffError(f"{value.key}: {error.message}", error.hint) from error
    except OSError as error:
        raise value.wrong(f"cannot be read: {error.strerror}") from error


def _calibration(value: _Value) -> Path:
    path = _expanded(value.text(), value.folder)
    if path.is_file():
        return path
    raise value.wrong(f"is {shown(str(path))}, but there is no such file", "Make it with `crdiff calibrate`.")


def _family(value: _Value) -> Path:
    path = _expanded(value.text(), value.folder)
    try:
        families.load_family(path)
    except CrdiffError as error:
        raise CrdiffError(f"{value.key}: {error.message}", error.hint) from error
    return path


def _size(value: _Value) -> Size:
    return value.table.size(value.key)


def _sizes(value: _Value) -> list[tuple[Size, KeyPath]]:
    return [(size, path) for path, size in value.elements("texts", _size).items()]


def _targets(value: _Value) -> tuple[str, ...]:
    return tuple(value.elements("texts", _one_of(TARGETS, "kind of layer", "kinds")).values())


def _inner_table(value: _Value) -> Mapping[str, object]:
    table = value.raw()
    if isinstance(table, dict):
        return table
    raise value.wrong(f"is {shown(table)}, must be a table")


def _tables(value: _Value) -> list[tuple[Mapping[str, object], KeyPath]]:
    return [(table, path) for path, table in value.elements("tables", _inner_table, unique=False).items()]


def _ratios(value: _Value) -> dict[str, float]:
    table = value.table.table(value.key)
    if not table.values:
        raise value.wrong("is empty")
    ratios: dict[str, float] = {}
    for group in table.values:
        with value.problems.catching((*value.path, group)):
            ratios[group] = check_ratio(f"{value.key}.{group}", table.number(group))
    return ratios


def _base(value: _Value) -> PlanBase:
    """Read an alias, a place on the Hub, or a path from the plan's folder or else the current one.

    The order is that of `bases.locate`.
    """
    base = value.text()
    if recipe := recipe_files.by_alias(base):
        return PlanBase(base, base, families.by_id(recipe.family), folder=False)
    if location := parse_uri(base):
        file = location.file and location.file.rpartition("/")[2]
        return PlanBase(base, file_stem(file) if file else location.repo.partition("/")[2])
    for path in (_expanded(base, value.folder), _expanded(base, Path())):
        if "://" not in base and os.path.lexists(path):
            if path.is_dir():
                snapshot = cached_location(path)
                short = snapshot.repo.partition("/")[2] if snapshot else path.resolve().name
            else:
                short = file_stem(path.name)
            is_folder = path.is_dir() or path.name.lower().endswith(".json")
            return PlanBase(str(path.absolute()), short or "model", folder=is_folder)
    if location := parse_id(base):
        return PlanBase(base, location.repo.partition("/")[2])
    raise value.wrong(f"is {shown(bases.without_secrets(base))}, which names no base", bases.hint(base))


def _expanded(path: str, folder: Path) -> Path:
    try:
        return folder / Path(path).expanduser()
    except RuntimeError:  # ~name of an unknown user
        return folder / path


# Keys of a pack, which has all sizes of its base.
_PACK: Mapping[str, Key] = {
    "pack": Key('pack = "{base}.crdiff"', _pack),
    "files": Key("files = false", _flag),
}
_SIZES = Key('sizes = ["512", "400x560"]', _sizes)
_SHARED: Mapping[str, Key] = {
    "repo": Key('repo = "my-org/sdxl-crdiff"', _template),
    "name": Key(f'name = "{DEFAULT_NAME}"', _template),
    "revision": Key('revision = "main"', _template),
    "tag": Key('tag = "v1"', _template),
    "private": Key("private = true", _flag),
    "dtype": Key('dtype = "fp16"', _one_of(tuple(DTYPES), "dtype", "dtypes")),
    "weights": Key('weights = "fp16"', _Value.text),
    "recipe": Key('recipe = "my-sdxl.toml"', _recipe),
    "targets": Key('targets = ["attn", "ff"]', _targets),
    "criterion": Key('criterion = "wanda:compare=row"', _Value.text),
    "calibration": Key('calibration = "sdxl-512.safetensors"', _calibration),
    "allow_nonfinite": Key("allow_nonfinite = true", _flag),
    "family": Key('family = "my-model.toml"', _family),
    "native": Key('native = "1024x1024"', _size),
    "layout": Key('layout = "original"', _one_of(("original", "diffusers"), "layout", "layouts")),
}
TABLES: Final[Mapping[str, Mapping[str, Key]]] = {
    "the plan": {"sizes": _SIZES, **_SHARED, **_PACK, "base": Key('[[base]], and below it base = "sdxl"', _tables)},
    "[[base]]": {
        "base": Key('base = "sdxl"', _base),
        "sizes": _SIZES,
        **_SHARED,
        **_PACK,
        "base_model": Key('base_model = "ORG/NAME"', _hub_id),
        "variant": Key('[[base.variant]] above each, or weights = "fp16" for the weights of a folder', _tables),
    },
    "[[base.variant]]": {
        "size": Key('size = "640x1536"', _size),
        "ratio": Key("ratio = 0.3", lambda value: check_ratio(value.key, value.table.number(value.key))),
        "ratios": Key("ratios = { down = 0.2, mid = 0.6, up = 0.4 }", _ratios),
        "poa_weight": Key("poa_weight = 1.5", lambda value: check_poa_weight(value.key, value.table.number(value.key))),
        **_SHARED,
    },
}
