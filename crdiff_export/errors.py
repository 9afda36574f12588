"""Errors that a user can cause or see; any other exception is a bug and keeps its traceback.

`code` is the error's name in JSON, `exit_code` that of the command line.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

_PACKAGE = Path(__file__).parent


class CrdiffError(Exception):
    """An error for people: `message` says what is wrong, with file and key; `hint` says what to do about it."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "failed"

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}"


class CheckpointError(CrdiffError):
    """A file cannot be read as a checkpoint."""

    code = "checkpoint"


class FamilyError(CrdiffError):
    """A checkpoint has the layers of no known model family."""

    code = "family"


class RecipeError(CrdiffError):
    """A recipe file, an alias or a size cannot be used."""

    code = "recipe"


class OptionError(RecipeError):
    """An option is wrong, or does not go with the base or with another option."""

    exit_code = 2
    code = "usage"


class PromptsError(CrdiffError):
    """A file of prompts cannot be read."""

    code = "prompts"


class PlanError(CrdiffError):
    """A request is impossible, which names, shapes and options alone show."""

    code = "plan"


class BakeError(CrdiffError):
    """A write failed; the target is as it was."""

    code = "bake"


class VerifyError(CrdiffError):
    """A file does not hold what its header says."""

    exit_code = 3
    code = "verify"


class HubError(CrdiffError):
    """The Hub did not answer, or refused."""

    exit_code = 4
    code = "hub"


class PackError(CrdiffError):
    """A pack is damaged or none, has not the size that is wanted, or is of another base."""

    code = "pack"


class PoaError(CrdiffError):
    """POA is impossible with this model, file or number."""

    code = "poa"


class PreviewError(CrdiffError):
    """Pictures cannot be drawn: the model cannot be opened, or the machine is too small."""

    code = "preview"


class CardError(CrdiffError):
    """A model card's front matter or managed section cannot be edited safely."""

    code = "card"


class ScorerError(CrdiffError):
    """A scorer cannot be found, opened or run, or does not return a score."""

    code = "scorer"


class PlanFileError(CrdiffError):
    """A plan file has one or more problems; all of them are listed before anything runs.

    A problem without a name is the whole error: the file cannot be read.
    """

    code = "plan-file"

    def __init__(self, name: str, problems: Sequence[CrdiffError]) -> None:
        if not name:
            super().__init__(problems[0].message, problems[0].hint)
            self.problems: tuple[CrdiffError, ...] = ()
            return
        count = f"{len(problems)} problems" if len(problems) > 1 else "one problem"
        super().__init__(f"{name}: {count}", "Nothing was done; correct the file, then run it again.")
        self.problems = tuple(problems)


class SearchError(CrdiffError):
    """A search cannot begin, go on or be read, because of its storage, its settings or its space."""

    code = "search"


class CalibrationError(CrdiffError):
    """A calibration cannot be made or read, or is of another base than the one it is used with."""

    code = "calibration"


class CriterionError(CrdiffError):
    """A criterion of another package fails."""

    code = "criterion"


@contextmanager
def foreign_errors(error_type: type[CrdiffError], what: str, hint: str) -> Iterator[None]:
    """Turn an exception of code that is not ours into an error for people.

    What the called code raises becomes that error, and so does what the `with` block raises itself, e.g. a `TypeError`
    because a function takes other arguments or returned what it should not. What a function of this package
    raises, called from the block, is a bug and passes with its traceback; `MemoryError` and its kind pass as well.

    Args:
        error_type: The class of the error.
        what: Whose code it is, with which the message begins.
        hint: What to do; the traceback is shown on request.

    Yields:
        Nothing; the code runs in the `with` block.

    Raises:
        CrdiffError: An `error_type`, with the kind and the first line of the exception.
    """
    try:
        yield
    except CrdiffError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error) or _is_ours(error):
            raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        text = f"{type(error).__name__}: {first}" if first else type(error).__name__
        raise error_type(f"{what}: {text}", f"{hint} --debug shows the traceback.") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is too small, for Python or on a device."""
    words = str(error).lower()
    phrases = ("out of memory", "can't allocate memory", "not enough memory")
    is_runtime = isinstance(error, RuntimeError) and any(phrase in words for phrase in phrases)
    return isinstance(error, MemoryError) or is_runtime


def _is_ours(error: BaseException) -> bool:
    """Whether an exception comes from a function of this package that the guarded block called."""
    trace = error.__traceback__
    block = trace.tb_next if trace else None  # below the frame of `foreign_errors` is that of the block
    if block is None or block.tb_next is None:
        return False
    while block.tb_next:
        block = block.tb_next
    return Path(block.tb_frame.f_code.co_filename).is_relative_to(_PACKAGE)
