"""Remember the hashes of large files in the user's cache folder, so that a base is hashed once.

A hash belongs to a file as it was: the same device, inode, size, time of modification and time of change. An entry is
one small JSON file that appears whole under its name, so that several processes can share the folder; a damaged one is
no entry. Checks of a file's bytes never ask here: bits rot without a change of any time.
"""

import json
import os
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from typing import Self

# Of a file that has just been changed the next change may have the same times, as coarse as clocks of file systems are.
YOUNG_NS: Final = 3_000_000_000
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells a file from others and from itself after a change, as `stat` gives it."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, info: os.stat_result) -> "Self":
        """Make the state from the result of `stat` or `fstat`."""
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)

    def is_old(self, now_ns: int) -> bool:
        """Whether the last change is long enough before a time that another change would show."""
        return now_ns - max(self.mtime_ns, self.ctime_ns) > YOUNG_NS


def look_up(state: FileState, kind: str) -> str | None:
    """Find the hash of a file.

    Args:
        state: The file as it is now.
        kind: What of the file was hashed, a word such as `data`.

    Returns:
        The SHA-256 as hex; None if it is not known of the file as it is.
    """
    path = _entry(state, kind)
    if path is None:
        return None
    try:
        entry: Any = json.loads(path.read_bytes())
        is_same = {key: entry[key] for key in asdict(state)} == asdict(state)
        digest = entry["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return digest if is_same and isinstance(digest, str) and _DIGEST.fullmatch(digest) else None


def store(state: FileState, kind: str, digest: str, began_ns: int) -> None:
    """Remember the hash of a file, unless the file was young when hashing began; a full disk is no error.

    Args:
        state: The file, the same before its first byte was read and after its last.
        kind: What was hashed.
        digest: The SHA-256 as hex.
        began_ns: When hashing began (`time.time_ns`).
    """
    path = _entry(state, kind)
    if path is None or not state.is_old(began_ns):
        return
    text = json.dumps({**asdict(state), "sha256": digest})
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".part", delete=False) as part:
            try:
                part.write(text)
                part.flush()
                os.fsync(part.fileno())
                Path(part.name).replace(path)
            except BaseException:
                Path(part.name).unlink(missing_ok=True)
                raise


def now_ns() -> int:
    """Return the time, as the times of files are counted."""
    return time.time_ns()


def folder() -> Path | None:
    """Return the folder of the entries; None on Windows, where no time tells of every change."""
    if os.name == "nt":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or ""
    with suppress(RuntimeError):  # without a home
        return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "crdiff" / "hashes"
    return None


def _entry(state: FileState, kind: str) -> Path | None:
    """A file that is changed or replaced under its inode takes the place of its old entry."""
    home = folder()
    return home / f"{state.device:x}-{state.inode:x}-{kind}.json" if home else None
