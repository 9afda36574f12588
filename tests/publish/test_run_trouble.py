"""`crdiff publish` where something goes wrong: with one variant, with the Hub, with the disk, or with the process."""

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crdiff_export.models import recipe_files
from tests.support import makers
from tests.support.forks import Forks
from tests.support.hub_runs import checked
from tests.support.isolation import Crdiff, Ran
from tests.support.loopback_hub import LoopbackHub
from tests.support.publishing import Desk, checkpoint, plan, publish, statuses

# --- what is kept ---


def test_one_at_a_time(desk: Desk) -> None:
    """--keep none: the disk never holds more than one output, whatever becomes of it."""
    desk.base()
    desk.plan(plan("48x48", "96x64", "96x96", "64x96").replace("{size}", "sub/{size}") + 'revision = "b"\n')
    seen: list[list[str]] = []
    desk.hub.before("PUT /lfs/", lambda: seen.append(outputs(desk)), times=9)
    desk.hub.before("POST .*/commit/", lambda: seen.append(outputs(desk)), times=9)
    desk.hub.fail("POST .*/preupload/", status=400)
    sizes = ("48x48", "96x64", "96x96", "64x96")
    expected = {f"sub/{size}.safetensors": "published" for size in sizes} | {"sub/48x48.safetensors": "failed"}
    assert desk.made("-o", "out", "--keep", "none", code=4) == expected
    assert seen == [[f"{size}.safetensors"] for size in sizes[1:] for _ in ("upload", "commit")]
    assert desk.files() == {"out"}
    assert len(desk.downloads()) == 1
    again = desk.made("-o", "out", "--keep", "none")
    assert again == dict.fromkeys(expected, "unchanged") | {"sub/48x48.safetensors": "published"}
    assert desk.files() == {"out"}


def outputs(desk: Desk) -> list[str]:
    """All files, temp files included."""
    return sorted(path.name for path in desk.folder.rglob("*") if path.is_file() and path.suffix != ".toml")


def test_what_is_kept_is_sent_again(desk: Desk) -> None:
    desk.base()
    desk.plan(plan("48x48", "96x64"))
    assert desk.made("--no-push") == {"48x48.safetensors": "written", "96x64.safetensors": "written"}
    made = {path: (desk.folder / path).read_bytes() for path in desk.files()}
    assert len(made) == 2
    desk.hub.fail("POST .*/preupload/", status=400)
    assert desk.made("--keep", "none", code=4) == {"48x48.safetensors": "failed", "96x64.safetensors": "published"}
    assert desk.files() == {"48x48.safetensors"}  # nobody wants to make that again
    (desk.folder / "96x64.safetensors").write_bytes(made["96x64.safetensors"])
    del desk.hub.repositories["tester/out"]
    assert set(desk.made().values()) == {"published"}
    assert desk.downloads() == []
    assert {path: desk.hub.read("tester/out", path) for path in made} == made


def test_a_damaged_file_is_not_sent(desk: Desk) -> None:
    desk.base()
    desk.plan(plan("48x48", "96x64"))
    desk.made("--no-push")
    path = desk.folder / "48x48.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert desk.made(code=1) == {"48x48.safetensors": "failed", "96x64.safetensors": "published"}
    path.write_bytes(whole[:-1])
    assert desk.made(code=1) == {"48x48.safetensors": "failed", "96x64.safetensors": "unchanged"}
    assert path.read_bytes() == whole[:-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--no-push", "--keep", "none"], "--no-push and --keep none do not go together"),
        (["--no-push", "--create-pr"], "--no-push and --create-pr do not go together"),
        (["--create-pr"], "plan.toml: --create-pr does not go with tag = 'v1' (96x64 of demo)"),
        (["--create-pr", "--dry-run"], "plan.toml: --create-pr does not go with tag = 'v1' (96x64 of demo)"),
        (["--keep", "some"], "Invalid value for '--keep'"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], said: str, crdiff: Crdiff, here: Path) -> None:
    (here / "plan.toml").write_text(plan("96x64", base="demo", more='tag = "v1"'))
    ran = crdiff("publish", "plan.toml", "--json", *options)
    assert (ran.code, ran.out, ran.error["code"]) == (2, "", "usage")
    assert ran.error["message"].startswith(said)


# --- one that fails ---

