"""The file in which a search is kept: a journal of Optuna's, to which any number of processes append.

A line is written whole or, by a process that was killed or a disk that was full, in part; a part at the end is cut off
by whoever writes next. A file that is no journal is refused before it is touched.
"""

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from crdiff_export.errors import SearchError
from crdiff_export.search.lock import Lock

SUFFIX = ".journal"


def open_journal(path: Path, *, create: bool) -> JournalStorage:
    """The storage in a file, new if there is none and `create` is set; SearchError for any other file."""
    if path.suffix != SUFFIX:
        hint = f"Name a file that ends with {SUFFIX}, or a server, as in postgresql://host/database."
        raise SearchError(f"{path}: not the name of a search's journal", hint)
    try:
        if not create and not path.exists():
            raise SearchError(f"{path}: no such journal", "Begin the search first, or name the file it is kept in.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check(path)
        return JournalStorage(_Backend(path))
    except OSError as error:
        raise SearchError(f"{path}: {error.strerror}", "Name a file that can be read and written.") from error


def _check(path: Path) -> None:
    """Refuse a file that is not made of journal lines; a part of one at the end may be left from a crash."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            whole = line.endswith(b"\n")
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
                # A lone part of a line is a journal only if it begins like one.
                if not whole and (number > 1 or b'{"op_code":'.startswith(line[:11])):
                    return
            if not (isinstance(entry, dict) and {"op_code", "worker_id"} <= entry.keys()):
                hint = "It was left as it is; name another file, or restore this one from a copy."
                raise SearchError(f"{path}: no journal of a search, or a damaged one (line {number})", hint)


class _Backend(JournalFileBackend):
    """Optuna's journal file, which mends its end before it appends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._exclusive = Lock(path)
        super().__init__(str(path))

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        try:
            yield from super().read_logs(log_number_from)
        except ValueError as error:
            hint = "Stop all workers; restore the file from a copy, or begin a new search."
            raise SearchError(f"{self._path}: damaged since it was opened", hint) from error

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self._exclusive.held():
            with self._path.open("r+b") as file:
                _mend(file)
            with self._path.open("ab") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())


def _mend(file: IO[bytes]) -> None:
    """Cut off what follows the last whole line."""
    end = file.seek(0, os.SEEK_END)
    whole = end
    while whole:
        start = max(0, whole - 65536)
        file.seek(start)
        block = file.read(whole - start)
        at = block.rfind(b"\n")
        if at >= 0:
            whole = start + at + 1
            break
        whole = start
    if whole < end:
        file.truncate(whole)
