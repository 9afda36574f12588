"""Who may write to a journal: one at a time, on this machine or another, and nobody for longer than they live.

Optuna's own lock is a symbolic link too, the one thing that every network drive makes for one alone; but it waits for
half a minute when its owner was killed. Ours says who that is, so that others of the machine need not wait.
"""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from crdiff_export.search.lease import alive, machine

GRACE: Final = 30.0  # seconds; Optuna's, after which an owner that we cannot see is thought dead
LONGEST: Final = 0.05  # seconds between two tries


class Lock:
    """The right to write to a file."""

    def __init__(self, path: Path, grace: float = GRACE) -> None:
        self._path = path
        self._link = path.with_name(f"{path.name}.lock")  # Optuna's name, which its own tools respect
        self._grace = grace

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for the right, have it, and give it back; an interruption at any moment leaves nothing behind."""
        mine = f"{machine()} {os.getpid()} {secrets.token_hex(4)}"
        try:
            self._wait(mine)
            yield
        finally:
            if self._owner() == mine:
                self._link.unlink(missing_ok=True)

    def _wait(self, mine: str) -> None:
        pause, since = 0.001, time.monotonic()
        seen: str | None = None
        while not self._take(mine):
            owner = self._owner()
            if owner is not None and owner != seen:
                seen, since = owner, time.monotonic()
            if owner is not None and (_dead(owner) or time.monotonic() - since > self._grace):
                self._break(owner)
                continue
            time.sleep(pause)
            pause = min(2 * pause, LONGEST)

    def _take(self, mine: str) -> bool:
        try:
            self._link.symlink_to(mine)
        except FileExistsError:
            return False
        except OSError:
            return self._take_file(mine)
        return True

    def _take_file(self, mine: str) -> bool:
        """The same where links need a privilege or do not exist."""
        try:
            handle = os.open(self._link, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except (FileExistsError, PermissionError):
            if self._owner() is None and not os.access(self._path.parent, os.W_OK):
                raise
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(mine)
        return True

    def _owner(self) -> str | None:
        with suppress(OSError):
            return str(self._link.readlink())
        with suppress(OSError, ValueError):
            return self._link.read_text("utf-8")
        return None

    def _break(self, owner: str) -> None:
        """Remove the lock of an owner that is no more; of several who would, none may remove that of the next."""
        with self._path.open("rb") as file:
            with suppress(ImportError, OSError):
                from fcntl import LOCK_EX, flock

                flock(file, LOCK_EX)
            if self._owner() == owner:
                self._link.unlink(missing_ok=True)


def _dead(owner: str) -> bool:
    where, _, rest = owner.rpartition(" ")[0].rpartition(" ")
    return where == machine() and rest.isdecimal() and not alive(int(rest))
