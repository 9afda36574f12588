"""Exports for tests: several jobs for one base, the bytes of outputs, and progress that interrupts."""

import errno
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from crdiff_export import ExportRequest, Size, export
from crdiff_export.bake import write
from crdiff_export.export import ExportJob, prepare, prepare_located

SIZE = Size(512, 512)


def bake(base: object, output: Path | None, size: Size = SIZE, **request: Any) -> Path:
    """Export a base; the path of the output."""
    return export(ExportRequest(str(base), size, output, **request)).written.path


def jobs(base: Path, folder: Path, requests: Sequence[Mapping[str, Any]], **common: Any) -> list[ExportJob]:
    """Jobs for one base, planned from one reading of its headers."""
    folder.mkdir(exist_ok=True)
    suffix = "" if base.is_dir() else ".safetensors"
    first, *others = (
        ExportRequest(str(base), SIZE, folder / f"{number}{suffix}", **common, **request)
        for number, request in enumerate(requests)
    )
    job = prepare(first)
    return [job, *(prepare_located(other, job.criterion, job.base, job.plan.checkpoint) for other in others)]


def content(path: Path) -> dict[str, bytes]:
    """A file's bytes, or those of every file of a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def names(folder: Path) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def write_in_chunks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let exports read and write chunks of this many bytes."""
    monkeypatch.setattr(write, "write", functools.partial(write.write, chunk=size))


def failing(number: int = errno.ENOSPC) -> Callable[..., NoReturn]:
    """A function that raises an OSError."""

    def call(*args: object, **kwargs: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return call


class Interrupting:
    """Progress that interrupts as Ctrl-C would, after some steps of a stage, or of any."""

    def __init__(self, stage: str | None = None, after: int = 0) -> None:
        self._at, self._left, self._now = stage, after, ""

    def stage(self, title: str, size: int, unit: str = "bytes") -> None:
        """Begin a stage."""
        self._now = title

    def advance(self, size: int) -> None:
        """Interrupt where it is time."""
        if self._at in (None, self._now):
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt


class Recorder:
    """Progress that remembers each stage's title and size, and how far it came."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.done: list[int] = []

    def stage(self, title: str, size: int, unit: str = "bytes") -> None:
        """Begin a stage."""
        self.stages.append((title, size))
        self.done.append(0)

    def advance(self, size: int) -> None:
        """Note some progress."""
        self.done[-1] += size
