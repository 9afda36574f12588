"""Temp siblings: a file or folder appears under its name only when it is complete."""

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from crdiff_export.errors import BakeError
from crdiff_export.formats import file_lock
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.progress import Progress

_PART = ".crdiff-part"
_OLD = ".crdiff-old"
# Longer names, in bytes, have no room for prefix and suffix; file systems allow 255 in all.
_LONGEST_NAME = 200
# linux/fs.h RENAME_EXCHANGE, fcntl.h AT_FDCWD
_EXCHANGE = 2
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_AT_FDCWD = -100


@contextlib.contextmanager
def temp_sibling(target: Path, folder: bool) -> Iterator[Path]:
    """Create a temp sibling of `target` for the context, and remove it at the end unless `publish` has moved it.

    Siblings that a killed run left behind are removed first; those of a running process stay.

    Args:
        target: The path that the sibling will get in the end.
        folder: Create a folder, not a file.

    Yields:
        The path of the empty file or folder.
    """
    clean(target)
    part, handle = _name(target), None
    try:
        while True:
            try:
                handle = _create(part, folder)
                break
            except BlockingIOError:
                part = _name(target)
        yield part
    finally:
        try:
            _remove(part)
        except BaseException:  # an interrupt, which comes only once: try again
            _remove(part)
            raise
        finally:
            if handle is not None:
                os.close(handle)


def publish(part: Path, target: Path, *, replace: bool = True) -> None:
    """Move a finished temp sibling to its name in one step and make the move durable.

    Args:
        part: The temp sibling.
        target: Its final path.
        replace: Replace what exists there.

    Raises:
        FileExistsError: Without `replace`, something other than an empty folder exists there.
    """
    if part.is_dir():
        _publish_folder(part, target, replace=replace)
    elif replace:
        part.replace(target)
    else:
        _link(part, target)
    sync_folder(target.parent)


@contextlib.contextmanager
def publish_first(part: Path, target: Path, *, replace: bool) -> Iterator[None]:
    """Publish a file, then run the context; if the context fails, put back what was there before.

    Args:
        part: The finished temp sibling.
        target: Its final path.
        replace: Replace what exists there.

    Yields:
        None, once the file is published.
    """
    old = part.with_name(part.name.removesuffix(_PART) + _OLD)
    try:
        if replace and os.path.lexists(target):
            target.rename(old)
        publish(part, target, replace=replace)
        try:
            yield
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    except BaseException:
        if os.path.lexists(old):
            old.rename(target)
        raise
    old.unlink(missing_ok=True)


def _publish_folder(part: Path, target: Path, *, replace: bool) -> None:
    if not replace or not target.exists():
        try:
            if sys.platform == "win32" and target.is_dir():
                target.rmdir()
            part.rename(target)  # POSIX: over an empty folder, too, and over no other
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
            raise
    else:
        _swap(part, target)


def _link(part: Path, target: Path) -> None:
    """Give a file its name unless the name is taken, in one step where the file system has hard links."""
    try:
        os.link(part, target)
    except FileExistsError:
        raise
    except OSError:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        part.replace(target)


def copy_companions(checkpoint: Checkpoint, part: Path, progress: Progress) -> None:
    """Copy and write the files beside the weights of a checkpoint, and make everything in the new folder durable.

    Args:
        checkpoint: The checkpoint to copy from.
        part: The folder to copy to; a file, which has no companions, stays as it is.
        progress: Is told about the bytes copied.
    """
    sizes = {name: (checkpoint.home / name).stat().st_size for name in checkpoint.companions}
    if sizes:
        progress.stage("copying", sum(sizes.values()))
    for name, size in sizes.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.home / name, part / name)
        _sync(part / name, os.O_RDWR)
        progress.advance(size)
    for generated, content in checkpoint.generated.items():
        (part / generated).write_bytes(content)
        _sync(part / generated, os.O_RDWR)
    if part.is_dir():
        for folder in {p.parent for p in part.rglob("*")}:
            sync_folder(folder)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_permissions(part: Path, target: Path) -> None:
    """Give a file the permissions of the file that it will replace, if there is one.

    Args:
        part: The temp sibling; a folder stays as it is.
        target: Its final path.
    """
    if part.is_file() and target.exists():
        with contextlib.suppress(OSError):
            shutil.copymode(target, part)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where the system supports it."""
    with contextlib.suppress(OSError):
        _sync(path, os.O_RDONLY)


def _swap(part: Path, target: Path) -> None:
    """Exchange two folders; the old target is then at `part`, which `temp_sibling` removes."""
    if sys.platform == "linux":
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        names = os.fsencode(part), os.fsencode(target)
        if renameat2 and renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_EXCHANGE)) == 0:
            return
    # Elsewhere in two steps; after a kill between them the next run's `clean` puts the old folder back.
    old = part.with_name(part.name.removesuffix(_PART) + _OLD)
    try:
        target.rename(old)
        part.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def clean(target: Path) -> None:
    """Remove temp siblings that a killed run left beside `target`, and put back a folder that it had moved away."""
    name = "".join(f"[{c}]" if c in "*?[" else c for c in _short(target.name))
    for old in target.parent.glob(f".{name}.????????????{_OLD}"):
        with contextlib.suppress(OSError):
            _remove(old) if target.exists() else old.replace(target)
    for part in target.parent.glob(f".{name}.????????????{_PART}"):
        with contextlib.suppress(OSError):
            handle = file_lock.lock(part)
            try:
                _remove(part)
            finally:
                if handle is not None:
                    os.close(handle)


def _create(part: Path, folder: bool) -> int | None:
    """Create a temp sibling and return the locked handle that marks it as in use; None without file locks.

    Raises:
        BlockingIOError: Another process is just removing it, because it was not locked yet.
    """
    part.mkdir() if folder else part.touch(exist_ok=False)
    try:
        handle = file_lock.lock(part)
    except FileNotFoundError as error:
        raise BlockingIOError from error
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return None
    if handle is not None and not (part.exists() and os.path.samestat(os.fstat(handle), part.stat())):
        os.close(handle)
        raise BlockingIOError
    return handle


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _name(target: Path) -> Path:
    return target.parent / f".{_short(target.name)}.{uuid.uuid4().hex[:12]}{_PART}"


def _short(name: str) -> str:
    """Return the name, or a hash of a name that is too long to add to."""
    raw = os.fsencode(name)
    return name if len(raw) <= _LONGEST_NAME else hashlib.sha256(raw).hexdigest()


def as_bake_error(error: OSError, target: Path) -> BakeError:
    """Turn an error of the file system into a BakeError.

    Args:
        error: What the system raised.
        target: The output that it concerns.

    Returns:
        The error to raise.
    """
    message = f"{target}: {error.strerror or error}"
    if isinstance(error, FileExistsError):
        return BakeError(f"{target}: came there during the export", "Give another -o, or --force to replace it.")
    if error.errno in _FULL:
        return BakeError(f"{message}; nothing was left behind", "Free some space, or give another place with -o.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return BakeError(message, "Give a place you may write to with -o.")
    return BakeError(message, "Check the paths, then run the export again; the target is as it was.")