# A base, what else its variant says, and the error that it meets.
WRONG: dict[str, tuple[str, dict[str, str], str, str]] = {
    "missing": ("org/nothing", {}, "hub", "org/nothing: no such repository, or a private one"),
    "no file": ("hf://org/base/x.safetensors", {}, "hub", "org/base/x.safetensors: no such file in the repository"),
    "no revision": ("hf://org/base@nowhere/model.safetensors", {}, "hub", "org/base: no such revision"),
    "gated": ("org/gated", {}, "hub", "org/gated/model.safetensors: gated; your account has no access"),
    "private": ("org/private", {}, "hub", "org/private: no such repository, or a private one"),
    "several": ("org/odd", {}, "hub", "org/odd: has 4 checkpoints"),
    "no model": ("hf://org/odd/odd.safetensors", {}, "family", "no known model family"),
    "no weights": ("hf://org/odd/README.md", {}, "hub", "org/odd/README.md: not a safetensors file"),
    "damaged": ("hf://org/odd/damaged.safetensors", {}, "hub", "damaged.safetensors: not a safetensors file"),
    "pruned": (
        "hf://org/odd/pruned.safetensors",
        {},
        "plan",
        "pruned.safetensors: its header says that crdiff pruned it",
    ),
    "not finite": ("hf://org/odd/nan.safetensors", {}, "plan", "not finite"),
    "recipe": ("org/base", {"recipe": '"foreign.toml"', "size": '"512"'}, "recipe", "foreign.toml: not a recipe for"),
    "group": ("org/base", {"ratios": "{ blocks = 0.3 }"}, "usage", "this model has no group 'blocks' to prune"),
    "grid": ("org/base", {"size": '"100x100"'}, "usage", "100x100 does not fit"),
    "targets": ("org/dit", {"targets": '["attn2"]', "size": '"512"'}, "usage", "has no 'attn2' targets"),
    "suffix": ("org/base", {"name": '"suffix"'}, "plan", "suffix: the output is a safetensors file"),
    "taken": ("org/base", {}, "plan", "taken.safetensors: not made by crdiff, and so not replaced"),
    "in the way": ("org/base", {"name": '"file/x.safetensors"'}, "plan", "file/x.safetensors: File exists: "),
    "too long": ("org/base", {"name": f'"{"ü" * 150}.safetensors"'}, "plan", "File name too long"),
    "read-only": ("org/base", {"repo": '"org/readonly"'}, "hub", "org/readonly: the Hub answered 403"),
    "not mine": ("org/base", {"repo": '"org/new"'}, "hub", "org/new: no such repository, and the token may not create"),
    "no card": ("org/base", {"repo": '"tester/broken"'}, "card", "README.md, line 3: the front matter is not YAML"),
    "refused": ("org/base", {"repo": '"tester/refused"'}, "hub", "tester/refused: the Hub answered 503"),
}
MENDED = ("missing", "gated", "taken", "refused")


def wrong() -> str:
    """A plan with all of these, between two that are right."""
    text = 'repo = "tester/out"\n'
    for name, (base, more, _, _) in {
        "first": ("org/base", {}, "", ""),
        **WRONG,
        "last": ("org/base", {}, "", ""),
    }.items():
        said = {"size": '"96x96"', "name": f'"{name}.safetensors"'} | more
        lines = "".join(f"{key} = {value}\n" for key, value in said.items())
        text += f'[[base]]\nbase = "{base}"\n[[base.variant]]\n{lines}'
    return text


