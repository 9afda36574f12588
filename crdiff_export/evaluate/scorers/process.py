"""A program that runs beside this one and is talked to in lines; it can neither block this one nor outlive it."""

import contextlib
import os
import queue
import select
import shutil
import subprocess
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import IO, Final

GRACE: Final = 5.0  # seconds to end by itself, or to answer what it has read
LINE: Final = 1 << 20  # bytes; a longer line comes in pieces of so many
KEPT: Final = 5  # the last lines of its stderr
AHEAD: Final = 1024  # lines of its stdout that wait to be read; then it waits


class Silence(Enum):
    """Why there is no line."""

    LATE = "late"
    DEAF = "closed its stdin"
    ENDED = "closed its stdout"


class Program:
    """A program started without a shell, in a session of its own, so that what it starts is ended with it.

    `folder` is removed when it has ended: with `end`, with `kill`, or with this object.
    """

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        """OSError or ValueError where it cannot be started; the folder is then left to the caller."""
        self._popen = subprocess.Popen(  # noqa: S603  what the user asked for, and no shell reads it
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        pipes = self._popen.stdin, self._popen.stdout, self._popen.stderr
        assert pipes[0] and pipes[1] and pipes[2]  # noqa: PT018  one fact
        self._stdin = pipes[0]
        self._lines: queue.Queue[bytes | None] = queue.Queue(AHEAD)
        self._said: deque[bytes] = deque(maxlen=KEPT)
        self._deaf = threading.Event()
        self._readers = (_beside(_read, pipes[1], self._lines), _beside(_keep, pipes[2], self._said))
        self._end = weakref.finalize(self, _end, self._popen, self._readers, self._lines, folder)

    @property
    def running(self) -> bool:
        """Whether it has not been ended from here."""
        return self._end.alive

    @property
    def ahead(self) -> bool:
        """Whether there is a line that nobody has read; that its stdout is at an end is none."""
        with self._lines.mutex:
            return any(line is not None for line in self._lines.queue)

    def send(self, lines: Sequence[bytes]) -> None:
        """Write lines to it, as fast as it reads them; do not wait for that."""
        _beside(_write, self._stdin, lines, self._deaf)

    def receive(self, seconds: float) -> bytes | Silence:
        """Its next line with the line's end, or why there is none."""
        end, deaf = time.monotonic() + seconds, False
        while True:
            left = end - time.monotonic()
            try:
                line = self._lines.get(timeout=max(0.0, min(0.1, left)))
            except queue.Empty:
                if not deaf and (
                    self._deaf.is_set() or _is_refused(self._stdin)
                ):  # it may still answer what it read before
                    deaf, end = True, min(end, time.monotonic() + GRACE)
                elif left <= 0:
                    return Silence.DEAF if deaf else Silence.LATE
            else:
                return Silence.ENDED if line is None else line

    def status(self) -> int | None:
        """How it ended, as `subprocess` says it; None where it runs on."""
        try:
            status = self._popen.wait(GRACE)
        except subprocess.TimeoutExpired:
            return None
        self._readers[1].join(GRACE)  # its last words are there
        return status

    def last_words(self, limit: int = 600) -> str:
        """The end of what it wrote to stderr, in one line."""
        lines = [line.decode(errors="replace").strip() for line in tuple(self._said)]
        return " / ".join(line if line.isprintable() else ascii(line) for line in lines if line)[-limit:]

    def end(self) -> None:
        """Close its stdin and give it a moment; it may be called twice."""
        self._end()

    def kill(self) -> None:
        """End it at once."""
        _kill(self._popen)
        self._end()


def _beside(act: Callable[..., None], *args: object) -> threading.Thread:
    thread = threading.Thread(target=act, args=args, name="crdiff-scorer", daemon=True)
    thread.start()
    return thread


def _read(pipe: IO[bytes], lines: "queue.Queue[bytes | None]") -> None:
    with pipe:
        while line := pipe.readline(LINE):
            lines.put(line)
    lines.put(None)


def _keep(pipe: IO[bytes], said: "deque[bytes]") -> None:
    with pipe:
        while line := pipe.readline(LINE):
            said.append(line)


def _write(pipe: IO[bytes], lines: Sequence[bytes], deaf: threading.Event) -> None:
    try:
        for line in lines:
            pipe.write(line)
            pipe.flush()
    except (OSError, ValueError):  # it has closed the pipe, or we have
        deaf.set()


def _is_refused(pipe: IO[bytes]) -> bool:
    """Whether nobody can read any more what is written, though it may still have had a place in the pipe."""
    if pipe.closed or not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(pipe, 0)
    return bool(poll.poll(0))


def _kill(popen: "subprocess.Popen[bytes]") -> None:
    """End it and all that it started."""
    if os.name == "posix":
        import signal

        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(popen.pid, signal.SIGKILL)
    elif popen.poll() is None:
        popen.kill()


def _end(
    popen: "subprocess.Popen[bytes]",
    readers: Sequence[threading.Thread],
    lines: "queue.Queue[bytes | None]",
    folder: Path,
) -> None:
    try:
        with contextlib.suppress(OSError):  # it ended before it had read all
            popen.stdin.close() if popen.stdin else None
        with contextlib.suppress(subprocess.TimeoutExpired):
            popen.wait(GRACE)
        _kill(popen)
        popen.wait()
        end = time.monotonic() + GRACE
        while any(reader.is_alive() for reader in readers) and time.monotonic() < end:
            with contextlib.suppress(queue.Empty):  # a full queue would keep its reader
                lines.get(timeout=0.01)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
