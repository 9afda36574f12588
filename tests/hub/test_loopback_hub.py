"""The loopback Hub against the Hub's real clients, two versions of the Python one and the one for JavaScript."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from tests.support import SUPPORT, makers
from tests.support.loopback import client as client_script
from tests.support.loopback_hub import (
    EXPIRED_TOKEN,
    READ_TOKEN,
    REPO_TOKEN,
    STRANGER_TOKEN,
    USER,
    WRITE_TOKEN,
    LoopbackHub,
    served,
)
from tests.support.publishing import digest

# Read now: the tests' own environment has nothing of whoever runs them.
OLDEST = os.environ.get("CRDIFF_TEST_OLDEST_HUB")
NODE_MODULES = os.environ.get("CRDIFF_TEST_NODE_MODULES")
REPO = f"{USER}/repo"
OK = ["None", None]
Client = Callable[..., list[Any]]


@pytest.fixture(params=["installed", "oldest"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Client:
    """Runs jobs with a version of the Python client, one after another in one process."""
    return runner(request.param, tmp_path)


def runner(version: str, tmp_path: Path) -> Client:
    if version == "oldest" and OLDEST is None:
        pytest.skip("CRDIFF_TEST_OLDEST_HUB names no folder with the oldest huggingface_hub")

    def run(hub: LoopbackHub, *jobs: tuple[str, dict[str, Any]], **settings: Any) -> list[Any]:
        done = subprocess.run(
            command(*jobs), env=environment(version, hub, tmp_path, **settings), check=True, capture_output=True
        )
        said = json.loads(done.stdout)
        assert said["version"].startswith("1." if version == "oldest" else "2.")
        answers: list[Any] = said["answers"]
        return answers

    return run


def command(*jobs: tuple[str, dict[str, Any]]) -> list[str]:
    return [sys.executable, "-P", client_script.__file__, json.dumps(jobs)]


def environment(version: str, hub: LoopbackHub, tmp_path: Path, **settings: Any) -> dict[str, str]:
    oldest = {"PYTHONPATH": OLDEST} if version == "oldest" and OLDEST else {}
    for name in ("user", "home"):
        (tmp_path / name).mkdir(exist_ok=True)
    ours = hub.environment(tmp_path / "home", **settings)
    return {**os.environ, "HOME": str(tmp_path / "user"), **ours, **oldest}


def titles(hub: LoopbackHub, repo_id: str, revision: str = "main") -> list[str]:
    return [commit.title for commit in hub.repo(repo_id).log(revision)]


# --- the Python client ---


def test_uploads(client: Client, loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    small, large = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    small.write_bytes(os.urandom(1000))
    large.write_bytes(os.urandom(250_000))
    loopback_hub.part_size = 100_000
    job = {"repo": REPO, "small": str(small), "large": str(large)}
    answer, settings = client(loopback_hub, ("upload", job), ("settings", {"repo": f"{USER}/other"}))
    assert (settings, loopback_hub.repos()) == ([True, False, "manual", False], [REPO])
    first, again, second, third = answer["commits"]
    history = loopback_hub.repo(REPO).log()
    assert again == first
    assert [commit.oid for commit in history[:3]] == [third, second, first]
    assert [commit.title for commit in history[:2]] == ["Three", "Two"]
    assert (history[1].description, history[1].author, len(history)) == ("In parts.", USER, 4)
    assert answer["made"] == [f"{loopback_hub.url}/{REPO}"] * 2
    assert answer["url"] == f"{loopback_hub.url}/{REPO}/commit/{third}"
    assert answer["exists"] == ["HfHubHTTPError", HTTPStatus.CONFLICT]
    assert answer["stale"] == ["HfHubHTTPError", HTTPStatus.PRECONDITION_FAILED]
    assert answer["bad card"] == ["ValueError", None]
    assert answer["missing"] == ["RemoteEntryNotFoundError", HTTPStatus.NOT_FOUND]
    assert answer["branch"] == ["RevisionNotFoundError", HTTPStatus.NOT_FOUND]
    uploads = [(one.oid, one.part, one.received) for one in loopback_hub.uploads]
    parts = [(digest(large), part, size) for part, size in ((1, 100_000), (2, 100_000), (3, 50_000))]
    assert uploads == [(digest(small), None, 1000), *parts]
    files = loopback_hub.repo(REPO).files()
    assert list(files) == [
        *(".gitattributes", "README.md", "config.json", "copy.safetensors", "empty.txt", "small.safetensors")
    ]
    assert {path for path, entry in files.items() if entry.lfs} == {"copy.safetensors", "small.safetensors"}
    assert loopback_hub.read(REPO, "copy.safetensors") == small.read_bytes()
    assert loopback_hub.read(REPO, "sub/large.safetensors", second) == large.read_bytes()
    assert loopback_hub.read(REPO, "empty.txt") == b""


def test_pull_requests_branches_and_tags(client: Client, loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo(REPO, {"README.md": b"# A card"})
    loopback_hub.page_size = 3
    (answer,) = client(loopback_hub, ("pull_requests", {"repo": REPO}))
    page = f"{loopback_hub.url}/{REPO}/discussions"
    assert answer["pulls"] == [[1, "refs/pr/1", f"{page}/1"], [2, "refs/pr/2", f"{page}/2"]]
    assert (answer["draft"], answer["comment"]) == ([4, "draft", "refs/pr/4"], "Looks good")
    draft, question = [4, "A draft", "draft", USER], [3, "A question", "open", USER]
    pulls = [[number, f"Pull {number}", "open", USER] for number in (2, 1)]
    assert answer["listed"] == {
        "all": [draft, question, *pulls],
        "pulls": [draft, *pulls],
        "others": [question],
        "strangers": [],
    }
    assert answer["closed"] == "closed"
    assert answer["details"] == [
        ["Pull 1", "merged", ["comment", "commit", "commit", "status-change"]],
        ["Pull 2, renamed", "open", ["comment", "commit", "comment", "title-change"]],
    ]
    conflict = ["HfHubHTTPError", HTTPStatus.CONFLICT]
    assert [answer["branch again"], answer["tag again"]] == [conflict, conflict]
    assert answer["no branch"] == ["RevisionNotFoundError", HTTPStatus.NOT_FOUND]
    assert answer["refs"] == [
        ["refs/heads/main", "refs/heads/side/way"],
        ["refs/tags/v1"],
        ["refs/pr/1", "refs/pr/2", "refs/pr/4"],
    ]
    assert titles(loopback_hub, REPO) == ["Pull 1 (#1)", "Add files", "initial commit"]
    assert titles(loopback_hub, REPO, "refs/pr/1")[:2] == ["More", "Pull 1"]
    assert titles(loopback_hub, REPO, "side/way")[:2] == ["Side", "Pull 1 (#1)"]
    assert loopback_hub.read(REPO, "1.txt") == b"2"
    assert loopback_hub.repo(REPO).tags == {"v1": loopback_hub.repo(REPO).branches["side/way"]}


@pytest.mark.parametrize("tensors", [40, 4000], ids=["small header", "header of 250 kB"])
def test_reading(client: Client, loopback_hub: LoopbackHub, tmp_path: Path, tensors: int) -> None:
    file = tmp_path / "model.safetensors"
    makers.write(file, {f"layer.{i}.weight": ("F16", (2, 2), os.urandom(8)) for i in range(tensors)})
    card = b"---\nlicense: mit\nlibrary_name: diffusers\nbase_model: org/base\n---\n# A card\n"
    oid = loopback_hub.add_repo(REPO, {"sub/model.safetensors": file, "README.md": card, "sub/x.json": b"{}"})
    loopback_hub.commit(REPO, {"sub/model.safetensors": os.urandom(99), "new.txt": b"new"}, "Later", revision="main")
    loopback_hub.state.repos[REPO].tags["v1"] = oid
    loopback_hub.page_size = 2
    job = {"repo": REPO, "revisions": ["v1", oid, oid[:9]], "path": "sub/model.safetensors"}
    loopback_hub.commit(REPO, {"sub/model.safetensors": file, "new.txt": None}, "Back")
    (answer,) = client(loopback_hub, ("read", job))
    expected = {".gitattributes": None, "README.md": digest(card), "sub/model.safetensors": digest(file)}
    assert answer["downloads"] == [digest(file)] * 3
    assert answer["snapshot"].items() >= {path: known for path, known in expected.items() if known}.items()
    assert list(answer["siblings"]) == [*expected, "sub/x.json"]
    assert answer["siblings"]["sub/model.safetensors"] == [file.stat().st_size, digest(file)]
    assert answer["paths"] == [["sub/model.safetensors", digest(file)], ["README.md", None], ["sub", None]]
    assert answer["tree"] == [".gitattributes", "README.md", "sub", "sub/model.safetensors", "sub/x.json"]
    assert (answer["top"], answer["sub"]) == ([".gitattributes", "README.md", "sub"], answer["tree"][3:])
    assert [title for title, _, _ in answer["commits"]] == ["Back", "Later", "Add files", "initial commit"]
    tags = ["diffusers", "base_model:org/base", "base_model:finetune:org/base", "license:mit", "region:us"]
    head = loopback_hub.repo(REPO).branches["main"]
    assert answer["info"] == [REPO, head, False, False, "diffusers", tags]
    metadata = {"license": "mit", "library_name": "diffusers", "base_model": "org/base"}
    assert answer["card"] == answer["model card"] == metadata
    assert (answer["tensors"], answer["exists"]) == (tensors, [True, True, False])


def test_rights(client: Client, loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo("org/base", {"README.md": b"# A card"})
    loopback_hub.add_repo("org/gated", {"model.safetensors": b"weights"}, gated="auto", access=(USER,))
    loopback_hub.add_repo(REPO, {"model.safetensors": b"weights"}, private=True)
    loopback_hub.scope(REPO)
    tokens = {"write": WRITE_TOKEN, "read": READ_TOKEN, "scoped": REPO_TOKEN, "expired": EXPIRED_TOKEN}
    tokens["stranger"] = STRANGER_TOKEN
    job = {"base": "org/base", "gated": "org/gated", "private": REPO, "tokens": tokens}
    (answer,) = client(loopback_hub, ("errors", job))
    missing, missing_to_nobody = (["RepositoryNotFoundError", status] for status in (404, 401))
    forbidden, invalid = (["HfHubHTTPError", status] for status in (403, 401))
    assert answer["repo"] == answer["private"] == missing
    assert answer["private, nobody"] == missing_to_nobody
    assert answer["revision"] == ["RevisionNotFoundError", HTTPStatus.NOT_FOUND]
    assert answer["entry"] == ["RemoteEntryNotFoundError", HTTPStatus.NOT_FOUND]
    assert answer["gated"] == ["GatedRepoError", HTTPStatus.FORBIDDEN]
    assert answer["gated, nobody"] == ["GatedRepoError", HTTPStatus.UNAUTHORIZED]
    assert answer["gated, let in"] == OK
    assert answer["whoami"] == ["write", "read", "fineGrained"]
    assert answer["expired"] == answer["whoami, expired"] == invalid
    strangers = {"expired": invalid, "stranger": missing, "nobody": missing_to_nobody}
    assert answer["read"] == {"write": OK, "read": OK, "scoped": OK, **strangers}
    assert answer["write"] == {"write": OK, "read": forbidden, "scoped": OK, **strangers}
    nobody = {"expired": invalid, "nobody": missing_to_nobody}
    assert answer["commit"] == {**dict.fromkeys(("write", "read", "scoped", "stranger"), forbidden), **nobody}
    assert answer["pull"] == {**dict.fromkeys(("write", "read", "scoped", "stranger"), OK), **nobody}
    assert answer["own pull"] == OK
    creators = {"read": forbidden, "scoped": forbidden, "stranger": forbidden, "expired": invalid, "nobody": invalid}
    assert answer["create"] == {"write": OK, **creators}
    assert answer["create elsewhere"] == forbidden
    assert answer["exists"] == OK


def test_faults(client: Client, loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    """The client tries again where a call may be repeated; not a commit, of which it never learns."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(100_000))
    one, two = f"{USER}/one", f"{USER}/two"
    loopback_hub.add_repo(one)
    loopback_hub.add_repo(two)
    loopback_hub.fail(f"POST .*{one}/preupload/", status=429, headers={"Retry-After": "0"})
    loopback_hub.drop("PUT /lfs/", after_bytes=50_000)
    loopback_hub.lie_about_sha("told.safetensors")
    loopback_hub.drop_answer(f"POST .*{two}/commit/")
    jobs = [{"repo": one, "name": "told.safetensors"}, {"repo": two, "name": "lost.safetensors"}]
    first, second = client(loopback_hub, *(("once", {**job, "path": str(file)}) for job in jobs))
    assert first == [*OK, ["0" * 64]]
    assert loopback_hub.read(one, "told.safetensors") == file.read_bytes()
    assert second == ["RemoteProtocolError", None, [digest(file)]]
    received = [(upload.received, upload.expected) for upload in loopback_hub.uploads]
    assert received == [(50_000, 100_000), (100_000, 100_000), (100_000, 100_000)]
    assert [len(titles(loopback_hub, repo)) for repo in (one, two)] == [2, 2]
    statuses = [asked.status for asked in loopback_hub.requests if asked.method == "PUT" or "commit" in asked.path]
    assert statuses == [0, 200, 200, 200, 0]