def test_one_that_fails_stops_no_other(desk: Desk) -> None:
    desk.base()
    desk.base("org/gated", gated="manual")
    desk.base("org/private", private=True)
    shutil.copy(recipe_files.builtin_path() / "sd15.toml", desk.folder / "foreign.toml")
    odd = {f"{name}.safetensors": data for name, data in odd_files(desk).items()}
    desk.hub.add_repo("org/odd", {"README.md": b"Nothing.", **odd})
    dit = makers.tiny("sd3-medium.original-transformer")
    desk.hub.add_repo("org/dit", {"dit.safetensors": makers.header(dit) + b"".join(data for *_, data in dit.values())})
    desk.hub.add_repo("org/readonly", {"x": b"x"})
    desk.hub.add_repo("tester/broken", {"README.md": b"---\nlicense: [\n---\n"})
    out = desk.folder / "tester/out"  # as there are several repositories
    out.mkdir(parents=True)
    (out / "taken.safetensors").write_bytes(b"mine")
    (out / "file").write_bytes(b"mine, too")
    desk.hub.fail("POST .*/refused/commit/", times=99, headers={"Retry-After": "0"})
    desk.plan(wrong())
    ran = desk.publish("--json")
    assert (ran.code, ran.err) == (1, "")
    first, *made, last = ran.result["variants"]
    assert (first["status"], last["status"]) == ("published", "published")
    for one, (name, (_, _, code, message)) in zip(made, WRONG.items(), strict=True):
        assert (one["status"], one["error"]["code"]) == ("failed", code), name
        assert message in one["error"]["message"], name
        assert one["error"]["hint"], name
    assert sorted(path.split("/")[2] for path in desk.downloads(".safetensors")) == ["base", "odd"]
    assert len([path for path in desk.asked("POST") if "/refused/commit/" in path]) == 5
    assert (out / "taken.safetensors").read_bytes() == b"mine"

    # What can be mended is made, and nothing else.
    (out / "taken.safetensors").unlink()
    desk.hub.repositories["org/gated"].access.add("tester")
    desk.base("org/nothing")
    desk.hub.faults.clear()
    before = len(desk.titles("tester/out"))
    ran = desk.publish("--json")
    status = dict(zip(["first", *WRONG, "last"], statuses(ran.result).values(), strict=True))
    assert ran.code == 1
    assert {name for name in status if status[name] == "published"} == set(MENDED)
    assert {name for name in status if status[name] == "unchanged"} == {"first", "last"}
    assert len(desk.titles("tester/out")) == before + 3
    assert sorted(path.split("/")[2] for path in desk.downloads()) == ["gated", "nothing"]


def odd_files(desk: Desk) -> dict[str, bytes]:
    """Files that cannot be pruned."""
    odd = makers.write(desk.tmp / "odd", {"odd.weight": ("F16", (2, 2), bytes(8))}).read_bytes()
    pruned = makers.write(desk.tmp / "pruned", makers.tiny("demo.original-unet"), {"crdiff.schema": "1"}).read_bytes()
    tensors = makers.tiny("demo.original-unet")
    name = next(name for name in tensors if name.endswith("attn1.to_q.weight"))
    dtype, shape, data = tensors[name]
    nan = makers.write(desk.tmp / "nan", {**tensors, name: (dtype, shape, b"\xff" * len(data))}).read_bytes()
    return {"odd": odd, "damaged": odd[:4] + b"\xff" * 8 + odd[12:], "pruned": pruned, "nan": nan}


def test_all_failures_are_the_hubs(desk: Desk) -> None:
    """Exit code 4, though the tag could not be set either."""
    desk.base()
    desk.plan(plan("48x48", "96x64", more='tag = "v1"'))
    desk.hub.fail("POST .*/commit/", status=400, times=99)
    ran = desk.publish("--json")
    assert ran.code == 4
    assert {one["error"]["code"] for one in ran.result["variants"]} == {"hub"}
    (tag,) = ran.result["tags"]
    assert (tag["repo"], tag["tag"], tag["commit"]) == ("tester/out", "v1", None)
    assert tag["error"]["message"] == "tester/out: not tagged v1, as not all of it is there"
    assert desk.hub.repo("tester/out").tags == {}
    desk.hub.fail("POST .*/tag/", status=500)
    desk.hub.faults.pop(0)
    ran = desk.publish()
    assert ran.code == 4
    assert "tester/out: the Hub answered 500" in ran.err
    assert desk.made() == dict.fromkeys(["48x48.safetensors", "96x64.safetensors"], "unchanged")
    assert desk.hub.repo("tester/out").tags == {"v1": desk.hub.repo("tester/out").branches["main"]}


def test_a_repository_that_cannot_be_read_is_asked_once(desk: Desk) -> None:
    desk.base()
    desk.hub.add_repo("tester/out")
    desk.plan(plan(*SIZES))
    desk.hub.fail("GET .*/out/tree/", status=400, times=9)
    assert set(desk.made(code=4).values()) == {"failed"}
    assert len([path for path in desk.asked("GET") if "/out/tree/" in path]) == 1
    assert desk.changes() == desk.downloads() == []


def test_a_base_that_goes_away_in_between(desk: Desk) -> None:
    desk.base()
    desk.base("org/other")
    desk.plan(plan("48x48") + '[[base]]\nbase = "org/other"\nname = "other.safetensors"\n')
    desk.hub.before("GET .*/auth-check", lambda: desk.hub.repositories.pop("org/base"))
    assert desk.made(code=4) == {"48x48.safetensors": "failed", "other.safetensors": "published"}


