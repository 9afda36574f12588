"""The plan file of `crdiff publish`: which bases are pruned for which sizes, and where each result goes.

Nothing in it is ignored or guessed, and all that is wrong is said at once. What stands before the first [[base]] holds
for every base, what stands in a [[base]] for all of its sizes, what stands in a [[base.variant]] for that one alone;
the innermost wins. A base is pruned for its `sizes`, or else for those before the first [[base]], and besides for the
size of each of its [[base.variant]] tables.
"""

import re
import tomllib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from crdiff_export.errors import CrdiffError, MatrixError
from crdiff_export.formats.text import did_you_mean, printable
from crdiff_export.formats.text_file import read_text_file
from crdiff_export.models import families
from crdiff_export.models.recipe import check_groups, choose
from crdiff_export.models.recipe_toml import shown
from crdiff_export.publish import toml_lines
from crdiff_export.publish.plan_keys import (
    DEFAULT_NAME,
    EXAMPLES,
    FIELD,
    FILES,
    REPO,
    OwnRecipe,
    Place,
    Said,
    read,
)
from crdiff_export.publish.toml_lines import KeyPath, Problems
from crdiff_export.sizes import Size, check_grid

# git's rules for a branch or tag, as far as anybody follows them, and for a path those of every system.
_REF = re.compile(r"(?!.*(\.\.|//|/\.|\.lock(/|$)))\w([\w./+-]{0,198}[\w+-])?")
_PART = r'[^/\\:*?"<>|\x00-\x1f\x7f-\x9f]{0,199}[^/\\:*?"<>|\x00-\x1f\x7f-\x9f. ]'
_FILLED = {
    "repo": (REPO, "ORG/NAME"),
    "revision": (_REF, "the name of a branch"),
    "tag": (_REF, "the name of a tag"),
    "name": (re.compile(f"{_PART}(/{_PART})*"), "a path that every system can have, with / between its parts"),
}
_ANY_SIZE = Size(1024, 1024)


@dataclass(frozen=True, slots=True)
class Entry:
    """One cell of the matrix: a base, a size, and what is said about the two; None is what nobody said.

    `base` is for `bases.locate`, a path made absolute. `path` is the one in the repository. With `default_name` nobody
    chose it: it ends in .safetensors unless the base is known to be a folder, and where the base proves to be one only
    later it has to go without. `variant` is that of the weights in a folder with several. `line` is that of the size.
    """

    base: str
    size: Size
    path: str
    default_name: bool
    repo: str | None = None
    revision: str | None = None
    tag: str | None = None
    private: bool | None = None
    base_model: str | None = None
    dtype: str | None = None
    variant: str | None = None
    recipe: Path | None = None
    ratio: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    poa_weight: float | None = None
    targets: tuple[str, ...] | None = None
    allow_nonfinite: bool = False
    line: int | None = None
    criterion: str = "magnitude"
    calibration: Path | None = None

    def __str__(self) -> str:
        return f"{self.size} of {Path(self.base).name or self.base}"


@dataclass(frozen=True, slots=True)
class Matrix:
    """What a plan file says, in its order; `name` is the file's, without its folder."""

    name: str
    entries: tuple[Entry, ...]

    def local(self, entry: Entry) -> PurePosixPath:
        """Where a result is kept below the output folder: at its path if all go to one branch of one repository.

        Else below ORG/NAME, and there below REVISION if this repository gets results on several.
        """
        return _local(entry, _branches(self.entries))


def load(path: Path) -> Matrix:
    """Read a plan file; MatrixError has all that is wrong with it."""
    try:
        text = read_text_file(path, "plan", "Name one TOML file.", CrdiffError)
    except CrdiffError as error:
        problem = CrdiffError(printable(error.message, 400), error.hint)
        raise MatrixError(printable(path.name or str(path)), [problem]) from error
    return parse(text, path.name, path.parent)


def parse(text: str, name: str, folder: Path) -> Matrix:
    """Read a plan; paths in it begin in `folder`. MatrixError has all that is wrong, by line."""
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: syntax, and integers of more digits than int() takes
        raise MatrixError(printable(name), [_syntax(name, str(error))]) from error
    problems = Problems(name, toml_lines.lines(text))
    defaults = read(values, (), "the plan", folder.absolute(), problems)
    tables, _ = defaults.pop("base", (None, ()))
    if "base" not in values:
        problems.add((), "base is missing", f"Write {EXAMPLES['base']}.")
    entries = [entry for table, at in tables or () for entry in _base(table, at, defaults, folder.absolute(), problems)]
    _refuse_conflicts(entries, problems)
    if problems.found:
        raise MatrixError(printable(name), problems.in_order())
    return Matrix(name, tuple(entries))