def test_xet(client: Client, xet_hub: LoopbackHub, tmp_path: Path) -> None:
    """hf_xet uploads to the folder and downloads from it; who has it switched off gets the same bytes over HTTP."""
    folder = tmp_path / "files"
    folder.mkdir()
    weights, base = os.urandom(1_000_000), os.urandom(200_000)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "note.txt").write_bytes(b"note")
    xet_hub.add_repo(f"{USER}/base", {"model.safetensors": base}, xet=True)
    first, again, loaded, _, from_base, put = client(
        xet_hub,
        ("folder", {"repo": REPO, "path": str(folder)}),
        ("folder", {"repo": REPO, "path": str(folder)}),
        ("download", {"repo": REPO, "path": "model.safetensors", "revision": "main"}),
        ("copy", {"source": f"{USER}/base", "target": f"{USER}/copy", "path": "model.safetensors"}),
        ("download", {"repo": f"{USER}/copy", "path": "model.safetensors", "revision": "main"}),
        ("once", {"repo": f"{USER}/copy", "name": "put.safetensors", "path": str(folder / "model.safetensors")}),
        xet=True,
    )
    assert (again, titles(xet_hub, REPO)[1:], len(xet_hub.repo(REPO).commits)) == (first, ["initial commit"], 2)
    assert loaded == digest(weights)
    assert (from_base, xet_hub.read(f"{USER}/copy", "model.safetensors")) == (digest(base), base)
    assert put == [*OK, [digest(weights)]]
    entry = xet_hub.repo(REPO).files()["model.safetensors"]
    assert (entry.lfs, entry.size, entry.content.sha256) == (True, 1_000_000, digest(weights))
    assert entry.xet
    assert not xet_hub.uploads
    before = len(xet_hub.requests)
    (folder / "note.txt").write_bytes(b"another note")
    with_pull = ("folder", {"repo": REPO, "path": str(folder), "create_pr": True})
    (folder / "new.safetensors").write_bytes(os.urandom(5000))
    (pull,) = client(xet_hub, with_pull, xet=True)
    assert pull == [xet_hub.repo(REPO).pulls[1], "refs/pr/1"]
    for path in ("model.safetensors", "new.safetensors"):
        assert xet_hub.read(REPO, path, "refs/pr/1") == (folder / path).read_bytes()
    assert any(asked.path.endswith("/xet-write-token/main?create_pr=1") for asked in xet_hub.requests[before:])
    (over_http,) = client(xet_hub, ("download", {"repo": REPO, "path": "new.safetensors", "revision": "refs/pr/1"}))
    assert over_http == digest(folder / "new.safetensors")
    assert not list((tmp_path / "user").iterdir()), "a client wrote outside of its home"


