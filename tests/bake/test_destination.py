"""Where an export may go: what is refused before anything is read or written, and what --force does not touch."""

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from crdiff_export import ExportRequest
from crdiff_export.bake.destination import HEADER_GROWTH, DiskSpace, check_space
from crdiff_export.errors import PlanError
from crdiff_export.export import ExportJob, prepare
from crdiff_export.models import demo
from tests.support import makers
from tests.support.exporting import SIZE, bake, names
from tests.support.messages import raises

SHARDS = "shards/diffusion_pytorch_model.safetensors.index.json"


def job(base: object, output: Path | None = None, *, force: bool = False) -> ExportJob:
    return prepare(ExportRequest(str(base), SIZE, output, force=force, hashing=False))


def refused(base: object, output: Path, key: object, *, force: bool = False) -> None:
    """Assert that an output is refused by its path, and why."""
    with raises(PlanError, output, key):
        job(base, output, force=force)


# --- its name ---


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("sd15.safetensors", "sd15-crdiff-512x512.safetensors"),
        ("pipe", "pipe-crdiff-512x512"),
        ("pipe/unet", "unet-crdiff-512x512"),
        (SHARDS, "diffusion_pytorch_model-crdiff-512x512"),
    ],
)
def test_the_default_name(shelf: Path, here: Path, base: str, name: str) -> None:
    assert job(shelf / base).target == Path(name)


def test_the_default_name_of_the_current_folder(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shelf / "pipe")
    with pytest.raises(PlanError, match="that is the base itself"):
        job(".")


@pytest.mark.parametrize("name", ["", ".", "..", "/", "sub/.."])
@pytest.mark.parametrize("force", [True, False])
def test_a_path_without_a_name_is_a_folder(shelf: Path, here: Path, name: str, force: bool) -> None:
    (here / "sub").mkdir()
    assert job(shelf / "pipe", Path(name), force=force).target == Path(name) / "pipe-crdiff-512x512"


def test_only_an_ending_is_no_name(here: Path) -> None:
    refused("demo", Path(".safetensors"), "not a name")


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250 + ".safetensors"])
def test_a_name_that_is_too_long(here: Path, name: str) -> None:
    refused("demo", Path(name), os.strerror(errno.ENAMETOOLONG))


@pytest.mark.parametrize("name", ["x" * (255 - len(".safetensors")), "a[1]*?"], ids=["almost too long", "for globs"])
def test_a_name_that_is_odd(here: Path, name: str) -> None:
    bake("demo", Path(f"{name}.safetensors"))
    assert names(here) == [f"{name}.safetensors"]


# --- what is there ---


def occupied(make: Callable[[Path], object]) -> Callable[[Path], Path]:
    def at(path: Path) -> Path:
        make(path)
        return path

    return at


def full(path: Path) -> None:
    path.mkdir()
    (path / "photo.jpg").write_text("mine")


