"""The plan file of `crdiff publish`: which bases are pruned for which sizes, and where each result goes.

Nothing in it is ignored or guessed, and all problems are reported at once. Keys before the first [[base]] hold for
every base, keys in a [[base]] for all of its sizes, keys in a [[base.variant]] for that size alone; the innermost wins.
A base is pruned for its `sizes`, or else for those before the first [[base]], and also for the size of each of its
[[base.variant]] tables. With `pack`, one pack holds all of these sizes, beside a file for each or instead.
"""

import re
import tomllib
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from crdiff_export.errors import CrdiffError, PlanFileError
from crdiff_export.export import ExportRequest
from crdiff_export.formats.text import did_you_mean, printable
from crdiff_export.formats.text_file import read_text_file
from crdiff_export.hub.location import FILE_ENDINGS, REF, is_repo_id
from crdiff_export.models import families
from crdiff_export.models.recipe import check_groups, choose
from crdiff_export.models.recipe_toml import shown
from crdiff_export.packs import SUFFIX
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.publish import toml_lines
from crdiff_export.publish.plan_keys import (
    DEFAULT_NAME,
    FIELD,
    OF_ONE_SIZE,
    TABLES,
    InheritedValues,
    PlanBase,
    PlanRecipe,
    read_table,
)
from crdiff_export.publish.toml_lines import KeyPath, Problems
from crdiff_export.sizes import Size, check_grid

# A part of a path that every system can have.
_PART = r'[^/\\:*?"<>|\x00-\x1f\x7f-\x9f]{0,199}[^/\\:*?"<>|\x00-\x1f\x7f-\x9f. ]'
_PATH = re.compile(f"{_PART}(/{_PART})*")
# Windows takes these for devices, whatever ending they have.
# src: https://learn.microsoft.com/windows/win32/fileio/naming-a-file
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}


def _is_path(path: str) -> bool:
    """Whether a text is a path that every system can have."""
    return bool(_PATH.fullmatch(path)) and not any(map(_is_reserved, path.split("/")))


def _is_reserved(part: str) -> bool:
    """Whether a part of a path is only an ending, or the name of a device on Windows."""
    return part.lower() in (".safetensors", SUFFIX) or part.partition(".")[0].rstrip().lower() in _DEVICES


# The keys that are templates: the check of what one gives, and what it must be.
_TEMPLATES: Mapping[str, tuple[Callable[[str], object], str]] = {
    "repo": (is_repo_id, "ORG/NAME"),
    "revision": (REF.fullmatch, "the name of a branch"),
    "tag": (REF.fullmatch, "the name of a tag"),
    "name": (_is_path, "a path that every system can have, with / between its parts"),
    "pack": (
        lambda path: _is_path(path) and path.endswith(SUFFIX),
        f"a path that every system can have, with / between its parts and {SUFFIX} at its end",
    ),
}
_FILE_TEMPLATES, _PACK_TEMPLATES = ("repo", "revision", "tag", "name"), ("repo", "revision", "tag", "pack")
# The keys that go to the export as they are.
_EXPORT_KEYS = ("dtype", "ratio", "ratios", "poa_weight", "targets", "criterion", "calibration", "allow_nonfinite",
                "family", "native", "layout")  # fmt: skip