def test_a_hub_without_xet_says_so(client: Client, loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(1000))
    loopback_hub.add_repo(REPO)
    (answer,) = client(loopback_hub, ("once", {"repo": REPO, "name": "model.safetensors", "path": str(file)}), xet=True)
    assert answer[0] != "None"
    assert titles(loopback_hub, REPO) == ["initial commit"]


@pytest.mark.parametrize("answer", [False, True], ids=["before the commit", "after the commit"])
def test_a_client_that_is_killed(loopback_hub: LoopbackHub, tmp_path: Path, *, answer: bool) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(1000))
    loopback_hub.add_repo(REPO)
    job = ("once", {"repo": REPO, "name": "model.safetensors", "path": str(file)})
    hold = loopback_hub.hold("POST .*/commit/", answer=answer)
    with subprocess.Popen(
        command(job), env=environment("installed", loopback_hub, tmp_path), stdout=subprocess.PIPE
    ) as process:
        assert hold.reached.wait(30)
        process.send_signal(signal.SIGKILL)
    hold.drop()
    assert len(titles(loopback_hub, REPO)) == (2 if answer else 1)
    (again,) = runner("installed", tmp_path)(loopback_hub, job)
    assert again == [*OK, [digest(file)]]
    assert len(titles(loopback_hub, REPO)) == 2
    assert len(loopback_hub.uploads) == 1, "the large file has come already"


