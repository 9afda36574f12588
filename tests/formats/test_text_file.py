"""A short text file is read whole, or refused in one line that names it."""

from pathlib import Path

import pytest

from crdiff_export.errors import PlanError
from crdiff_export.formats.text_file import MAX_BYTES, read_text_file
from tests.support.messages import raises


def test_a_text_is_read_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf" + "é".encode())
    assert read_text_file(tmp_path / "a.toml", "plan", "Name a file.", PlanError) == "é"


@pytest.mark.parametrize(
    ("name", "content"),
    [("missing.toml", None), ("folder", None), ("wide.toml", b"a" * MAX_BYTES + b"b"), ("latin.toml", b"caf\xe9")],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with raises(PlanError, name):
        read_text_file(tmp_path / name, "plan", "Name a file.", PlanError)


def test_a_file_of_just_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"a" * MAX_BYTES)
    assert len(read_text_file(tmp_path / "a.toml", "plan", "Name a file.", PlanError)) == MAX_BYTES
