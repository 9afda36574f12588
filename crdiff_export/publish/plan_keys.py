"""The keys of a plan file: what each may say, and what is said where; all that is wrong is collected with its line."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from crdiff_export.errors import CrdiffError
from crdiff_export.formats.dtypes import DTYPES
from crdiff_export.formats.text import did_you_mean, nearest
from crdiff_export.models import families, recipe_files
from crdiff_export.models.families import Family
from crdiff_export.models.recipe import TARGETS, Recipe, check_poa_weight, check_ratio
from crdiff_export.models.recipe_toml import RecipeTable, shown
from crdiff_export.publish.toml_lines import KeyPath, Problems
from crdiff_export.sizes import Size

DEFAULT_NAME: Final = "{base}-crdiff-{size}.safetensors"
PLACEHOLDERS: Final = ("{base}", "{size}", "{width}", "{height}", "{dtype}")
EXAMPLES: Final = {
    "repo": 'repo = "my-org/sdxl-crdiff"',
    "name": f'name = "{DEFAULT_NAME}"',
    "revision": 'revision = "main"',
    "tag": 'tag = "v1"',
    "private": "private = true",
    "dtype": 'dtype = "fp16"',
    "weights": 'weights = "fp16"',
    "recipe": 'recipe = "my-sdxl.toml"',
    "targets": 'targets = ["attn", "ff"]',
    "criterion": 'criterion = "wanda:compare=row"',
    "calibration": 'calibration = "sdxl-512.safetensors"',
    "allow_nonfinite": "allow_nonfinite = true",
    "sizes": 'sizes = ["512", "400x560"]',
    "base": '[[base]], and below it base = "sdxl"',
    "base_model": 'base_model = "ORG/NAME"',
    "variant": '[[base.variant]] above each, or weights = "fp16" for the weights to take from a folder',
    "size": 'size = "640x1536"',
    "ratio": "ratio = 0.3",
    "ratios": "ratios = { down = 0.2, mid = 0.6, up = 0.4 }",
    "poa_weight": "poa_weight = 1.5",
}
SHARED: Final = (
    "repo",
    "name",
    "revision",
    "tag",
    "private",
    "dtype",
    "weights",
    "recipe",
    "targets",
    "criterion",
    "calibration",
    "allow_nonfinite",
)
KEYS: Final = {
    "the plan": ("sizes", *SHARED, "base"),
    "[[base]]": ("base", "sizes", *SHARED, "base_model", "variant"),
    "[[base.variant]]": ("size", "ratio", "ratios", "poa_weight", *SHARED),
}
# What is the name of a file, even where it looks like ORG/NAME.
FILES: Final = (".safetensors", ".ckpt", ".json", ".pt", ".pth", ".bin", ".gguf", ".sft")
_HUB_ID = re.compile(r"[\w.-]+/(?P<name>[\w.-]+)(@[\w./-]+)?")
_HUB_PLACE = re.compile(r"hf://[^/@]+/(?P<name>[^/@]+)(@(refs/(?:pr|convert)/[^/]+|[^/]+))?(/(?P<file>.+))?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# What stands for something in a template.
FIELD: Final = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]")
# The Hub's rules.
REPO: Final = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Place:
    """A base: what finds it, what {base} stands for, and, where it is known, its family and whether it is a folder."""

    base: str
    short: str
    family: Family | None = None
    folder: bool | None = None


@dataclass(frozen=True, slots=True)
class OwnRecipe:
    """A recipe file that was read."""

    path: Path
    recipe: Recipe
    family: Family


class Said(dict[str, tuple[Any, KeyPath]]):
    """What a table says and where, with what those around it say; None for a value that is wrong."""

    def value(self, key: str) -> Any:
        """The value of a key; None as well if nobody says it."""
        return self.get(key, (None, ()))[0]

    def within(self, outer: "Said") -> "Said":
        """This, and from the outer table what is not said here."""
        return Said({**outer, **self})


@dataclass(frozen=True, slots=True)
class _Value:
    """One value to be read: its table, which knows it by the name `key` that messages use, and its path."""

    table: RecipeTable
    key: str
    at: KeyPath
    folder: Path
    problems: Problems

    def text(self) -> str:
        text = self.table.string(self.key)
        if _CONTROL.search(text):
            raise self.table.wrong(self.key, f"is {shown(text)}, which has a control character")
        return text

    def elements(self, kind: str) -> Iterator["_Value"]:
        """Each element of an array of one or more, by a name such as sizes[2]."""
        items = self.table.values[self.key]
        if not isinstance(items, list) or not items:
            what = "is empty" if items == [] else f"is {shown(items)}, must be an array of {kind}"
            raise self.table.wrong(self.key, what)
        for number, item in enumerate(items):
            name = f"{self.key}[{number}]"
            table = RecipeTable({name: item}, "", examples={name: EXAMPLES[self.key]})
            yield _Value(table, name, (*self.at, number), self.folder, self.problems)


def read(values: Mapping[str, object], at: KeyPath, kind: str, folder: Path, problems: Problems) -> Said:
    """What one table says; `kind` is one of KEYS, `folder` is where paths begin."""
    said = Said()
    for key in values:
        table, place = RecipeTable(values, "", examples=EXAMPLES), (*at, key)
        with problems.catching(place):
            if key not in KEYS[kind]:
                other = next((other for other, keys in KEYS.items() if key in keys), None)
                close = nearest(key, KEYS[kind], cutoff=0.8)
                hint = f"It is a key of {other}." if other and not close else did_you_mean(key, KEYS[kind], "keys")
                raise table.wrong(key, f"is not a key of {kind}", hint)
            said[key] = None, place
            reader = _tables if (kind, key) == ("the plan", "base") else _READERS[key]
            said[key] = reader(_Value(table, key, place, folder, problems)), place
    return said


def _tables(value: _Value) -> list[tuple[dict[str, object], KeyPath]]:
    found = []
    for item in value.elements("tables"):
        with value.problems.catching(item.at):
            table = item.table.values[item.key]
            if not isinstance(table, dict):
                raise item.table.wrong(item.key, f"is {shown(table)}, must be a table")
            found.append((table, item.at))
    return found


def _template(value: _Value) -> str | None:
    text = value.text()
    wrong = [found for found in dict.fromkeys(FIELD.findall(text)) if found not in (*PLACEHOLDERS, "{{", "}}")]
    for found in wrong:
        if len(found) == 1:
            hint = f"Write {found}{found} for the brace itself, or {{size}} for the size."
            value.problems.add(value.at, f"{value.key} has a {found} alone", hint)
        else:
            hint = did_you_mean(found, PLACEHOLDERS, "placeholders")
            value.problems.add(value.at, f"{value.key} has {shown(found)}, which stands for nothing", hint)
    return None if wrong else text


def _flag(value: _Value) -> bool:
    flag = value.table.values[value.key]
    if isinstance(flag, bool):
        return flag
    raise value.table.wrong(value.key, f"is {shown(flag)}, must be true or false")


def _dtype(value: _Value) -> str:
    dtype = value.text()
    if dtype in DTYPES:
        return dtype
    raise value.table.wrong(value.key, f"is {shown(dtype)}, no dtype", did_you_mean(dtype, tuple(DTYPES), "dtypes"))


def _hub_id(value: _Value) -> str:
    repo = value.text()
    if REPO.fullmatch(repo):
        return repo
    raise value.table.wrong(value.key, f"is {shown(repo)}, must be ORG/NAME")


def _recipe(value: _Value) -> OwnRecipe:
    path = _expanded(value.text(), value.folder)
    try:
        recipe = recipe_files.load(path)
        return OwnRecipe(path, recipe, families.by_id(recipe.family))
    except CrdiffError as error:
        raise CrdiffError(f"{value.key}: {error.message}", error.hint) from error
    except OSError as error:
        raise value.table.wrong(value.key, f"cannot be read: {error.strerror}") from error


def _calibration(value: _Value) -> Path:
    path = _expanded(value.text(), value.folder)
    if path.is_file():
        return path
    problem = f"is {shown(str(path))}, but there is no such file"
    raise value.table.wrong(value.key, problem, "Make it with `crdiff calibrate`.")


def _targets(value: _Value) -> tuple[str, ...]:
    found: list[str] = []
    for item in value.elements("texts"):
        with value.problems.catching(item.at):
            kind = item.text()
            if kind not in TARGETS:
                hint = did_you_mean(kind, TARGETS, "kinds")
                raise item.table.wrong(item.key, f"is {shown(kind)}, no kind of layer", hint)
            if kind in found:
                raise item.table.wrong(item.key, f"is {shown(kind)} again", "Keep one of the two.")
            found.append(kind)
    return tuple(found)


def _sizes(value: _Value) -> list[tuple[Size, KeyPath]]:
    found: dict[Size, KeyPath] = {}
    for item in value.elements("texts"):
        with value.problems.catching(item.at):
            size = item.table.size(item.key)
            if size in found:
                raise item.table.wrong(item.key, f"is {size} again", "Keep one of the two.")
            found[size] = item.at
    return list(found.items())


def _ratios(value: _Value) -> dict[str, float]:
    table = value.table.table(value.key)
    if not table.values:
        raise value.table.wrong(value.key, "is empty")
    found: dict[str, float] = {}
    for group in table.values:
        with value.problems.catching((*value.at, group)):
            found[group] = check_ratio(f"{value.key}.{group}", table.number(group))
    return found


def _place(value: _Value) -> Place:
    """An alias, a place on the Hub, a path from the plan's folder or else the current one: `bases.locate`'s order."""
    base = value.text()
    if known := recipe_files.by_alias(base):
        return Place(base, base, families.by_id(known.family), folder=False)
    if match := _HUB_PLACE.fullmatch(base.rstrip("/")):
        return Place(base, _stem(match["file"]) if match["file"] else match["name"])
    for path in (_expanded(base, value.folder), _expanded(base, Path())):
        if "://" not in base and os.path.lexists(path):
            name = path.name if path.name not in ("", "..") else path.resolve().name
            return Place(
                str(path.absolute()), _stem(name) or "model", folder=path.is_dir() or name.lower().endswith(".json")
            )
    is_path = base.lower().endswith(FILES) or base.startswith((".", "~", "/")) or "\\" in base
    if not is_path and (match := _HUB_ID.fullmatch(base)):
        return Place(base, match["name"])
    if base.startswith("hf://"):
        problem, hint = f"is {shown(base)}, no place on the Hub", "Write hf://ORG/NAME or hf://ORG/NAME/FILE."
    elif "://" in base:  # not shown: passwords and tokens stand in links
        problem, hint = "is a link", "Download the file and give its path, or write hf://ORG/NAME/FILE."
    elif is_path or "/" in base or "." in base:
        problem = f"is {shown(base)}, but there is no such file or folder"
        hint = "Give a path, a Hub id such as ORG/NAME, or an alias; `crdiff recipes list` names them."
    else:
        problem, hint = f"is {shown(base)}, no alias, file or folder", recipe_files.unknown_alias_hint(base)
    raise value.table.wrong(value.key, problem, hint)


def _expanded(path: str, folder: Path) -> Path:
    try:
        return folder / Path(path).expanduser()
    except RuntimeError:  # a ~name that is nobody's home
        return folder / path


def _stem(name: str) -> str:
    """What outputs of a file are called after, as `Checkpoint.stem` has it."""
    name = name.rpartition("/")[2].removesuffix(".index.json")
    return next((name[: -len(end)] for end in FILES if name.lower().endswith(end)), name)


_READERS: Final[Mapping[str, Callable[[_Value], Any]]] = {
    **dict.fromkeys(("repo", "name", "revision", "tag"), _template),
    "private": _flag,
    "allow_nonfinite": _flag,
    "dtype": _dtype,
    "weights": _Value.text,
    "recipe": _recipe,
    "targets": _targets,
    "criterion": _Value.text,
    "calibration": _calibration,
    "sizes": _sizes,
    "base": _place,
    "base_model": _hub_id,
    "variant": _tables,
    "size": lambda value: value.table.size(value.key),
    "ratio": lambda value: check_ratio(value.key, value.table.number(value.key)),
    "poa_weight": lambda value: check_poa_weight(value.key, value.table.number(value.key)),
    "ratios": _ratios,
}