def test_the_client_in_this_process(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    loopback_hub.add_repo(REPO, {"README.md": b"# A card", "model.bin": bytes(1000)})
    api = HfApi(endpoint=loopback_hub.url, token=WRITE_TOKEN)
    made = api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO)
    assert made.oid == loopback_hub.repo(REPO).branches["main"]
    loaded = api.snapshot_download(REPO, local_dir=tmp_path)
    assert (Path(loaded) / "model.bin").read_bytes() == bytes(1000)
    assert {asked.headers["host"] for asked in loopback_hub.requests} == {loopback_hub.host}


# --- the client for JavaScript ---


def test_the_client_for_javascript(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    node = shutil.which("node")
    if NODE_MODULES is None or node is None:
        pytest.skip("CRDIFF_TEST_NODE_MODULES names no folder with @huggingface/hub, or there is no node")
    file = tmp_path / "model.safetensors"
    makers.write(file, {f"{i}.weight": ("F16", (4, 4), os.urandom(32)) for i in range(3000)}, {"format": "pt"})
    loopback_hub.add_repo(REPO)
    put = {"repo": REPO, "name": "unet/model.safetensors", "path": str(file)}
    assert runner("installed", tmp_path)(loopback_hub, ("once", put)) == [[*OK, [digest(file)]]]
    loopback_hub.part_size = 1000
    loopback_hub.page_size = 2
    before = len(loopback_hub.requests)
    target = f"{USER}/from-js"
    job = {"hubUrl": loopback_hub.url, "accessToken": WRITE_TOKEN, "repo": REPO, "target": target}
    done = subprocess.run(
        [node, str(SUPPORT / "js_client.mjs"), json.dumps({**job, "file": "unet/model.safetensors"})],
        env={"PATH": os.environ["PATH"], "CRDIFF_TEST_NODE_MODULES": NODE_MODULES},
        check=True,
        stdout=subprocess.PIPE,
    )
    answer = json.loads(done.stdout)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest(file)}\nsize {file.stat().st_size}\n"
    assert answer["listed"][1:] == [
        ["directory", "unet", 0, None],
        ["file", "unet/model.safetensors", file.stat().st_size, digest(file)],
    ]
    assert (answer["downloaded"], answer["absent"], answer["pointer"]) == (digest(file), None, pointer)
    assert (answer["exists"], answer["paths"]) == ([True, False], [digest(file)])
    assert (answer["tensors"], answer["parameters"]) == (3000, {"F16": 48_000})
    assert answer["created"] == {"repoUrl": f"{loopback_hub.url}/{target}", "id": target}
    assert answer["again"] == HTTPStatus.CONFLICT
    assert titles(loopback_hub, target) == ["From JavaScript", "initial commit"]
    assert answer["commit"] == loopback_hub.repo(target).branches["main"]
    assert answer["pull"] == f"{loopback_hub.url}/{target}/discussions/1"
    assert digest(loopback_hub.read(target, "model.safetensors")) == answer["content"]
    assert {path: loopback_hub.read(target, path) for path in ("small.bin", "README.md")} == {
        "small.bin": b"\0\1",
        "README.md": b"# Hello\n",
    }
    assert loopback_hub.read(target, "note.txt", "refs/pr/1") == b"note"
    assert sorted(upload.part or 0 for upload in loopback_hub.uploads) == [0, 0, 1, 2, 3]
    assert all("python" not in asked.headers["user-agent"] for asked in loopback_hub.requests[before:])