@pytest.mark.parametrize(
    ("base", "make", "force", "message"),
    [
        ("sd15.safetensors", Path.touch, False, "already exists"),
        ("sd15.safetensors", Path.mkdir, True, "a folder; the output is one file"),
        ("sd15.safetensors", lambda path: path.symlink_to("nowhere"), False, "already exists"),
        ("sd15.safetensors", lambda path: path.symlink_to(path), False, "already exists"),
        ("sd15.safetensors", os.mkfifo, True, "not a regular file"),
        ("pipe", full, True, "not a folder that crdiff made; --force does not replace it"),
        ("pipe", Path.touch, True, "not a folder, which the output is"),
        ("pipe", lambda path: path.symlink_to("nowhere"), True, "not a folder, which the output is"),
        (SHARDS, full, True, "not a folder that crdiff made; --force does not replace it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes need rights there")
def test_what_is_in_the_way(
    shelf: Path, tmp_path: Path, base: str, make: Callable[[Path], object], force: bool, message: str
) -> None:
    target = tmp_path / ("o.safetensors" if base.endswith(".safetensors") else "o")
    make(target)
    before = sorted(tmp_path.rglob("*")), os.lstat(target).st_mtime_ns, os.lstat(target).st_ino
    refused(shelf / base, target, message, force=force)
    assert (sorted(tmp_path.rglob("*")), os.lstat(target).st_mtime_ns, os.lstat(target).st_ino) == before


@pytest.mark.parametrize("base", ["sd15.safetensors", "pipe", SHARDS])
def test_a_folder_of_other_things_gets_the_default_name_inside(shelf: Path, tmp_path: Path, base: str) -> None:
    full(tmp_path / "o")
    written = bake(shelf / base, tmp_path / "o")
    assert written.parent == tmp_path / "o"
    assert written.name.removesuffix(".safetensors").endswith("-crdiff-512x512")
    assert (tmp_path / "o/photo.jpg").read_text() == "mine"


def test_an_earlier_output_is_not_replaced_unasked(shelf: Path, tmp_path: Path) -> None:
    bake(shelf / "pipe", tmp_path / "o")
    refused(shelf / "pipe", tmp_path / "o", "already exists")


def test_an_empty_folder_is_nothing(shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    assert (bake(shelf / "pipe", tmp_path / "o") / "model_index.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_to_a_folder_is_refused_by_name(shelf: Path, tmp_path: Path) -> None:
    bake(shelf / "pipe", tmp_path / "real")
    (tmp_path / "o").symlink_to("real")
    refused(shelf / "pipe", tmp_path / "o", "a link to a folder", force=True)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_force_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "o.safetensors").symlink_to("precious")
    bake("demo", tmp_path / "o.safetensors", force=True)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "o.safetensors").is_symlink()


def test_force_replaces_a_folder_of_ours(shelf: Path, tmp_path: Path) -> None:
    bake(shelf / "pipe", tmp_path / "o")
    (tmp_path / "o/unet/config.json").write_text("old")
    bake(shelf / "pipe", tmp_path / "o", force=True)
    assert (tmp_path / "o/unet/config.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_force_replaces_an_output_of_shards_by_one_of_a_file(shelf: Path, tmp_path: Path) -> None:
    first = tmp_path / "first/unet"
    makers.write_shards(first, makers.tiny("demo.diffusers-unet"), 2)
    bake(tmp_path / "first", tmp_path / "o")
    shutil.copytree(shelf / "pipe/unet", tmp_path / "second/unet")
    bake(tmp_path / "second", tmp_path / "o", force=True)
    assert not list((tmp_path / "o").rglob("*.index.json"))


@pytest.mark.parametrize("name", ["notes.txt", "unet/mine.safetensors", ".git/HEAD", "vae/picture.png"])
def test_force_does_not_delete_what_somebody_put_there(shelf: Path, tmp_path: Path, name: str) -> None:
    target = bake(shelf / "pipe", tmp_path / "o")
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("mine")
    refused(shelf / "pipe", target, f"holds {name}", force=True)


# --- the base ---


@pytest.fixture
def own(shelf: Path, tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    shutil.copy(shelf / "sd15.safetensors", tmp_path / "own")
    for name in ("pipe", "shards"):  # not all of it: a copy of the sparse file has no hole
        shutil.copytree(shelf / name, tmp_path / "own" / name)
    return tmp_path / "own"


@pytest.mark.parametrize(
    ("base", "target", "message"),
    [
        ("sd15.safetensors", "sd15.safetensors", "that is the base itself"),
        ("sd15.safetensors", "pipe/../sd15.safetensors", "that is the base itself"),
        ("sd15.safetensors", "linked.safetensors", "that is the base itself"),
        ("sd15.safetensors", "same.safetensors", "that is the base itself"),
        ("linked.safetensors", "sd15.safetensors", "that is the base itself"),
        ("pipe", "pipe", "that is the base itself"),
        ("pipe", "pipe/unet", "that is the base itself"),
        ("pipe", "pipe/new", "that is the base itself"),
        (SHARDS, "shards", "that is the base itself"),
        ("pipe/unet", "pipe", "the base lies in it"),
        (SHARDS, "../own", "the base lies in it"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_the_base_is_never_the_output(own: Path, base: str, target: str, message: str) -> None:
    (own / "linked.safetensors").symlink_to("sd15.safetensors")
    os.link(own / "sd15.safetensors", own / "same.safetensors")
    refused(own / base, own / target, message, force=True)


def test_an_output_beside_its_base_is_fine(own: Path) -> None:
    assert job(own / SHARDS, own / "shards/pruned").target == own / "shards/pruned"
    assert job(own / "pipe", own / "pipe2").target == own / "pipe2"


def test_a_base_of_ours_in_an_output_of_ours_is_not_deleted_with_it(shelf: Path, tmp_path: Path) -> None:
    target = bake(shelf / "pipe", tmp_path / "o")
    shutil.copytree(shelf / "pipe", target / "base")
    refused(target / "base", target, "the base lies in it", force=True)


# --- rights and room ---


def test_a_folder_that_the_system_says_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused("demo", tmp_path / "o.safetensors", "cannot be written to")


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused("demo", tmp_path / "file/o.safetensors", "does not exist")


@pytest.mark.parametrize("base", ["sd15.safetensors", SHARDS, "pipe"])
def test_room_is_asked_for_all_that_is_written(shelf: Path, tmp_path: Path, base: str) -> None:
    planned = job(shelf / base, tmp_path / ("o.safetensors" if base.endswith("safetensors") else "o"))
    path = bake(shelf / base, planned.target)
    written = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in written)
    assert size <= planned.space.needed <= size + HEADER_GROWTH * len(planned.plan.outputs)
    assert planned.space.folder == tmp_path


def test_too_little_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """All outputs for one folder count together."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_500_000))
    check_space(DiskSpace(Path(), 500_000), DiskSpace(Path(), 1_000_000))
    with raises(PlanError, "6.94 GB needed, 1.50 MB free"):
        check_space(DiskSpace(Path("/"), 6_937_040_000), DiskSpace(Path("/"), 1_000_000))


def test_nothing_is_read_or_written_for_a_plan(tmp_path: Path) -> None:
    before = demo.path().stat().st_mtime_ns
    job("demo", tmp_path / "o.safetensors")
    assert list(tmp_path.iterdir()) == []
    assert demo.path().stat().st_mtime_ns == before
