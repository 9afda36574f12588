"""Scorers in the user's own Python: `module:function`, and what other packages offer as an entry point.

A function whose first parameter is called `images` is the scoring function itself, `(images, prompts) -> list[float]`.
Any other is a factory, `(device, dtype) -> Scorer`. The module may lie in the current folder; what is installed wins.
An exception of its code becomes an error of one line; `--debug` shows its traceback.
"""

import hashlib
import inspect
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

from crdiff_export.errors import CrdiffError, OptionError, ScorerError, foreign_errors
from crdiff_export.evaluate.scorers.score import SCORER_HINT, FunctionScorer, Scorer

_MEMBERS = ("name", "score", "fingerprint", "close")


def open_function(spec: str, device: str, dtype: str) -> Scorer:
    """Open the scorer at `module:function`, where `function` may be `a.b`; ScorerError if it does not exist."""
    function = import_function(spec, ScorerError, SCORER_HINT)
    with _current_folder():
        return as_scorer(spec, function, device, dtype)


def import_function(spec: str, error_type: type[CrdiffError], hint: str) -> Any:
    """Import what `module:function` names, from the current folder or from what is installed.

    Args:
        spec: The module and the name in it, which may be `a.b`.
        error_type: The class of the error where there is no such function.
        hint: What to do where the module raises an exception.

    Returns:
        The function.

    Raises:
        OptionError: The text does not name a function.
        CrdiffError: An `error_type`: the module or the function does not exist, or the module raised an exception.
    """
    module, _, path = spec.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *path.split("."))):
        raise OptionError(f"{spec!r} names no function", "Write module:function, as in my_scorers:sharpness.")
    with _current_folder(), foreign_errors(error_type, f"{spec}: cannot be imported", hint):
        imported = _import(spec, module, error_type)
    try:
        return reduce(getattr, path.split("."), imported)
    except AttributeError as error:
        file = getattr(imported, "__file__", None) or module
        raise error_type(f"{spec}: {module} has no {path!r}", f"Check the name; it is read from {file}.") from error


def _import(spec: str, module: str, error_type: type[CrdiffError]) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        what = f"there is no module {error.name!r}" if is_missing else f"cannot be imported: {error}"
        hint = "Install it here, or run crdiff in the folder that it is in."
        raise error_type(f"{spec}: {what}", hint) from error


def load_entry_point(entry: EntryPoint) -> Any:
    """Import what an entry point names; ScorerError where its package is broken."""
    with foreign_errors(ScorerError, f"{entry.name}: {entry.value} cannot be loaded", SCORER_HINT):
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            package = entry.dist.name if entry.dist else entry.value
            hint = f"Install {package} again, or whatever it needs."
            raise ScorerError(f"{entry.name}: {entry.value} cannot be loaded: {error}", hint) from error


def as_scorer(name: str, function: Any, device: str, dtype: str) -> Scorer:
    """Make the scorer of a function.

    Args:
        name: What the user calls it.
        function: A scoring function, or a factory.
        device: The device that a factory gets.
        dtype: The dtype that a factory gets: fp32, fp16 or bf16.

    Returns:
        The scorer.

    Raises:
        ScorerError: It is neither, or the factory makes no scorer.
    """
    if not callable(function):
        raise ScorerError(f"{name}: is no function", "Name a scoring function, or one that makes a scorer.")
    try:
        signature = inspect.signature(function)
        if next(iter(signature.parameters), None) == "images":
            # The module is hashed now, before its file may change; what else the function uses cannot be seen.
            record = {"name": name, "module": _module_hash(function), "python": platform.python_version()}
            return FunctionScorer(record, function)
        signature.bind(device, dtype)
    except (ValueError, TypeError) as error:  # ValueError: a function in C may have no signature
        message = f"{name}: takes neither (images, prompts) nor (device, dtype)"
        raise ScorerError(message, "Name its parameters so; the first one's name decides.") from error
    with foreign_errors(ScorerError, name, SCORER_HINT):
        scorer: Scorer = function(device, dtype)
        missing = [member for member in _MEMBERS if not hasattr(scorer, member)]
    if missing:
        raise ScorerError(
            f"{name}: gives no scorer: {type(scorer).__name__} has no {', '.join(missing)}",
            "Return a `crdiff_export.evaluate.Scorer`, or call the first parameter of a scoring function `images`.",
        )
    return scorer


@contextmanager
def _current_folder() -> Iterator[None]:
    """Let modules be imported from the current folder, after all other places."""
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        last = len(sys.path) - 1 - sys.path[::-1].index(folder)
        del sys.path[last]


def _module_hash(function: Callable[..., Any]) -> str:
    """Hash the module that a function was written in; of a callable object or a partial it is not known."""
    try:
        source = inspect.getsourcefile(inspect.unwrap(function))
        return f"sha256:{hashlib.sha256(Path(source or '').read_bytes()).hexdigest()}"
    except (TypeError, OSError):
        return "unknown"
