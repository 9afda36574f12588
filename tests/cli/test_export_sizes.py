"""`crdiff export` of several sizes: one reading of the base, the same files, one summary."""

import shlex
from pathlib import Path

import pytest

from tests.support.command_lines import Line
from tests.support.forks import Forks
from tests.support.isolation import Crdiff
from tests.support.loopback_hub import LoopbackHub
from tests.support.messages import refused
from tests.support.publishing import REPO, Desk

SIZES = "--res 48 --res 96x64 --res 80"
OUTPUT = "d-{size}.safetensors"
NAMES = ("d-48x48.safetensors", "d-96x64.safetensors", "d-80x80.safetensors")


@pytest.fixture
def line(crdiff: Crdiff, here: Path) -> Line:
    return lambda text: crdiff(*shlex.split(text))


@pytest.fixture
def desk(loopback_hub: LoopbackHub, tmp_path: Path, clients: Forks | None) -> Desk:
    return Desk(loopback_hub, tmp_path, clients)


def test_the_files_are_those_of_one_export_each(line: Line, here: Path) -> None:
    ran = line(f"export demo {SIZES} --residual embed -o {OUTPUT}")
    assert ran.code == 0, ran.err
    assert ran.err.count("counting: ") == ran.err.count("writing: ") == 1
    rows = [row.split() for row in ran.out.splitlines()[1:4]]
    assert [row[0] for row in rows] == ["48x48", "96x64", "80x80"]
    assert [row[-1] for row in rows] == list(NAMES)
    for size, name in zip(("48", "96x64", "80"), NAMES, strict=True):
        assert line(f"export demo --res {size} --residual embed -o one.safetensors --force").code == 0
        assert (here / "one.safetensors").read_bytes() == (here / name).read_bytes()


def test_json_is_one_object_with_the_variants(line: Line, here: Path) -> None:
    several = line(f"export demo {SIZES} --json").result
    assert [variant["resolution"] for variant in several["variants"]] == ["48x48", "96x64", "80x80"]
    alone = line("export demo --res 48 --json --force").result
    assert "variants" not in alone
    del alone["schema"], alone["seconds"]
    assert several["variants"][0] == alone
    planned = line(f"export demo {SIZES} --dry-run --force --json").result
    assert [variant["resolution"] for variant in planned["variants"]] == ["48x48", "96x64", "80x80"]
    assert planned["dry_run"]
    bare = line(f"export demo {SIZES} -q --force").out.splitlines()
    assert bare == [f"demo-crdiff-{size}.safetensors" for size in ("48x48", "96x64", "80x80")]


def test_a_size_that_is_given_twice_is_made_once(line: Line, here: Path) -> None:
    assert line("export demo --res 48 --res 48x48").code == 0
    assert [path.name for path in here.iterdir()] == ["demo-crdiff-48x48.safetensors"]


def test_one_that_fails_does_not_stop_the_others(line: Line, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output appears in the meantime, and stays."""
    from crdiff_export.bake import staging

    publish = staging.publish

    def appear(part: Path, path: Path, *, replace: bool) -> None:
        if "96x64" in path.name:
            path.write_text("mine")
        publish(part, path, replace=replace)

    monkeypatch.setattr(staging, "publish", appear)
    ran = line(f"export demo {SIZES} -o {OUTPUT} --json")
    assert ran.code == 1
    assert [("error" in variant, variant["resolution"]) for variant in ran.result["variants"]] == [
        (False, "48x48"), (True, "96x64"), (False, "80x80"),
    ]  # fmt: skip
    assert (here / NAMES[1]).read_text() == "mine"
    assert sorted(path.name for path in here.iterdir()) == sorted(NAMES)
    (here / NAMES[1]).unlink()
    ran = line(f"export demo {SIZES} -o {OUTPUT} --force")
    assert ran.code == 1 or "failed" not in ran.out


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (f"export demo {SIZES} -o x.safetensors", "x.safetensors"),
        ("export demo --res 48 --res 50", "50x50"),
        ("export demo --res 48 --res nothing", "nothing"),
    ],
)
def test_what_cannot_be_meant_stops_before_anything_is_written(words: str, key: str, line: Line, here: Path) -> None:
    refused(line(words), 2, key)
    assert not list(here.iterdir())


def test_all_are_pushed_and_the_tag_is_at_the_last(desk: Desk) -> None:
    words = [*SIZES.split(), "-o", "d-{size}.safetensors", "--push", REPO, "--tag", "v1", "--json"]
    ran = desk.run("export", "demo", *words)
    assert ran.code == 0, ran.err
    assert desk.names() == {*NAMES, "README.md"}
    assert [variant["push"]["tag"] for variant in ran.result["variants"]] == [None, None, "v1"]
    assert desk.hub.repo(REPO).tags == {"v1": desk.head()}
    again = desk.run("export", "demo", *words, "--force")
    assert again.code == 0, again.err
    assert not any(variant["push"]["changed"] for variant in again.result["variants"])


def test_a_crdiff_of_one_size_has_names_with_a_size_too(crdiff: Crdiff, here: Path) -> None:
    assert crdiff("export", "demo", "--res", "48", "-o", "a-{size}.safetensors").code == 0
    assert (here / "a-48x48.safetensors").exists()


def test_several_sizes_do_not_replace_each_other_on_the_hub(line: Line, here: Path, desk: Desk) -> None:
    words = f"export demo {SIZES} -o {OUTPUT} --push {REPO} --path-in-repo"
    refused(line(f"{words} x.safetensors"), 2, "x.safetensors")
    assert not list(here.iterdir())
    ran = desk.run(*shlex.split(f"{words} sub/"))
    assert ran.code == 0, ran.err
    assert desk.names() == {"README.md", *(f"sub/{name}" for name in NAMES)}
