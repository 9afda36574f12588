"""`crdiff publish` of plans with packs: beside the files of a base, or instead of them."""

from typing import Any

import pytest

from crdiff_export.packs import open_pack
from tests.publish.test_run import shelves
from tests.support.publishing import BASE, REPO, Desk, checkpoint, plan

PACK = 'pack = "{base}.crdiff"'
ALL = {"48x48.safetensors", "96x64.safetensors", "model.crdiff"}


def publish(desk: Desk, *args: object, code: int = 0, **how: Any) -> dict[str, str]:
    """The status of all variants and packs, by path."""
    ran = desk.publish(*args, "--json", **how)
    assert (ran.code, ran.err) == (code, ""), ran.err + ran.out
    return {one["path"]: one["status"] for kind in ("variants", "packs") for one in ran.result[kind]}


def test_a_pack_stands_beside_the_files(desk: Desk) -> None:
    desk.base()
    desk.plan(plan("48x48", "96x64", more=f'{PACK}\ntag = "v1"'))
    assert publish(desk) == dict.fromkeys(ALL, "published")
    assert desk.names() == ALL | {"README.md"}
    assert desk.titles()[0] == "Publish model.crdiff with crdiff"
    assert desk.hub.repo(REPO).tags == {"v1": desk.head()}
    assert len(desk.downloads()) == 1
    assert desk.is_whole(desk.folder / "model.crdiff")
    exported = desk.run("export", BASE, "--pack", "model.crdiff", "--res", "48", "-o", "again.safetensors")
    assert exported.code == 0, exported.err
    assert (desk.folder / "again.safetensors").read_bytes() == desk.hub.read(REPO, "48x48.safetensors")
    card = desk.hub.read(REPO, "README.md").decode()
    assert len([line for line in card.splitlines() if line.startswith("| [")]) == 2
    assert publish(desk) == dict.fromkeys(ALL, "unchanged")
    assert [line for line in desk.changes() if "/tag/" not in line] == []
    assert desk.downloads() == desk.downloads(".crdiff") == []


def test_what_is_told_of_a_pack(desk: Desk) -> None:
    desk.base()
    desk.plan(plan("48x48", "96x64", more=PACK))
    shown = desk.publish("--dry-run")
    assert "pack of 2" in shown.out
    assert "1 to make" in next(line for line in shown.out.splitlines() if line.startswith("packs:"))
    (planned,) = desk.publish("--dry-run", "--json").result["packs"]
    assert (planned["sizes"], planned["action"], planned["reason"]) == (["48x48", "96x64"], "make", "new")
    ran = desk.publish("--json")
    (made,) = ran.result["packs"]
    data = desk.hub.read(REPO, "model.crdiff")
    assert (made["bytes"], made["commit"]) == (len(data), desk.head())
    assert made["url"].endswith(f"/resolve/{desk.head()}/model.crdiff")
    assert made["digest"] == open_pack(desk.folder / "model.crdiff").header.digest()
    assert ran.result["published"] == 3
    assert "pack of 2" in desk.publish().out
    (planned,) = desk.publish("--dry-run", "--json").result["packs"]
    assert (planned["action"], planned["digest"]) == ("skip", made["digest"])


def test_the_pack_instead_of_the_files(desk: Desk) -> None:
    desk.base()
    desk.plan(plan("48x48", "96x64", each=f"{PACK}\nfiles = false"))
    assert publish(desk, "--keep", "none", "-o", "out") == {"model.crdiff": "published"}
    assert desk.names() == {"model.crdiff", "README.md"}
    assert desk.files() == {"out"}
    assert publish(desk, "--keep", "none", "-o", "out") == {"model.crdiff": "unchanged"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"more": f'{PACK}\ndtype = "bf16"'}, "changed: cast (48x48)"),
        ({"sizes": ("48x48",)}, "changed: sizes"),
        ({"each": '[[base.variant]]\nsize = "64x96"'}, "changed: sizes"),
        ({"more": f'{PACK}\ntargets = ["attn"]'}, "changed: poa.weight, targets, "),
        ({"more": f'{PACK}\ncriterion = "random"'}, "changed: criterion, poa.weight, "),
    ],
    ids=str,
)  # fmt: skip
def test_a_pack_of_other_numbers_is_made_again(desk: Desk, change: dict[str, Any], reason: str) -> None:
    desk.base()
    desk.plan(plan("48x48", "96x64", more=f"{PACK}\nfiles = false"))
    publish(desk, "--keep", "none")
    changed = {"sizes": ("48x48", "96x64"), "more": PACK, **change}
    desk.plan(plan(*changed.pop("sizes"), **{**changed, "more": f"{changed['more']}\nfiles = false"}))
    (planned,) = desk.publish("--dry-run", "--json").result["packs"]
    assert planned["action"] == "make"
    assert planned["reason"].startswith(reason)
    assert publish(desk) == {"model.crdiff": "published"}
    assert publish(desk) == {"model.crdiff": "unchanged"}


