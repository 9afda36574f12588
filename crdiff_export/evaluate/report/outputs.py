"""The files that a report goes to: whether they may, before anything is drawn, and the writing, all or none."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from crdiff_export.bake import staging
from crdiff_export.errors import PlanError


def check(asked: Sequence[Path], kinds: Sequence[str], what: str, *, force: bool) -> tuple[Path, ...]:
    """Each of the files once; PlanError where one must not or cannot be. `what` says which kinds may be."""
    found = tuple(dict.fromkeys(asked))
    for path in found:
        try:
            _check(path, kinds, what, force=force)
        except OSError as error:
            raise PlanError(f"{path}: {error.strerror}", "Give another place with -o.") from error
    return found


def _check(path: Path, kinds: Sequence[str], what: str, *, force: bool) -> None:
    if path.suffix.lower() not in kinds:
        name = path.name or "report"
        names = [f"{name}{kind}" for kind in kinds]
        raise PlanError(f"{path}: {what}", f"Name it {', '.join(names[:-1])} or {names[-1]}.")
    if not path.parent.is_dir():
        raise PlanError(f"{path}: the folder {path.parent} does not exist", "Create it, or give another -o.")
    if os.path.lexists(path):
        path.lstat()
        if path.exists() and not path.is_file():
            raise PlanError(f"{path}: not a regular file", "Give another place with -o.")
        if not force:
            raise PlanError(f"{path}: already exists", "Give another -o, or --force to replace it.")
    if not os.access(path.parent, os.W_OK):
        raise PlanError(f"{path}: the folder {path.parent} cannot be written to", "Give another place with -o.")


def write(paths: Sequence[Path], save: Callable[[Path, str], None], *, replace: bool) -> None:
    """Have `save` write each to a sibling, by its suffix, then give them their names; BakeError says why one cannot."""
    with ExitStack() as stack:
        parts: list[Path] = []
        for path in paths:
            try:
                part = stack.enter_context(staging.staged(path, folder=False))
                save(part, path.suffix.lower())
            except OSError as error:
                raise staging.explained(error, path) from error
            parts.append(part)
        for part, path in zip(parts, paths, strict=True):
            try:
                staging.settle(part, path)
                staging.publish(part, path, replace=replace)
            except OSError as error:
                raise staging.explained(error, path) from error
