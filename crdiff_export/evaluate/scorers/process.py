"""A program that runs beside this one and talks to it in lines; it can neither block this one nor outlive it."""

import contextlib
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Final

GRACE: Final = 5.0  # seconds to end by itself
LONGEST_LINE: Final = 1 << 20  # bytes; a longer line comes in pieces
LAST_LINES: Final = 5  # lines of its stderr that are kept
AHEAD: Final = 1024  # lines of its stdout that wait to be read; the program waits then


class Program:
    """A program started without a shell, in a session of its own, so that its children end with it.

    `folder` is a private one, which is removed when it has ended: with `end`, with `kill`, or with this object.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """Start it; OSError or ValueError where that fails."""
        pipe = subprocess.PIPE
        self.folder = Path(tempfile.mkdtemp(prefix="crdiff-scorer-"))
        try:
            self._popen = subprocess.Popen(  # noqa: S603  the user's own command, and no shell reads it
                words, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
            )
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        stdin, stdout, stderr = self._popen.stdin, self._popen.stdout, self._popen.stderr
        assert stdin and stdout and stderr  # noqa: PT018  one fact
        self._stdin = stdin
        self._lines: queue.Queue[bytes | None] = queue.Queue(AHEAD)
        self._stderr: deque[bytes] = deque(maxlen=LAST_LINES)
        self._readers = (
            _start_thread(_read_answers, stdout, self._lines),
            _start_thread(_read, stderr, self._stderr.append),
        )
        self._end = weakref.finalize(self, _end, self._popen, self._readers, self._lines, self.folder)

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
        _start_thread(_write, self._stdin, lines)

    def receive(self, seconds: float) -> bytes | None:
        """Return its next line with the line's end, or None at the end of its stdout; TimeoutError if none comes."""
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None

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


def _write(pipe: IO[bytes], lines: Sequence[bytes]) -> None:
    with contextlib.suppress(OSError, ValueError):  # the program or this side has closed the pipe
        for line in lines:
            pipe.write(line)
            pipe.flush()


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
