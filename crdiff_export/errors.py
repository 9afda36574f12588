"""The errors a user can cause; anything else that is raised is a bug and keeps its traceback."""

from collections.abc import Sequence
from typing import ClassVar


class CrdiffError(Exception):
    """What is wrong, in one line with the file and the key, and in one more line what to do about it."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "failed"

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}"


class CheckpointError(CrdiffError):
    """A file that cannot be read as a checkpoint."""

    code = "checkpoint"


class FamilyError(CrdiffError):
    """A checkpoint whose layers no known model family has."""

    code = "family"


class RecipeError(CrdiffError):
    """A recipe file, an alias or a size that cannot be used."""

    code = "recipe"


class OptionError(RecipeError):
    """An option that does not go with the base: the command line is what is wrong."""

    exit_code = 2
    code = "usage"


class PlanError(CrdiffError):
    """A request that names, shapes or flags alone show to be impossible."""

    code = "plan"


class BakeError(CrdiffError):
    """A write that did not reach its target; the target is as it was."""

    code = "bake"


class VerifyError(CrdiffError):
    """A file that does not hold what its header says."""

    exit_code = 3
    code = "verify"


class HubError(CrdiffError):
    """The Hub did not answer, or answered no."""

    exit_code = 4
    code = "hub"


class PoaError(CrdiffError):
    """A model, a file or a number that POA cannot be done with."""

    code = "poa"


class PreviewError(CrdiffError):
    """Pictures that cannot be made: a model that cannot be opened, a machine that is too small."""

    code = "preview"


class CardError(CrdiffError):
    """A model card whose front matter or marked section cannot be edited safely."""

    code = "card"


class ScorerError(CrdiffError):
    """A scorer that cannot be found, opened or asked, or an answer of one that is no score."""

    code = "scorer"


class MatrixError(CrdiffError):
    """A plan file with one or more problems, all of them found before anything runs."""

    code = "matrix"

    def __init__(self, name: str, problems: Sequence[CrdiffError]) -> None:
        count = f"{len(problems)} problems" if len(problems) > 1 else "one problem"
        super().__init__(f"{name}: {count}", "Nothing was done; mend the file, then run it again.")
        self.problems = tuple(problems)


class SearchError(CrdiffError):
    """A search that cannot begin, go on or be read: its storage, its settings, or what it is asked to try."""

    code = "search"


class CalibrationError(CrdiffError):
    """A calibration that cannot be made or read, or that is of another base than the one it is used with."""

    code = "calibration"
