"""Who works on a trial, and for how long others believe it: a lease, renewed while the worker lives.

Hosts need clocks that agree to within the lease. One that is wrong, or a worker that froze, costs a trial that is done
twice, never one that counts twice: the second to finish finds it finished.
"""

import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from crdiff_export.errors import SearchError
from crdiff_export.search.board import Attempt

LEASE: Final = 120.0  # seconds; a worker of another machine that dies is noticed after so long


class Lost(Exception):
    """The trial was taken from its worker, which was thought dead."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker's name, and the machine on which its process number means something."""

    name: str
    machine: str

    @classmethod
    def here(cls) -> "Worker":
        """A new worker of this process."""
        return cls(f"{platform.node()}:{os.getpid()}:{secrets.token_hex(4)}", machine())


@cache
def machine() -> str:
    """The host since it was started, and the container's own count of processes: elsewhere a number is another's."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return "/".join(parts)


def expired(attempt: Attempt, worker: Worker, now: float) -> bool:
    """Whether a running trial is nobody's: its lease is over, or its process, on this machine, is no more."""
    return attempt.until < now or (attempt.machine == worker.machine and not alive(_pid(attempt.worker)))


def alive(pid: int) -> bool:
    """Whether a process of this machine may still be there; always where that cannot be told."""
    if os.name != "posix" or pid <= 0:
        return True  # elsewhere a signal 0 is a Ctrl-C; the lease decides
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    with suppress(OSError, IndexError):
        # One that was killed and whose parent has not looked yet does no more than one that is gone: proc(5).
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] not in "ZX"
    return True


def _pid(name: str) -> int:
    parts = name.split(":")
    return int(parts[-2]) if len(parts) > 2 and parts[-2].isdecimal() else 0


@contextmanager
def held(renew: Callable[[float], None], leave: Callable[[], None], seconds: float) -> Iterator[Callable[[], None]]:
    """Renew a lease in the background; what is yielded raises Lost once it cannot be renewed because it was taken.

    `leave` is called in the thread that renews, at its end.
    """
    over = threading.Event()
    lost = threading.Event()

    def keep() -> None:
        while not over.wait(seconds / 4):
            try:
                renew(time.time() + seconds)
            except Lost:
                lost.set()
                break
            except SearchError:
                continue  # the storage is away: the worker itself will find out, or it comes back
        leave()

    def check() -> None:
        if lost.is_set():
            raise Lost

    thread = threading.Thread(target=keep, name="crdiff-lease", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        over.set()
        thread.join()
