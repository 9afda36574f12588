"""Routes that change repositories: making them, uploading to them, committing, branches and tags."""

import base64
import hashlib
import json
import re
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.support.loopback.routes import MODEL, REPO, REV, Routes
from tests.support.loopback.state import Pending, State, Upload
from tests.support.loopback.store import Content, Entry, Repo, is_lfs
from tests.support.loopback.wire import Answer, Refusal, Request, Violation, as_json

WRITING = Routes()


@WRITING.on("POST", "/api/repos/create")
def create_repo(hub: State, request: Request) -> Answer:
    body, account = request.json(), hub.account(request)
    namespace = body["organization"] or account.user
    repo_id = f"{namespace}/{body['name']}"
    if account.role != "write" or not account.owns(repo_id):
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    url = f"{hub.url}/{repo_id}"
    if repo_id in hub.repositories:
        raise Refusal(409, "You already created this model repo", url=url)
    private = body.get("visibility") == "private" or body.get("private", False)
    hub.repositories[repo_id] = Repo(repo_id, private=private)
    return as_json({"url": url, "name": repo_id, "id": repo_id})


# --- uploads ---


@WRITING.on("POST", f"{MODEL}/preupload/{REV}", "create_pr")
def preupload(hub: State, request: Request) -> Answer:
    repo = hub.committable(request, unquote(request.names["rev"]))
    commit = hub.commit_of(repo, request.names["rev"])
    answers = []
    for file in request.json()["files"]:
        path, size, start = file["path"], file["size"], base64.b64decode(file["sample"], validate=True)
        _check_path(path)
        if len(start) != min(size, 512):
            raise Violation(400, f"{path}: a sample of {len(start)} bytes for a file of {size}")
        answer = {"path": path, "uploadMode": "lfs" if is_lfs(path, size, start) else "regular", "shouldIgnore": False}
        if path in commit.files:
            answer["oid"] = commit.files[path].etag
        answers.append(answer)
    return as_json({"files": answers})


