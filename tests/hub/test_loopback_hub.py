"""The loopback Hub against the Hub's real clients, two versions of the Python one and the one for JavaScript."""

import http.client
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from tests.support import SUPPORT, makers
from tests.support.hub_runs import CLIENTS, environment
from tests.support.loopback import client as client_script
from tests.support.loopback_hub import (
    EXPIRED_TOKEN,
    READ_TOKEN,
    REPO_TOKEN,
    SCOPED_REPO,
    STRANGER_TOKEN,
    USER,
    WRITE_TOKEN,
    LoopbackHub,
    served,
)
from tests.support.publishing import digest

NODE_MODULES = os.environ.get("CRDIFF_TEST_NODE_MODULES")
REPO = f"{USER}/repo"
OK = ["None", None]
Client = Callable[..., list[Any]]


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Client:
    """Runs jobs with a version of the Python client, one after another in one process."""

    def run(hub: LoopbackHub, *jobs: tuple[str, dict[str, Any]], xet: bool = False) -> list[Any]:
        command = [sys.executable, "-P", client_script.__file__, json.dumps(jobs)]
        env = environment(hub, tmp_path, client=request.param, xet=xet)
        output = json.loads(subprocess.run(command, env=env, check=True, capture_output=True).stdout)
        assert output["version"].startswith("1." if request.param == "oldest" else "2.")
        answers: list[Any] = output["answers"]
        return answers

    return run


def titles(hub: LoopbackHub, repo_id: str, revision: str = "main") -> list[str]:
    return [commit.title for commit in hub.repo(repo_id).log(revision)]


# --- the Python client ---


