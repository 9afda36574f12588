"""Signals that end a command: at once where that is safe, otherwise at its next step; it cleans up in both cases.

An exception that a signal handler raises can come just after a lock was taken and before the block that releases it;
other threads then wait for ever. So a signal is only recorded while threads are at work, and `Stopper.watch` raises it
where the work reports progress.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from crdiff_export.progress import Progress

# Added to a signal's number this is the exit code in every shell: 130 interrupted, 143 terminated.
BY_SIGNAL = 128
# A second signal within so many seconds is ignored; a later one shows that the first was not obeyed.
PATIENCE = 5.0
# A signal that came where Python drops exceptions is repeated after so many seconds.
REPEAT_AFTER = 0.1


class Stopped(BaseException):
    """A signal to end. It unwinds everything, so that temp files go; no library catches it, as some catch Ctrl-C.

    `outcome` and `hint` are for people; work that leaves something behind says there what, and how it goes on.
    """

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.outcome = "nothing half-done was left behind"
        self.hint = ""
        self.exit_code = BY_SIGNAL + signum
        self.word = "interrupted" if signum == signal.SIGINT else "terminated"


class Stopper:
    """The handler of the signals that end a command."""

    def __init__(self) -> None:
        self._since = -PATIENCE
        self._signum: int | None = None
        self._watching = False
        self._dropped = False
        self._unraisable = sys.unraisablehook
        # Only the main thread can take signals, and Windows has no SIGHUP. A signal that is ignored from the start
        # (nohup, a shell's `&`) stays ignored.
        signals = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
        main = threading.current_thread() is threading.main_thread()
        self._signals = [s for s in signals if main and s is not None and signal.getsignal(s) is not signal.SIG_IGN]

    def __call__(self, signum: int, _frame: FrameType | None) -> None:
        again, self._dropped = self._signum is not None and not self._dropped, False
        if again and time.monotonic() - self._since < PATIENCE:
            return
        self._since = time.monotonic()
        self._signum = self._signum or signum
        if again or not self._watching:
            raise Stopped(self._signum)

    def install(self) -> None:
        """Let signals unwind from here on."""
        if self._signals:
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._repeat
        for signum in self._signals:
            signal.signal(signum, self)

    def remove(self) -> None:
        """Let signals end the process at once from here on, as nothing is left to be cleaned up."""
        if self._signals:
            sys.unraisablehook = self._unraisable
        for signum in self._signals:
            signal.signal(signum, signal.SIG_DFL)

    def _repeat(self, dropped: "sys.UnraisableHookArgs") -> None:
        """Repeat a signal that came in a destructor or an import hook, where Python drops exceptions."""
        if self._signum is None or not isinstance(dropped.exc_value, Stopped):
            self._unraisable(dropped)
            return
        self._dropped = True
        timer = threading.Timer(REPEAT_AFTER, signal.raise_signal, (self._signum,))
        timer.daemon = True
        timer.start()

    @contextmanager
    def watch(self, progress: Progress) -> Iterator[Progress]:
        """Give a progress for work in several threads: a signal unwinds from the next step that is reported to it."""
        self._watching = True
        try:
            yield _StoppableProgress(progress, self)
        finally:
            self._watching = False
        self.check()

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Let a signal unwind at once within a `watch`, while no thread of ours is at work."""
        self.check()
        self._watching = False
        try:
            self.check()
            yield
        finally:
            self._watching = True

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self._signum is not None:
            raise Stopped(self._signum)


class _StoppableProgress:
    def __init__(self, progress: Progress, stopper: Stopper) -> None:
        self._progress, self._stopper = progress, stopper

    def stage(self, title: str, size: int, unit: str = "bytes") -> None:
        self._stopper.check()
        self._progress.stage(title, size, unit)

    def advance(self, size: int) -> None:
        self._stopper.check()
        self._progress.advance(size)