# The keys that all sizes of a pack share, and the fields of their exports.
_SHARED_IN_PACK = {
    "weights": "variant", "dtype": "dtype", "criterion": "criterion", "calibration": "calibration",
    "family": "family", "native": "native", "allow_nonfinite": "allow_nonfinite",
}  # fmt: skip
_EXAMPLES = {name: key.example for keys in reversed([*TABLES.values()]) for name, key in keys.items()}
_ANY_SIZE = Size(1024, 1024)


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """One variant that a plan file asks for, a base at a size, or the pack of a base; and where the result goes.

    Attributes:
        request: The export, but for its output and the settings of the run. The path of a base is absolute. Of a pack,
            that of its first size.
        path: The path in the repository.
        default_name: Whether the plan gives no name. Then `path` ends in .safetensors unless the base is known to be a
            folder; if it proves to be one only later, the ending has to go.
        repo: The repository on the Hub; None to only write the file.
        revision: The branch; None for main.
        tag: The tag that the plan wants, if any.
        private: Whether to create a private repository; None to decide by the base's licence.
        base_model: The Hub id of a base that is a local file.
        line: The line of the size; of a pack, that of its [[base]].
        base_name: What {base} stands for.
        pack: The exports of all sizes of a pack; empty for a variant.
    """

    request: ExportRequest
    path: str
    default_name: bool = False
    repo: str | None = None
    revision: str | None = None
    tag: str | None = None
    private: bool | None = None
    base_model: str | None = None
    line: int | None = None
    base_name: str = field(default="", compare=False)
    pack: tuple[ExportRequest, ...] = ()

    def __str__(self) -> str:
        """Return what messages call it."""
        if self.pack:
            return f"the pack of {Path(self.request.base).name or self.request.base}"
        return f"{self.request.size} of {Path(self.request.base).name or self.request.base}"

    @property
    def branch(self) -> tuple[str, str]:
        """The repository and the branch that the result goes to, as the Hub tells them apart; empty without one."""
        return ((self.repo or "").casefold(), (self.revision or "main") if self.repo else "")


@dataclass(frozen=True, slots=True)
class PlanFile:
    """What a plan file asks for, in its order; `name` is the file's name without its folder."""

    name: str
    entries: tuple[PlanEntry, ...]

    def local_path(self, entry: PlanEntry) -> PurePosixPath:
        """Return where a result is written, below the output folder.

        Args:
            entry: An entry of this plan.

        Returns:
            Its path in the repository if all results go to one branch; else below ORG/NAME, and there below the branch
            if this repository gets results on several.
        """
        branches = {entry.branch for entry in self.entries}
        if len(branches) < 2 or not entry.repo:
            return PurePosixPath(entry.path)
        repo, revision = entry.branch
        several = sum(repo == other for other, _ in branches) > 1
        return PurePosixPath(entry.repo, revision if several else "", entry.path)


def load(path: Path) -> PlanFile:
    """Read a plan file.

    Args:
        path: The file.

    Returns:
        What it asks for.

    Raises:
        PlanFileError: With all problems of the file.
    """
    try:
        text = read_text_file(path, "plan", "Name one TOML file.", CrdiffError)
    except CrdiffError as error:
        problem = CrdiffError(printable(error.message, 400), error.hint)
        raise PlanFileError("", [problem]) from error
    return parse(text, path.name, path.parent)


def parse(text: str, name: str, folder: Path) -> PlanFile:
    """Read the text of a plan file.

    Args:
        text: The text.
        name: The name of the file, for errors.
        folder: Where paths in the plan begin.

    Returns:
        What it asks for.

    Raises:
        PlanFileError: With all problems of the text, by line.
    """
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: syntax, and integers of more digits than int() takes
        raise PlanFileError(printable(name), [_syntax_problem(name, str(error))]) from error
    problems = Problems(name, toml_lines.lines(text))
    shared = read_table(values, (), "the plan", folder.absolute(), problems)
    tables, _ = shared.pop("base", (None, ()))
    if "base" not in values:
        problems.add((), "base is missing", f"Write {_EXAMPLES['base']}.")
    entries = [
        entry
        for table, path in tables or ()
        for entry in _entries_of_base(table, path, shared, folder.absolute(), problems)
    ]
    plan = PlanFile(name, tuple(entries))
    _refuse_conflicts(plan, problems)
    if errors := problems.in_order():
        raise PlanFileError(printable(name), errors)
    return plan


def _syntax_problem(name: str, error: str) -> CrdiffError:
    match = re.fullmatch(r"(.*) \(at line (\d+), (column \d+)\)", error, re.DOTALL)
    problem = f"{name}:{match[2]}: {match[1]}, {match[3]}" if match else f"{name}: {error}"
    hint = "A plan is TOML: one key = value in a line, texts in quotes, no key twice."
    return CrdiffError(printable(problem, 400), hint)


