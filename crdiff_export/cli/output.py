"""What people see: results on stdout; notes, progress and errors on stderr. `--json` and `-q` are decided here."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

from crdiff_export.cli.blocks import Block, Facts
from crdiff_export.cli.signals import Stopper
from crdiff_export.errors import CrdiffError
from crdiff_export.formats.text import WARNING, printable
from crdiff_export.progress import Progress

if TYPE_CHECKING:
    from crdiff_export.cli.progress_display import ProgressDisplay

SCHEMA = 1
# Columns of a terminal that does not say how wide it is.
USUAL_WIDTH = 80
# The Hub client's bars, which tqdm draws, in the style of ours.
_TQDM = {"ASCII": " ━", "BAR_FORMAT": "{desc:<10.30} {bar:40} {n_fmt}/{total_fmt} {rate_fmt} {remaining}"}
# What stands for the characters of a table where the encoding of stdout does not have them.
_GRAPHICS = "─…▏▎▍▌▋▊▉█"
_IN_ASCII = str.maketrans(_GRAPHICS, "-~...#####")


@dataclass(frozen=True)
class Result:
    """The result of a command: an object for --json, blocks of text for people, and those that -q leaves.

    `bare` is None where -q leaves all of the text. `notes` go to stderr, before the text.
    """

    json: Mapping[str, Any]
    text: Sequence[Block]
    bare: Sequence[Block] | None = None
    notes: Sequence[str] = ()
    exit_code: int = 0

    def followed_by(self, other: "Result", key: str) -> "Result":
        """Add the result of a second step; `key` is its place in the JSON object."""
        bare = [*(self.bare or self.text), *(other.bare or other.text)]
        return Result({key: other.json, **self.json}, [*self.text, *other.text], bare, [*self.notes, *other.notes])


def for_each(out: "Output", files: Sequence[Path], run: Callable[[Path], Result]) -> Result:
    """Do the same with several files; an error of one of them does not keep the others from their turn.

    Args:
        out: Shows errors.
        files: The files.
        run: Gives the result of one.

    Returns:
        Its result for one file. For several the results one below the other, in JSON as a list `files`, in which an
        error is an object, too; the exit code is the worst, which is the largest.

    """
    if len(files) == 1:
        return run(files[0])
    records: list[Mapping[str, Any]] = []
    text: list[Block] = []
    bare: list[Block] = []
    codes, notes = [0], []
    for file in files:
        try:
            result = run(file)
        except CrdiffError as error:
            out.error(error)
            codes.append(error.exit_code)
            fields = {"code": error.code, "message": error.message, "hint": error.hint}
            records.append({"file": str(file), "error": fields})
            continue
        records.append(result.json)
        text += [*([""] if text and len(result.text) > 1 else []), *result.text]
        bare += result.text if result.bare is None else result.bare
        notes += [f"{file}: {note}" for note in result.notes]
    return Result({"files": records}, text, bare, notes, max(codes))


class Output:
    """The way of results, notes and progress to stdout and stderr, as --json and -q ask."""

    def __init__(self, stopper: Stopper, *, as_json: bool, quiet: bool) -> None:
        self.stopper = stopper
        self.as_json = as_json
        self.silent = as_json or quiet
        self._quiet = quiet

    def show(self, result: Result) -> None:
        """Show a result, once in every run."""
        if self.as_json:
            # In ASCII: a file's name may be any bytes.
            _print(json.dumps({"schema": SCHEMA, **result.json}, allow_nan=False))
            return
        self.notes(result.notes)
        self.print(result.text if result.bare is None or not self._quiet else result.bare)

    def print(self, blocks: Iterable[Block]) -> None:
        """Print what belongs to a result that has been shown, unless that was JSON."""
        for block in () if self.as_json else blocks:
            for line in _lines(block):
                _print(line)

    def notes(self, texts: Iterable[str]) -> None:
        """Print what is worth knowing on stderr, unless it is to be silent."""
        for text in () if self.silent else texts:
            line = text if text.startswith(WARNING) else f"note: {text}"
            print(printable(line, limit=None), file=sys.stderr, flush=True)

    def log(self, text: str) -> None:
        """Print a line of progress on stderr, unless it is to be silent."""
        if not self.silent:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show on a terminal what takes seconds without a word, such as the import of torch, until it is over."""
        if self.silent or not sys.stderr.isatty():
            yield
            return
        print(text, end="\r", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            print("\x1b[2K", end="\r", file=sys.stderr, flush=True)

    def error(self, error: CrdiffError, prefix: str = "") -> None:
        """Print one of several errors, unless the result is JSON and holds it."""
        if not self.as_json:
            print_error(error.code, prefix + error.message, error.hint)

    @contextmanager
    def progress(self) -> Iterator["ProgressDisplay"]:
        """Show the progress of work in one thread: bars on a terminal, lines elsewhere, nothing if silent."""
        from crdiff_export.cli import progress_display

        with progress_display.choose(silent=self.silent) as display:
            yield display

    @contextmanager
    def threads_progress(self) -> Iterator[Progress]:
        """Show the progress of work in several threads, which a signal ends at the next step that is reported."""
        with self.progress() as display, self.stopper.watch(display) as progress:
            yield progress

    def quiet_hub_client(self) -> None:
        """Keep the Hub client's bars to a terminal that wants them, and its warnings to people; before its import."""
        if self.silent or not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        for name, value in _TQDM.items():  # read when tqdm is imported
            os.environ.setdefault(f"TQDM_{name}", value)
        if self.silent:
            os.environ.setdefault("HF_HUB_VERBOSITY", "error")

    def announce_base(self, base: str) -> None:
        """Note that a base may have to be fetched from the Hub first."""
        from crdiff_export.hub import bases

        self.quiet_hub_client()
        if source := bases.hub_uri(base):
            self.notes([f"{source} comes from the Hub, unless it is in the local cache"])


def print_error(
    code: str, message: str, hint: str, problems: Sequence[CrdiffError] = (), *, as_json: bool = False,
    trace: str | None = None,
) -> None:  # fmt: skip
    """Print on stderr what is wrong and what to do; of several problems each one first.

    Args:
        code: The kind of error, for --json.
        message: What is wrong.
        hint: What to do about it; may be empty.
        problems: What has been wrong in all places, if the error only counts them.
        as_json: Print one JSON object instead of text.
        trace: The traceback, if it is to be shown.

    """
    if as_json:
        error: dict[str, Any] = {"code": code, "message": message, "hint": hint}
        if problems:
            error["problems"] = [{"message": problem.message, "hint": problem.hint} for problem in problems]
        if trace:
            error["traceback"] = trace
        print(json.dumps({"schema": SCHEMA, "error": error}), file=sys.stderr)
        return
    if trace:
        print(trace, end="", file=sys.stderr)
    for problem in problems:
        print_error(problem.code, problem.message, problem.hint)
    first = f"crdiff: {printable(message, limit=None)}"
    print(f"\x1b[1;31m{first}\x1b[0m" if _coloured(sys.stderr) else first, file=sys.stderr)
    if hint:
        print(f"  {printable(hint, limit=None)}", file=sys.stderr)


def _print(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        message = f"standard output: {error.strerror}"
        raise CrdiffError(message, "Free some space, or send the output elsewhere.") from error


def _lines(block: Block) -> Iterator[str]:
    if isinstance(block, str):
        yield block
        return
    from crdiff_export.cli import text_table

    width = _terminal_width()
    if isinstance(block, Facts):
        yield from text_table.fact_lines(block.pairs, width)
        return
    header, lines = text_table.table_lines(block, width)
    if header is not None:
        yield f"\x1b[1m{header}\x1b[0m" if width and _coloured(sys.stdout) else header
    can_draw = _can_draw(sys.stdout)
    yield from (line if can_draw else line.translate(_IN_ASCII) for line in lines)


def _terminal_width() -> int | None:
    """Return the columns of the terminal that stdout is, or what COLUMNS says; None if it is no terminal."""
    if not sys.stdout.isatty():
        return None
    stated = os.environ.get("COLUMNS", "")
    if stated.isdecimal() and int(stated):
        return int(stated)
    with contextlib.suppress(OSError):
        return os.get_terminal_size(sys.stdout.fileno()).columns or USUAL_WIDTH
    return USUAL_WIDTH


def _can_draw(stream: TextIO) -> bool:
    """Whether the encoding of a stream has the rules and bars of a table."""
    try:
        _GRAPHICS.encode(stream.encoding)
    except UnicodeEncodeError:
        return False
    return True


def _coloured(stream: IO[str]) -> bool:
    """Whether a stream takes colours: a terminal that knows them, or FORCE_COLOR; never with NO_COLOR."""
    terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    return not os.environ.get("NO_COLOR") and (terminal or bool(os.environ.get("FORCE_COLOR")))