@WRITING.on("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(hub: State, request: Request) -> Answer:
    """Without a ref the files are for a pull request that is yet to be opened, which anyone may do."""
    body = request.json()
    if body["operation"] != "upload" or body["hash_algo"] not in ("sha256", "sha_256"):
        raise Violation(400, f"not an upload by sha256: {body['operation']}, {body['hash_algo']}")
    if "ref" in body:
        repo = hub.committable(request, body["ref"]["name"])
        hub.commit_of(repo, body["ref"]["name"])
    else:
        hub.account(request)
        repo = hub.readable(request)
    return as_json({"transfer": "basic", "objects": [_actions(hub, repo, **item) for item in body["objects"]]})


def _actions(hub: State, repo: Repo, oid: str, size: int) -> dict[str, Any]:
    if hub.stored(repo, oid, size):
        return {"oid": oid, "size": size}
    chunk = hub.part_size if size > hub.part_size else None
    key = secrets.token_hex(16)
    hub.pending[key] = Pending(repo.id, oid, size, chunk)
    upload: dict[str, Any] = {"href": f"{hub.url}/lfs/{key}"}
    if chunk:
        parts = {f"{n:05d}": f"{hub.url}/lfs/{key}/{n}" for n in range(1, -(-size // chunk) + 1)}
        upload = {"href": f"{hub.url}/api/complete_multipart?uploadId={key}"}
        upload["header"] = {"chunk_size": str(chunk), **parts}
    verify = {"href": f"{hub.url}/{repo.id}.git/info/lfs/verify"}
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}


@WRITING.on("PUT", r"/lfs/(?P<key>\w+)(?:/(?P<part>\d+))?", locked=False)
def put(hub: State, request: Request) -> Answer:
    """The storage behind the Hub: its addresses are signed, and a token in addition is an error there."""
    if "authorization" in request.headers:
        raise Violation(400, "Only one auth mechanism allowed; the token is not for the storage")
    with hub.lock:
        pending = hub.pending.get(request.names["key"])
        part = int(request.names["part"]) if "part" in request.names else None
        length = pending.length(part) if pending else None
        if pending is None or length is None:
            raise Violation(403, "no such upload address")
        upload = Upload(pending.oid, part)
        hub.uploads.append(upload)
    if request.body.length != length:
        raise Violation(400, f"{request.body.length} bytes in place of {length}")
    path = Path(hub.spool.name, secrets.token_hex(16))
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("wb") as file:
        for piece in request.body.pieces():
            file.write(piece)
            md5.update(piece)
            upload.received += len(piece)
    if part is None:
        _keep(hub, pending, path)
    else:
        with hub.lock:
            pending.parts[part] = md5.hexdigest(), path
    return Answer(200, b"", {"ETag": f'"{md5.hexdigest()}"'})


def _keep(hub: State, pending: Pending, path: Path) -> None:
    content = Content(path)
    if (content.size, content.sha256) != (pending.size, pending.oid):
        raise Violation(400, f"{content.size} bytes of sha256 {content.sha256} for {pending.oid} of {pending.size}")
    with hub.lock:
        if pending.repo in hub.repositories:
            hub.repositories[pending.repo].objects[pending.oid] = content, None


@WRITING.on("POST", "/api/complete_multipart", "uploadId", locked=False)
def complete(hub: State, request: Request) -> Answer:
    body = request.json()
    with hub.lock:
        pending = hub.pending.get(request.query.get("uploadId", ""))
    if pending is None or pending.chunk is None or pending.oid != body["oid"]:
        raise Violation(404, "no such upload in parts")
    named = [(part["partNumber"], part["etag"]) for part in body["parts"]]
    arrived = [(number, f'"{etag}"') for number, (etag, _) in sorted(pending.parts.items())]
    count = -(-pending.size // pending.chunk)
    if named != arrived or len(arrived) != count:
        raise Violation(400, f"the parts are {arrived} of {count}, not {named}")
    whole = Path(hub.spool.name, secrets.token_hex(16))
    with whole.open("wb") as file:
        for _, (_, path) in sorted(pending.parts.items()):
            file.write(path.read_bytes())
    _keep(hub, pending, whole)
    return as_json({"success": True})


@WRITING.on("POST", rf"/{REPO}\.git/info/lfs/verify")
def verify(hub: State, request: Request) -> Answer:
    hub.account(request)
    body = request.json()
    if not hub.stored(hub.readable(request), body["oid"], body["size"]):
        raise Violation(404, f"{body['oid']} of {body['size']} bytes has not been uploaded")
    return as_json({})


# --- commits ---


@WRITING.on("POST", f"{MODEL}/commit/{REV}", "create_pr")
def commit(hub: State, request: Request) -> Answer:
    revision = unquote(request.names["rev"])
    repo = hub.committable(request, revision)
    base = hub.commit_of(repo, revision)
    opens = request.flag("create_pr")
    header, *operations = (json.loads(line) for line in request.body.read().splitlines() if line.strip())
    title, description = header["value"]["summary"], header["value"].get("description", "")
    parent = header["value"].get("parentCommit")
    if parent is not None and opens:
        base = repo.resolve(parent) or base
    if parent not in (None, base.oid):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    if not title or not operations:
        raise Violation(400, "a commit without a title or without a file")
    files = dict(base.files)
    for operation in operations:
        value = operation["value"]
        _check_path(value["path"])
        files[value["path"]] = _ADD[operation["key"]](hub, repo, value)
    author = hub.account(request).user
    oid = repo.add(base.oid, title, files, description, author)
    answer: dict[str, Any] = {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo.id}/commit/{oid}"}
    if opens:
        pull = repo.open_pull_request(title, description, author, oid)
        answer["pullRequestUrl"] = f"{hub.url}/{repo.id}/discussions/{pull.num}"
    else:
        move(repo, revision, oid)
    return as_json({**answer, "hookOutput": ""})


def _add_file(hub: State, repo: Repo, value: Any) -> Entry:
    data = base64.b64decode(value["content"], validate=True)
    if is_lfs(value["path"], len(data), data[:512]):
        raise Violation(400, f"{value['path']}: must go to the large file storage")
    return Entry(Content(data), lfs=False)


def _add_lfs_file(hub: State, repo: Repo, value: Any) -> Entry:
    """Xet's storage does not say for which repository a file was uploaded."""
    stored = hub.stored(repo, value["oid"], value["size"]) or (hub.xet.find(value["oid"]) if hub.xet else None)
    if stored is None or stored[0].size != value["size"]:
        path = value["path"]
        raise Violation(422, f"LFS pointer pointed to a file that does not exist. Offending file: - {path}")
    return Entry(stored[0], lfs=True, xet=stored[1])


_ADD = {"file": _add_file, "lfsFile": _add_lfs_file}


def move(repo: Repo, revision: str, oid: str) -> None:
    """Let a branch or a pull request point to a commit."""
    if number := re.fullmatch(r"refs/pr/(\d+)", revision):
        repo.pulls[int(number[1])] = oid
    elif revision in repo.branches:
        repo.branches[revision] = oid
    else:
        raise Violation(400, f"{revision} is no branch to commit to")


def _check_path(path: str) -> None:
    parts = path.split("/")
    if any(part in ("", ".", "..", ".git") for part in parts) or "\\" in path or "\0" in path:
        raise Violation(400, f"{path!r} is no path in a repository")


# --- branches and tags ---


@WRITING.on("POST", f"{MODEL}/branch/(?P<name>[^/]+)")
def create_branch(hub: State, request: Request) -> Answer:
    repo = hub.writable(request)
    name = unquote(request.names["name"])
    if name in repo.branches:
        raise Refusal(409, f"Reference already exists: refs/heads/{name}")
    repo.branches[name] = repo.branches["main"]
    return as_json({})


@WRITING.on("POST", f"{MODEL}/tag/{REV}")
def create_tag(hub: State, request: Request) -> Answer:
    repo, tag = hub.writable(request), request.json()["tag"]
    commit = hub.commit_of(repo, request.names["rev"])
    if tag in repo.tags:
        raise Refusal(409, f"Tag reference exists already: refs/tags/{tag}")
    repo.tags[tag] = commit.oid
    return as_json({})
