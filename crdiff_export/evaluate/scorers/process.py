"""A program that runs beside this one and talks to it in lines; it can neither block this one nor outlive it."""

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
LONGEST_LINE: Final = 1 << 20  # bytes; a longer line comes in pieces
LAST_LINES: Final = 5  # lines of its stderr that are kept
AHEAD: Final = 1024  # lines of its stdout that wait to be read; the program waits then


class Silence(Enum):
    """Why there is no line."""

    LATE = "late"
    DEAF = "closed its stdin"
    ENDED = "closed its stdout"


class Program:
    """A program started without a shell, in a session of its own, so that its children end with it.

    `folder` is removed when it has ended: with `end`, with `kill`, or with this object.
    """

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        """Start it; OSError or ValueError where that fails, and the folder is then left to the caller."""
        pipe = subprocess.PIPE
        self._popen = subprocess.Popen(  # noqa: S603  the user's own command, and no shell reads it
            words, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        stdin, stdout, stderr = self._popen.stdin, self._popen.stdout, self._popen.stderr
        assert stdin and stdout and stderr  # noqa: PT018  one fact
        self._stdin = stdin
        self._lines: queue.Queue[bytes | None] = queue.Queue(AHEAD)
        self._stderr: deque[bytes] = deque(maxlen=LAST_LINES)
        self._is_deaf = threading.Event()
        self._readers = (
            _start_thread(_read_answers, stdout, self._lines),
            _start_thread(_read, stderr, self._stderr.append),
        )
        self._end = weakref.finalize(self, _end, self._popen, self._readers, self._lines, folder)

    @property
    def running(self) -> bool:
        """Whether it has not been ended from here."""
        return self._end.alive

    @property
    def has_lines(self) -> bool:
        """Whether there is a line that was not received yet."""
        with self._lines.mutex:
            return any(line is not None for line in self._lines.queue)

    def send(self, lines: Sequence[bytes]) -> None:
        """Write lines to it, as fast as it reads them; do not wait for that."""
        _start_thread(_write, self._stdin, lines, self._is_deaf)

    def receive(self, seconds: float) -> bytes | Silence:
        """Return its next line with the line's end, or the reason why no line came in time."""
        end, is_deaf = time.monotonic() + seconds, False
        while True:
            left = end - time.monotonic()
            try:
                line = self._lines.get(timeout=max(0.0, min(0.1, left)))
            except queue.Empty:
                # It may still answer what it read before it closed its stdin.
                if not is_deaf and (self._is_deaf.is_set() or _is_refused(self._stdin)):
                    is_deaf, end = True, min(end, time.monotonic() + GRACE)
                elif left <= 0:
                    return Silence.DEAF if is_deaf else Silence.LATE
            else:
                return Silence.ENDED if line is None else line

    def status(self) -> int | None:
        """Return how it ended, as `subprocess` says it; None where it runs on."""
        try:
            status = self._popen.wait(GRACE)
        except subprocess.TimeoutExpired:
            return None
        self._readers[1].join(GRACE)  # then its last words are there
        return status

    def last_words(self, limit: int = 600) -> str:
        """Return the end of what it wrote to stderr, in one line."""
        lines = [line.decode(errors="replace").strip() for line in tuple(self._stderr)]
        return " / ".join(line if line.isprintable() else ascii(line) for line in lines if line)[-limit:]

    def end(self) -> None:
        """Close its stdin and give it a moment; it may be called twice."""
        self._end()

    def kill(self) -> None:
        """End it at once."""
        _kill(self._popen)
        self._end()


def _start_thread(act: Callable[..., None], *args: object) -> threading.Thread:
    thread = threading.Thread(target=act, args=args, name="crdiff-scorer", daemon=True)
    thread.start()
    return thread


def _read(pipe: IO[bytes], receive: Callable[[bytes], None]) -> None:
    with pipe:
        while line := pipe.readline(LONGEST_LINE):
            receive(line)


def _read_answers(pipe: IO[bytes], lines: "queue.Queue[bytes | None]") -> None:
    """Put each line of a pipe into the queue, and None at its end."""
    _read(pipe, lines.put)
    lines.put(None)


def _write(pipe: IO[bytes], lines: Sequence[bytes], is_deaf: threading.Event) -> None:
    try:
        for line in lines:
            pipe.write(line)
            pipe.flush()
    except (OSError, ValueError):  # the program or this side has closed the pipe
        is_deaf.set()


def _is_refused(pipe: IO[bytes]) -> bool:
    """Say whether the program can no longer read what is written, though the pipe may still have room for it."""
    if pipe.closed or not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(pipe, 0)
    return bool(poll.poll(0))


def _kill(popen: "subprocess.Popen[bytes]") -> None:
    """End it and its children."""
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
    """End it, and wait for the threads that read from it."""
    try:
        with contextlib.suppress(OSError):  # it ended before it had read everything
            popen.stdin.close() if popen.stdin else None
        with contextlib.suppress(subprocess.TimeoutExpired):
            popen.wait(GRACE)
        _kill(popen)
        popen.wait()
        end = time.monotonic() + GRACE
        while any(reader.is_alive() for reader in readers) and time.monotonic() < end:
            with contextlib.suppress(queue.Empty):  # a full queue would hold up its reader
                lines.get(timeout=0.01)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