def _syntax(name: str, error: str) -> CrdiffError:
    place = re.fullmatch(r"(.*) \(at line (\d+), (column \d+)\)", error, re.DOTALL)
    problem = f"{name}:{place[2]}: {place[1]}, {place[3]}" if place else f"{name}: {error}"
    hint = "A plan is TOML: one key = value in a line, texts in quotes, no key twice."
    return CrdiffError(printable(problem, 400), hint)


def _base(
    values: Mapping[str, object], at: KeyPath, defaults: Said, folder: Path, problems: Problems
) -> Iterator[Entry]:
    """The cells of one [[base]]."""
    own = read(values, at, "[[base]]", folder, problems)
    variants, _ = own.pop("variant", (None, ()))
    said = own.within(defaults)
    if "base" not in values:
        problems.add(at, "base is missing", 'Write base = "sdxl".')
    if "sizes" not in said and "variant" not in values:
        problems.add(at, "nothing says for which sizes", f"Write {EXAMPLES['sizes']}.")
    for size, place in said.value("sizes") or ():
        yield from _cell(size, place, said, problems)
    for table, place in variants or ():
        inner = read(table, place, "[[base.variant]]", folder, problems)
        if "size" not in table:
            problems.add(place, "size is missing", f"Write {EXAMPLES['size']}.")
        yield from _cell(inner.value("size"), (*place, "size"), inner.within(said), problems)


def _cell(size: Size | None, at: KeyPath, said: Said, problems: Problems) -> Iterator[Entry]:
    """The entry of a size; none where a part of it is wrong, which is found all the same."""
    place: Place | None = said.value("base")
    own: OwnRecipe | None = said.value("recipe")
    _check_fit(size, at, place, own, said, problems)
    for key in ("revision", "tag", "private"):
        if key in said and "repo" not in said:
            hint = f"Write {EXAMPLES['repo']}, or leave {key} out."
            problems.add(said[key][1], f"{key} is for a repository, but there is no repo", hint)
    known, at_size = place or Place("", "base"), size or _ANY_SIZE
    default = DEFAULT_NAME.removesuffix(".safetensors") if known.folder else DEFAULT_NAME
    whole = said.within(Said(name=(default, at)))
    parts = {key: _filled(key, whole, known, at_size, problems) for key in _FILLED if key in whole}
    repo, revision, tag, path = (parts.get(key) for key in ("repo", "revision", "tag", "name"))
    if path and "name" in said:
        _check_name(path, known.folder, said["name"][1], problems)
    wrong = None in parts.values() or said.get("private", (False,))[0] is None
    if path is None or place is None or size is None or wrong:
        return
    yield Entry(
        base=place.base, size=size, path=path, default_name="name" not in said,
        repo=repo, revision=revision, tag=tag, private=said.value("private"), base_model=said.value("base_model"),
        dtype=said.value("dtype"), variant=said.value("weights"), recipe=own.path if own else None,
        ratio=said.value("ratio"), ratios=said.value("ratios") or {}, poa_weight=said.value("poa_weight"),
        targets=said.value("targets"), criterion=said.value("criterion") or "magnitude",
        calibration=said.value("calibration"), allow_nonfinite=bool(said.value("allow_nonfinite")),
        line=problems.line(at) or None,
    )  # fmt: skip


def _check_fit(
    size: Size | None, at: KeyPath, place: Place | None, own: OwnRecipe | None, said: Said, problems: Problems
) -> None:
    """Find what the base's family cannot have, as far as the base or the recipe tells which one it is."""
    family = own.family if own else place.family if place else None
    if own and place and place.family not in (None, own.family):
        hint = "Leave recipe out, or give one for this family."
        problems.add(said["recipe"][1], f"recipe is for {own.family.title}, which {place.short} is not", hint)
        return
    known = (family,) if family else families.all_families()
    groups = tuple(dict.fromkeys(group for each in known for group in each.groups))
    for group in said.value("ratios") or ():
        if group not in groups:
            whose = f"{family.title} does not have" if family else "no model has"
            problem = f"ratios.{group} is for a group that {whose}"
            problems.add((*said["ratios"][1], group), problem, did_you_mean(group, groups, "groups"))
    for kind in said.value("targets") or ():
        if family and kind not in family.kinds:
            hint = f"It has: {', '.join(family.kinds)}."
            problems.add(said["targets"][1], f"targets has {kind}, which {family.title} does not have", hint)
    if family and size:
        with problems.catching(at):
            check_grid(size, family.grid, family.title)
    if family and own:
        with problems.catching(said["recipe"][1], "recipe: "):
            check_groups(choose(own.recipe, size or _ANY_SIZE).variant, family.groups, own.recipe.name)


