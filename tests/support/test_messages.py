"""Helpers that assert errors notice another class, a missing key, and a text that is not golden."""

import pytest

from crdiff_export.errors import BakeError, CheckpointError
from tests.support import messages
from tests.support.messages import check, normalised


def test_an_error_needs_its_class_its_key_and_a_golden_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "texts", lambda: frozenset({"a.safetensors: is damaged\nDownload it again."}))
    monkeypatch.setattr(messages, "updating", False)
    monkeypatch.setattr(messages, "seen", set())
    error = CheckpointError("a.safetensors: is damaged", "Download it again.")
    check(error, CheckpointError, "a.safetensors")
    with pytest.raises(AssertionError):
        check(error, BakeError, "a.safetensors")
    with pytest.raises(AssertionError):
        check(error, CheckpointError, "b.safetensors")
    with pytest.raises(AssertionError):
        check(CheckpointError("a.safetensors: is lost", "Download it again."), CheckpointError, "a.safetensors")


def test_a_text_is_the_same_in_every_run(tmp_path: object) -> None:
    assert normalised(f"{tmp_path}/here/a.safetensors: is damaged\n") == "TMP/here/a.safetensors: is damaged"