def test_a_base_that_changes_in_between(desk: Desk) -> None:
    """What is published by then is, once, and the rest is not."""
    base = desk.folder / "local.safetensors"
    base.write_bytes(checkpoint())
    desk.plan(plan(*SIZES, base=base.name))
    desk.hub.before("PUT /lfs/", lambda: base.write_bytes(checkpoint(1)))
    ran = desk.publish("--keep", "none", "--json")
    assert ran.code == 1
    assert [one["status"] for one in ran.result["variants"]] == ["published", "failed", "failed"]
    assert "changed while it was read" in ran.result["variants"][1]["error"]["message"]
    assert desk.files() == {base.name}
    assert set(desk.made("--keep", "none").values()) == {"published"}
    assert len(desk.titles("tester/out")) == 4


def test_what_somebody_put_into_a_folder_is_not_sent(desk: Desk) -> None:
    (desk.folder / "pipe/unet").mkdir(parents=True)
    makers.write(desk.folder / "pipe/unet/diffusion_pytorch_model.safetensors", makers.tiny("demo.diffusers-unet"))
    (desk.folder / "pipe/unet/config.json").write_text("{}")
    desk.plan(plan("48x48", base="pipe").replace("{size}.safetensors", "{size}"))
    (written,) = desk.publish("--no-push", "--json").result["variants"]
    files = [path for path in (desk.folder / "48x48").rglob("*") if path.is_file()]
    assert (written["status"], written["bytes"]) == ("written", sum(path.stat().st_size for path in files))
    (desk.folder / "48x48/.env").write_text("a secret")
    ran = desk.publish("--json")
    assert ran.code == 1
    assert ran.result["variants"][0]["error"]["message"].startswith("48x48: holds .env, which is no part of the output")
    assert (desk.folder / "48x48/.env").read_text() == "a secret"
    assert not any("48x48" in name for name in desk.hub.repo("tester/out").files())
    (desk.folder / "48x48/.env").unlink()
    (sent,) = desk.publish("--json").result["variants"]
    assert (sent["status"], sent["bytes"], sent["digest"]) == ("published", written["bytes"], written["digest"])


