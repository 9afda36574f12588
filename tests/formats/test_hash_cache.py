"""A base is hashed once, and never believed to be what it was before a change."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from crdiff_export.formats import hash_cache, hashing
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.formats.hash_cache import FileState, look_up, store
from crdiff_export.formats.hashing import hash_data_once
from crdiff_export.progress import Silent
from tests.support import makers, oracle
from tests.support.isolation import Crdiff

pytestmark = pytest.mark.skipif(os.name == "nt", reason="there is no cache on Windows")

OLD = 100 * hash_cache.YOUNG_NS
DIGEST = "ab" * 32


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a clock by which files of a moment ago are old."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_cache, "now_ns", lambda: time.time_ns() + OLD)
    return tmp_path / "cache" / "crdiff" / "hashes"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return makers.write(tmp_path / "base.safetensors", makers.tiny("demo.original-unet"))


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The files that were read to be hashed."""
    read: list[Path] = []
    real = hashing.feed

    def feed(digest, file, *args, **options):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN003, ANN202
        read.append(file.path)
        return real(digest, file, *args, **options)

    monkeypatch.setattr(hashing, "feed", feed)
    return read  # type: ignore[return-value]


def hash_of(path: Path, *, rehash: bool = False) -> str:
    (file,) = open_checkpoint(path).files
    return hash_data_once(file, Silent(), rehash=rehash)


def test_a_file_is_hashed_once(base: Path, readings: list[Path]) -> None:
    assert hash_of(base) == hash_of(base) == oracle.sha256(base).removeprefix("0x")
    assert len(readings) == 1
    assert hash_of(base, rehash=True) == hash_of(base)
    assert len(readings) == 2


def touched(path: Path) -> None:
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))


def rewritten(path: Path) -> None:
    """Other bytes with the times of before."""
    info, raw = path.stat(), path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(raw) - 1)
        file.write(bytes([raw[-1] ^ 1]))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def replaced(path: Path) -> None:
    info, raw = path.stat(), path.read_bytes()
    other = path.with_name("other")
    other.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    os.utime(other, ns=(info.st_atime_ns, info.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [touched, rewritten, replaced])
def test_a_changed_file_is_hashed_again(change: Callable[[Path], None], base: Path, readings: list[Path]) -> None:
    hash_of(base)
    change(base)
    assert hash_of(base) == oracle.sha256(base).removeprefix("0x")
    assert len(readings) == 2


def test_a_young_file_is_not_remembered(base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_cache, "now_ns", time.time_ns)
    hash_of(base)
    assert not cache.exists()
    monkeypatch.setattr(hash_cache, "now_ns", lambda: time.time_ns() - OLD)  # a file of the future is young, too
    hash_of(base)
    assert not cache.exists()


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(base: Path, cache: Path) -> None:
    (file,) = open_checkpoint(base).files
    before, after = hashing.feed(hashlib.sha256(), file, 0, 8, threading.Event())
    assert before == after is not None
    hashing.remember([before, after], DIGEST, hash_cache.now_ns())
    assert len(list(cache.iterdir())) == 1
    for path in cache.iterdir():
        path.unlink()
    touched(base)
    other = FileState.of(base.stat())
    for states in ([before, other], [before, None], [None, None]):
        hashing.remember(states, DIGEST, hash_cache.now_ns())
    assert not list(cache.iterdir())


def test_no_reading_before_the_hash_of_a_file_that_is_not_the_one_whose_header_was_read(base: Path) -> None:
    (file,) = open_checkpoint(base).files
    hash_data_once(file, Silent())
    assert hashing.remembered_hash(file)
    rewritten(base)
    assert hashing.remembered_hash(file) is None


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"null", b'{"sha256": "' + b"ab" * 32 + b'"}', b"\xff\xfe", b"[" * 100_000, "other size",
     "other digest"],
    ids=lambda damage: str(damage)[:12],
)  # fmt: skip
def test_a_damaged_entry_is_no_entry(damage: bytes | str, base: Path, cache: Path, readings: list[Path]) -> None:
    digest = hash_of(base)
    (entry,) = cache.iterdir()
    values = json.loads(entry.read_bytes())
    if damage == "other size":
        damage = json.dumps({**values, "size": values["size"] + 1}).encode()
    elif damage == "other digest":
        damage = json.dumps({**values, "sha256": "nothing"}).encode()
    assert isinstance(damage, bytes)
    entry.write_bytes(damage)
    assert hash_of(base) == digest
    assert len(readings) == 2
    assert json.loads(entry.read_bytes()) == values  # and is written anew


def test_many_processes_may_write_one_entry(cache: Path) -> None:
    state = FileState(1, 2, 3, 4, 5)
    digests = [f"{number:064x}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda digest: store(state, "data", digest, OLD), digests))
    assert look_up(state, "data") in digests
    assert [path.name for path in cache.iterdir()] == ["1-2-data.json"]
    assert look_up(replace(state, ctime_ns=6), "data") is None
    assert look_up(state, "file") is None


@pytest.mark.parametrize("why", ["a file", "not writable"])
def test_a_cache_that_cannot_be_written_is_none(why: str, base: Path, cache: Path) -> None:
    if why == "a file":
        cache.parent.mkdir(parents=True)
        cache.write_text("in the way")
    else:
        cache.mkdir(parents=True)
        cache.chmod(0o500)
        if os.access(cache, os.W_OK):
            pytest.skip("this user may write anywhere")
    assert hash_of(base) == hash_of(base)


def test_a_full_disk_leaves_nothing(base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert hash_of(base) == hash_of(base)
    assert not list(cache.iterdir())


def test_exports_share_it_and_verify_does_not_trust_it(
    crdiff: Crdiff, base: Path, here: Path, cache: Path, readings: list[Path]
) -> None:
    command = ("export", base, "--res", "96x64", "--ratio", "0.3")
    assert crdiff(*command, "-o", "a.safetensors").code == 0
    first = (here / "a.safetensors").read_bytes()
    (entry,) = cache.iterdir()
    values = json.loads(entry.read_bytes())
    assert f"0x{values['sha256']}" == makers.metadata_of(here / "a.safetensors")["crdiff.source.hash_sha256"]
    assert crdiff(*command, "-o", "b.safetensors").code == 0
    assert (here / "b.safetensors").read_bytes() == first
    # What it says goes into the header, so a lie shows who asks it.
    entry.write_text(json.dumps({**values, "sha256": "cd" * 32}))
    assert crdiff(*command, "-o", "c.safetensors").code == 0
    assert makers.metadata_of(here / "c.safetensors")["crdiff.source.hash_sha256"] == "0x" + "cd" * 32
    assert crdiff("verify", "a.safetensors", "--base", base).code == 0
    assert crdiff("verify", "c.safetensors", "--base", base).code == 3
    entry.write_text(json.dumps({**values, "sha256": "cd" * 32}))
    assert crdiff(*command, "--rehash", "-o", "d.safetensors").code == 0
    assert (here / "d.safetensors").read_bytes() == first