def _entries_of_base(
    table: Mapping[str, object], path: KeyPath, shared: InheritedValues, folder: Path, problems: Problems
) -> Iterator[PlanEntry]:
    """Yield the entries of a [[base]]: its sizes, then its pack."""
    inner = read_table(table, path, "[[base]]", folder, problems)
    variants, _ = inner.pop("variant", (None, ()))
    values = inner.within(shared)
    if "base" not in table:
        problems.add(path, "base is missing", 'Write base = "sdxl".')
    if "sizes" not in values and "variant" not in table:
        problems.add(path, "nothing says for which sizes", f"Write {_EXAMPLES['sizes']}.")
    sizes = list(_sizes_of_base(variants, values, folder, problems))
    made = [(entry, own) for size, at, own in sizes if (entry := _entry(size, at, own, problems))]
    without_files = values.value("files") is False
    if without_files and "pack" not in values:
        problems.add(
            values["files"][1],
            "files is false, but there is no pack",
            f"Write {_EXAMPLES['pack']}, or leave files out.",
        )
    if not without_files:
        yield from (entry for entry, _ in made)
    if made and "pack" in values and (pack := _pack_entry(made, path, values, problems)):
        yield pack


def _sizes_of_base(
    variants: Sequence[tuple[Mapping[str, object], KeyPath]] | None,
    values: InheritedValues,
    folder: Path,
    problems: Problems,
) -> Iterator[tuple[Size | None, KeyPath, InheritedValues]]:
    """Yield each size of a [[base]], where it is written, and the values that hold for it; None for a wrong size."""
    for size, at in values.value("sizes") or ():
        yield size, at, values
    for variant, at in variants or ():
        innermost = read_table(variant, at, "[[base.variant]]", folder, problems)
        if "size" not in variant:
            problems.add(at, "size is missing", f"Write {_EXAMPLES['size']}.")
        yield innermost.value("size"), (*at, "size"), innermost.within(values)


def _entry(size: Size | None, at: KeyPath, values: InheritedValues, problems: Problems) -> PlanEntry | None:
    """Make the entry of a size; None if a part of it is wrong, after all of its problems have been added."""
    base: PlanBase | None = values.value("base")
    recipe: PlanRecipe | None = values.value("recipe")
    _check_family(size, at, base, recipe, values, problems)
    for key in ("revision", "tag", "private"):
        if key in values and "repo" not in values:
            hint = f"Write {_EXAMPLES['repo']}, or leave {key} out."
            problems.add(values[key][1], f"{key} is for a repository, but there is no repo", hint)
    any_base, any_size = base or PlanBase("", "base"), size or _ANY_SIZE
    folder = _is_folder(any_base, values.value("layout"))
    default = DEFAULT_NAME.removesuffix(".safetensors") if folder else DEFAULT_NAME
    named = values.within(InheritedValues(name=(default, at)))
    texts = {key: _fill(key, named, any_base, any_size, problems) for key in _FILE_TEMPLATES if key in named}
    path = texts["name"]
    if path and "name" in values:
        _check_name(path, folder, values["name"][1], problems)
    wrong = None in texts.values() or values.get("private", (False,))[0] is None
    if path is None or base is None or size is None or wrong:
        return None
    options = {key: values.value(key) for key in _EXPORT_KEYS if values.value(key) is not None}
    if "criterion" in options:
        with problems.catching(values["criterion"][1], "criterion: "):
            CriterionChoice.load(options["criterion"]).check_calibration(given="calibration" in values)
    request = ExportRequest(
        base.base, size, recipe=recipe.path if recipe else None, variant=values.value("weights"), force=True,
        given="in the plan file", **options,
    )  # fmt: skip
    return PlanEntry(
        request, path, "name" not in values, texts.get("repo"), texts.get("revision"), texts.get("tag"),
        values.value("private"), values.value("base_model"), problems.line(at) or None, base.short,
    )  # fmt: skip