# --- what no client may do ---


@dataclass(frozen=True)
class Said:
    status: int
    headers: dict[str, str]
    body: bytes


class Raw:
    """Requests as they are written, over one connection."""

    def __init__(self, hub: LoopbackHub) -> None:
        self.hub = hub
        self.connection = http.client.HTTPConnection(hub.host, timeout=30)

    def ask(self, method: str, path: str, body: Any = None, **headers: str | None) -> Said:
        named = {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
        kind = "application/json"
        if isinstance(body, list):
            body, kind = (
                b"".join(json.dumps({"key": k, "value": v}).encode() + b"\n" for k, v in body),
                "application/x-ndjson",
            )
        elif isinstance(body, dict):
            body = json.dumps(body).encode()
            kind = "application/vnd.git-lfs+json" if "batch" in path or "multipart" in path else kind
        if not path.startswith("/lfs/"):
            named = {"Authorization": f"Bearer {WRITE_TOKEN}", "Content-Type": kind, **named}
        self.connection.request(method, path, body, named)
        answer = self.connection.getresponse()
        return Said(answer.status, dict(answer.headers.items()), answer.read())

    def address(self, data: bytes, *, parts: bool = False) -> list[str]:
        """Where the storage wants a large file of REPO, or its parts and then the call that puts them together."""
        batch = {"operation": "upload", "transfers": ["basic", "multipart"], "hash_algo": "sha256"}
        objects = [{"oid": digest(data), "size": len(data)}]
        said = self.ask("POST", f"/{REPO}.git/info/lfs/objects/batch", {**batch, "objects": objects})
        upload = json.loads(said.body)["objects"][0]["actions"]["upload"]
        numbered = [upload["header"][name] for name in sorted(upload["header"]) if name.isdecimal()] if parts else []
        return [url.removeprefix(self.hub.url) for url in (*numbered, upload["href"])]


@pytest.fixture
def raw(loopback_hub: LoopbackHub) -> Iterator[Raw]:
    """On a Hub that has REPO."""
    loopback_hub.add_repo(REPO, {"README.md": b"# A card", "model.safetensors": b"weights"})
    found = Raw(loopback_hub)
    yield found
    found.connection.close()


API = f"/api/models/{REPO}"
HEADER = ("header", {"summary": "A title", "description": ""})
LFS = {"path": "new.safetensors", "algo": "sha256", "oid": digest(b"weights"), "size": 7}
TEXT = {"path": "x.txt", "content": "eA==", "encoding": "base64"}
FILE = {"path": "a.txt", "sample": "eA==", "size": 1}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/api/models", None, 404),
        ("GET", "/api/datasets/org/name", None, 404),
        ("PATCH", API, None, 404),
        ("POST", API, {}, 404),
        ("GET", f"{API}?color=red", None, 400),
        ("GET", f"{API}?blobs=maybe", None, 400),
        ("GET", f"{API}/tree/main?cursor=next", None, 400),
        ("GET", f"{API}/discussions?status=odd", None, 400),
        ("POST", "/api/repos/create", {"organization": USER}, 400),
        ("POST", "/api/repos/create", {"name": "x", "organization": USER, "colour": "red"}, 400),
        ("POST", "/api/repos/create", {"name": 1, "organization": USER}, 400),
        ("POST", "/api/repos/create", b"{", 400),
        ("POST", f"{API}/preupload/main", {"files": []}, 400),
        ("POST", f"{API}/preupload/main", {"files": [{**FILE, "size": 2}]}, 400),
        ("POST", f"{API}/preupload/main", {"files": [{**FILE, "sample": "?"}]}, 400),
        ("POST", f"{API}/preupload/main", {"files": [{**FILE, "path": "../a"}]}, 400),
        ("POST", f"{API}/preupload/main", {"files": [FILE] * 257}, 400),
        ("POST", f"{API}/commit/main", b"", 415),
        ("POST", f"{API}/commit/main", [HEADER], 400),
        ("POST", f"{API}/commit/main", [("file", TEXT)], 400),
        ("POST", f"{API}/commit/main", [("header", {"summary": ""}), ("file", TEXT)], 400),
        ("POST", f"{API}/commit/main", [HEADER, ("rename", {"path": "a"})], 400),
        ("POST", f"{API}/commit/main", [HEADER, ("file", {**TEXT, "path": "/x"})], 400),
        ("POST", f"{API}/commit/main", [HEADER, ("file", {**TEXT, "path": "x.safetensors"})], 400),
        ("POST", f"{API}/commit/main", [HEADER, ("file", {**TEXT, "encoding": "utf-8"})], 400),
        ("POST", f"{API}/commit/main", [HEADER, ("lfsFile", {**LFS, "oid": "0" * 64})], 422),
        ("POST", f"{API}/commit/main", [HEADER, ("lfsFile", {**LFS, "size": 8})], 422),
        ("POST", f"{API}/commit/v1", [HEADER, ("file", TEXT)], 400),
        ("POST", f"/{REPO}.git/info/lfs/objects/batch", {"operation": "download"}, 400),
        ("POST", f"/{REPO}.git/info/lfs/verify", {"oid": "0" * 64, "size": 1}, 404),
        ("POST", "/api/complete_multipart?uploadId=1", {"oid": "0" * 64, "parts": []}, 404),
        ("PUT", "/lfs/1", b"x", 403),
        ("PUT", "/lfs/1/1", b"x", 403),
    ],
)
def test_violations(raw: Raw, method: str, path: str, body: Any, status: int) -> None:
    raw.hub.state.repos[REPO].tags["v1"] = raw.hub.repo(REPO).branches["main"]
    before = raw.hub.repo(REPO).refs
    assert raw.ask(method, path, body).status == status
    (violation,) = raw.hub.violations
    assert violation.startswith(f"{method} {path}: ")
    assert raw.hub.repo(REPO).refs == before
    raw.hub.violations.clear()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "huggingface.co"}, 400),
        ({"Authorization": "Basic dTpw"}, 401),
        ({"Range": "bytes=0-1,3-4"}, 400),
        ({"Range": "lines=0-1"}, 400),
        ({"Transfer_Encoding": "chunked"}, 411),
    ],
)
def test_headers_that_no_client_sends(raw: Raw, headers: dict[str, str], status: int) -> None:
    assert raw.ask("GET", f"/{REPO}/resolve/main/README.md", **headers).status == status
    assert len(raw.hub.violations) == 1
    raw.hub.violations.clear()


