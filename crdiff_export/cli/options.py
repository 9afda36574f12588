"""Types of options, options that several commands take, and completion."""

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from crdiff_export.cli.command import OptionMaker, gather, option, option_group
from crdiff_export.errors import CrdiffError, OptionError, PromptsError
from crdiff_export.formats.dtypes import DTYPES
from crdiff_export.formats.text import printable
from crdiff_export.formats.text_file import read_text_file
from crdiff_export.models.recipe import MAX_POA_WEIGHT, TARGETS
from crdiff_export.sizes import Size

BYTE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class FiniteRange(click.FloatRange):
    """A range of numbers. No bound of click's own keeps out `nan`, which is neither below nor above it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a number that can be used.", param, ctx)
        return number


class Ratio(FiniteRange):
    """A share of weights, from 0 to below 1."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9]{1,3}(?:\.[0-9]{1,9})?)\s*%\s*", value)):
            share = float(match[1]) / 100
            advice = f"Write it as {share:g}." if share < 1 else "A ratio is below 1."
            self.fail(f"{value!r} is a percentage. {advice}", param, ctx)
        return super().convert(value, param, ctx) + 0.0  # -0.0 is 0


class ParsedType(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.5 on
    """The type of an option whose text a function reads; what that refuses is a usage error."""

    def __init__(self, metavar: str, parse: Callable[[str], Any], offered: Sequence[str] = ()) -> None:
        self.name = metavar
        self._parse = parse
        self._offered = offered

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Name the value in --help."""
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read a text; any other value has been read before."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except CrdiffError as error:
            self.fail(f"{error.message}. {error.hint}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer some values to a shell."""
        return [CompletionItem(name) for name in self._offered if name.startswith(incomplete)]


def _parse_targets(text: str) -> tuple[str, ...]:
    kinds = tuple(kind.strip() for kind in text.split(",") if kind.strip())
    unknown = next((kind for kind in kinds if kind not in TARGETS), None)
    if unknown is not None or not kinds:
        wrong = "nothing is named" if unknown is None else f"{unknown!r} is no kind of layer"
        raise OptionError(wrong, f"Give some of {', '.join(TARGETS)}, with commas between them.")
    return kinds


def _parse_device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", text):
        raise OptionError(f"{text!r} is no device", "Give auto, cpu, cuda, cuda:N or mps.")
    return text


def parse_bytes(text: str) -> int:
    """Read a number of bytes, as in `4GB` or `500MB`; OptionError for any other text."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([KMGT]?B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * BYTE_UNITS[(match[2] or "B").upper()]) if match else 0
    if size < 1:
        raise OptionError(f"{text!r} is no amount of memory", "Write it as 4GB or 500MB.")
    return size


SIZE = ParsedType("N|WxH", Size.parse)
TOLD_SIZE = ParsedType("native|N|WxH", lambda text: text if text == "native" else Size.parse(text), ("native",))
TARGET_KINDS = ParsedType("KINDS", _parse_targets)
# Whether this machine has the device shows when it is used.
DEVICE = ParsedType("DEVICE", _parse_device, ("auto", "cpu", "cuda", "mps"))
BYTES = ParsedType("BYTES", parse_bytes)
FILE = click.Path(path_type=Path)
RATIO = Ratio(0, 1, max_open=True)
POA_WEIGHT = FiniteRange(0, MAX_POA_WEIGHT)
COUNT = click.IntRange(1)


def complete_base(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the built-in recipes, whose names stand for their bases, and files."""
    from crdiff_export.models.recipe_files import aliases

    names = [CompletionItem(alias) for alias in aliases() if alias.startswith(incomplete)]
    return [*names, CompletionItem(incomplete, type="file")]


def complete_file(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer files, for an option that takes addresses as well."""
    return [CompletionItem(incomplete, type="file")]


def complete_criterion(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the criteria that are installed."""
    from crdiff_export.prune.criteria.spec import names

    return [CompletionItem(name) for name in names() if name.startswith(incomplete)]


base_argument = click.argument("base", shell_complete=complete_base)
file_argument = click.argument("file", type=FILE)
files_argument = click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FILE)
force = option("--force", "Replace outputs that exist.")
recipe = option("--recipe FILE", "A recipe instead of the built-in one (.toml, .json).", FILE)
targets = option("--targets", "Layers to prune, such as attn,ff. Default: the recipe's, or the family's.", TARGET_KINDS)
variant = option("--variant NAME", "Weights to take from a folder that has several, such as fp16.")
family = option("--family FILE", "A table of the base's family, if crdiff does not know it (`crdiff families`).", FILE)
rehash = option("--rehash", "Hash the base anew. Default: its hash is remembered until the file changes.")
sizes = option("--res", "The size to prune for, in pixels; may be given several times: the base is read once for all.",
               SIZE, "sizes", multiple=True, required=True)  # fmt: skip
native = option("--native", "The size that BASE was trained at. Default: what it says itself, or its family's.", SIZE)
prompt_of_numbers = option("--prompt TEXT", "Take the recipe's numbers for this prompt, where it has some.")
poa_weight = option("--poa-weight W", "POA weight to recommend in the header; 1 is the pruned model alone.", POA_WEIGHT)
dtype = option("--dtype", "Cast all float tensors. Default: keep each as it is.", click.Choice(list(DTYPES)))
layout = option(
    "--layout", "Write in this layout: original is one file as web UIs and ComfyUI open it, diffusers a folder with "
    "the UNet or transformer. Default: the base's.", click.Choice(["original", "diffusers"]),
)  # fmt: skip
allow_nonfinite = option("--allow-nonfinite", "Keep and count target weights that are infinite or not numbers.")
threads = option("--threads N", "Threads on the CPU. Default: all cores.", COUNT)
device = option("--device", "Where weights are counted and zeroed: auto, cpu, cuda, cuda:N or mps. The result does not "
                "depend on it.", DEVICE, default="auto", show_default=True)  # fmt: skip
_ratios = option_group(
    "Ratios",
    recipe,
    option("--ratio R", "Share of every group's weights to set to zero.", RATIO),
    option("--down R", "Share for the down blocks of a UNet; wins over --ratio.", RATIO),
    option("--mid R", "Share for its mid block; wins over --ratio.", RATIO),
    option("--up R", "Share for its up blocks; wins over --ratio.", RATIO),
)
prompt = option("--prompt TEXT", "What to draw; may be given several times.", dest="prompts", multiple=True)
criterion_options = option_group(
    "Criterion",
    option("--criterion NAME[:OPTION=VALUE,…]", "How weights are ranked: magnitude, uniform (the same ratio "
           "everywhere), random, wanda, taylor, obs or adverse (docs/criteria.md).", default="magnitude",
           show_default=True, shell_complete=complete_criterion),
    option("--calibration FILE", "What crdiff calibrate has made for this base and size, where the criterion ranks by "
           "that.", FILE),
)  # fmt: skip
base_model = option("--base-model ORG/NAME", "The base on the Hub, where it was a local file.")
sheet = option("--sheet FILE", "A picture for the top of the card, from crdiff preview (PNG).", FILE)
relation = option("--relation", "base_model_relation of a new card; the Hub knows no word for pruned.",
                  click.Choice(["finetune", "quantized", "merge", "adapter"]), default="finetune",
                  show_default=True)  # fmt: skip
push_options = option_group(
    "Hub",
    option("--path-in-repo PATH", "Where in the repository. Default: the file's name; of a folder the root.",
           dest="path"),
    option("--revision BRANCH", "Branch to commit to, made if it is not there. Default: main."),
    option("--create-pr", "Open a pull request; a second run continues it."),
    option("--message TEXT", "Message of the commit, title of the pull request."),
    option("--tag NAME", "Tag the commit; a tag that exists elsewhere is not moved."),
    option("--private/--public", "Visibility of a repository that has to be created. Default: private if the base is "
           "gated or its licence is unknown or other.", default=None),
    base_model,
    sheet,
    option("--preview PROMPT", "Draw that picture of this prompt; may be given several times.", dest="previews",
           multiple=True),
    relation,
)  # fmt: skip


def ratio_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for ratios; those for single groups become one parameter, `ratios`."""

    def by_group(down: float | None, mid: float | None, up: float | None) -> dict[str, float]:
        return {group: ratio for group, ratio in (("down", down), ("mid", mid), ("up", up)) if ratio is not None}

    return _ratios(gather("ratios", by_group)(function))


def prompts_file(name: str, help_text: str, dest: str = "listed") -> OptionMaker:
    """Describe an option that names a file of prompts; its value is the prompts."""
    help_text += " A .csv or .tsv file needs a column prompt; in others # begins no comment."
    return option(name, help_text, FILE, dest, callback=lambda _ctx, _param, path: read_prompts(path) if path else ())


def join_prompts(listed: tuple[str, ...], prompts: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Take the prompts of the command line, then those of a file."""
    return prompts + listed


def read_prompts(path: Path) -> tuple[str, ...]:
    r"""Read prompts from a file: one a line, or of a .csv or .tsv file the column `prompt`.

    A line ends where an editor ends it, at `\n`, `\r\n` or `\r`, and no sign begins a comment.

    Args:
        path: The file.

    Returns:
        The prompts, without spaces around them; empty ones are left out.

    Raises:
        PromptsError: It is no such file.
    """
    hint = "Give --prompts a text file with one prompt a line, or a .csv or .tsv file with a column prompt."
    text = read_text_file(path, "prompt", hint, PromptsError)
    separator = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
    lines = re.split(r"\r\n|\r|\n", text) if separator is None else _read_column(path, text, separator, hint)
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise PromptsError(f"{path}: has no prompt", hint)
    return prompts


def _read_column(path: Path, text: str, separator: str, hint: str) -> list[str]:
    """Read the column `prompt` of a table (RFC 4180) whose first row names the columns."""
    table = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        columns = next(table, [])
        rows = [(table.line_num, row) for row in table if row]
    except csv.Error as error:
        raise PromptsError(f"{path}, line {table.line_num}: not a table of columns: {error}", hint) from error
    names = [name.strip().lower() for name in columns]
    if names.count("prompt") != 1:
        count = "two columns" if "prompt" in names else "no column"
        shown = ", ".join(map(printable, columns)) or "nothing"
        raise PromptsError(f"{path}: its first row names {count} prompt, but has to name one: {shown}", hint)
    for line, row in rows:
        if len(row) != len(columns):
            message = f"{path}, line {line}: has {len(row)} columns, its first row {len(columns)}"
            mark = "comma" if separator == "," else "tab"
            raise PromptsError(message, f'Put a prompt that holds a {mark} into quotes: "a red fox".')
    return [row[names.index("prompt")] for _, row in rows]