def _pack_entry(
    made: Sequence[tuple[PlanEntry, InheritedValues]], path: KeyPath, values: InheritedValues, problems: Problems
) -> PlanEntry | None:
    """Make the entry of the pack of a [[base]]; None if a part of it is wrong, after its problems have been added.

    Args:
        made: The entries of its sizes, with the values that hold for each.
        path: The path of the [[base]].
        values: The values that hold for all of its sizes.
        problems: Gets the problems.
    """
    base: PlanBase = values.value("base")
    _check_pack_sizes(made, problems)
    for key in ("repo", "revision", "tag"):
        for name in FIELD.findall(values.value(key) or ""):
            if name in OF_ONE_SIZE:
                hint = f"Leave {name} out, or write {key} below each [[base.variant]] and one for the pack above."
                problems.add(values[key][1], f"{key} has {name}, but the pack holds all sizes", hint)
    texts = {key: _fill(key, values, base, _ANY_SIZE, problems) for key in _PACK_TEMPLATES if key in values}
    target = texts["pack"]
    if target is None or None in texts.values():
        return None
    first = made[0][0].request
    return PlanEntry(
        first, target, False, texts.get("repo"), texts.get("revision"), texts.get("tag"), values.value("private"),
        values.value("base_model"), problems.line(path) or None, base.short, tuple(entry.request for entry, _ in made),
    )  # fmt: skip


def _check_pack_sizes(made: Sequence[tuple[PlanEntry, InheritedValues]], problems: Problems) -> None:
    """Find sizes that one pack cannot hold."""
    apart = "Write it as a [[base]] of its own, with or without a pack of its own."
    first = made[0][0]
    by_size: dict[Size, PlanEntry] = {}
    for entry, values in made:
        request, at = entry.request, entry.line or 0
        other = by_size.setdefault(request.size, entry)
        if other is not entry:
            hint = "Leave one of the two out, or write it as a [[base]] of its own."
            problems.add(at, f"the pack would have {request.size} twice (line {other.line})", hint)
        for key, name in _SHARED_IN_PACK.items():
            if getattr(request, name) != getattr(first.request, name):
                problem = f"{key} is not the same for {request.size} and {first.request.size} (line {first.line}), "
                problems.add(at, f"{problem}which are in one pack", apart)
        with suppress(CrdiffError):  # those of a size are problems of its own
            criterion = CriterionChoice.load(request.criterion)
            if criterion.moves:
                hint = "Write pack only below each [[base]] that has another criterion."
                problem = f"criterion {criterion.name} moves weights that stay, and a pack holds none"
                problems.add(values["criterion"][1], problem, hint)
        with suppress(CrdiffError):  # a calibration that cannot be read fails the run of its base
            calibrated = CriterionChoice.of(request.criterion, request.calibration).calibration
            if calibrated and calibrated.size != request.size:
                problem = f"calibration was made at {calibrated.size}, and the pack would have {request.size} by it"
                problems.add(at, problem, "Give this base that one size, or leave pack out.")


def _check_family(
    size: Size | None, at: KeyPath, base: PlanBase | None, recipe: PlanRecipe | None, values: InheritedValues,
    problems: Problems,
) -> None:  # fmt: skip
    """Find values that the base's family does not have, if the base or the recipe tells the family."""
    family = recipe.family if recipe else base.family if base else None
    if recipe and base and base.family not in (None, recipe.family):
        hint = "Leave recipe out, or give one for this family."
        problems.add(values["recipe"][1], f"recipe is for {recipe.family.title}, which {base.short} is not", hint)
        return
    possible = (family,) if family else families.all_families()
    groups = tuple(dict.fromkeys(group for each in possible for group in each.groups))
    for group in values.value("ratios") or ():
        if group not in groups:
            whose = f"{family.title} does not have" if family else "no model has"
            problem = f"ratios.{group} is for a group that {whose}"
            problems.add((*values["ratios"][1], group), problem, did_you_mean(group, groups, "groups"))
    for kind in values.value("targets") or ():
        if family and kind not in family.kinds:
            hint = f"It has: {', '.join(family.kinds)}."
            problems.add(values["targets"][1], f"targets has {kind}, which {family.title} does not have", hint)
    if family and size:
        with problems.catching(at):
            check_grid(size, family.grid, family.title)
    if family and recipe:
        with problems.catching(values["recipe"][1], "recipe: "):
            variant = choose(recipe.recipe, size or _ANY_SIZE).variant
            check_groups(variant, family.groups, recipe.recipe.name)