def test_a_large_file_that_is_not_what_was_said(raw: Raw) -> None:
    (address,) = raw.address(b"right")
    assert raw.ask("PUT", address, b"wrong").status == HTTPStatus.BAD_REQUEST
    assert raw.ask("PUT", address, b"too long").status == HTTPStatus.BAD_REQUEST
    assert raw.ask("PUT", address, b"right", Authorization=f"Bearer {WRITE_TOKEN}").status == HTTPStatus.BAD_REQUEST
    assert len(raw.hub.violations) == 3
    raw.hub.violations.clear()
    assert not raw.hub.repo(REPO).objects
    assert raw.ask("PUT", address, b"right").status == HTTPStatus.OK
    lfs = {"path": "new.bin", "algo": "sha256", "oid": digest(b"right"), "size": 6}
    assert raw.ask("POST", f"{API}/commit/main", [HEADER, ("lfsFile", lfs)]).status == HTTPStatus.BAD_REQUEST
    raw.hub.violations.clear()
    assert raw.ask("POST", f"{API}/commit/main", [HEADER, ("lfsFile", {**lfs, "size": 5})]).status == HTTPStatus.OK
    assert raw.hub.read(REPO, "new.bin") == b"right"


def test_parts_that_do_not_fit_together(raw: Raw) -> None:
    raw.hub.part_size = 2
    one, two, complete = raw.address(b"abc", parts=True)
    first = raw.ask("PUT", one, b"ab").headers["ETag"]
    assert raw.ask("PUT", two, b"cd").status == HTTPStatus.BAD_REQUEST
    parts = [{"partNumber": 1, "etag": first}]
    assert raw.ask("POST", complete, {"oid": digest(b"abc"), "parts": parts}).status == HTTPStatus.BAD_REQUEST
    second = raw.ask("PUT", two, b"d").headers["ETag"]
    parts.append({"partNumber": 2, "etag": first})
    assert raw.ask("POST", complete, {"oid": digest(b"abc"), "parts": parts}).status == HTTPStatus.BAD_REQUEST
    parts[1]["etag"] = second
    assert raw.ask("POST", complete, {"oid": digest(b"abc"), "parts": parts}).status == HTTPStatus.BAD_REQUEST
    assert len(raw.hub.violations) == 4
    raw.hub.violations.clear()
    parts[1]["etag"] = raw.ask("PUT", two, b"c").headers["ETag"]
    for _ in range(2):  # a client whose answer got lost asks again
        assert raw.ask("POST", complete, {"oid": digest(b"abc"), "parts": parts}).status == HTTPStatus.OK


