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