def test_uploads(client: Client, loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    small, large = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    small.write_bytes(os.urandom(1000))
    large.write_bytes(os.urandom(250_000))
    loopback_hub.part_size = 100_000
    (answer,) = client(loopback_hub, ("upload", {"repo": REPO, "small": str(small), "large": str(large)}))
    first, again, second, third = answer["commits"]
    repo = loopback_hub.repo(REPO)
    history = repo.log()
    assert again == first
    assert [commit.oid for commit in history[:3]] == [third, second, first]
    assert [commit.title for commit in history[:2]] == ["Three", "Two"]
    assert (history[1].description, history[1].author, len(history)) == ("In parts.", USER, 4)
    assert (answer["created"], repo.private) == ([f"{loopback_hub.url}/{REPO}"] * 2, True)
    assert answer["url"] == f"{loopback_hub.url}/{REPO}/commit/{third}"
    assert answer["exists"] == ["HfHubHTTPError", HTTPStatus.CONFLICT]
    assert answer["stale"] == ["HfHubHTTPError", HTTPStatus.PRECONDITION_FAILED]
    assert answer["bad card"] == ["ValueError", None]
    assert answer["no branch"] == ["RevisionNotFoundError", HTTPStatus.NOT_FOUND]
    uploads = [(upload.oid, upload.part, upload.received) for upload in loopback_hub.uploads]
    parts = [(digest(large), part, size) for part, size in ((1, 100_000), (2, 100_000), (3, 50_000))]
    assert uploads == [(digest(small), None, 1000), *parts]
    files = repo.files()
    assert {path for path, entry in files.items() if entry.lfs} == {"small.safetensors", "sub/large.safetensors"}
    assert files.keys() - {"small.safetensors", "sub/large.safetensors"} == {
        *(".gitattributes", "README.md", "config.json", "empty.txt")
    }
    assert files["sub/large.safetensors"].content.read() == large.read_bytes()
    assert files["empty.txt"].content.read() == b""


def test_pull_requests_branches_and_tags(client: Client, loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo(REPO, {"README.md": b"# A card"})
    loopback_hub.page_size = 1
    (answer,) = client(loopback_hub, ("propose", {"repo": REPO}))
    page = f"{loopback_hub.url}/{REPO}/discussions"
    assert answer["pulls"] == [[1, "refs/pr/1", f"{page}/1"], [2, "refs/pr/2", f"{page}/2"]]
    pulls = [[number, f"Pull {number}", "open", USER] for number in (2, 1)]
    assert answer["listed"] == {"all": pulls, "own": pulls, "others": []}
    assert answer["again"] == [["HfHubHTTPError", HTTPStatus.CONFLICT]] * 2
    assert answer["refs"] == [["refs/heads/main", "refs/heads/side/way"], ["refs/tags/v1"]]
    assert titles(loopback_hub, REPO) == ["Add files", "initial commit"]
    assert titles(loopback_hub, REPO, "refs/pr/1")[:2] == ["More", "Pull 1"]
    assert titles(loopback_hub, REPO, "side/way")[:2] == ["Side", "Add files"]
    assert loopback_hub.read(REPO, "1.txt", "refs/pr/1") == b"2"
    repo = loopback_hub.repo(REPO)
    assert repo.tags == {"v1": repo.branches["side/way"]}


def test_reading(client: Client, loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    """The client asks once more for a header that is longer than 100 kB."""
    file = tmp_path / "model.safetensors"
    makers.write(file, {f"layer.{i}.weight": ("F16", (2, 2), os.urandom(8)) for i in range(4000)})
    card = client_script.CARD.encode()
    oid = loopback_hub.add_repo(REPO, {"sub/model.safetensors": file, "README.md": card, "sub/x.json": b"{}"})
    loopback_hub.commit(REPO, {"sub/model.safetensors": os.urandom(99), "new.txt": b"new"}, "Later")
    loopback_hub.repositories[REPO].tags["v1"] = oid
    loopback_hub.page_size = 2
    head = loopback_hub.commit(REPO, {"sub/model.safetensors": file, "new.txt": None}, "Back")
    (answer,) = client(
        loopback_hub, ("read", {"repo": REPO, "revisions": ["v1", oid], "path": "sub/model.safetensors"})
    )
    assert answer["downloads"] == [digest(file)] * 2
    assert answer["snapshot"].items() >= {"README.md": digest(card), "sub/model.safetensors": digest(file)}.items()
    assert answer["paths"] == [["sub/model.safetensors", digest(file)], ["README.md", None]]
    assert answer["tree"] == [".gitattributes", "README.md", "sub", "sub/model.safetensors", "sub/x.json"]
    assert answer["info"] == [REPO, head, False, False]
    assert answer["cards"] == [{"license": "mit", "library_name": "diffusers", "base_model": "org/base"}] * 2
    assert (answer["tensors"], answer["exists"]) == (4000, [True, True, False])


def test_rights(client: Client, loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo("org/base", {"README.md": b"# A card"})
    loopback_hub.add_repo("org/gated", {"model.safetensors": b"weights"}, gated="auto", access=(USER,))
    loopback_hub.add_repo(SCOPED_REPO, {"model.safetensors": b"weights"}, private=True)
    tokens = {
        "write": WRITE_TOKEN, "read": READ_TOKEN, "scoped": REPO_TOKEN, "expired": EXPIRED_TOKEN,
        "stranger": STRANGER_TOKEN,
    }  # fmt: skip
    job = {"base": "org/base", "gated": "org/gated", "private": SCOPED_REPO, "tokens": tokens}
    (answer,) = client(loopback_hub, ("rights", job))
    missing, missing_to_anonymous = (["RepositoryNotFoundError", status] for status in (404, 401))
    forbidden, invalid = (["HfHubHTTPError", status] for status in (403, 401))
    assert answer["repo"] == missing
    assert answer["revision"] == ["RevisionNotFoundError", HTTPStatus.NOT_FOUND]
    assert answer["entry"] == ["RemoteEntryNotFoundError", HTTPStatus.NOT_FOUND]
    gated = {
        "stranger": ["GatedRepoError", HTTPStatus.FORBIDDEN],
        "anonymous": ["GatedRepoError", HTTPStatus.UNAUTHORIZED],
    }
    assert answer["gated"] == {**gated, "write": OK}
    assert answer["whoami"] == ["write", "read", "fineGrained"]
    assert answer["expired"] == invalid
    strangers = {"expired": invalid, "stranger": missing, "anonymous": missing_to_anonymous}
    assert answer["read"] == {"write": OK, "read": OK, "scoped": OK, **strangers}
    assert answer["write"] == {"write": OK, "read": forbidden, "scoped": OK, **strangers}
    anonymous = {"expired": invalid, "anonymous": missing_to_anonymous}
    assert answer["commit"] == {**dict.fromkeys(("write", "read", "scoped", "stranger"), forbidden), **anonymous}
    assert answer["pull"] == {**dict.fromkeys(("write", "read", "scoped", "stranger"), OK), **anonymous}
    assert answer["own pull"] == OK
    creators = {"read": forbidden, "scoped": forbidden, "stranger": forbidden, "expired": invalid, "anonymous": invalid}
    assert answer["create"] == {"write": OK, **creators}
    assert answer["create elsewhere"] == forbidden


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
    assert [upload.received for upload in loopback_hub.uploads] == [50_000, 100_000, 100_000]
    assert [len(titles(loopback_hub, repo)) for repo in (one, two)] == [2, 2]
    statuses = [asked.status for asked in loopback_hub.requests if asked.method == "PUT" or "commit" in asked.path]
    assert statuses == [0, 200, 200, 200, 0]


def test_xet(client: Client, xet_hub: LoopbackHub, tmp_path: Path) -> None:
    """hf_xet uploads to the folder and downloads from it; without Xet a client gets the same bytes over HTTP."""
    folder = tmp_path / "files"
    folder.mkdir()
    weights, base = os.urandom(1_000_000), os.urandom(200_000)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "note.txt").write_bytes(b"note")
    xet_hub.add_repo(f"{USER}/base", {"model.safetensors": base}, xet=True)
    upload = {"repo": REPO, "path": str(folder)}
    first, again, loaded, from_base = client(
        xet_hub,
        ("folder", upload),
        ("folder", upload),
        ("download", {"repo": REPO, "path": "model.safetensors", "revision": "main"}),
        ("download", {"repo": f"{USER}/base", "path": "model.safetensors", "revision": "main"}),
        xet=True,
    )
    assert (again, titles(xet_hub, REPO)) == (first, ["A folder", "initial commit"])
    assert (loaded, from_base) == (digest(weights), digest(base))
    entry = xet_hub.repo(REPO).files()["model.safetensors"]
    assert (entry.lfs, entry.size, entry.content.sha256) == (True, 1_000_000, digest(weights))
    assert entry.xet
    (folder / "new.safetensors").write_bytes(os.urandom(5000))
    (pull,) = client(xet_hub, ("folder", {**upload, "create_pr": True}), xet=True)
    assert pull == [xet_hub.repo(REPO).pulls[1], "refs/pr/1"]
    assert xet_hub.read(REPO, "new.safetensors", "refs/pr/1") == (folder / "new.safetensors").read_bytes()
    assert not xet_hub.uploads
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


# --- the client for JavaScript ---


def test_the_client_for_javascript(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    node = shutil.which("node")
    if NODE_MODULES is None or node is None:
        pytest.skip("CRDIFF_TEST_NODE_MODULES names no folder with @huggingface/hub, or there is no node")
    file = tmp_path / "model.safetensors"
    makers.write(file, {f"{i}.weight": ("F16", (4, 4), os.urandom(32)) for i in range(3000)}, {"format": "pt"})
    loopback_hub.add_repo(REPO, {"unet/model.safetensors": file})
    loopback_hub.part_size = 1000
    loopback_hub.page_size = 2
    target = f"{USER}/from-js"
    job = {"hubUrl": loopback_hub.url, "accessToken": WRITE_TOKEN, "repo": REPO, "target": target}
    done = subprocess.run(
        [node, str(SUPPORT / "js_client.mjs"), json.dumps({**job, "file": "unet/model.safetensors"})],
        env={"PATH": os.environ["PATH"], "CRDIFF_TEST_NODE_MODULES": NODE_MODULES},
        check=True,
        stdout=subprocess.PIPE,
    )
    answer = json.loads(done.stdout)
    assert answer["listed"][1:] == [["directory", "unet", None], ["file", "unet/model.safetensors", digest(file)]]
    assert (answer["downloaded"], answer["absent"], answer["tensors"]) == (digest(file), None, 3000)
    assert answer["created"] == {"repoUrl": f"{loopback_hub.url}/{target}", "id": target}
    assert answer["again"] == HTTPStatus.CONFLICT
    assert titles(loopback_hub, target) == ["From JavaScript", "initial commit"]
    assert answer["commit"] == loopback_hub.repo(target).branches["main"]
    assert answer["pull"] == f"{loopback_hub.url}/{target}/discussions/1"
    assert digest(loopback_hub.read(target, "model.safetensors")) == answer["content"]
    assert loopback_hub.read(target, "README.md") == b"# Hello\n"
    assert loopback_hub.read(target, "note.txt", "refs/pr/1") == b"note"
    assert sorted(upload.part or 0 for upload in loopback_hub.uploads) == [1, 2, 3]


# --- what no client may do ---


class Raw:
    """Requests as they are written, over one connection; each returns the status, the headers and the body."""

    def __init__(self, hub: LoopbackHub) -> None:
        self.hub = hub
        self.connection = http.client.HTTPConnection(hub.host, timeout=30)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        if isinstance(body, list):
            body = b"".join(json.dumps({"key": key, "value": value}).encode() + b"\n" for key, value in body)
        elif isinstance(body, dict):
            body = json.dumps(body).encode()
        token = {} if path.startswith("/lfs/") else {"Authorization": f"Bearer {WRITE_TOKEN}"}
        self.connection.request(method, path, body, token | (headers or {}))
        answer = self.connection.getresponse()
        return answer.status, dict(answer.headers.items()), answer.read()

    def addresses(self, data: bytes) -> list[str]:
        """Where the storage wants a large file of REPO, or its parts and then the call that puts them together."""
        objects = [{"oid": digest(data), "size": len(data)}]
        batch = {"operation": "upload", "hash_algo": "sha256", "objects": objects}
        _, _, body = self.ask("POST", f"/{REPO}.git/info/lfs/objects/batch", batch)
        upload = json.loads(body)["objects"][0]["actions"]["upload"]
        parts = [url for name, url in sorted(upload.get("header", {}).items()) if name.isdecimal()]
        return [url.removeprefix(self.hub.url) for url in (*parts, upload["href"])]


@pytest.fixture
def raw(loopback_hub: LoopbackHub) -> Iterator[Raw]:
    """On a Hub that has REPO."""
    loopback_hub.add_repo(REPO, {"README.md": b"# A card", "model.safetensors": b"weights"})
    connection = Raw(loopback_hub)
    yield connection
    connection.connection.close()


API = f"/api/models/{REPO}"
HEADER = ("header", {"summary": "A title", "description": ""})
LFS = {"path": "new.safetensors", "algo": "sha256", "oid": digest(b"weights"), "size": 7}
TEXT = {"path": "x.txt", "content": "eA==", "encoding": "base64"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/api/datasets/org/name", None, 404),
        ("PATCH", API, None, 404),
        ("GET", f"{API}?color=red", None, 400),
        ("GET", f"{API}/tree/main?recursive=maybe", None, 400),
        ("POST", "/api/repos/create", {"organization": USER}, 500),
        ("POST", "/api/repos/create", b"{", 400),
        ("POST", f"{API}/preupload/main", {"files": [{"path": "a.txt", "sample": "eA==", "size": 2}]}, 400),
        ("POST", f"{API}/commit/main", [HEADER], 400),
        ("POST", f"{API}/commit/main", [("header", {"summary": ""}), ("file", TEXT)], 400),
        ("POST", f"{API}/commit/main", [HEADER, ("file", {**TEXT, "path": "a/../x"})], 400),
        ("POST", f"{API}/commit/main", [HEADER, ("file", {**TEXT, "path": "x.safetensors"})], 400),
        ("POST", f"{API}/commit/main", [HEADER, ("lfsFile", {**LFS, "oid": "0" * 64})], 422),
        ("POST", f"{API}/commit/main", [HEADER, ("lfsFile", {**LFS, "size": 8})], 422),
        ("POST", f"{API}/commit/v1", [HEADER, ("file", TEXT)], 400),
        ("POST", f"/{REPO}.git/info/lfs/verify", {"oid": "0" * 64, "size": 1}, 404),
        ("POST", "/api/complete_multipart?uploadId=1", {"oid": "0" * 64, "parts": []}, 404),
        ("PUT", "/lfs/1/1", b"x", 403),
    ],
)
def test_violations(raw: Raw, method: str, path: str, body: Any, status: int) -> None:
    raw.hub.repositories[REPO].tags["v1"] = raw.hub.repo(REPO).branches["main"]
    before = raw.hub.repo(REPO).refs
    assert raw.ask(method, path, body)[0] == status
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
        ({"Transfer-Encoding": "chunked"}, 411),
    ],
)
def test_headers_that_no_client_sends(raw: Raw, headers: dict[str, str], status: int) -> None:
    assert raw.ask("GET", f"/{REPO}/resolve/main/README.md", headers=headers)[0] == status
    assert len(raw.hub.violations) == 1
    raw.hub.violations.clear()


def test_a_large_file_that_differs_from_its_description(raw: Raw) -> None:
    (address,) = raw.addresses(b"right")
    assert raw.ask("PUT", address, b"wrong")[0] == HTTPStatus.BAD_REQUEST
    assert raw.ask("PUT", address, b"too long")[0] == HTTPStatus.BAD_REQUEST
    assert raw.ask("PUT", address, b"right", {"Authorization": f"Bearer {WRITE_TOKEN}"})[0] == HTTPStatus.BAD_REQUEST
    assert len(raw.hub.violations) == 3
    assert not raw.hub.repo(REPO).objects
    assert raw.ask("PUT", address, b"right")[0] == HTTPStatus.OK
    lfs = {**LFS, "oid": digest(b"right"), "size": 5}
    assert raw.ask("POST", f"{API}/commit/main", [HEADER, ("lfsFile", lfs)])[0] == HTTPStatus.OK
    assert raw.hub.read(REPO, "new.safetensors") == b"right"
    raw.hub.violations.clear()


def test_parts_that_do_not_fit_together(raw: Raw) -> None:
    raw.hub.part_size = 2
    one, two, complete = raw.addresses(b"abc")
    first = raw.ask("PUT", one, b"ab")[1]["ETag"]
    assert raw.ask("PUT", two, b"cd")[0] == HTTPStatus.BAD_REQUEST
    parts = [{"partNumber": 1, "etag": first}]
    assert raw.ask("POST", complete, {"oid": digest(b"abc"), "parts": parts})[0] == HTTPStatus.BAD_REQUEST
    parts.append({"partNumber": 2, "etag": raw.ask("PUT", two, b"d")[1]["ETag"]})
    assert raw.ask("POST", complete, {"oid": digest(b"abc"), "parts": parts})[0] == HTTPStatus.BAD_REQUEST
    assert len(raw.hub.violations) == 3
    raw.hub.violations.clear()
    parts[1]["etag"] = raw.ask("PUT", two, b"c")[1]["ETag"]
    for _ in range(2):  # a client whose answer got lost asks again
        assert raw.ask("POST", complete, {"oid": digest(b"abc"), "parts": parts})[0] == HTTPStatus.OK


def test_the_fixture_fails_the_test() -> None:
    run = served()
    raw = Raw(next(run))
    assert raw.ask("GET", "/nothing")[0] == HTTPStatus.NOT_FOUND
    raw.connection.close()
    with pytest.raises(AssertionError, match="no such route"):
        next(run)


# --- what a test may ask of the Hub ---


def test_ranges_of_a_file_that_nobody_reads_whole(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    file, size = tmp_path / "huge.safetensors", 1 << 40
    with file.open("wb") as sparse:
        sparse.truncate(size)
        sparse.seek(-5, os.SEEK_END)
        sparse.write(b"\1\2\3\4\5")
    loopback_hub.add_repo(REPO, {file.name: file}, sha256={file.name: "f" * 64})
    raw = Raw(loopback_hub)
    path = f"/{REPO}/resolve/main/{file.name}"
    status, headers, _ = raw.ask("HEAD", path)
    assert (status, headers["Content-Length"]) == (HTTPStatus.OK, str(size))
    assert (headers["X-Linked-Size"], headers["X-Linked-Etag"]) == (str(size), f'"{"f" * 64}"')
    status, headers, body = raw.ask("GET", path, headers={"Range": f"bytes={size - 4}-{1 << 50}"})
    assert (status, body) == (HTTPStatus.PARTIAL_CONTENT, b"\2\3\4\5")
    assert headers["Content-Range"] == f"bytes {size - 4}-{size - 1}/{size}"
    status, headers, _ = raw.ask("GET", path, headers={"Range": f"bytes={size}-"})
    assert (status, headers["Content-Range"]) == (416, f"bytes */{size}")
    raw.connection.close()


def test_what_goes_wrong_on_demand(raw: Raw) -> None:
    raw.hub.fail("GET .*/refs", times=2, headers={"X-Note": "busy"})
    raw.hub.fail("GET .*/refs", status=418, body=b"tea")
    answers = [raw.ask("GET", f"{API}/refs") for _ in range(4)]
    assert [status for status, _, _ in answers] == [503, 503, 418, 200]
    assert (answers[0][1]["X-Note"], answers[2][2]) == ("busy", b"tea")
    raw.hub.drop("GET .*/refs")
    with pytest.raises(http.client.RemoteDisconnected):
        raw.ask("GET", f"{API}/refs")
    raw.hub.drop_answer("POST .*/branch/new")
    with pytest.raises(http.client.RemoteDisconnected):
        raw.ask("POST", f"{API}/branch/new", {})
    assert "refs/heads/new" in raw.hub.repo(REPO).refs
    assert [asked.status for asked in raw.hub.requests] == [503, 503, 418, 200, 0, 0]


def test_a_request_that_waits(raw: Raw) -> None:
    """Other requests go on, and one that is dropped does nothing."""
    hold = raw.hub.hold("POST .*/commit/", after_bytes=20)
    other = Raw(raw.hub)
    with ThreadPoolExecutor() as pool:
        late = pool.submit(raw.ask, "POST", f"{API}/commit/main", [HEADER, ("file", TEXT)])
        assert hold.reached.wait(30)
        assert other.ask("GET", f"{API}/refs")[0] == HTTPStatus.OK
        hold.drop()
        assert isinstance(late.exception(30), ConnectionError)
    other.connection.close()
    assert len(raw.hub.repo(REPO).commits) == 2


def test_many_at_once(loopback_hub: LoopbackHub) -> None:
    loopback_hub.add_repo(REPO)

    def commit(number: int) -> int:
        raw = Raw(loopback_hub)
        status, _, _ = raw.ask("POST", f"{API}/commit/main", [HEADER, ("file", {**TEXT, "path": f"{number}.txt"})])
        raw.connection.close()
        return status

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(commit, range(64))) == {HTTPStatus.OK}
    assert len(loopback_hub.repo(REPO).files()) == 65
