"""`crdiff push` and `crdiff export --push` with the Hub's real clients: what is there afterwards, and what is said."""

import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from crdiff_export.publish.card import BaseModel
from crdiff_export.publish.licence import why_private
from tests.support import SUPPORT, makers
from tests.support.forks import Forks
from tests.support.hub_runs import CLIENTS, Client
from tests.support.isolation import Crdiff, Ran
from tests.support.loopback_hub import EXPIRED_TOKEN, READ_TOKEN, REPO_TOKEN, WRITE_TOKEN, LoopbackHub
from tests.support.publishing import NAME, PULL, REPO, TITLE, Desk, Made, changed, digest, refused

NODE_MODULES = os.environ.get("CRDIFF_TEST_NODE_MODULES")
BEGIN, END = b"<!-- crdiff:begin -->", b"<!-- crdiff:end -->"


def of_base(path: Path, base: str, target: Path) -> Path:
    """A baked file whose header says that its base is another one; its tensors' bytes are the same."""
    return makers.said(path, {"crdiff.source.name": base}, target)


# --- the first push, and the second one ---


# The numbers of the parts that are uploaded to the Hub itself.
PARTS: Mapping[str, list[int | None]] = {"lfs": [None], "parts": [1, 2, 3], "xet": []}


@pytest.mark.parametrize(
    ("way", "client"),
    [("lfs", "installed"), ("parts", "installed"), ("xet", "oldest")],
)
def test_what_is_pushed_is_there_once(
    way: str, client: Client, made: Made, tmp_path: Path, clients: Forks | None
) -> None:
    storage = tmp_path / "xet" if way == "xet" else None
    with LoopbackHub(storage) as hub:
        desk = Desk(hub, tmp_path, clients)
        size = made.one.stat().st_size
        if way == "parts":
            hub.part_size = size // 2 - 1
        ran = desk.push(made.one, REPO, "--json", client=client, xet=way == "xet")
        assert (ran.code, ran.err) == (0, "")
        agents = " ".join(asked.headers["user-agent"] for asked in hub.requests)
        assert set(re.findall(r"hf_hub/(\d)", agents)) == {"1" if client == "oldest" else "2"}
        commit = hub.repo(REPO).branches["main"]
        url = f"{hub.url}/{REPO}/resolve/{commit}/{NAME}"
        note = f"created {REPO}, private, as the licence of its base is not known"
        assert ran.result == {
            "schema": 1, "repo": REPO, "revision": "main", "commit": commit, "changed": True, "tag": None,
            "pull_request": None, "notes": [note],
            "files": [{"path": NAME, "bytes": size, "sha256": digest(made.one), "url": url}],
        }  # fmt: skip
        assert (desk.titles(), desk.names()) == ([TITLE], {NAME, "README.md"})
        assert hub.repo(REPO).private
        entry = hub.repo(REPO).files()[NAME]
        assert (entry.lfs, entry.xet is not None) == (True, way == "xet")
        assert [one.part for one in hub.uploads] == PARTS[way]
        assert sum(one.received for one in hub.uploads) == (0 if way == "xet" else size)
        assert digest(hub.read(REPO, NAME)) == digest(made.one)
        fetched = HfApi(hub.url, WRITE_TOKEN).hf_hub_download(REPO, NAME, revision=commit, cache_dir=tmp_path / "c")
        assert Path(fetched).read_bytes() == made.one.read_bytes()

        before = len(hub.uploads)
        posts = len(desk.asked("POST"))
        ran = desk.push(made.one, client=client, xet=way == "xet")
        assert ran.code == 0
        assert ran.out.splitlines()[1] == f"commit:     {commit}, which holds it already: no commit was made"
        assert ran.out.splitlines()[-1] == url
        assert [line.partition(":")[0] for line in ran.err.splitlines()] == ["hashing"]
        assert (desk.titles(), len(hub.uploads), len(desk.asked("POST"))) == ([TITLE], before, posts)
        assert not hub.violations


def test_what_a_push_says(desk: Desk, made: Made) -> None:
    desk.hub.add_repo(REPO)
    ran = desk.push(made.one)
    commit = desk.head()
    url = f"{desk.hub.url}/{REPO}/resolve/{commit}/{NAME}"
    assert ran.out.splitlines() == [
        f"repository: {REPO} (main)",
        f"commit:     {commit}",
        f"file:       {NAME} ({made.one.stat().st_size / 1000:.2f} KB)",
        f"SHA-256:    {digest(made.one)}",
        url,
    ]
    assert [line.partition(":")[0] for line in ran.err.splitlines()] == ["hashing", "sending"]
    assert desk.push(made.one, REPO, "-q") == Ran(0, f"{url}\n", "")


