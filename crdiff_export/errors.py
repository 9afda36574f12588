"""Errors that a user can cause or see; any other exception is a bug and keeps its traceback.

`code` is the error's name in JSON, `exit_code` that of the command line.
"""

from collections.abc import Sequence
from typing import ClassVar


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
    """A plan file has one or more problems; all of them are listed before anything runs."""

    code = "plan-file"

    def __init__(self, name: str, problems: Sequence[CrdiffError]) -> None:
        count = f"{len(problems)} problems" if len(problems) > 1 else "one problem"
        super().__init__(f"{name}: {count}", "Nothing was done; mend the file, then run it again.")
        self.problems = tuple(problems)


class SearchError(CrdiffError):
    """A search cannot begin, go on or be read, because of its storage, its settings or its space."""

    code = "search"


class CalibrationError(CrdiffError):
    """A calibration cannot be made or read, or is of another base than the one it is used with."""

    code = "calibration"
