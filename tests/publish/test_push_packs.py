"""`crdiff push` and `crdiff card` of packs, and exports with a pack that is on the Hub."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import makers
from tests.support.hub_runs import CLIENTS, Client
from tests.support.loopback_hub import LoopbackHub
from tests.support.messages import refused as refused_with
from tests.support.publishing import BASE, REPO, Desk, Made, digest, refused

PACK = "one.crdiff"


def make(desk: Desk, *args: object, base: object = BASE, name: str = PACK) -> Path:
    """A pack of a base."""
    ran = desk.run("pack", "create", base, "--res", "96x64", "--res", "64x96", *args, "-o", name)
    assert ran.code == 0, ran.err
    desk.hub.requests.clear()
    return desk.folder / name


@pytest.fixture
def pack(desk: Desk) -> Path:
    """A pack of BASE with thresholds."""
    desk.base()
    return make(desk)


def card(desk: Desk, revision: str = "main") -> str:
    return desk.hub.read(REPO, "README.md", revision).decode()


@pytest.mark.parametrize("client", CLIENTS)
def test_a_pack_is_pushed_once(desk: Desk, pack: Path, client: Client) -> None:
    ran = desk.push(pack, REPO, "--json", client=client)
    assert (ran.code, ran.err) == (0, "")
    assert desk.titles() == [f"Upload {PACK} with crdiff"]
    assert desk.names() == {PACK, "README.md"}
    assert desk.is_whole(pack)
    url = f"{desk.hub.url}/{REPO}/resolve/{desk.head()}/{PACK}"
    (file,) = ran.result["files"]
    assert (file["path"], file["bytes"], file["sha256"], file["url"]) == (
        PACK, pack.stat().st_size, digest(pack), url,
    )  # fmt: skip
    assert f"--pack hf://{REPO}/{PACK} --res 64x96" in card(desk)
    assert f"{pack.stat().st_size:,} bytes for 64x96 and 96x64" in card(desk)
    assert "license: mit" in card(desk)
    again = desk.push(pack, REPO, client=client)
    assert "no commit was made" in again.out
    assert again.out.splitlines()[-1] == url
    assert len(desk.titles()) == 1


def test_a_repository_gets_files_and_packs(desk: Desk, pack: Path) -> None:
    """Of the pack that is there its header alone is read; a size in both is said once."""
    assert desk.push(pack).code == 0
    assert desk.export(BASE, "-o", "one.safetensors").code == 0
    desk.hub.requests.clear()
    assert desk.push(desk.folder / "one.safetensors").code == 0
    assert desk.downloads(PACK) == []
    ranges = [asked.headers["range"] for asked in desk.hub.requests if PACK in asked.path and "range" in asked.headers]
    assert len(ranges) == 1
    rows = [line.split(" | ")[0] for line in card(desk).splitlines() if re.match(r"\| \[", line)]
    assert sorted(len(re.findall(r"\[", row)) for row in rows) == [1, 2]
    assert "one.safetensors" in max(rows, key=len)
    assert "resolution:64x96" in card(desk)
    before = card(desk)
    assert desk.push(make(desk, "--ratio", "0.2", "--force"), REPO, "--path-in-repo", "other/").code == 0
    assert "other/one.crdiff" in card(desk)
    assert before.splitlines()[:3] == card(desk).splitlines()[:3]


def test_where_a_pack_goes(desk: Desk, pack: Path) -> None:
    for args, revision, path in (
        (["--path-in-repo", "packs/"], "main", f"packs/{PACK}"),
        (["--path-in-repo", "a/b.crdiff", "--revision", "half"], "half", "a/b.crdiff"),
        (["--create-pr"], "refs/pr/1", PACK),
    ):
        ran = desk.push(pack, REPO, *args, "--json")
        assert ran.code == 0, ran.err
        assert ran.result["revision"] == revision
        assert desk.hub.read(REPO, path, revision) == pack.read_bytes()
    assert f"--pack hf://{REPO}@half/a/b.crdiff " in card(desk, "half")
    assert f"--pack hf://{REPO}/{PACK} " in card(desk, "refs/pr/1")
    ran = desk.push(pack, REPO, "--path-in-repo", "packs/", "--tag", "v1", "--message", "A pack\n\nof two", "--json")
    assert ran.result["tag"] == "v1"
    assert desk.hub.repo(REPO).tags == {"v1": desk.head()}


def test_a_dry_run_sends_nothing(desk: Desk, pack: Path) -> None:
    ran = desk.push(pack, REPO, "--dry-run", "--json")
    assert {file["path"]: file["state"] for file in ran.result["files"]} == {PACK: "new", "README.md": "new"}
    assert desk.changes() == []
    assert PACK in ran.result["card"]


@pytest.mark.parametrize(
    ("settings", "front", "private"),
    [
        ({}, b"---\nlicense: mit\n---\n", False),
        ({"gated": "auto", "access": ("tester",)}, b"---\nlicense: mit\nextra_gated_prompt: Please\n---\n", True),
        ({}, b"---\nlicense: other\nlicense_name: own\n---\n", True),
    ],
    ids=["public", "gated", "other"],
)
def test_the_base_decides(desk: Desk, settings: dict[str, Any], front: bytes, private: bool) -> None:
    desk.base(card=front, **settings)
    assert desk.push(make(desk)).code == 0
    assert desk.hub.repo(REPO).private == private
    assert ("extra_gated_prompt" in card(desk)) == bool(settings)
    assert "base_model: org/base" in card(desk)


def test_the_base_of_a_local_file_can_be_named(desk: Desk, made: Made) -> None:
    desk.base()
    pack = make(desk, base=made.home / "small.safetensors")
    assert desk.push(pack, REPO, "--base-model", "org/base").code == 0
    assert "base_model: org/base" in card(desk)
    assert not desk.hub.repo(REPO).private


def test_masks_are_compared_before_they_are_sent(desk: Desk) -> None:
    desk.base()
    pack = make(desk, "--criterion", "random")
    assert desk.push(pack, REPO).code == 0
    assert desk.is_whole(pack)
    whole = pack.read_bytes()
    pack.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    before = desk.head()
    refused(desk.push(pack, REPO, "-q"), 1, "the masks of")
    pack.write_bytes(whole.replace(b"poa.weight", b"poa_weight", 1))
    refused(desk.push(pack, REPO, "-q"), 1, PACK)
    assert desk.head() == before


def test_what_is_no_way_to_push_a_pack(desk: Desk, pack: Path) -> None:
    picture = desk.folder / "sheet.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0\0\0\0IEND\xaeB`\x82")
    for args in (
        ["--sheet", picture],
        ["--preview", "a fox"],
        ["--path-in-repo", "a.safetensors"],
        ["--path-in-repo", ""],
    ):
        ran = desk.push(pack, REPO, *args)
        refused_with(ran, 2, "pack" if args[0] != "--path-in-repo" else "is not a name for a pack")
    refused_with(desk.run("card", pack, "--sheet", picture), 2, "--sheet")
    refused_with(desk.push(makers.write(desk.folder / "no.crdiff", makers.tiny("demo.original-unet"))), 1, "no.crdiff")
    assert desk.hub.repos() == ["org/base"]


def test_a_card_of_a_pack(desk: Desk, pack: Path) -> None:
    ran = desk.run("card", pack)
    assert ran.code == 0
    assert "--pack hf://ORG/NAME/one.crdiff " in ran.out
    assert desk.push(pack).code == 0
    assert desk.run("card", pack, REPO).out.rstrip("\n") == card(desk).rstrip("\n")


def test_other_files_of_that_name_are_left_out(desk: Desk, pack: Path) -> None:
    odd = {"a.crdiff": b"text", "b.crdiff": b"\x08\0\0\0\0\0\0\0{}      ", "c.crdiff": pack.read_bytes()[:900]}
    desk.hub.add_repo(REPO, {**odd, "copy.safetensors": pack.read_bytes()})
    assert desk.push(pack).code == 0
    assert not [name for name in (*odd, "copy.safetensors") if name in card(desk)]
    assert PACK in card(desk)


def test_an_export_takes_a_pack_from_the_hub(desk: Desk, pack: Path, loopback_hub: LoopbackHub) -> None:
    assert desk.push(pack, REPO, "--path-in-repo", "packs/").code == 0
    assert desk.export(BASE, "-o", "plain.safetensors").code == 0
    ran = desk.export(BASE, "--pack", f"hf://{REPO}/packs/{PACK}", "-o", "packed.safetensors")
    assert ran.code == 0, ran.err
    assert digest(desk.folder / "packed.safetensors") == digest(desk.folder / "plain.safetensors")
    for name in (f"hf://{REPO}", f"hf://{REPO}/no.crdiff", "no.crdiff", "plain.safetensors"):
        refused_with(
            desk.export(BASE, "--pack", name, "-o", "x.safetensors", "-q"),
            4 if "no.crdiff" in name and "hf" in name else 1,
        )