def test_the_client_for_javascript_reads_it(desk: Desk, made: Made) -> None:
    node = shutil.which("node")
    if node is None or NODE_MODULES is None:
        pytest.skip("no node, or CRDIFF_TEST_NODE_MODULES names no folder with @huggingface/hub")
    assert desk.push(made.one).code == 0
    job = {"hubUrl": desk.hub.url, "accessToken": WRITE_TOKEN, "repo": REPO, "target": "tester/js", "file": NAME}
    done = subprocess.run(
        [node, str(SUPPORT / "js_client.mjs"), json.dumps(job)],
        env={"PATH": os.environ["PATH"], "CRDIFF_TEST_NODE_MODULES": NODE_MODULES},
        check=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert answer["downloaded"] == digest(made.one)
    assert answer["tensors"] == len(makers.entries_of(made.one))


# --- who may see it ---

OPEN = b"---\nlicense: creativeml-openrail-m\n---\n"


def test_a_new_repository_is_as_open_as_the_base(desk: Desk, made: Made, tmp_path: Path) -> None:
    desk.hub.add_repo("org/base", {"README.md": OPEN})
    path = of_base(made.one, "hf://org/base/model.safetensors", tmp_path / NAME)
    assert desk.push(path, REPO, "--json").result["notes"] == [f"created {REPO}, public"]
    assert not desk.hub.repo(REPO).private
    front, _, rest = desk.hub.read(REPO, "README.md").decode().partition("\n---\n")
    for line in ("license: creativeml-openrail-m", "base_model: org/base", "base_model_relation: finetune"):
        assert line in front.splitlines()
    assert BEGIN.decode() in rest


def test_a_base_can_be_named(desk: Desk, made: Made) -> None:
    desk.hub.add_repo("org/base", {"README.md": OPEN}, gated="auto")
    ran = desk.push(made.one, REPO, "--json", "--base-model", "org/base", "--relation", "quantized")
    assert ran.result["notes"] == [f"created {REPO}, private, as its base is gated"]
    front = desk.hub.read(REPO, "README.md").decode().partition("\n---\n")[0]
    assert {"base_model: org/base", "base_model_relation: quantized"} < set(front.splitlines())


@pytest.mark.parametrize(
    ("base", "why"),
    [
        (BaseModel("o/b", "mit"), None),
        (BaseModel("o/b", "other"), "its base has a licence of its own kind (other)"),
        (BaseModel("o/b"), "the licence of its base is not known"),
        (BaseModel("o/b", "mit", gated=True), "its base is gated"),
    ],
)
def test_a_licence_decides_who_may_see_a_variant(base: BaseModel, why: str | None) -> None:
    assert why_private(base) == why


def test_a_base_that_is_not_to_be_found_is_noted(desk: Desk, made: Made) -> None:
    ran = desk.push(made.one, REPO, "--base-model", "org/nothing")
    lost = "note: the licence of the base is not known: org/nothing: no such repository, or a private one"
    assert lost in ran.err.splitlines()
    assert desk.hub.repo(REPO).private


def test_the_visibility_is_whose_it_is(desk: Desk, made: Made, tmp_path: Path) -> None:
    desk.hub.add_repo("org/base", {"README.md": OPEN})
    path = of_base(made.one, "hf://org/base/model.safetensors", tmp_path / NAME)
    assert desk.push(path, "tester/hidden", "--private", "--json").result["notes"] == ["created tester/hidden, private"]
    assert desk.push(made.one, "studio/shown", "--public", "--json").result["notes"] == ["created studio/shown, public"]
    desk.hub.add_repo("tester/private", private=True)
    assert desk.push(made.one, "tester/private", "--public", "--json").result["notes"] == []
    assert desk.push(made.one, "studio/shown", "--private", "--json").result["changed"] is False
    private = {repo: desk.hub.repo(repo).private for repo in desk.hub.repos()}
    assert private == {"org/base": False, "tester/hidden": True, "studio/shown": False, "tester/private": True}


# --- who may write ---

# A token, a repository, and what is wrong.
ACCESS: dict[str, tuple[str | None, str, str, Client]] = {
    "read token": (READ_TOKEN, "tester/mine", "403", "installed"),
    "read token, new": (READ_TOKEN, "tester/new", "may not create", "installed"),
    "expired": (EXPIRED_TOKEN, "tester/mine", "401", "installed"),
    "nonsense": ("hf_" + "x" * 34, "tester/new", "401", "oldest"),
    "none": (None, "tester/mine", "not logged in", "installed"),
    "none, oldest": (None, "tester/mine", "not logged in", "oldest"),
    "none, new": (None, "tester/new", "not logged in", "installed"),
    "another repository's": (REPO_TOKEN, "tester/mine", "403", "installed"),
    "somebody's": (WRITE_TOKEN, "stranger/public", "403", "installed"),
    "somebody's secret": (WRITE_TOKEN, "stranger/private", "may not create", "installed"),
    "somebody's gated": (WRITE_TOKEN, "stranger/gated", "gated", "installed"),
}


@pytest.mark.parametrize("case", ACCESS)
def test_access_is_checked_first(case: str, desk: Desk, made: Made) -> None:
    """Nothing is hashed, sent or made."""
    token, repo, key, client = ACCESS[case]
    desk.hub.add_repo("tester/mine", {"x.txt": b"x"})
    desk.hub.add_repo("stranger/public")
    desk.hub.add_repo("stranger/private", private=True)
    desk.hub.add_repo("stranger/gated", gated="manual")
    if "gated" in case:
        # The Hub's own order of checks is not known; whichever comes first, the answer says what to do.
        desk.hub.fail("auth-check", status=403, headers={"X-Error-Code": "GatedRepo"})
    before = desk.hub.repos()
    ran = desk.push(made.one, repo, token=token, client=client)
    refused(ran, 4, repo, key)
    assert len(ran.err.splitlines()) == 2
    assert [line for line in desk.asked() if line != "POST /api/repos/create"] == [
        f"GET /api/models/{repo}/auth-check/write",
        *([f"GET /api/models/{repo}"] if key == "may not create" else []),
    ]
    assert (desk.hub.repos(), desk.hub.uploads) == (before, [])


def test_a_token_for_one_repository_is_enough_for_it(desk: Desk, made: Made) -> None:
    desk.hub.add_repo("tester/scoped", private=True)
    assert desk.push(made.one, "tester/scoped", token=REPO_TOKEN).code == 0
    assert desk.titles("tester/scoped") == [TITLE]


# --- export --push ---


def test_export_and_push(desk: Desk, made: Made) -> None:
    """Of a base on the Hub: what it says, and that a push of the same file finds it there."""
    base = makers.write(desk.tmp / "b", makers.tiny("demo.original-unet")).read_bytes()
    desk.hub.add_repo("org/base", {"model.safetensors": base, "README.md": b"---\nlicense: mit\n---\n"})
    ran = desk.export("hf://org/base/model.safetensors", "-o", NAME, "--push", REPO, "--tag", "v1")
    assert ran.code == 0, ran.err
    head = desk.hub.repo(REPO).log()[0]
    url = f"{desk.hub.url}/{REPO}/resolve/{head.oid}/{NAME}"
    assert ran.out.splitlines()[-7:] == [
        NAME, f"repository: {REPO} (main)", f"commit:     {head.oid}", "tag:        v1",
        f"file:       {NAME} ({(desk.folder / NAME).stat().st_size / 1000:.2f} KB)",
        f"SHA-256:    {digest(desk.folder / NAME)}", url,
    ]  # fmt: skip
    assert f"note: created {REPO}, public" in ran.err.splitlines()
    assert digest(desk.hub.read(REPO, NAME)) == digest(desk.folder / NAME)
    assert desk.hub.repo(REPO).tags == {"v1": head.oid}
    shown = desk.hub.read(REPO, "README.md").decode().splitlines()
    assert all(line.startswith("crdiff ") for line in shown if "hf://" in line)  # names are links elsewhere
    assert b"base_model: org/base\n" in desk.hub.read(REPO, "README.md")
    # Access was known before the base was fetched.
    asked = desk.asked()
    fetching = next(place for place, line in enumerate(asked) if "/resolve/" in line and "org/base" in line)
    assert asked.index(f"GET /api/models/{REPO}/auth-check/write") < fetching

    assert desk.push(NAME, REPO, "--tag", "v1", "-q") == Ran(0, f"{url}\n", "")
    ran = desk.export("hf://org/base/model.safetensors", "-o", NAME, "--force", "--push", REPO, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert (ran.result["output"], ran.result["push"]["changed"]) == (NAME, False)
    assert ran.result["push"]["files"][0]["url"] == url
    assert desk.titles() == [TITLE]


def test_an_export_that_could_not_be_pushed_does_not_begin(desk: Desk) -> None:
    base = makers.write(desk.tmp / "b", makers.tiny("demo.original-unet")).read_bytes()
    desk.hub.add_repo("org/base", {"model.safetensors": base})
    desk.hub.add_repo("stranger/public")
    ran = desk.export("hf://org/base/model.safetensors", "--push", "stranger/public", "--json")
    assert (ran.code, ran.out, ran.error["code"]) == (4, "", "hub")
    assert "stranger/public: the Hub answered 403" in ran.error["message"]
    assert not [line for line in desk.asked() if "/resolve/" in line or "/tree/" in line]
    assert list(desk.folder.iterdir()) == []


def test_an_export_that_is_not_taken_is_not_lost(desk: Desk) -> None:
    desk.hub.fail("/commit/", status=403)
    ran = desk.export("demo", "-o", NAME, "--push", REPO, "--create-pr")
    refused(ran, 4, REPO, "pull request")
    ran = desk.export("demo", "-o", NAME, "--push", REPO)
    refused(ran, 4, REPO, "403", f"`crdiff push {NAME} {REPO}`")
    assert desk.push(NAME).code == 0
    assert desk.is_whole(desk.folder / NAME)


def test_an_export_to_a_pull_request_needs_a_token(desk: Desk) -> None:
    """To look at the repository takes none."""
    desk.hub.add_repo("stranger/public")
    ran = desk.export("demo", "--push", "stranger/public", "--create-pr", token=None)
    refused(ran, 4, "stranger/public", "not logged in")
    assert list(desk.folder.iterdir()) == []


def test_a_planned_export_asks_nobody(crdiff: Crdiff, here: Path) -> None:
    ran = crdiff("export", "demo", "--res", "96x64", "--push", REPO, "--dry-run")
    assert (ran.code, list(here.iterdir())) == (0, [])
    assert "would push to:" in ran.out
    assert crdiff("export", "demo", "--res", "96x64", "--push", REPO, "--dry-run", "--json").result["push"] == REPO


# --- branches, tags, pull requests ---


def test_an_export_and_a_push_go_to_one_pull_request(desk: Desk) -> None:
    desk.hub.add_repo("org/model")
    ran = desk.export("demo", "--push", "org/model", "--create-pr", "--json", token=READ_TOKEN)
    assert ran.result["push"]["pull_request"] == f"{desk.hub.url}/org/model/discussions/1"
    ran = desk.push(ran.result["output"], "org/model", "--create-pr", "--json", token=READ_TOKEN)
    assert (ran.result["changed"], ran.result["revision"]) == (False, "refs/pr/1")
    assert len(desk.hub.repo("org/model").pull_requests) == 1


def test_a_branch_is_made_and_main_left_alone(desk: Desk, made: Made) -> None:
    first = desk.hub.add_repo(REPO, {"README.md": b"# Mine\n"})
    ran = desk.push(made.one, REPO, "--revision", "sizes/96x64", "--tag", "v1", "--json")
    assert ran.code == 0
    repo = desk.hub.repo(REPO)
    assert repo.branches == {"main": first, "sizes/96x64": ran.result["commit"]}
    assert (repo.tags, ran.result["revision"]) == ({"v1": ran.result["commit"]}, "sizes/96x64")
    assert desk.names(REPO, "sizes/96x64") == {NAME, "README.md"}
    assert b"/blob/sizes/96x64/" in desk.hub.read(REPO, "README.md", "sizes/96x64").replace(b"%2F", b"/")


def test_a_pull_request_can_be_a_revision(desk: Desk, made: Made) -> None:
    desk.hub.add_repo(REPO, {"README.md": b"# Mine\n"})
    desk.hub.open_pull_request(REPO, "Anything")
    ran = desk.push(made.one, REPO, "--revision", "refs/pr/1", "--json")
    assert (ran.code, ran.result["revision"]) == (0, "refs/pr/1")
    assert desk.titles(REPO, "refs/pr/1") == [TITLE, "Add files"]
    assert desk.titles() == ["Add files"]
    ran = desk.push(made.one, REPO, "--revision", "refs/pr/2")
    refused(ran, 4, REPO, "revision")
    assert "hashing" not in ran.err
    ran = desk.push(made.one, "tester/none", "--revision", "refs/pr/2")
    refused(ran, 4, "tester/none", "pull request")
    assert desk.hub.repos() == [REPO]


def test_a_tag_stays_where_it_is(desk: Desk, made: Made) -> None:
    ran = desk.push(made.one, REPO, "--tag", "v1")
    commit = desk.head()
    assert ran.out.splitlines()[2] == "tag:        v1"
    assert desk.push(made.one, REPO, "--tag", "v1", "--json").result["changed"] is False
    # Somebody has written into the card since.
    desk.hub.commit(REPO, {"README.md": desk.hub.read(REPO, "README.md") + b"\nWords.\n"})
    assert desk.push(made.one, REPO, "--tag", "v1", client="installed").code == 0
    uploads = len(desk.hub.uploads)
    ran = desk.push(made.other, REPO, "--tag", "v1")
    refused(ran, 4, REPO, "v1", commit[:10])
    assert desk.titles() == ["A commit by somebody else", TITLE]
    assert len(desk.hub.uploads) == uploads
    assert desk.push(made.other, REPO, "--tag", "v2").code == 0
    ran = desk.push(made.other, REPO, "--tag", "v1")
    assert ran.code == 4
    assert f"the tag v1 is at {commit[:10]}, not at the commit" in ran.err
    repo = desk.hub.repo(REPO)
    assert repo.tags == {"v1": commit, "v2": repo.branches["main"]}


def test_one_pull_request_however_often(desk: Desk, made: Made) -> None:
    desk.hub.add_repo("org/model", {"README.md": b"# Theirs\n"})
    desk.hub.page_size = 2
    how: Mapping[str, Any] = {"token": READ_TOKEN, "client": "oldest"}
    for title in (PULL, "Another one"):
        desk.hub.open_pull_request("org/model", title, "stranger")
    ran = desk.push(made.one, "org/model", "--create-pr", "--json", **how)
    assert ran.code == 0, ran.err
    page = f"{desk.hub.url}/org/model/discussions/3"
    commit = desk.hub.repo("org/model").pulls[3]
    result = ran.result
    assert (result["revision"], result["pull_request"], result["commit"]) == ("refs/pr/3", page, commit)
    ran = desk.push(made.one, "org/model", "--create-pr", **how)
    assert ran.out.splitlines()[:3] == [
        "repository:   org/model (refs/pr/3)",
        f"commit:       {commit}, which holds it already: no commit was made",
        f"pull request: {page}",
    ]
    ran = desk.push(made.other, "org/model", "--create-pr", "--json", **how)
    assert (ran.result["pull_request"], ran.result["changed"]) == (page, True)
    repo = desk.hub.repo("org/model")
    pulls = [(one.title, one.author, one.status) for one in repo.pull_requests]
    assert pulls == [(PULL, "stranger", "open"), ("Another one", "stranger", "open"), (PULL, "tester", "open")]
    assert desk.titles("org/model", "refs/pr/3") == [TITLE, PULL, "Add files"]
    assert (desk.titles("org/model"), repo.pulls[1], repo.pulls[2]) == (["Add files"], *[repo.branches["main"]] * 2)
    assert digest(desk.hub.read("org/model", NAME, "refs/pr/3")) == digest(made.other)


def test_a_pull_request_is_known_by_its_title(desk: Desk, made: Made) -> None:
    """And once it is merged, there is nothing left to propose."""
    desk.hub.add_repo("org/model", {"README.md": b"# Theirs\n"})
    message = ("--create-pr", "--message", "\n  For wide pictures\n\nPlease.")
    assert desk.push(made.one, "org/model", *message, token=READ_TOKEN).code == 0
    assert desk.push(made.one, "org/model", "--create-pr", token=READ_TOKEN).code == 0
    (first, second) = desk.hub.repo("org/model").pull_requests
    assert (first.title, first.description, second.title) == ("For wide pictures", "Please.", PULL)
    desk.hub.repositories["tester/model"] = desk.hub.repositories.pop("org/model")
    desk.hub.repositories["tester/model"].id = "tester/model"
    desk.hub.merge("tester/model", 1)
    ran = desk.push(made.one, "tester/model", *message, "--json")
    assert (ran.result["changed"], ran.result["revision"], ran.result["pull_request"]) == (False, "main", None)
    assert len(desk.hub.repo("tester/model").pull_requests) == 2


# --- what cannot be meant ---

# What is given, and which part of it is named.
USAGE: dict[str, tuple[list[str], str]] = {
    "pull request and branch": ([REPO, "--create-pr", "--revision", "x"], "--revision"),
    "pull request and tag": ([REPO, "--create-pr", "--tag", "x"], "--tag"),
    **{f"repo {name!r}": ([name], repr(name))
       for name in ("name", "a/b/c", "/b", "a/", "", "a b/c", "hf://a/b", "https://huggingface.co/a/b", "ü/b",
                    "my--org/x", "a/b.git", "datasets/b")},
    "base model": ([REPO, "--base-model", "sdxl"], "'sdxl'"),
    **{f"path {path!r}": ([REPO, "--path-in-repo", path], repr(path))
       for path in ("../x.safetensors", "a/../x.safetensors", "/x.safetensors", "a//x.safetensors", "./x.safetensors",
                    "a/./x.safetensors", ".git/x.safetensors", "a/.cache/x.safetensors", "a\\x.safetensors", "//",
                    "a\nb.safetensors", "a\u202eb.safetensors", "x", "")},
    **{f"tag {name!r}": ([REPO, "--tag", name], repr(name))
       for name in ("a b", "a..b", "a/", "a.lock", "-a", "a~1", "a:b", "a\n", ".a", "a//b", "a/.b", "v1@x")},
    "branch": ([REPO, "--revision", "a b"], "'a b'"),
    "message": ([REPO, "--message", " \n"], "--message"),
}  # fmt: skip


@pytest.mark.parametrize("case", USAGE)
def test_a_misuse_asks_nobody(case: str, crdiff: Crdiff, made: Made) -> None:
    """Where nobody answers, the Hub would be what is wrong."""
    given, key = USAGE[case]
    refused(crdiff("push", made.one, *given), 2, key)


@pytest.mark.parametrize(
    "given",
    ["--tag v1", "--create-pr", "--private", "--public", "--path-in-repo x", "--message x", "--relation merge"],
)
def test_an_export_without_a_push_takes_no_options_of_one(given: str, crdiff: Crdiff, here: Path) -> None:
    flag = "--private/--public" if given in ("--private", "--public") else given.split(maxsplit=1)[0]
    ran = crdiff("export", "demo", "--res", "96x64", *given.split(), "--json")
    assert (ran.code, ran.error["message"]) == (2, f"{flag} is for a push")
    ran = crdiff("export", "demo", "--res", "96x64", "--push", "name", *given.split(), "--json")
    assert (ran.code, ran.error["message"], list(here.iterdir())) == (2, "'name' is not a repository", [])


def damaged(made: Made, folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that are not to be pushed, and what is said of them."""
    whole = made.one.read_bytes()
    shapes: dict[str, tuple[bytes, str]] = {
        "cut": (whole[:-1], "are there"),
        "header": (whole[:20], "the header's length is given as"),
        "foreign": ((made.home / "small.safetensors").read_bytes(), "not made by crdiff (no crdiff.schema"),
        "empty": (b"", "the file is empty"),
        "stamp": (whole.replace(b'"crdiff.residual":', b'"crdiff.residuel":'), "crdiff.residual is missing"),
    }
    for name, (data, _) in shapes.items():
        (folder / f"{name}.safetensors").write_bytes(data)
    index = next(made.shards.glob("*.index.json"))
    named = {name: (folder / f"{name}.safetensors", said) for name, (_, said) in shapes.items()}
    return {**named, "nothing": (folder / "x", "no such file"), "index": (index, "the index of shards")}


@pytest.mark.parametrize("kind", ["cut", "header", "foreign", "empty", "stamp", "nothing"])
def test_what_crdiff_did_not_make_is_not_pushed(kind: str, crdiff: Crdiff, made: Made, tmp_path: Path) -> None:
    path, said = damaged(made, tmp_path)[kind]
    ran = crdiff("push", path, REPO, "--json")
    assert (ran.code, ran.out, ran.error["code"]) == (1, "", "checkpoint")
    assert (said in ran.error["message"], bool(ran.error["hint"])) == (True, True), ran.error


def test_flipped_bytes_are_found_before_anything_is_sent(desk: Desk, made: Made, tmp_path: Path) -> None:
    desk.hub.add_repo(REPO)
    data = bytearray(made.one.read_bytes())
    data[-1] ^= 1
    path = tmp_path / NAME
    path.write_bytes(data)
    ran = desk.push(path)
    told = makers.metadata_of(path)["modelspec.hash_sha256"]
    (size,) = struct.unpack("<Q", data[:8])
    found = digest(bytes(data[8 + size :]))
    refused(ran, 3, path, found, told)
    assert desk.asked() == [f"GET /api/models/{REPO}/auth-check/write"]


# --- where it goes, and under which name ---


def test_a_name_may_be_anything_that_can_be_read(desk: Desk, made: Made, tmp_path: Path) -> None:
    place = "für alle/a #1%2F?&.safetensors"
    ran = desk.push(made.one, REPO, "--path-in-repo", place, "--message", "Mit Umlaut: ü")
    commit = desk.head()
    quoted = "f%C3%BCr%20alle/a%20%231%252F%3F%26.safetensors"
    assert ran.out.splitlines()[-1] == f"{desk.hub.url}/{REPO}/resolve/{commit}/{quoted}"
    assert digest(desk.hub.read(REPO, place)) == digest(made.one)
    named = tmp_path / "--a 'b' [c](d)|e.safetensors"
    shutil.copy(made.one, named)
    assert desk.push(named, REPO, "--path-in-repo", "d/").code == 0
    assert desk.push(made.other, REPO, "--path-in-repo", f"x/y/{NAME}").code == 0
    assert desk.names() == {"README.md", place, f"d/{named.name}", f"x/y/{NAME}"}
    card = desk.hub.read(REPO, "README.md").decode()
    assert [line.count("|") for line in card.splitlines() if line.startswith("| [")] == [6, 6, 6]
    assert {commit.title for commit in desk.hub.repo(REPO).log()[:-1]} == {
        "Mit Umlaut: ü", f"Upload d/{named.name} with crdiff", f"Upload x/y/{NAME} with crdiff"
    }  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_no_text_is_refused(crdiff: Crdiff, made: Made, tmp_path: Path) -> None:
    named = tmp_path / os.fsdecode(b"a\xff.safetensors")
    shutil.copy(made.one, named)
    ran = crdiff("push", named, REPO, "--json")
    assert (ran.code, ran.error["code"]) == (2, "usage")


# --- the card ---


def test_a_card_keeps_what_is_not_ours(desk: Desk, made: Made) -> None:
    theirs = b"# Ours\r\n\r\nTwo  spaces  \r\n\tand a tab, \xc3\xbc, no end"
    desk.hub.add_repo(REPO, {"README.md": theirs, "config.json": b"{}"})
    assert desk.push(made.one).code == 0
    first = desk.hub.read(REPO, "README.md")
    rest = first.partition(b"\r\n---\r\n")[2]
    assert rest.startswith(b"\r\n" + theirs + b"\r\n\r\n" + BEGIN)
    assert rest.endswith(END + b"\r\n")
    assert b"\n" not in first.replace(b"\r\n", b"")
    edited = first.replace(b"# Ours", b"# Ours!").replace(END, END + b"\r\nAnd after.")
    desk.hub.commit(REPO, {"README.md": edited})
    assert desk.push(made.other, REPO, "--path-in-repo", "two.safetensors").code == 0
    second = desk.hub.read(REPO, "README.md")
    assert second.partition(BEGIN)[0].endswith(edited.partition(b"\r\n---\r\n")[2].partition(BEGIN)[0])
    assert second.endswith(END + b"\r\nAnd after.\r\n")
    assert (second.count(b"| [one"), second.count(b"| [two")) == (1, 1)
    assert {b"- resolution:96x64", b"- resolution:64x96"} < set(second.splitlines())
    # A card that somebody took away comes back with the next file.
    desk.hub.commit(REPO, {"README.md": None})
    assert desk.push(made.other).code == 0
    assert desk.hub.read(REPO, "README.md").count(b"| [") == 2


BROKEN: dict[str, tuple[bytes, int, str, str]] = {
    "encoding": (b"---\n---\n\xff", 4, "hub", f"{REPO}/README.md: not UTF-8"),
    "markers": (b"# A\n" + BEGIN + b"\n", 1, "card", "README.md: not one pair of markers"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_card_that_cannot_be_kept_stops_the_push(kind: str, desk: Desk, made: Made) -> None:
    text, code, name, message = BROKEN[kind]
    desk.hub.add_repo(REPO, {"README.md": text})
    ran = desk.push(made.one, REPO, "--json")
    assert (ran.code, ran.out, ran.error["code"]) == (code, "", name)
    assert ran.error["message"].startswith(message)
    assert ran.error["hint"]
    assert (desk.titles(), desk.hub.uploads, desk.hub.read(REPO, "README.md")) == (["Add files"], [], text)


def strange() -> dict[str, bytes]:
    """Files that others may have in a repository."""
    bodies = {
        "no json": b"{nope", "a list": b"[1]", "an entry": b'{"a":1}', "deep": b"[" * 100_000,
        "metadata": b'{"__metadata__":"crdiff.schema"}', "number": b'{"__metadata__":{"crdiff.schema":1}}',
        "stamp": b'{"__metadata__":{"crdiff.schema":"1"}}', "newer": b'{"__metadata__":{"crdiff.schema":"9"}}',
        "dtype": b'{"a":{"dtype":"Q7","shape":[1],"data_offsets":[0,1]}}', "no shape": b'{"a":{"dtype":"F16"}}',
        "offsets": b'{"a":{"dtype":"F16","shape":["x"],"data_offsets":[0]}}', "bytes": b'{"\xff":1}',
        "large": b'{"__metadata__":{"x":"' + b"y" * 200_000 + b'"}}',
    }  # fmt: skip
    raw = {"empty": b"", "short": b"abc", "zeros": b"\0" * 100, "huge": struct.pack("<Q", 2**63) + b"x" * 100}
    files = {**raw, **{name: makers.frame(body) for name, body in bodies.items()}}
    return {f"{name}.safetensors": data for name, data in files.items()}


@pytest.mark.parametrize("client", CLIENTS)
def test_strange_files_of_others_do_not_matter(client: Client, desk: Desk, made: Made) -> None:
    desk.hub.add_repo(REPO, strange())
    desk.hub.page_size = 5
    ran = desk.push(made.one, REPO, "--json", client=client)
    assert ran.code == 0, ran.err
    assert desk.names() == {NAME, "README.md", *strange()}
    assert desk.hub.read(REPO, "README.md").count(b"| [") == 1


# --- folders ---


def test_a_pipeline_goes_as_a_whole(desk: Desk, made: Made, tmp_path: Path) -> None:
    hub = desk.hub
    hub.add_repo(REPO, {"README.md": b"# Mine\n"})
    attributes = hub.read(REPO, ".gitattributes")
    ran = desk.push(made.pipe, REPO, "--json")
    assert (ran.code, ran.err) == (0, "")
    names = {path.relative_to(made.pipe).as_posix() for path in made.pipe.rglob("*") if path.is_file()}
    assert {file["path"] for file in ran.result["files"]} == names - {"README.md", ".gitattributes"}
    assert desk.names() == names - {".gitattributes"}
    for path in names - {"README.md", ".gitattributes"}:
        assert hub.read(REPO, path) == (made.pipe / path).read_bytes()
    # What is the repository's own stays so.
    assert hub.read(REPO, ".gitattributes") == attributes
    assert hub.read(REPO, "README.md").startswith(b"---\nlibrary_name: diffusers\n")
    assert b"# Mine\n" in hub.read(REPO, "README.md")
    ran = desk.push(made.pipe, REPO)
    assert "which holds it already: no commit was made" in ran.out
    assert ran.out.splitlines()[-1] == f"{hub.url}/{REPO}/tree/{hub.repo(REPO).branches['main']}"
    assert desk.titles() == ["Upload pipe with crdiff", "Add files"]

    copy = tmp_path / "pipe"
    shutil.copytree(made.pipe, copy)
    (copy / "tokenizer/spiece.model").write_bytes(b"\0new")
    before = len(hub.uploads)
    sent = digest(copy / "tokenizer/spiece.model")
    assert desk.push(copy, REPO, "--json").result["changed"] is True
    assert [one.oid for one in hub.uploads[before:]] == [sent]
    newest, older, *_ = hub.repo(REPO).log()
    assert changed(newest, older) == {"tokenizer/spiece.model"}
    assert not hub.violations


def test_folders_go_into_folders(desk: Desk, made: Made) -> None:
    ran = desk.push(made.shards, REPO, "--path-in-repo", "v1/unet")
    assert ran.code == 0
    names = {f"v1/unet/{path.name}" for path in made.shards.iterdir()}
    assert desk.names() == {*names, "README.md"}
    assert f"files:      {len(names)} (" in ran.out
    index = next(made.shards.glob("*.index.json"))
    refused(desk.push(index), 1, index, made.shards)
    # Below the root a README.md is a file like any other.
    assert desk.push(made.pipe, REPO, "--path-in-repo", "v2/").code == 0
    assert desk.hub.read(REPO, "v2/README.md") == (made.pipe / "README.md").read_bytes()
    assert BEGIN in desk.hub.read(REPO, "README.md")