def _fill(key: str, values: InheritedValues, base: PlanBase, size: Size, problems: Problems) -> str | None:
    """Fill a template for a base and a size; None if the result is wrong."""
    template, at = values[key]
    if template is None:
        return None
    words = {
        "{base}": base.short, "{size}": str(size), "{width}": str(size.width), "{height}": str(size.height),
        "{dtype}": values.value("dtype"), "{{": "{", "}}": "}",
    }  # fmt: skip
    if words["{dtype}"] is None and "{dtype}" in FIELD.findall(template):
        problems.add(at, f"{key} has {{dtype}}, but there is no dtype", 'Write dtype = "fp16", or leave {dtype} out.')
        return None
    text = FIELD.sub(lambda field: words[field[0]], template)
    is_valid, what = _TEMPLATES[key]
    if is_valid(text):
        return text
    problems.add(at, f"{key} is {shown(text)}, must be {what}", f"Write {_EXAMPLES[key]}.", "filled")
    return None


def _is_folder(base: PlanBase, layout: str | None) -> bool | None:
    """Whether a result is a folder; None if only the base's headers tell it."""
    if layout == "diffusers":
        return True
    if layout == "original" and base.folder:
        return None  # a folder in the original layout, such as shards, stays one
    return base.folder


def _check_name(path: str, folder: bool | None, at: KeyPath, problems: Problems) -> None:
    """Find a name that does not fit a base that is a file, or a folder."""
    safetensors = path.endswith(".safetensors")
    if folder and safetensors:
        problem = f"name is {shown(path)}, but the base is a folder, and so is the result"
        problems.add(at, problem, "Leave .safetensors out.", "suffix")
    elif not safetensors and (folder is False or (not folder and path.lower().endswith(FILE_ENDINGS))):
        problem = f"name is {shown(path)}, must end in .safetensors"
        problems.add(at, problem, f"Write {_EXAMPLES['name']}.", "suffix")


def _refuse_conflicts(plan: PlanFile, problems: Problems) -> None:
    """Find results that would be one file, or one inside another, on a disk that ignores case."""
    paths: list[tuple[PurePosixPath, PlanEntry]] = []
    for entry in plan.entries:
        path = PurePosixPath(unicodedata.normalize("NFC", str(plan.local_path(entry))).casefold())
        paths.append((path, entry))
        if entry.default_name and path.suffix == ".safetensors":  # should the base prove to be a folder
            paths.append((path.with_suffix(""), entry))
    first: dict[PurePosixPath, PlanEntry] = {}
    for path, entry in paths:
        other = first.setdefault(path, entry)
        if other is not entry:
            problem = f"{entry} would be {entry.path}, and so would {other} (line {other.line})"
            key, fields = ("pack", "{base}") if entry.pack and other.pack else ("name", "{base} and {size}")
            hint = f"Put {fields} into {key}, or give one of them its own."
            is_other = entry.request.base != other.request.base and entry.request.size == other.request.size
            if (is_other or key == "pack") and entry.base_name.casefold() == other.base_name.casefold():
                ending = path.suffix if path.suffix == ".safetensors" else ""
                name = f"other{SUFFIX}" if key == "pack" else f"other-{{size}}{ending}"
                hint = f'Both bases are called {entry.base_name}: below one [[base]] write `{key} = "{name}"`.'
            problems.add(entry.line or 0, problem, hint)
    for path, entry in paths:
        outer = next((first[parent] for parent in path.parents if parent in first), entry)
        if outer is not entry:
            problem = f"{entry} would be {entry.path}, within what {outer} (line {outer.line}) would be"
            problems.add(entry.line or 0, problem, "Give one of them another name.")
    _refuse_mixed_visibility(plan.entries, problems)


def _refuse_mixed_visibility(entries: Sequence[PlanEntry], problems: Problems) -> None:
    first: dict[str, PlanEntry] = {}
    for entry in entries:
        other = first.setdefault((entry.repo or "").casefold(), entry)
        if entry.repo and entry.private != other.private:
            problem = f"private is not the same for {entry} and {other} (line {other.line}), both in {entry.repo}"
            problems.add(entry.line or 0, problem, "Say private once for a repository, beside its repo.")
