"""Ctrl-C and its relatives: a command ends at once where that is safe, else at its next step, and cleans up first.

An exception out of a signal handler can come between the taking of a lock and the block that gives it back; other
threads then wait for ever. So, while threads are at work, a signal is only noted, and `watch` raises it where the work
reports its progress.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from crdiff_export.progress import Progress

# What a signal's exit code is made of in every shell: 130 interrupted, 143 terminated.
BY_SIGNAL = 128
# Seconds after which a second signal is taken for a sign that the first one is not being obeyed.
PATIENCE = 5.0
# Seconds after which a signal is repeated that came where Python drops exceptions.
ELSEWHERE = 0.01


class Stopped(BaseException):
    """A signal to end. Unwinds everything, so that temp files go; no library catches it, as some catch Ctrl-C."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.exit_code = BY_SIGNAL + signum
        self.word = "interrupted" if signum == signal.SIGINT else "terminated"


class Stopper:
    """What the signals to end do."""

    def __init__(self) -> None:
        self._since = -PATIENCE
        self._noted: int | None = None
        self._watching = False
        self._dropped = False
        self._unraisable = sys.unraisablehook
        # A thread cannot take signals, and Windows has no SIGHUP. Those that whoever started us wants ignored
        # (nohup, a shell's `&`) stay ignored.
        known = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
        here = threading.current_thread() is threading.main_thread()
        self._signals = [s for s in known if here and s is not None and signal.getsignal(s) is not signal.SIG_IGN]

    def __call__(self, signum: int, _frame: FrameType | None) -> None:
        again, self._dropped = self._noted is not None and not self._dropped, False
        if again and time.monotonic() - self._since < PATIENCE:
            return
        self._since = time.monotonic()
        self._noted = self._noted or signum
        if again or not self._watching:
            raise Stopped(self._noted)

    def install(self) -> None:
        """From here on a signal unwinds."""
        if self._signals:
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._again
        for signum in self._signals:
            signal.signal(signum, self)

    def remove(self) -> None:
        """From here on it ends the process at once, as nothing is left to be cleaned up."""
        if self._signals:
            sys.unraisablehook = self._unraisable
        for signum in self._signals:
            signal.signal(signum, signal.SIG_DFL)

    def _again(self, dropped: "sys.UnraisableHookArgs") -> None:
        """Have a signal come again that came in a destructor or a callback of the import system, where it ended
        nothing and was reported as a fault."""
        if self._noted is None or not isinstance(dropped.exc_value, Stopped):
            self._unraisable(dropped)
            return
        self._dropped = True
        timer = threading.Timer(ELSEWHERE, signal.raise_signal, (self._noted,))
        timer.daemon = True
        timer.start()

    @contextmanager
    def watch(self, progress: Progress) -> Iterator[Progress]:
        """A progress for work in several threads: a signal unwinds from the next step that is reported to it."""
        self._watching = True
        try:
            yield _Watched(progress, self)
        finally:
            self._watching = False
        self.check()

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Within a `watch`, while no thread of ours is at work: a signal unwinds at once."""
        self.check()
        self._watching = False
        try:
            self.check()
            yield
        finally:
            self._watching = True

    def check(self) -> None:
        """Raise what has been noted."""
        if self._noted is not None:
            raise Stopped(self._noted)


class _Watched:
    def __init__(self, progress: Progress, stopper: Stopper) -> None:
        self._progress, self._stopper = progress, stopper

    def stage(self, title: str, size: int, unit: str = "bytes") -> None:
        self._stopper.check()
        self._progress.stage(title, size, unit)

    def advance(self, size: int) -> None:
        self._stopper.check()
        self._progress.advance(size)