def test_a_pack_of_another_base_is_made_again(desk: Desk) -> None:
    desk.base()
    desk.plan(plan("48x48", more=f"{PACK}\nfiles = false"))
    publish(desk, "--keep", "none")
    desk.hub.commit("org/base", {"model.safetensors": checkpoint(7)})
    (planned,) = desk.publish("--dry-run", "--json").result["packs"]
    assert planned["reason"] == "changed: source.file_sha256"
    assert publish(desk) == {"model.crdiff": "published"}


def test_a_local_base_is_compared_by_the_hash_of_its_tensors(desk: Desk) -> None:
    (desk.folder / "model.safetensors").write_bytes(checkpoint())
    desk.plan(plan("48x48", base="model.safetensors", repo=REPO, more=f"{PACK}\nfiles = false"))
    assert publish(desk) == {"model.crdiff": "published"}
    assert publish(desk) == {"model.crdiff": "unchanged"}
    (desk.folder / "model.safetensors").write_bytes(checkpoint(1))
    (planned,) = desk.publish("--dry-run", "--json").result["packs"]
    assert planned["reason"] == "changed: source.hash_sha256"


def test_what_an_earlier_run_made_is_only_sent(desk: Desk) -> None:
    desk.base()
    desk.plan(plan("48x48", "96x64", more=f"{PACK}\nfiles = false"))
    assert publish(desk, "--no-push") == {"model.crdiff": "written"}
    assert publish(desk, "--no-push") == {"model.crdiff": "unchanged"}
    made = (desk.folder / "model.crdiff").read_bytes()
    (planned,) = desk.publish("--dry-run", "--json").result["packs"]
    assert (planned["action"], planned["reason"]) == ("send", "made by an earlier run")
    assert publish(desk) == {"model.crdiff": "published"}
    assert desk.downloads() == []
    assert desk.hub.read(REPO, "model.crdiff") == made


def test_what_is_no_pack_is_not_replaced(desk: Desk) -> None:
    desk.base()
    desk.plan(plan("48x48", more=PACK))
    (desk.folder / "model.crdiff").write_text("mine")
    assert publish_failing(desk) == {"48x48.safetensors": "published", "model.crdiff": "failed"}
    assert (desk.folder / "model.crdiff").read_text() == "mine"
    desk.hub.commit(REPO, {"other.crdiff": b"theirs"})
    desk.plan(plan("48x48", more='pack = "other.crdiff"\nfiles = false'))
    (planned,) = desk.publish("--dry-run", "--json").result["packs"]
    assert (planned["action"], planned["reason"]) == ("make", "replaces what crdiff did not make")


def publish_failing(desk: Desk, code: int = 1) -> dict[str, str]:
    ran = desk.publish("--json")
    assert ran.code == code
    return {one["path"]: one["status"] for kind in ("variants", "packs") for one in ran.result[kind]}


def test_one_that_fails_stops_no_other_and_is_not_tagged(desk: Desk) -> None:
    desk.base()
    desk.plan(plan("48x48", "96x64", more=f'{PACK}\ntag = "v1"'))
    desk.hub.fail("POST .*/preupload/", status=400)
    first = publish_failing(desk, 4)
    assert sorted(first.values()) == ["failed", "published", "published"]
    assert first["model.crdiff"] == "published"
    assert desk.hub.repo(REPO).tags == {}
    assert set(publish(desk).values()) == {"published", "unchanged"}
    assert desk.hub.repo(REPO).tags == {"v1": desk.head()}


def test_a_base_that_is_not_there_fails_its_pack(desk: Desk) -> None:
    desk.base()
    text = plan("48x48", more=f"{PACK}\nfiles = false") + '[[base]]\nbase = "hf://org/no/x.safetensors"\n'
    desk.plan(text)
    assert publish_failing(desk, 4) == {"model.crdiff": "published", "x.crdiff": "failed"}


def test_masks_and_folders(desk: Desk) -> None:
    """Packs of masks, of pipelines on branches of their own."""
    shelves(desk)
    desk.plan(
        f'repo = "{REPO}"\ncriterion = "random"\npack = "packs/{{base}}-{{dtype}}.crdiff"\ndtype = "fp16"\n'
        'files = false\nsizes = ["48", "96x64"]\n[[base]]\nbase = "org/pipe"\nrevision = "half"\nweights = "fp16"\n'
        '[[base]]\nbase = "org/sharded"\n'
    )
    paths = ["packs/pipe-fp16.crdiff", "packs/sharded-fp16.crdiff"]
    assert publish(desk) == dict.fromkeys(paths, "published")
    assert (desk.folder / REPO / "half" / paths[0]).is_file()
    assert "variant fp16" in desk.hub.read(REPO, "README.md", "half").decode()
    assert publish(desk) == dict.fromkeys(paths, "unchanged")
    totals = desk.publish("--dry-run").out
    assert "0 to make, 0 to push, 2 there" in totals


def test_pull_requests(desk: Desk) -> None:
    desk.base()
    desk.hub.add_repo(REPO)
    desk.plan(plan("48x48", more=PACK))
    assert set(publish(desk, "--create-pr").values()) == {"published"}
    assert "model.crdiff" in desk.names(revision="refs/pr/1")
    assert set(publish(desk, "--create-pr").values()) == {"unchanged"}
