"""Scorers in somebody else's Python: `module:function`, and what other packages offer as an entry point.

A function whose first parameter is called `images` is the scoring function itself, `(images, prompts) -> list[float]`.
Any other is a factory, `(device, dtype) -> Scorer`. The module may lie in the current folder; what is installed wins.
What its code raises is not caught: it keeps its traceback.
"""

import hashlib
import inspect
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crdiff_export.errors import ScorerError
from crdiff_export.evaluate.scorers.score import Score, Scorer, is_finite

if TYPE_CHECKING:
    from PIL.Image import Image

_MEMBERS = ("name", "score", "fingerprint", "close")


class Function:
    """A function that gives a number for each picture."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self._function = function
        self._module = _text_hash(function)  # of what was loaded, whatever becomes of the file

    def score(self, images: "Sequence[Image]", prompts: Sequence[str]) -> list[Score]:
        answer = self._function(images, prompts)
        try:
            values = list(answer)
        except TypeError as error:
            message = f"{self.name}: gives {type(answer).__name__}, no list of numbers"
            raise ScorerError(message, "Return one finite number for each picture.") from error
        for number, value in enumerate(values, 1):
            if not is_finite(value):
                message = f"{self.name}: the score of picture {number} is {value!r}"
                raise ScorerError(message, "Return one finite number for each picture.")
        return [Score(float(value)) for value in values]

    def fingerprint(self) -> dict[str, str]:
        """Its name, the text of its module, and the version of Python; what else it uses is not seen."""
        return {"name": self.name, "module": self._module, "python": platform.python_version()}

    def close(self) -> None:
        """It holds nothing."""


def _text_hash(function: Callable[..., Any]) -> str:
    """Of the module that a function was written in; a callable object or a partial does not say where that is."""
    try:
        source = inspect.getsourcefile(inspect.unwrap(function))
        return f"sha256:{hashlib.sha256(Path(source or '').read_bytes()).hexdigest()}"
    except (TypeError, OSError):
        return "unknown"


def open_function(spec: str, device: str, dtype: str) -> Scorer:
    """The scorer at `module:function`, where `function` may be `a.b`; ScorerError where there is none."""
    module, _, path = spec.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *path.split("."))):
        raise ScorerError(f"{spec!r} names no function", "Write module:function, as in my_scorers:sharpness.")
    with _current_folder():
        try:
            found: Any = import_module(module)
        except ImportError as error:
            itself = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
            what = f"there is no module {error.name!r}" if itself else f"cannot be imported: {error}"
            hint = "Install it here, or run crdiff in the folder that it is in."
            raise ScorerError(f"{spec}: {what}", hint) from error
        try:
            found = reduce(getattr, path.split("."), found)
        except AttributeError as error:
            message = f"{spec}: {module} has no {path!r}"
            raise ScorerError(message, f"Check the name; it is read from {_place(found)}.") from error
        return made(spec, found, device, dtype)


def loaded(entry: EntryPoint) -> Any:
    """What an entry point leads to; ScorerError where its package is broken."""
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        package = entry.dist.name if entry.dist else entry.value
        hint = f"Install {package} again, or whatever it needs."
        raise ScorerError(f"{entry.name}: {entry.value} cannot be loaded: {error}", hint) from error


def made(name: str, found: Any, device: str, dtype: str) -> Scorer:
    """The scorer that a function is or makes, by the rule above."""
    if not callable(found):
        raise ScorerError(f"{name}: is no function", "Name a scoring function, or one that makes a scorer.")
    try:
        signature = inspect.signature(found)
        if next(iter(signature.parameters), None) == "images":
            return Function(name, found)
        signature.bind(device, dtype)
    except (ValueError, TypeError) as error:  # one that is written in C may not say what it takes
        message = f"{name}: takes neither (images, prompts) nor (device, dtype)"
        raise ScorerError(message, "Name its parameters so; the first one's name decides.") from error
    scorer: Scorer = found(device, dtype)
    lacking = [member for member in _MEMBERS if not hasattr(scorer, member)]
    if lacking:
        raise ScorerError(
            f"{name}: gives no scorer: {type(scorer).__name__} has no {', '.join(lacking)}",
            "Return a `crdiff_export.evaluate.Scorer`, or call the first parameter of a scoring function `images`.",
        )
    return scorer


@contextmanager
def _current_folder() -> Iterator[None]:
    """The current folder as the last place that modules are looked for in."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.reverse()
        sys.path.remove(here)
        sys.path.reverse()


def _place(module: Any) -> str:
    return str(getattr(module, "__file__", None) or getattr(module, "__name__", "an unknown place"))