def test_the_fixture_fails_the_test() -> None:
    run = served()
    raw = Raw(next(run))
    assert raw.ask("GET", "/nothing").status == HTTPStatus.NOT_FOUND
    raw.connection.close()
    with pytest.raises(AssertionError, match="no such route"):
        next(run)


# --- what a test may ask of the Hub ---


def test_ranges_of_a_file_that_nobody_reads_whole(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    file = tmp_path / "huge.safetensors"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
        sparse.seek(-5, os.SEEK_END)
        sparse.write(b"\1\2\3\4\5")
    loopback_hub.add_repo(REPO, {file.name: file}, sha256={file.name: "f" * 64})
    raw = Raw(loopback_hub)
    path = f"/{REPO}/resolve/main/{file.name}"
    head = raw.ask("HEAD", path, Range="bytes=0-0")
    assert (head.status, head.headers["Content-Length"]) == (HTTPStatus.OK, str(1 << 40))
    assert (head.headers["X-Linked-Size"], head.headers["X-Linked-Etag"]) == (str(1 << 40), f'"{"f" * 64}"')
    end = raw.ask("GET", path, Range="bytes=-4")
    assert (end.status, end.body) == (HTTPStatus.PARTIAL_CONTENT, b"\2\3\4\5")
    assert end.headers["Content-Range"] == f"bytes {(1 << 40) - 4}-{(1 << 40) - 1}/{1 << 40}"
    assert raw.ask("GET", path, Range=f"bytes={(1 << 40) - 2}-{1 << 50}").body == b"\4\5"
    past = raw.ask("GET", path, Range=f"bytes={1 << 40}-")
    assert (past.status, past.headers["Content-Range"]) == (416, f"bytes */{1 << 40}")
    info = json.loads(raw.ask("GET", f"{API}?blobs=true").body)
    assert info["siblings"][1]["lfs"]["sha256"] == "f" * 64
    raw.connection.close()


def test_what_goes_wrong_on_demand(raw: Raw) -> None:
    raw.hub.fail("GET .*/refs", times=2, headers={"X-Note": "busy"})
    raw.hub.fail("GET .*/refs", status=418, body=b"tea")
    said = [raw.ask("GET", f"{API}/refs") for _ in range(4)]
    assert [one.status for one in said] == [503, 503, 418, 200]
    assert (said[0].headers["X-Note"], said[2].body) == ("busy", b"tea")
    raw.hub.drop("GET .*/refs")
    with pytest.raises(http.client.RemoteDisconnected):
        raw.ask("GET", f"{API}/refs")
    raw.hub.drop_answer("POST .*/branch/new")
    with pytest.raises(http.client.RemoteDisconnected):
        raw.ask("POST", f"{API}/branch/new", {})
    assert "refs/heads/new" in raw.hub.repo(REPO).refs
    assert [asked.status for asked in raw.hub.requests] == [503, 503, 418, 200, 0, 0]


def test_somebody_else_is_faster(raw: Raw) -> None:
    head = raw.hub.repo(REPO).branches["main"]
    header = ("header", {"summary": "Mine", "description": "", "parentCommit": head})
    raw.hub.before("POST .*/commit/", lambda: raw.hub.commit(REPO, {"theirs.txt": b"x", "README.md": None}))
    assert raw.ask("POST", f"{API}/commit/main", [header, ("file", TEXT)]).status == HTTPStatus.PRECONDITION_FAILED
    assert [commit.author for commit in raw.hub.repo(REPO).log()] == ["somebody", "somebody", "system"]
    assert list(raw.hub.repo(REPO).files()) == [".gitattributes", "model.safetensors", "theirs.txt"]


def test_a_request_that_waits(raw: Raw) -> None:
    """Other requests go on, and one that is dropped does nothing."""
    waits, dropped = raw.hub.hold("POST .*/branch/one"), raw.hub.hold("POST .*/commit/", after_bytes=20)
    other = Raw(raw.hub)
    with ThreadPoolExecutor() as pool:
        late = pool.submit(raw.ask, "POST", f"{API}/branch/one", {})
        assert waits.reached.wait(30)
        assert other.ask("GET", f"{API}/refs").status == HTTPStatus.OK
        waits.release()
        assert late.result(30).status == HTTPStatus.OK
        late = pool.submit(raw.ask, "POST", f"{API}/commit/main", [HEADER, ("file", TEXT)])
        assert dropped.reached.wait(30)
        dropped.drop()
        assert isinstance(late.exception(30), ConnectionError)
    other.connection.close()
    assert len(raw.hub.repo(REPO).commits) == 2


def test_many_at_once(loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo(REPO)

    def commit(number: int) -> int:
        raw = Raw(loopback_hub)
        said = raw.ask("POST", f"{API}/commit/main", [HEADER, ("file", {**TEXT, "path": f"{number}.txt"})])
        raw.connection.close()
        return said.status

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(commit, range(64))) == {HTTPStatus.OK}
    assert len(loopback_hub.repo(REPO).files()) == 65
