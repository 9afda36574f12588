"""Temp siblings: gone or moved, never mistaken for somebody's file, never another run's."""

import contextlib
import ctypes
import errno
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from crdiff_export.bake import staging
from crdiff_export.bake.staging import clean, publish, temp_sibling
from crdiff_export.formats import file_lock
from tests.support.exporting import bake, failing, names

posix = pytest.mark.skipif(sys.platform == "win32", reason="no flock, no rename over folders")


def fill(part: Path, text: str = "new") -> None:
    if part.is_dir():
        (part / "inside").mkdir()
        (part / "inside/file").write_text(text)
    else:
        part.write_text(text)


def content(target: Path) -> str:
    return (target / "inside/file" if target.is_dir() else target).read_text()


def put(target: Path, folder: bool, *, replace: bool = True) -> None:
    """Write a new file or folder by way of a part."""
    with temp_sibling(target, folder) as part:
        fill(part)
        publish(part, target, replace=replace)


both = pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])


@pytest.mark.skipif(sys.platform == "win32", reason="no permissions of POSIX")
def test_a_replaced_file_keeps_its_permissions(shelf: Path, tmp_path: Path) -> None:
    target = tmp_path / "o.safetensors"
    target.write_text("old")
    target.chmod(0o640)
    bake(shelf / "dit.safetensors", target, force=True)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


@pytest.mark.parametrize("taken", [False, True])
def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    target = tmp_path / "o"
    with contextlib.suppress(FileExistsError), temp_sibling(target, folder=False) as part:
        fill(part)
        if taken:
            target.write_text("old")
        publish(part, target, replace=False)
    assert content(target) == ("old" if taken else "new")
    assert names(tmp_path) == ["o"]


# --- a swap of folders ---


@pytest.fixture
def in_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot exchange two names."""
    monkeypatch.setattr(sys, "platform", "darwin")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    part, target = tmp_path / ".o.aaaaaaaaaaaa.crdiff-part", tmp_path / "o"
    for path, text in ((part, "new"), (target, "old")):
        path.mkdir()
        fill(path, text)
    return part, target


class NoExchange:
    """A C library whose file system refuses to exchange two names."""

    @staticmethod
    def renameat2(*_: object) -> int:
        return -1


@posix
@pytest.mark.parametrize(("module", "name", "value"), [(sys, "platform", "darwin"), (ctypes, "CDLL", NoExchange)])
def test_two_steps_do_where_one_does_not(
    module: Any, name: str, value: Any, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, value if isinstance(value, str) else lambda *_, **__: value)
    publish(*folders, replace=True)
    assert content(folders[1]) == "new"
    assert names(tmp_path) == ["o"]


@posix
@pytest.mark.usefixtures("in_two_steps")
@pytest.mark.parametrize("step", [1, 2])
def test_a_failed_step_leaves_the_old_folder(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    part, target = folders
    calls: list[Path] = []
    rename = Path.rename

    def failing(self: Path, other: Path) -> Path:
        calls.append(self)
        if len(calls) == step:
            raise OSError(errno.EACCES, "no")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"):
        publish(part, target, replace=True)
    assert content(target) == "old"
    assert content(part) == "new"


# --- left-overs and neighbours ---


@pytest.mark.parametrize(
    "name",
    [
        ".o.2.0123456789ab.crdiff-part",
        ".oo.0123456789ab.crdiff-part",
        ".o.0123456789abc.crdiff-part",
        ".o.0123456789ab.crdiff-part.txt",
        "o.0123456789ab.crdiff-part",
        ".o.0123456789ab.part",
        "o.txt",
    ],
)
def test_what_is_another_targets_or_nobodys_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    clean(tmp_path / "o")
    assert names(tmp_path) == [name]


def test_a_name_with_what_globs_mean_something_to_is_only_itself(tmp_path: Path) -> None:
    (tmp_path / ".a.0123456789ab.crdiff-part").touch()
    (tmp_path / ".[a].0123456789ab.crdiff-part").touch()
    clean(tmp_path / "[a]")
    assert names(tmp_path) == [".a.0123456789ab.crdiff-part"]


def test_a_long_name_has_a_short_part(tmp_path: Path) -> None:
    name = "é" * 127  # 254 bytes
    with temp_sibling(tmp_path / name, folder=False) as part:
        assert len(os.fsencode(part.name)) < 255
        left = tmp_path / part.name.replace(part.name.split(".")[2], "0" * 12)
        left.touch()
        clean(tmp_path / name)
        assert names(tmp_path) == [part.name]
        publish(part, tmp_path / name)
    assert names(tmp_path) == [name]


@posix
@both
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_part_that_another_run_takes_for_a_left_over_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool, when: str
) -> None:
    """Between its making and its lock, in both orders that another run's `clean` can come."""
    locked = file_lock.lock
    taken: list[Path] = []

    def late(path: Path) -> int | None:
        if taken:
            return locked(path)
        taken.append(path)
        if when == "before":
            staging._remove(path)
            return locked(path)
        handle = locked(path)
        staging._remove(path)
        return handle

    monkeypatch.setattr(file_lock, "lock", late)
    with temp_sibling(tmp_path / "o", folder) as part:
        assert part != taken[0]
        assert names(tmp_path) == [part.name]
        fill(part)
        publish(part, tmp_path / "o")
    assert content(tmp_path / "o") == "new"


@posix
def test_a_part_that_another_run_is_about_to_remove_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = file_lock.lock
    others: list[int | None] = []

    def contended(path: Path) -> int | None:
        if not others:
            others.append(locked(path))
        return locked(path)

    monkeypatch.setattr(file_lock, "lock", contended)
    put(tmp_path / "o", folder=False)
    assert content(tmp_path / "o") == "new"
    assert others[0] is not None
    os.close(others[0])
    monkeypatch.undo()
    clean(tmp_path / "o")
    assert names(tmp_path) == ["o"]


@posix
@both
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool) -> None:
    import fcntl

    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    left = tmp_path / ".o.0123456789ab.crdiff-part"
    left.touch()
    put(tmp_path / "o", folder)
    assert names(tmp_path) == [left.name, "o"]  # nobody can know whether it is a left-over


@both
def test_a_system_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool) -> None:
    monkeypatch.setattr(file_lock, "fcntl", None)
    (tmp_path / ".o.0123456789ab.crdiff-part").touch()
    put(tmp_path / "o", folder)
    assert names(tmp_path) == ["o"]


# --- the end ---


def test_an_interrupt_while_a_part_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = staging._remove

    def interrupted(path: Path) -> None:
        monkeypatch.setattr(staging, "_remove", remove)
        raise KeyboardInterrupt

    monkeypatch.setattr(staging, "_remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path / "o", folder=False)
    assert names(tmp_path) == ["o"]
    with pytest.raises(KeyboardInterrupt), temp_sibling(tmp_path / "o", folder=True):
        monkeypatch.setattr(staging, "_remove", interrupted)
    assert names(tmp_path) == ["o"]


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    staging.sync_folder(tmp_path)
    staging.sync_folder(tmp_path / "none")


@posix
def test_a_move_is_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def note(name: str) -> None:
        call = getattr(os, name)

        def noted(*args: Any) -> None:
            order.append(name)
            call(*args)

        monkeypatch.setattr(os, name, noted)

    note("fsync")
    note("link")
    with temp_sibling(tmp_path / "o", folder=False) as part:
        publish(part, tmp_path / "o", replace=False)
    assert order == ["link", "fsync"]
