"""Recipes as TOML: parsed without ignoring or guessing anything, and written so that parsing gives the same recipe."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, cast, get_args

from crdiff_export.errors import RecipeError
from crdiff_export.formats import toml
from crdiff_export.formats.text import did_you_mean, nearest
from crdiff_export.models.recipe import (
    TARGETS,
    Evidence,
    Provenance,
    Recipe,
    Scalar,
    Variant,
    check_poa_weight,
    check_ratio,
)
from crdiff_export.sizes import Size

# An example of each key: the hint for a missing or mistyped key is the line to write.
EXAMPLES: Final = {
    "model": '[model] with family = "sdxl", title = "SDXL" and native = "1024x1024"',
    "family": 'family = "sdxl"',
    "title": 'title = "SDXL"',
    "native": 'native = "1024x1024"',
    "repo": 'repo = "owner/name"',
    "file": 'file = "model.safetensors", and the repo that it is in',
    "variant": 'one [[variant]] table per size, with resolution = "400x560"',
    "resolution": 'resolution = "400x560"',
    "ratios": "ratios = { down = 0.3, mid = 0.3, up = 0.3 }, or ratios = { blocks = 0.3 }",
    "poa_weight": "poa_weight = 1.5",
    "provenance": 'provenance = "starting-point", or add [variant.evidence] with scorer and pruned',
    "source": 'source = "where these numbers come from"',
    "targets": 'targets = ["attn", "ff"]',
    "prompt": 'prompt = "a lighthouse at dusk"',
    "evidence": '[variant.evidence] with scorer = "ImageReward" and pruned = 0.42',
    "scorer": 'scorer = "ImageReward"',
    "pruned": "pruned = 0.42",
    "dense": "dense = 0.12",
    "prompts": "prompts = 16",
    "interval": "interval = [0.1, 0.5]",
}
MODEL_KEYS: Final = ("family", "title", "native", "repo", "file")
VARIANT_KEYS: Final = ("resolution", "ratios", "poa_weight", "targets", "prompt", "provenance", "source", "evidence")
EVIDENCE_KEYS: Final = ("scorer", "prompts", "dense", "pruned", "interval")


def parse(text: str, name: str) -> Recipe:
    """Parse a recipe.

    Args:
        text: TOML.
        name: The file, for messages.

    Returns:
        The recipe.

    Raises:
        RecipeError: Something is wrong; the message names the file, the variant and the key.
    """
    try:
        document = RecipeTable(toml.parse(text), name)
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: wrong syntax, or an integer of more digits than int() accepts
        position = re.fullmatch(r"(.*) \(at (.*)\)", str(error), re.DOTALL)
        problem = f"{position[2]}: {position[1]}" if position else str(error)
        hint = "A recipe is TOML; `crdiff recipes show sdxl --toml` prints a valid one."
        raise RecipeError(f"{name}: {problem}", hint) from error
    document.refuse_unknown(("model", "variant"))
    model = document.table("model")
    model.refuse_unknown(MODEL_KEYS)
    family = model.string("family")
    if not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", family):
        raise model.wrong("family", f"is {shown(family)}, must be a family id")
    repo = model.string("repo") if "repo" in model else None
    if repo is not None and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo, re.ASCII):
        raise model.wrong("repo", f"is {shown(repo)}, must be the id of a Hub repository")
    file = model.string("file") if "file" in model else None
    if file is not None and (repo is None or "\\" in file or not all(part.strip(".") for part in file.split("/"))):
        raise model.wrong("file", f"is {shown(file)}, must be the path of a file in repo")
    title, native = model.string("title"), model.size("native")
    variants = tuple(
        parse_variant(table, f"{name}: variant {number}") for number, table in enumerate(document.tables("variant"), 1)
    )
    first: dict[tuple[Size, str | None], int] = {}
    for number, variant in enumerate(variants, 1):
        same = first.setdefault((variant.resolution, variant.prompt), number)
        if same != number:
            message = f"{name}: variant {number} ({variant.resolution}) is for the size and prompt of variant {same}"
            raise RecipeError(message, "Keep one of the two.")
    return Recipe(family, title, native, repo, file, variants, name)


def parse_variant(values: Mapping[str, object], where: str) -> Variant:
    """Parse one [[variant]] table.

    Args:
        values: The table.
        where: The file and the variant, for messages.

    Returns:
        The variant.

    Raises:
        RecipeError: A key is unknown, missing or wrong.
    """
    resolution = values.get("resolution")
    if isinstance(resolution, str) and re.fullmatch(r"[0-9x]{1,16}", resolution):
        where = f"{where} ({resolution})"
    table = RecipeTable(values, where)
    table.refuse_unknown(VARIANT_KEYS)
    size = table.size("resolution")
    groups = table.table("ratios")
    if not groups.values:
        raise table.wrong("ratios", "is empty")
    ratios = {group: check_ratio(f"{where}: ratios.{group}", groups.number(group)) for group in groups.values}
    weight = check_poa_weight(f"{where}: poa_weight", table.number("poa_weight"))
    provenance = table.string("provenance")
    if provenance not in get_args(Provenance):
        raise table.wrong("provenance", f"is {shown(provenance)}, must be one of {', '.join(get_args(Provenance))}")
    source = table.string("source")
    if provenance != "starting-point" and "evidence" not in table:
        raise table.wrong("provenance", f"is {provenance!r}, but there is no evidence")
    targets = table.strings("targets") if "targets" in table else None
    if targets is not None and (len(set(targets)) < len(targets) or not set(targets) <= set(TARGETS)):
        raise table.wrong("targets", f"must be some of {', '.join(TARGETS)}, each once")
    return Variant(
        resolution=size,
        ratios=ratios,
        poa_weight=weight,
        provenance=cast(Provenance, provenance),
        source=source,
        targets=targets,
        prompt=table.string("prompt") if "prompt" in table else None,
        evidence=_evidence(table.table("evidence")) if "evidence" in table else None,
    )


def _evidence(table: "RecipeTable") -> Evidence:
    extra = {key: table.scalar(key) for key in table.values if key not in EVIDENCE_KEYS}
    for key in extra:
        if guess := nearest(key, [name for name in EVIDENCE_KEYS if name not in table], cutoff=0.8):
            raise table.wrong(key, f"looks like {guess}", f"Write {guess}, or a name less like it.")
    interval = table.pair("interval") if "interval" in table else None
    if interval is not None and interval[0] > interval[1]:
        raise table.wrong("interval", "ends before it begins")
    return Evidence(
        scorer=table.string("scorer"),
        pruned=table.number("pruned"),
        dense=table.number("dense") if "dense" in table else None,
        prompts=table.count("prompts") if "prompts" in table else None,
        interval=interval,
        extra=extra,
    )


def dump(recipe: Recipe) -> str:
    """Write a recipe as TOML; `parse` returns an equal recipe."""
    blocks = [("[model]", {key: getattr(recipe, key) for key in MODEL_KEYS})]
    for variant in recipe.variants:
        blocks.append(("[[variant]]", {key: getattr(variant, key) for key in VARIANT_KEYS if key != "evidence"}))
        if variant.evidence:
            measured = {key: getattr(variant.evidence, key) for key in EVIDENCE_KEYS}
            blocks.append(("[variant.evidence]", {**measured, **variant.evidence.extra}))
    return "\n".join(f"{head}\n" + "".join(_lines(values)) for head, values in blocks)


def _lines(values: Mapping[str, object]) -> list[str]:
    return [f"{_key(key)} = {_toml(value)}\n" for key, value in values.items() if value is not None]


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case Mapping():
            return f"{{ {', '.join(f'{_key(key)} = {_toml(item)}' for key, item in value.items())} }}"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda control: f"\\u{ord(control[0]):04x}", text) + '"'


@dataclass(frozen=True, slots=True)
class RecipeTable:
    """One table of a document. Each method returns the checked value of a key; messages begin with `where`."""

    values: Mapping[str, object]
    where: str
    path: str = ""
    examples: Mapping[str, str] = field(default_factory=lambda: EXAMPLES)
    document: str = "recipe"

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def wrong(self, key: str, problem: str, hint: str | None = None) -> RecipeError:
        """Return the error about a key.

        Args:
            key: The key.
            problem: What is wrong, as a predicate.
            hint: What to do; by default the line to write.

        Returns:
            The error to raise.
        """
        example = self.examples.get(key, f"{key} = 0.3")
        return RecipeError(f"{self.where}: {self.path}{_plain(key)} {problem}", hint or f"Write {example}.")

    def refuse_unknown(self, known: tuple[str, ...]) -> None:
        """Refuse the first unknown key, with the nearest known one as a hint."""
        for key in self.values:
            if key not in known:
                raise self.wrong(key, f"is not a key of a {self.document}", did_you_mean(key, known, "keys"))

    def string(self, key: str) -> str:
        """Return a text that is not blank."""
        text = self._get(key)
        # JSON can spell a lone surrogate, which no file can hold.
        if isinstance(text, str) and text.strip() and not re.search(r"[\ud800-\udfff]", text):
            return text
        raise self._not(key, "a text")

    def number(self, key: str) -> float:
        """Return a finite number as a float; true and false are not numbers."""
        value = self._get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return float(value)
        raise self._not(key, "a finite number")

    def count(self, key: str) -> int:
        """Return a whole number from 1 to the largest TOML integer."""
        value = self._get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63:
            return value
        raise self._not(key, "a whole number from 1")

    def size(self, key: str) -> Size:
        """Return an image size.

        Raises:
            RecipeError: The value is not a text such as 512 or 400x560.
        """
        text = self.string(key)
        try:
            return Size.parse(text)
        except RecipeError as error:
            raise RecipeError(f"{self.where}: {self.path}{key}: {error.message}", error.hint) from error

    def scalar(self, key: str) -> Scalar:
        """Return a text, a finite number or a flag."""
        match self._get(key):
            case bool() as flag:
                return flag
            case int(number) if -(2**63) <= number < 2**63:
                return number
            case float():
                return self.number(key)
            case str():
                return self.string(key)
        raise self._not(key, "a text, a number, true or false")

    def strings(self, key: str) -> tuple[str, ...]:
        """Return an array of one or more texts."""
        value = self._get(key)
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise self._not(key, "an array of texts")

    def pair(self, key: str) -> tuple[float, float]:
        """Return an array of two finite numbers."""
        value = self._get(key)
        if isinstance(value, list) and len(value) == 2:
            low, high = (RecipeTable({key: item}, self.where, self.path, self.examples).number(key) for item in value)
            return low, high
        raise self._not(key, "an array of two numbers")

    def table(self, key: str) -> "RecipeTable":
        """Return a table inside this one."""
        value = self._get(key)
        if isinstance(value, dict):
            return RecipeTable(value, self.where, f"{self.path}{key}.", self.examples, self.document)
        raise self._not(key, "a table")

    def tables(self, key: str) -> list[dict[str, object]]:
        """Return an array of tables; empty if the key is absent."""
        value = self.values.get(key, [])
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            return value
        raise self._not(key, "an array of tables")

    def _get(self, key: str) -> object:
        if key not in self.values:
            raise self.wrong(key, "is missing")
        return self.values[key]

    def _not(self, key: str, kind: str) -> RecipeError:
        return self.wrong(key, f"is {shown(self.values[key])}, must be {kind}")


def shown(value: object) -> str:
    """Show a value of a document in a one-line message."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return repr(value if len(value) <= 60 else f"{value[:57]}...")
        case int() if (
            value.bit_length() > 64
        ):  # str() refuses more than 4300 digits, which hex literals of TOML can have
            return "a huge integer"
        case dict() | list():
            return "a table" if isinstance(value, dict) else "an array"
    return str(value)


def _plain(key: str) -> str:
    return key if key.isprintable() and 0 < len(key) <= 60 else shown(key)
