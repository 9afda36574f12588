"""How much memory is free for what a pass collects: the GPU's, the machine's, and what a container may have of it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# What is taken to be free where the system does not say.
UNKNOWN: Final = 4 * 10**9


def free(device: "torch.device") -> int:
    """Bytes that are free for tensors on a device. What is on a GPU is copied to main memory to be written."""
    host = min([*_machine(), *_groups()], default=None)
    if device.type != "cuda":
        return UNKNOWN if host is None else host
    from torch.cuda import mem_get_info

    own = int(mem_get_info(device)[0])
    return own if host is None else min(own, host)


def _machine() -> Iterator[int]:
    """What Linux says is free."""
    found = _table(PROC / "meminfo").get("MemAvailable:")
    if found is not None:
        yield found * 1024


def _groups() -> Iterator[int]:
    """What each control group that this process is in has left, its parents' too (cgroups(7)); none without a limit."""
    with contextlib.suppress(OSError, UnicodeError):
        for line in (PROC / "self" / "cgroup").read_text("utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            # A container may see itself at the root, whatever it is called outside.
            top = CGROUPS / "memory" if kinds else CGROUPS
            names = [name for name in path.split("/") if name not in ("", "..")]
            for depth in range(len(names) + 1):
                yield from _left(top.joinpath(*names[:depth]), old=bool(kinds))


def _left(folder: Path, *, old: bool) -> Iterator[int]:
    """What a group has left: its limit, less what it uses beside files that were read and may be dropped."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    with contextlib.suppress(OSError, ValueError):  # no such group here, or "max"
        limit, used = (int((folder / name).read_text("ascii")) for name in names)
        files = _table(folder / "memory.stat").get("total_inactive_file" if old else "inactive_file", 0)
        yield max(0, limit - max(0, used - files))


def _table(path: Path) -> dict[str, int]:
    """The numbers of a file that has a name and a number in each line; nothing where it cannot be read."""
    try:
        lines = [line.split() for line in path.read_text("ascii").splitlines()]
        return {words[0]: int(words[1]) for words in lines if len(words) > 1}
    except (OSError, ValueError):
        return {}
