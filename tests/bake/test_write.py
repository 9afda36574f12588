"""What only the write can find out."""

import os
from pathlib import Path
from typing import Any

import pytest

from crdiff_export import ExportRequest, Size, export
from crdiff_export.bake import write
from crdiff_export.errors import CheckpointError
from tests.support import makers


def test_a_base_that_changes_during_the_export_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing, counting and writing each read it: they must have read the same."""
    base = makers.write(tmp_path / "base.safetensors", makers.tiny("demo.original-unet"))
    write_file = write._write_file

    def change(*args: Any) -> None:
        write_file(*args)
        os.utime(base, ns=(1, 1))

    monkeypatch.setattr(write, "_write_file", change)
    with pytest.raises(CheckpointError) as caught:
        export(ExportRequest(str(base), Size(64, 64), tmp_path / "out.safetensors"))
    assert caught.value.message == f"{base}: the file changed while it was read"
    assert caught.value.hint == "Leave it alone during the export, then run it again."
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


@pytest.mark.parametrize(("base", "name"), [("sd15.safetensors", "o.safetensors"), ("pipe", "o")])
def test_files_are_durable_before_they_have_their_names(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, name: str
) -> None:
    """Also the sidecar and the copies: no file is half there after a loss of power."""
    durable: set[tuple[int, int]] = set()
    fsync, target = os.fsync, tmp_path / name

    def note(handle: int) -> None:
        fsync(handle)
        if not target.exists():
            durable.add(identity(os.fstat(handle)))

    def identity(stat: os.stat_result) -> tuple[int, int]:
        return stat.st_ino, stat.st_mtime_ns

    monkeypatch.setattr(os, "fsync", note)
    export(ExportRequest(str(shelf / base), Size(512, 512), target, residual="sidecar"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 1
    assert [path for path in files if identity(path.stat()) not in durable] == []