def _filled(key: str, said: Said, place: Place, size: Size, problems: Problems) -> str | None:
    """What a template says for a base and a size; None if it is wrong."""
    template, at = said[key]
    if template is None:
        return None
    values = {
        "{base}": place.short, "{size}": str(size), "{width}": str(size.width), "{height}": str(size.height),
        "{dtype}": said.value("dtype"), "{{": "{", "}}": "}",
    }  # fmt: skip
    names: list[str] = FIELD.findall(template)
    if "{dtype}" in names and values["{dtype}"] is None:
        problems.add(at, f"{key} has {{dtype}}, but there is no dtype", 'Write dtype = "fp16", or leave {dtype} out.')
        return None
    text = FIELD.sub(lambda name: values[name[0]], template)
    pattern, what = _FILLED[key]
    if pattern.fullmatch(text):
        return text
    problems.add(at, f"{key} is {shown(text)}, must be {what}", f"Write {EXAMPLES[key]}.", "filled")
    return None


def _check_name(path: str, folder: bool | None, at: KeyPath, problems: Problems) -> None:
    """Find a name that the result of a file, or of a folder, cannot have."""
    safetensors = path.endswith(".safetensors")
    if folder and safetensors:
        problem = f"name is {shown(path)}, but the base is a folder, and so is the result"
        problems.add(at, problem, "Leave .safetensors out.", "suffix")
    elif not safetensors and (folder is False or (not folder and path.lower().endswith(FILES))):
        problem = f"name is {shown(path)}, must end in .safetensors"
        problems.add(at, problem, f"Write {EXAMPLES['name']}.", "suffix")


def _branches(entries: Sequence[Entry]) -> set[tuple[str, str]]:
    """The repositories that results go to, each with its branch; none for what is only kept."""
    return {_branch(entry) for entry in entries}


def _branch(entry: Entry) -> tuple[str, str]:
    return ((entry.repo or "").casefold(), (entry.revision or "main") if entry.repo else "")


def _local(entry: Entry, branches: set[tuple[str, str]]) -> PurePosixPath:
    if len(branches) < 2 or not entry.repo:
        return PurePosixPath(entry.path)
    repo, revision = _branch(entry)
    several = sum(repo == other for other, _ in branches) > 1
    return PurePosixPath(entry.repo, revision if several else "", entry.path)


def _refuse_conflicts(entries: Sequence[Entry], problems: Problems) -> None:
    """Find results that would be one file, or one within another, at least where case is not told apart."""
    branches = _branches(entries)
    paths: list[tuple[PurePosixPath, Entry]] = []
    for entry in entries:
        path = PurePosixPath(unicodedata.normalize("NFC", str(_local(entry, branches))).casefold())
        paths += [(path, entry)]
        if entry.default_name and path.suffix == ".safetensors":  # should the base prove to be a folder
            paths += [(path.with_suffix(""), entry)]
    first: dict[PurePosixPath, Entry] = {}
    repos: dict[str, Entry] = {}
    for path, entry in paths:
        other = first.setdefault(path, entry)
        if other is not entry:
            problem = f"{entry} would be {entry.path}, and so would {other} (line {other.line})"
            problems.add(entry.line or 0, problem, "Put {base} and {size} into name, or give one of them its own.")
    for path, entry in paths:
        around = next((first[parent] for parent in path.parents if parent in first), entry)
        if around is not entry:
            problem = f"{entry} would be {entry.path}, within what {around} (line {around.line}) would be"
            problems.add(entry.line or 0, problem, "Give one of them another name.")
    for entry in entries:
        other = repos.setdefault((entry.repo or "").casefold(), entry)
        if entry.repo and entry.private != other.private:
            problem = f"private is not the same for {entry} and {other} (line {other.line}), both in {entry.repo}"
            problems.add(entry.line or 0, problem, "Say private once for a repository, beside its repo.")
