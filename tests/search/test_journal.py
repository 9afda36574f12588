"""The file of a search: one that was cut off goes on, a foreign one is left alone, and no lock outlives its owner."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from crdiff_export.errors import SearchError
from crdiff_export.search.engine import history, load_study, open_study
from crdiff_export.search.journal import _mend
from crdiff_export.search.lease import Worker
from crdiff_export.search.lock import Lock
from tests.support.search_objective import (
    NAME,
    PRINTS,
    PYTHON,
    searched,
    setup,
    told,
)

# --- files ---

FOREIGN = {
    "text": b"a text\n",
    "half a text": b"a text",
    "json": b'{"op_code": 0}\n',
    "list": b"[]\n",
    "no end": b'{"a": 1}',
    "binary": bytes(range(256)) * 4,
    "damaged in the middle": b'{"op_code":0,"worker_id":"a","study_name":"x","directions":[2]}\n{"op_co\n{}\n',
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_left_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    path.write_bytes(content)
    with pytest.raises(SearchError, match=r"a.journal: no journal of a search, or a damaged one \(line [12]\)\nIt was"):
        open_study(path, NAME, setup(), PRINTS)
    assert path.read_bytes() == content


def test_other_names_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"model")
    with pytest.raises(SearchError, match="not the name of a search's journal"):
        open_study(model, NAME, setup(), PRINTS)
    (tmp_path / "folder.journal").mkdir()
    with pytest.raises(SearchError, match=r"folder.journal: Is a directory|Permission denied"):
        open_study(tmp_path / "folder.journal", NAME, setup(), PRINTS)


def test_a_study_of_someone_else_is_refused(tmp_path: Path) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = tmp_path / "a.journal"
    study = optuna.create_study(storage=JournalStorage(JournalFileBackend(str(path))), study_name=NAME)
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(SearchError, match="'tiny' is no search of crdiff"):
        open_study(path, NAME, setup(), PRINTS)
    study.set_user_attr("crdiff", {"schema": 2})
    with pytest.raises(SearchError, match="another version of crdiff"):
        open_study(path, NAME, setup(), PRINTS)
    study.set_user_attr("crdiff", {"schema": 1, "fingerprint": PRINTS, "setup": setup().to_json()})
    with load_study(path, NAME) as opened, pytest.raises(SearchError, match="trial 0 of 'tiny' is none of a crdiff"):
        history(opened)


def test_a_journal_that_was_cut_off_anywhere_goes_on(tmp_path: Path) -> None:
    """A crash leaves a part of the last line, wherever it comes; the history is the same in the end."""
    search = setup("anneal", pairs=2)
    path = tmp_path / "whole.journal"
    whole = searched(path, search, 4, lease=0.01)
    content = path.read_bytes()
    ends = [at for at, byte in enumerate(content) if byte == ord("\n")]
    first = content.index(b'"crdiff"')  # from there on the study has its settings, which else are waited for
    cuts = [at for at in range(len(content)) if at > content.index(b"\n", first)]
    for cut in cuts[:: len(cuts) // 25]:
        other = tmp_path / f"{cut}.journal"
        other.write_bytes(content[:cut])
        time.sleep(0.01)
        assert told(searched(other, search, 4, lease=0.01)) == told(whole)
        lines = other.read_bytes().rpartition(b"\n")[0].splitlines()
        assert all(isinstance(json.loads(line), dict) for line in lines)
        assert len(lines) >= sum(at < cut for at in ends)


def test_a_study_whose_founder_died_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crdiff_export.search.study.PATIENCE", 0.1)
    path = tmp_path / "a.journal"
    open_study(path, NAME, setup(), PRINTS).close()
    begun = path.read_bytes().split(b"\n", 1)[0] + b'\n{"op_code":2,"wor'
    path.write_bytes(begun)
    assert len(searched(path, setup(), 2)) == 2


def test_a_journal_damaged_later_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    with open_study(path, NAME, setup(), PRINTS) as study:
        path.write_bytes(path.read_bytes() + b"{}}\n{}\n")
        with pytest.raises(SearchError, match="damaged since it was opened"):
            history(study)


# --- the lock ---


def appended(path: Path, lock: Path, *, grace: float = 30.0) -> float:
    """Seconds until what `lock` says is overcome."""
    began = time.monotonic()
    with Lock(path, grace).held():
        taken = time.monotonic() - began
        assert lock.is_symlink() or lock.is_file()
    assert not os.path.lexists(lock)
    return taken


@pytest.mark.parametrize("linked", [True, False], ids=["link", "file"])
def test_the_lock_of_a_dead_writer_is_broken(linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lock = tmp_path / "a.journal", tmp_path / "a.journal.lock"
    path.touch()
    gone = subprocess.run([*PYTHON, "import os; print(os.getpid())"], capture_output=True, check=True)
    pid = int(gone.stdout)

    def leave(text: str) -> None:
        lock.symlink_to(text) if linked else lock.write_text(text)

    if not linked:
        monkeypatch.setattr(Path, "symlink_to", _no_links)
    assert appended(path, lock) < 0.1
    if os.name == "posix":
        leave(f"{Worker.here().machine} {pid} 0")
        assert appended(path, lock) < 1
    for other in (f"elsewhere {pid} 0", f"{Worker.here().machine} {os.getpid()} 0", "what Optuna writes"):
        leave(other)
        assert 0.2 < appended(path, lock, grace=0.2) < 2
    if not linked:
        leave("")
        assert 0.2 < appended(path, lock, grace=0.2) < 2


def _no_links(*_: object) -> None:
    raise OSError(1, "Operation not permitted")


def test_an_interrupted_writer_leaves_no_lock(tmp_path: Path) -> None:
    path, lock = tmp_path / "a.journal", tmp_path / "a.journal.lock"
    with pytest.raises(KeyboardInterrupt), Lock(path).held():
        raise KeyboardInterrupt
    assert not os.path.lexists(lock)
    lock.symlink_to("another's")
    with pytest.raises(FileNotFoundError):  # there is no journal
        appended(path, lock, grace=0.01)
    assert lock.is_symlink()


def test_many_write_and_no_line_is_lost(tmp_path: Path) -> None:
    """Four processes, each of which dies while it holds the lock, after some whole lines and a part of one."""
    path = tmp_path / "a.journal"
    path.touch()
    code = f"""
import os, signal
from pathlib import Path
from crdiff_export.search.journal import _Backend
backend = _Backend(Path({str(path)!r}))
for line in range(50):
    backend.append_logs([{{"pid": os.getpid(), "line": line}}])
with backend._exclusive.held():
    with Path({str(path)!r}).open("ab") as file:
        file.write(b'{{"pid"')
    os._exit(9)
"""
    began = time.monotonic()
    writers = [subprocess.Popen([*PYTHON, code]) for _ in range(4)]
    assert {writer.wait(60) for writer in writers} == {9}
    assert time.monotonic() - began < 25  # nobody waited for half a minute
    with Lock(path).held(), path.open("r+b") as file:
        _mend(file)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for writer in writers:
        assert [line["line"] for line in lines if line["pid"] == writer.pid] == list(range(50))
