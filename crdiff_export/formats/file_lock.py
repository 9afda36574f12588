"""A lock on a file or folder that marks it as in use by a living process; the system drops it when the process ends."""

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be deleted and so needs no lock
    fcntl = None  # type: ignore[assignment]


def lock(path: Path, *, wait: bool = False) -> int | None:
    """Lock a file or folder for this process.

    Args:
        path: An existing file or folder.
        wait: Whether to wait until no other process has the lock.

    Returns:
        An open handle, which holds the lock until it is closed; None on a system without such locks.

    Raises:
        BlockingIOError: Another process has the lock, and `wait` is not set.
        OSError: The file system has no locks.

    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:  # a signal, too, where it waits
        os.close(handle)
        raise
    return handle
