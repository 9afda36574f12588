"""Whatever ends a change of a pack, and whenever: the pack is as it was, or complete."""

import errno
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from crdiff_export import Size
from crdiff_export.bake import direct_writer
from crdiff_export.errors import BakeError, CheckpointError, PlanError
from crdiff_export.formats import hash_cache
from crdiff_export.formats.hash_cache import FileState, look_up, store
from crdiff_export.packs import Pack, create, open_pack
from crdiff_export.packs.check import verify_pack
from crdiff_export.packs.create import PackRequest
from crdiff_export.progress import Progress, Silent
from tests.support import makers
from tests.support.exporting import SIZE, Interrupting, failing, names
from tests.support.forks import Forks
from tests.support.messages import raises
from tests.support.packing import add_sizes, new_pack, plans

OTHER = Size(384, 640)
RATIOS = {"down": 0.3, "mid": 0.55, "up": 0.1}
MASKED: dict[str, Any] = {"ratios": RATIOS, "criterion": "random"}
KILLS = [4, pytest.param(100, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow UNet. No test may change it."""
    return makers.write(tmp_path_factory.mktemp("base") / "base.safetensors", makers.tiny("demo.original-unet"))


@pytest.fixture(scope="module")
def pack_forks() -> Iterator[Forks]:
    """Runs command lines in forks of a process that has loaded what packs with masks need."""
    with closing(Forks("torch", "crdiff_export.packs.create", "crdiff_export.prune.criteria.random")) as server:
        yield server


@pytest.fixture
def pack(base: Path, tmp_path: Path) -> Path:
    """A pack with masks, alone in its folder."""
    (tmp_path / "place").mkdir()
    return new_pack(base, tmp_path / "place" / "o.crdiff", **MASKED).path


def add(base: Path, path: Path, progress: Progress | None = None) -> Pack:
    """Add a size with masks."""
    job = create.prepare_more(PackRequest(plans(base, OTHER, **MASKED), path), open_pack(path))
    return create.make(job, progress or Silent()).pack


# --- errors of the system ---

CALLS = [
    *[("write", errno.ENOSPC), ("write", errno.EDQUOT), ("fsync", errno.EIO), ("lseek", errno.EIO)],
    *[("replace", errno.EACCES), ("open", errno.EMFILE), ("link", errno.ENOSPC)],
]


@pytest.mark.parametrize("nth", [1, 2, 3, 9])
@pytest.mark.parametrize(("call", "number"), CALLS)
def test_a_call_of_the_system_fails(
    call: str, number: int, nth: int, base: Path, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a pack is made, and while it gets a size: an error, or all is well; no file is left in either case.

    Without the cache of hashes: once the base is some seconds old, the first call may be the cache's, whose failure
    loses nothing.
    """
    monkeypatch.setattr(hash_cache, "folder", lambda: None)
    before, usual = pack.read_bytes(), getattr(os, call)
    for step in ("add", "create"):
        calls = 0

        def fail(*args: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            return failing(number)() if calls == nth else usual(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                add(base, pack) if step == "add" else new_pack(base, pack.with_name("new.crdiff"), **MASKED)
            except (BakeError, CheckpointError):
                assert names(pack.parent) == ["o.crdiff"]
                assert pack.read_bytes() == before
                continue
        assert calls < nth or call in ("open", "link", "fsync")  # such as that of the folder
        opened = [open_pack(path) for path in sorted(pack.parent.iterdir())]
        assert len(opened) == (1 if step == "add" else 2)
        pack.write_bytes(before)
        pack.with_name("new.crdiff").unlink(missing_ok=True)


def test_a_full_disk_is_named(base: Path, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pack.read_bytes()
    monkeypatch.setattr(direct_writer, "_write_all", failing(errno.ENOSPC))
    with raises(BakeError, "o.crdiff", "No space left"):
        add(base, pack)
    with raises(BakeError, "new.crdiff", "No space left"):
        new_pack(base, pack.with_name("new.crdiff"), ratios=RATIOS)
    with raises(BakeError, "o.crdiff", "No space left"):
        create.remove(open_pack(pack), [], Silent())
    assert names(pack.parent) == ["o.crdiff"]
    assert pack.read_bytes() == before


def test_a_disk_that_is_too_small_is_known_before(base: Path, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(pack.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with raises(PlanError, "needed"):
        add(base, pack)


@pytest.mark.parametrize("after", [0, 1, 5, 30, 60])
@pytest.mark.parametrize("stage", ["writing", None])
def test_an_interrupt(stage: str | None, after: int, base: Path, pack: Path) -> None:
    before = pack.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        add(base, pack, Interrupting(stage, after))
    assert names(pack.parent) == ["o.crdiff"]
    assert pack.read_bytes() == before


def test_what_does_not_read_back_is_not_published(base: Path, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a write that the disk has lost: the bits of a mask."""
    before, append = pack.read_bytes(), direct_writer.DirectWriter.append

    def lose(self: direct_writer.DirectWriter, data: memoryview, offset: int) -> None:
        append(self, memoryview(bytes(len(data))) if offset > 20_000 else data, offset)

    monkeypatch.setattr(direct_writer.DirectWriter, "append", lose)
    with pytest.raises(Exception, match=r"o\.crdiff"):
        add(base, pack)
    assert names(pack.parent) == ["o.crdiff"]
    assert pack.read_bytes() == before


# --- two at once ---


@pytest.mark.parametrize("options", [MASKED, {"ratios": RATIOS}], ids=["masks", "thresholds"])
def test_a_pack_that_another_process_changes_is_not_overwritten(
    options: dict[str, Any], base: Path, pack: Path
) -> None:
    """Between reading it and the rename."""
    other = new_pack(base, pack.parent.parent / "other.crdiff", ratio=0.2).path.read_bytes()
    new_pack(base, pack, force=True, **options)
    for change in ("replace", "rewrite", "remove"):
        job = create.prepare_more(PackRequest(plans(base, OTHER, **options), pack), open_pack(pack))
        before = pack.read_bytes()
        if change == "replace":
            pack.with_name("next").write_bytes(other)
            pack.with_name("next").replace(pack)
        elif change == "rewrite":
            pack.write_bytes(other)
        else:
            pack.unlink()
        with pytest.raises((BakeError, CheckpointError), match=r"o\.crdiff"):
            create.make(job, Silent())
        assert names(pack.parent) == ([] if change == "remove" else ["o.crdiff"])
        assert change == "remove" or pack.read_bytes() == other
        pack.write_bytes(before)


def test_two_that_add_at_once(base: Path, pack: Path) -> None:
    """Every size that a run says it has added is there; a run that came too late fails."""
    sizes, added = [Size(64 * n, 64) for n in range(1, 5)], list[Size]()

    def run(size: Size) -> None:
        try:
            add_sizes(base, pack, size, **MASKED)
        except (CheckpointError, BakeError):
            return
        added.append(size)

    threads = [threading.Thread(target=run, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = verify_pack(pack, str(base), Silent()).pack
    assert added
    assert set(added) <= made.variants.keys()
    assert SIZE in made.variants
    assert names(pack.parent) == ["o.crdiff"]


def test_a_name_that_is_taken_meanwhile(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "o.crdiff"
    job = create.prepare_new(PackRequest(plans(base, ratios=RATIOS), path))
    path.write_text("mine")
    with raises(BakeError, "o.crdiff"):
        create.make(job, Silent())
    assert path.read_text() == "mine"
    assert names(tmp_path) == ["o.crdiff"]


# --- kills ---

needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@needs_signals
@pytest.mark.parametrize("kills", KILLS)
def test_a_kill_at_any_moment(kills: int, pack_forks: Forks, base: Path, pack: Path) -> None:
    """The pack is the old one or the new one, and the next run removes what is left over."""
    old, rng, ended = pack.read_bytes(), random.Random(5), 0
    words = ["pack", "add", pack.name, "--base", base, "--res", "384x640", "--criterion", "random", "--ratio", 0.3]
    began = time.monotonic()
    assert pack_forks.run(pack.parent, *words)[0] == 0
    window, new = time.monotonic() - began, pack.read_bytes()
    while ended < kills:
        pack.write_bytes(old)
        run = pack_forks.start(pack.parent, *words)
        time.sleep(rng.uniform(0, window))
        run.kill(signal.SIGKILL)
        code = run.wait()
        assert code in (0, -9)
        assert pack.read_bytes() in ([new] if code == 0 else [old, new])
        assert len(names(pack.parent)) <= 2
        ended += code != 0
        window *= 1 if code else 0.9
    pack.write_bytes(old)
    assert pack_forks.run(pack.parent, *words)[0] == 0
    assert names(pack.parent) == ["o.crdiff"]
    assert pack.read_bytes() == new


MOMENTS = {
    "as the part is made": ("crdiff_export.bake.staging._create", 1, True),
    "within the first write": ("os.write", 1, False),
    "after a mask": ("os.write", 9, True),
    "before the header": ("crdiff_export.formats.safetensors.serialise", 2, False),
    "before the sync": ("os.fsync", 1, False),
    "after the check": ("crdiff_export.bake.direct_writer._check", 1, True),
    "before the move": ("crdiff_export.bake.staging.publish", 1, False),
    "before the move is durable": ("crdiff_export.bake.staging.sync_folder", 1, False),
    "after the move": ("crdiff_export.bake.staging.publish", 1, True),
}


LATE = [("after a mask", "SIGTERM"), ("before the sync", "SIGTERM"), ("before the move", "SIGTERM")]


@needs_signals
@pytest.mark.parametrize(("moment", "name"), [*((moment, "SIGKILL") for moment in MOMENTS), *LATE])
def test_a_signal_at_a_moment_that_counts(pack_forks: Forks, base: Path, pack: Path, moment: str, name: str) -> None:
    call, nth, after = MOMENTS[moment]
    old = pack.read_bytes()
    words = ["pack", "add", pack.name, "--base", base, "--res", "384x640", "--criterion", "random", "--ratio", 0.3]
    hook = {"call": call, "nth": nth, "do": int(signal.Signals[name]), "after": after}
    code, err = pack_forks.run(pack.parent, *words, hook=hook)
    assert code == {"SIGKILL": -9, "SIGTERM": 143}[name], err
    assert pack.read_bytes() == old or list(open_pack(pack).variants) == [OTHER, SIZE]
    if name == "SIGTERM":
        assert names(pack.parent) == ["o.crdiff"]
    add_sizes(base, pack, OTHER, force=True, **MASKED)
    assert names(pack.parent) == ["o.crdiff"]


# --- the cache of hashes, by which packs tell their base ---


@needs_signals
def test_a_kill_while_a_hash_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry is absent, the old one or the new one; never half of one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "file"
    file.write_bytes(b"x")
    state, rng = FileState.of(file.stat()), random.Random(3)
    later = time.time_ns() + 100 * hash_cache.YOUNG_NS
    digests = ["ab" * 32, "cd" * 32]
    found = set()
    for number in range(40):
        child = os.fork()
        if child == 0:
            while True:  # until it is killed
                for digest in digests:
                    store(state, "data", digest, later)
        time.sleep(rng.uniform(0, 0.004) if number else 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        known = look_up(state, "data")
        assert known in (None, *digests)
        found.add(known)
        for entry in (tmp_path / "cache/crdiff/hashes").glob("*.json"):
            assert json.loads(entry.read_text())["sha256"] in digests
    assert found & set(digests)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_forgets_a_hash(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "file"
    file.write_bytes(b"x")
    state, later = FileState.of(file.stat()), time.time_ns() + 100 * hash_cache.YOUNG_NS
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing())
        store(state, "data", "ab" * 32, later)
    assert look_up(state, "data") is None
    assert list((tmp_path / "cache/crdiff/hashes").iterdir()) == []
