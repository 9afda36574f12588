"""Temp siblings: what is written becomes visible under its name only when it is complete, or not at all."""

import contextlib
import ctypes
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be deleted and so needs no lock
    fcntl = None  # type: ignore[assignment]

_PART = ".crdiff-part"
_OLD = ".crdiff-old"
# linux/fs.h RENAME_EXCHANGE, fcntl.h AT_FDCWD
_EXCHANGE = 2
_AT_FDCWD = -100


@contextlib.contextmanager
def staged(target: Path, folder: bool) -> Iterator[Path]:
    """A temp sibling of `target`, an empty file or folder; it is gone at the end unless `publish` has moved it.

    Siblings that a killed run left are removed first; those of a run that is still going are not.
    """
    clean(target)
    part, lock = _create(target, folder)
    try:
        yield part
    finally:
        if lock is not None:
            os.close(lock)
        _remove(part)


def publish(part: Path, target: Path) -> None:
    """Move a finished part to its name in one step, over what was there, and make the move durable."""
    if part.is_dir() and target.exists():
        _swap(part, target)
    else:
        part.replace(target)
    sync_folder(target.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(part: Path, target: Path) -> None:
    """Exchange two folders; what was at `target` is then at `part`, which `staged` removes."""
    if sys.platform == "linux":
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        names = os.fsencode(part), os.fsencode(target)
        if renameat2 and renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_EXCHANGE)) == 0:
            return
    # Elsewhere in two steps; after a kill between them the next run's `clean` puts the old folder back.
    old = part.with_name(part.name.removesuffix(_PART) + _OLD)
    target.replace(old)
    try:
        part.replace(target)
    except OSError:
        old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def clean(target: Path) -> None:
    """Remove what a killed run left beside `target`, and put back a folder that it had moved away."""
    name = _escape(target.name)
    for old in target.parent.glob(f".{name}.????????????{_OLD}"):
        with contextlib.suppress(OSError):
            _remove(old) if target.exists() else old.replace(target)
    for part in target.parent.glob(f".{name}.????????????{_PART}"):
        handle, held = _lock(part)
        if held:
            with contextlib.suppress(OSError):
                _remove(part)
        if handle is not None:
            os.close(handle)


def _create(target: Path, folder: bool) -> tuple[Path, int | None]:
    """A new part and the handle that holds its lock; again where another run's `clean` took it for a left-over."""
    while True:
        part = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}{_PART}"
        part.mkdir() if folder else part.touch(exist_ok=False)
        handle, held = _lock(part)
        if part.exists() and (held or not fcntl):
            return part, handle
        if handle is not None and part.exists():  # a file system without locks
            return part, handle
        if handle is not None:
            os.close(handle)


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _lock(path: Path) -> tuple[int | None, bool]:
    """An open handle, and whether it holds the lock that marks a part as belonging to a living process."""
    if fcntl is None:
        return None, True  # Windows: removing a file that is open fails
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None, False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return handle, False
    return handle, True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