@pytest.mark.parametrize("keep", ["all", "none"])
def test_a_full_disk(keep: str, crdiff: Crdiff, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is written, or, one by one, for each that does not fit."""
    sizes = {"48x48": 1, "96x64": 2, "96x96": 3}
    (here / "plan.toml").write_text(plan(*sizes, base="demo", repo="").replace('repo = ""\n', ""))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=22_000_000 - used(here)))
    ran = crdiff("publish", "plan.toml", "--json", *(["--keep", "none"] if keep == "none" else ["--no-push"]))
    assert ran.code == 1
    status = list(statuses(ran.result).values())
    assert status == (["failed"] * 3 if keep == "all" else ["written", "written", "failed"])
    messages = [one["error"]["message"] for one in ran.result["variants"] if one["error"]]
    assert all(" needed, " in message for message in messages)
    assert len(list(here.iterdir())) == 1 + status.count("written")


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# --- a process that ends ---


SIZES = ("48x48", "96x64", "96x96")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, clients: Forks) -> dict[str, bytes]:
    """What a run makes that nothing disturbs."""
    with LoopbackHub() as hub:
        desk = Desk(hub, tmp_path_factory.mktemp("whole"), clients)
        desk.base()
        desk.plan(plan(*SIZES))
        assert desk.publish("--no-push").code == 0
        return {name: (desk.folder / name).read_bytes() for name in desk.files()}


# What ends the process: the nth call of a function, or a request that waits at the Hub.
HOOKS: dict[str, dict[str, Any]] = {
    "begun": {"call": "crdiff_export.formats.safetensors.serialise", "nth": 2, "after": False},
    "written": {"call": "crdiff_export.bake.staging.publish", "nth": 1, "after": False},
    "named": {"call": "crdiff_export.bake.staging.publish", "nth": 2, "after": True},
    "hashed": {"call": "crdiff_export.publish.run.collect", "nth": 2, "after": True},
    "pushed": {"call": "crdiff_export.publish.run.push", "nth": 2, "after": True},
    "tagging": {"call": "crdiff_export.publish.run.tag", "nth": 1, "after": False},
}
HOLDS: dict[str, dict[str, Any]] = {
    "fetching": {"match": "GET /org/base/resolve/.*/model.safetensors$"},
    "uploading": {"match": "PUT /lfs/", "after_bytes": 100_000},
    "committing": {"match": "POST .*/commit/"},
    "committed": {"match": "POST .*/commit/", "answer": True},
}


def ended(desk: Desk, point: str, signum: signal.Signals, *args: object, **how: Any) -> Ran:
    """A run that a signal meets at some point."""
    if point in HOOKS:
        return desk.publish(*args, hook={**HOOKS[point], "do": int(signum)}, **how)
    holds = [desk.hub.hold(**HOLDS[point])]
    if point == "fetching":  # its header comes from the same place
        holds.append(desk.hub.hold(**HOLDS[point]))
    run = desk.fork(*publish(args), **how)
    for hold in holds:
        assert hold.reached.wait(60)
        if hold is not holds[-1]:
            hold.release()
    run.kill(signum)
    ran = checked(run.end())
    holds[-1].release() if point == "committed" else holds[-1].drop()
    return ran


@pytest.mark.parametrize(
    ("point", "keep"),
    [
        *((point, "all") for point in ("begun", "written", "named", "tagging", "uploading", "committed")),
        *((point, "none") for point in ("written", "pushed", "committing", "committed")),
    ],
)
def test_a_killed_run_is_continued(point: str, keep: str, desk: Desk, whole: dict[str, bytes]) -> None:
    """One commit for each variant, nothing lost, and nothing half-done on the disk."""
    desk.base()
    desk.plan(plan(*SIZES, more='tag = "v1"'))
    args = ("-o", "out", "--keep", keep)
    assert ended(desk, point, signal.SIGKILL, *args).code == -signal.SIGKILL
    again = desk.publish(*args)
    assert again.code == 0, again.err
    files = [f"{size}.safetensors" for size in SIZES]
    assert sorted(desk.titles("tester/out")) == sorted(f"Publish {name} with crdiff" for name in files)
    there = desk.hub.repo("tester/out")
    assert there.tags == {"v1": there.branches["main"]}
    assert {name: desk.hub.read("tester/out", name) for name in files} == whole
    left = {path.name for path in (desk.folder / "out").iterdir()}
    if keep == "all":
        assert left == set(files)
    else:  # what the Hub has is not looked for on the disk
        assert len(left) == (1 if point in ("pushed", "committed") else 0)


def test_a_silent_hub_does_not_keep_a_run_from_ending(desk: Desk) -> None:
    """Not while it is looked at, either."""
    desk.base()
    desk.plan(plan(*SIZES))
    hold = desk.hub.hold("GET /org/base/resolve/")
    run = desk.fork(*publish(()))
    assert hold.reached.wait(60)
    run.kill(signal.SIGTERM)
    assert checked(run.end()).code == 143
    assert desk.files() == set()


# Until when a run comes, and how many variants are published by then.
STOPS = {"begun": 0, "hashed": 1, "fetching": 0, "committed": 0}


@pytest.mark.parametrize(
    ("point", "signum", "keep"),
    [
        *((point, signal.SIGTERM, "none") for point in ("begun", "fetching")),
        *((point, signal.SIGINT, "all") for point in ("hashed", "committed")),
    ],
)
def test_a_stopped_run_says_how_far_it_came(point: str, signum: signal.Signals, keep: str, desk: Desk) -> None:
    desk.base()
    desk.plan(plan(*SIZES, more='tag = "v1"'))
    args = ("-o", "out", "--keep", keep)
    page = desk.tmp / "page.md"
    ran = ended(desk, point, signum, *args, env={"GITHUB_STEP_SUMMARY": str(page)})
    assert ran.code == {signal.SIGTERM: 143, signal.SIGINT: 130}[signum]
    word = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}[signum]
    assert ran.err.splitlines()[-1] == f"crdiff: {word}; nothing half-done was left behind"
    told = page.read_text()
    assert told.count("✅ published") == STOPS[point]
    assert told.count("⏹ not reached") == 3 - STOPS[point]
    assert "Tag" not in told
    left = {path.name for path in desk.folder.rglob("*") if path.is_file()} - {"plan.toml"}
    assert left == ({f"{size}.safetensors" for size in SIZES} if keep == "all" else set())
