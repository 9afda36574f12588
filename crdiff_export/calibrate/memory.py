"""Free memory: that of the GPU, of the machine, and of the container."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Assumed where the system does not tell.
UNKNOWN: Final = 4 * 10**9


def free(device: "torch.device") -> int:
    """Return the bytes that are free for tensors of a device, which are written by way of main memory."""
    host = min([*_machine(), *_groups()], default=None)
    if device.type != "cuda":
        return UNKNOWN if host is None else host
    from torch.cuda import mem_get_info

    gpu = int(mem_get_info(device)[0])
    return gpu if host is None else min(gpu, host)


def _machine() -> Iterator[int]:
    """Yield the free memory that Linux reports."""
    available = _table(PROC / "meminfo").get("MemAvailable:")
    if available is not None:
        yield available * 1024


def _groups() -> Iterator[int]:
    """Yield the free memory of each control group of this process and of its parents that has a limit (cgroups(7))."""
    with contextlib.suppress(OSError, UnicodeError):
        for line in (PROC / "self" / "cgroup").read_text("utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            # A container may see itself at the root, whatever its name outside.
            top = CGROUPS / "memory" if kinds else CGROUPS
            names = [name for name in path.split("/") if name not in ("", "..")]
            for depth in range(len(names) + 1):
                yield from _left(top.joinpath(*names[:depth]), old=bool(kinds))


def _left(folder: Path, *, old: bool) -> Iterator[int]:
    """Yield a group's limit less its usage; cached files do not count, because they can be dropped."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    with contextlib.suppress(OSError, ValueError):  # no such group here, or "max"
        limit, used = (int((folder / name).read_text("ascii")) for name in names)
        files = _table(folder / "memory.stat").get("total_inactive_file" if old else "inactive_file", 0)
        yield max(0, limit - max(0, used - files))


def _table(path: Path) -> dict[str, int]:
    """Read a file with a name and a number in each line; empty if it cannot be read."""
    try:
        lines = [line.split() for line in path.read_text("ascii").splitlines()]
        return {words[0]: int(words[1]) for words in lines if len(words) > 1}
    except (OSError, ValueError):
        return {}
