"""Routes that change repositories: making them, uploading to them, committing, refs."""

import base64
import binascii
import hashlib
import json
import re
import secrets
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from tests.support.loopback.routes import MODEL, REPO, REV, Routes
from tests.support.loopback.state import Pending, State, Upload
from tests.support.loopback.store import Commit, Content, Discussion, Entry, Repo
from tests.support.loopback.wire import (
    Answer,
    Refusal,
    Request,
    Violation,
    as_json,
    check,
)

WRITING = Routes()
_LFS = "application/vnd.git-lfs+json"
_OID = re.compile(r"[0-9a-f]{64}")


@WRITING.on("POST", "/api/repos/create")
def create_repo(state: State, request: Request) -> Answer:
    optional = {"type": str, "visibility": str, "private": bool, "resourceGroupId": str, "region": str}
    sent = request.fields({"name": str, "organization": (str, type(None))}, optional)
    account = state.known(request)
    visibility = sent.get("visibility", "public")
    if sent.get("type", "model") != "model" or visibility not in ("public", "private"):
        raise Violation(400, f"not a model that is public or private: {sent}")
    namespace = sent["organization"] or account.user
    repo_id = f"{namespace}/{sent['name']}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}", sent["name"]) or ".." in sent["name"] or "--" in sent["name"]:
        raise Refusal(400, f"Invalid repo name: {repo_id}")
    if account.role != "write" or not account.owns(repo_id):
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    url = f"{state.url}/{repo_id}"
    if repo_id in state.repos:
        raise Refusal(409, "You already created this model repo", url=url)
    private = visibility == "private" or sent.get("private", False)
    state.repos[repo_id] = Repo(repo_id, private=private)
    return as_json({"url": url, "name": repo_id, "id": repo_id})


@WRITING.on("DELETE", "/api/repos/delete")
def delete_repo(state: State, request: Request) -> Answer:
    sent = request.fields({"name": str, "organization": (str, type(None))}, {"type": str})
    account = state.known(request)
    request.names["repo"] = f"{sent['organization'] or account.user}/{sent['name']}"
    repo = state.writable(request)
    if account.role != "write":
        raise Refusal(403, "Forbidden: this token may not delete repositories.")
    del state.repos[repo.id]
    return as_json({})


@WRITING.on("PUT", f"{MODEL}/settings")
def settings(state: State, request: Request) -> Answer:
    repo = state.writable(request)
    sent = request.fields({}, {"gated": (str, bool), "visibility": str, "private": bool})
    if sent.get("gated", False) not in ("auto", "manual", False):
        raise Violation(400, f"gated: {sent['gated']}")
    repo.gated = sent.get("gated", repo.gated)
    repo.private = sent.get("private", sent["visibility"] == "private" if "visibility" in sent else repo.private)
    return as_json({"private": repo.private, "gated": repo.gated})


# --- uploads ---


@WRITING.on("POST", f"{MODEL}/preupload/{REV}", "create_pr")
def preupload(state: State, request: Request) -> Answer:
    repo = state.writable(request, "commit", unquote(request.names["rev"]))
    commit = state.commit_of(repo, request.names["rev"])
    sent = request.fields({"files": list}, {"gitIgnore": str, "gitAttributes": str})
    if not 0 < len(sent["files"]) <= 256:
        raise Violation(400, f"{len(sent['files'])} files in one call")
    ignored = [line.strip() for line in sent.get("gitIgnore", "").splitlines() if line.strip()]
    return as_json({"files": [_upload_mode(repo, commit, file, ignored) for file in sent["files"]]})


def _upload_mode(repo: Repo, commit: Commit, file: Any, ignored: list[str]) -> dict[str, Any]:
    check(file, {"path": str, "sample": str, "size": int})
    path, size = file["path"], file["size"]
    sample = _decoded(file["sample"])
    _check_path(path)
    if len(sample) != min(size, 512):
        raise Violation(400, f"{path}: a sample of {len(sample)} bytes for a file of {size}")
    mode = "lfs" if repo.is_lfs(path, size, sample, commit) else "regular"
    skip = any(fnmatch(path, pattern) or fnmatch(PurePosixPath(path).name, pattern) for pattern in ignored)
    answer = {"path": path, "uploadMode": mode, "shouldIgnore": skip}
    return {**answer, "oid": commit.files[path].etag} if path in commit.files else answer


@WRITING.on("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(state: State, request: Request) -> Answer:
    """Without a ref the files are for a pull request that is yet to be opened, which anyone may do."""
    optional = {"ref": dict, "transfers": list}
    sent = request.fields({"operation": str, "objects": list, "hash_algo": str}, optional, _LFS)
    if sent["operation"] != "upload" or sent["hash_algo"] not in ("sha256", "sha_256"):
        raise Violation(400, f"not an upload by sha256: {sent['operation']}, {sent['hash_algo']}")
    if "ref" in sent:
        name = check(sent["ref"], {"name": str})["name"]
        repo = state.writable(request, "commit", name)
        state.commit_of(repo, name)
    else:
        state.known(request)
        repo = state.readable(request)
    answer = as_json({"transfer": "basic", "objects": [_actions(state, repo, sent, item) for item in sent["objects"]]})
    answer.headers["Content-Type"] = _LFS
    return answer


def _actions(state: State, repo: Repo, sent: dict[str, Any], item: Any) -> dict[str, Any]:
    oid, size = (check(item, {"oid": str, "size": int})[name] for name in ("oid", "size"))
    if not _OID.fullmatch(oid) or size <= 0:
        raise Violation(400, f"no large file: {item}")
    known = {"oid": oid, "size": size}
    stored = state.held(repo, oid, size)
    if stored is not None:
        error = {"error": {"code": 422, "message": f"{oid} has {stored[0].size} bytes"}}
        return known if stored[0].size == size else {**known, **error}
    chunk = state.part_size if size > state.part_size else None
    if chunk and "multipart" not in sent.get("transfers", []):
        raise Violation(422, "too large for one part")
    key = secrets.token_hex(16)
    state.pending[key] = Pending(repo.id, oid, size, chunk)
    upload: dict[str, Any] = {"href": f"{state.url}/lfs/{key}"}
    if chunk:
        parts = {f"{n:05d}": f"{state.url}/lfs/{key}/{n}" for n in range(1, -(-size // chunk) + 1)}
        upload = {"href": f"{state.url}/api/complete_multipart?uploadId={key}"}
        upload["header"] = {"chunk_size": str(chunk), **parts}
    verify = {"href": f"{state.url}/{repo.id}.git/info/lfs/verify"}
    return {**known, "actions": {"upload": upload, "verify": verify}}


@WRITING.on("PUT", r"/lfs/(?P<key>\w+)(?:/(?P<part>\d+))?", locked=False)
def put(state: State, request: Request) -> Answer:
    """The storage behind the Hub: its addresses are signed, and a token in addition is an error there."""
    if "authorization" in request.headers:
        raise Violation(400, "Only one auth mechanism allowed; the token is not for the storage")
    with state.lock:
        pending = state.pending.get(request.names["key"])
        part = int(request.names["part"]) if "part" in request.names else None
        length = pending.length(part) if pending else None
        if pending is None or length is None:
            raise Violation(403, "no such upload address")
        upload = Upload(pending.oid, part, length)
        state.uploads.append(upload)
    if request.body.length != length:
        raise Violation(400, f"{request.body.length} bytes in place of {length}")
    path = state.spool()
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("wb") as file:
        for piece in request.body.pieces():
            file.write(piece)
            md5.update(piece)
            upload.received += len(piece)
    if part is None:
        _keep(state, pending, path)
    else:
        with state.lock:
            pending.parts[part] = md5.hexdigest(), path
    return Answer(200, b"", {"ETag": f'"{md5.hexdigest()}"'})


def _keep(state: State, pending: Pending, path: Path) -> None:
    content = Content(path)
    if (content.size, content.sha256) != (pending.size, pending.oid):
        raise Violation(400, f"{content.size} bytes of sha256 {content.sha256} for {pending.oid} of {pending.size}")
    with state.lock:
        if pending.repo in state.repos:
            state.repos[pending.repo].objects[pending.oid] = content, None


@WRITING.on("POST", "/api/complete_multipart", "uploadId", locked=False)
def complete(state: State, request: Request) -> Answer:
    sent = request.fields({"oid": str, "parts": list}, kind=_LFS)
    with state.lock:
        pending = state.pending.get(request.asks("uploadId") or "")
    if pending is None or pending.chunk is None or pending.oid != sent["oid"]:
        raise Violation(404, "no such upload in parts")
    named = [check(part, {"partNumber": int, "etag": str}) for part in sent["parts"]]
    wanted = [(n, f'"{etag}"') for n, (etag, _) in sorted(pending.parts.items())]
    count = -(-pending.size // pending.chunk)
    if [(part["partNumber"], part["etag"]) for part in named] != wanted or len(wanted) != count:
        raise Violation(400, f"the parts are {wanted} of {count}, not {named}")
    whole = state.spool()
    with whole.open("wb") as file:
        for _, (_, path) in sorted(pending.parts.items()):
            file.write(path.read_bytes())
    _keep(state, pending, whole)
    return as_json({"success": True})


@WRITING.on("POST", rf"/{REPO}\.git/info/lfs/verify")
def verify(state: State, request: Request) -> Answer:
    state.known(request)
    repo = state.readable(request)
    sent = request.fields({"oid": str, "size": int})
    stored = state.held(repo, sent["oid"], sent["size"])
    if stored is None or stored[0].size != sent["size"]:
        raise Violation(404, f"{sent['oid']} of {sent['size']} bytes has not been uploaded")
    return as_json({})


@WRITING.on("POST", f"{MODEL}/lfs-files/duplicate")
def duplicate(state: State, request: Request) -> Answer:
    """Large files of the path's repository become known to another one."""
    source = state.downloadable(request)
    sent = request.fields({"target": dict, "files": list})
    name = check(sent["target"], {"type": str, "name": str})["name"]
    request.names["repo"] = name
    target = state.writable(request)
    failed = []
    for file in sent["files"]:
        check(file, {"xetHash": str, "sha256": str, "filename": str})
        stored = state.stored(source, file["sha256"])
        if stored is None or stored[1] != file["xetHash"]:
            failed.append({"sha256": file["sha256"], "error": "not found"})
        else:
            target.objects[file["sha256"]] = stored
    return as_json({"success": not failed, "failed": failed})


# --- commits ---


@WRITING.on("POST", f"{MODEL}/commit/{REV}", "create_pr")
def commit(state: State, request: Request) -> Answer:
    revision = unquote(request.names["rev"])
    repo = state.writable(request, "commit", revision)
    base = state.commit_of(repo, revision)
    header, operations = _parse_commit(request)
    opens = request.flag("create_pr")
    parent = header.get("parentCommit")
    if parent is not None and opens:
        base = repo.resolve(parent) or base
    if parent is not None and not base.oid.startswith(parent):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(base.files)
    for key, value in operations:
        _APPLY[key](state, repo, base, files, value)
    author = state.known(request).user
    oid = repo.add(base.oid, header["summary"], files, header.get("description", ""), author)
    made: dict[str, Any] = {"success": True, "commitOid": oid, "commitUrl": f"{state.url}/{repo.id}/commit/{oid}"}
    if opens:
        pull = open_discussion(repo, header["summary"], header.get("description", ""), author, base.oid)
        made["pullRequestUrl"] = f"{state.url}/{repo.id}/discussions/{pull.num}"
        revision = f"refs/pr/{pull.num}"
    move(repo, revision, oid)
    return as_json({**made, "hookOutput": ""})


def _parse_commit(request: Request) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    request.expect("application/x-ndjson")
    try:
        lines = [json.loads(line) for line in request.body.read().splitlines() if line.strip()]
    except ValueError as error:
        raise Violation(400, f"not JSON: {error}") from error
    pairs = [(line["key"], line["value"]) for line in lines if check(line, {"key": str, "value": dict})]
    if len(pairs) < 2 or pairs[0][0] != "header" or not all(key in _APPLY for key, _ in pairs[1:]):
        raise Violation(400, f"not a header and then operations: {[key for key, _ in pairs]}")
    header = check(pairs[0][1], {"summary": str}, {"description": str, "parentCommit": str})
    if not header["summary"]:
        raise Violation(400, "a commit without a title")
    return header, pairs[1:]


def _add_file(state: State, repo: Repo, base: Commit, files: dict[str, Entry], value: Any) -> None:
    check(value, {"path": str, "content": str, "encoding": str})
    data = _decoded(value["content"])
    _check_path(value["path"])
    if value["encoding"] != "base64" or repo.is_lfs(value["path"], len(data), data[:512], base):
        raise Violation(400, f"{value['path']}: must go to the large file storage")
    files[value["path"]] = Entry(Content(data), lfs=False)


def _add_lfs_file(state: State, repo: Repo, base: Commit, files: dict[str, Entry], value: Any) -> None:
    """A copy of a file that the repository has comes without a size."""
    check(value, {"path": str, "algo": str, "oid": str}, {"size": int})
    _check_path(value["path"])
    stored = state.stored(repo, value["oid"], value.get("size"))
    if value["algo"] != "sha256" or stored is None:
        path = value["path"]
        raise Violation(422, f"LFS pointer pointed to a file that does not exist. Offending file: - {path}")
    content, xet = stored
    if value.get("size", content.size) != content.size:
        raise Violation(400, f"{value['path']}: has {content.size} bytes, not {value['size']}")
    files[value["path"]] = Entry(content, lfs=True, xet=xet)


def _delete_file(state: State, repo: Repo, base: Commit, files: dict[str, Entry], value: Any) -> None:
    path = check(value, {"path": str})["path"]
    if path not in base.files:
        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
    files.pop(path, None)


def _delete_folder(state: State, repo: Repo, base: Commit, files: dict[str, Entry], value: Any) -> None:
    folder = check(value, {"path": str})["path"].rstrip("/")
    inside = [path for path in base.files if path.startswith(f"{folder}/")]
    if not inside:
        raise Refusal(404, "A folder with this name doesn't exist", "EntryNotFound")
    for path in inside:
        files.pop(path, None)


_APPLY = {"file": _add_file, "lfsFile": _add_lfs_file, "deletedFile": _delete_file, "deletedFolder": _delete_folder}


def open_discussion(
    repo: Repo, title: str, description: str, author: str, base: str, *, pull: bool = True
) -> Discussion:
    """Number 1 and up, pull requests and other discussions alike."""
    discussion = Discussion(len(repo.discussions) + 1, title, description, author, pull, base)
    discussion.say(author, description)
    repo.discussions.append(discussion)
    return discussion


def move(repo: Repo, revision: str, oid: str) -> None:
    """Let a branch or a pull request point to a commit."""
    number = re.fullmatch(r"refs/pr/(\d+)", revision)
    if number:
        repo.pulls[int(number[1])] = oid
        commit = repo.commits[oid]
        repo.discussions[int(number[1]) - 1].note("commit", commit.author, {"subject": commit.title, "oid": oid})
    elif revision.removeprefix("refs/heads/") in repo.branches:
        repo.branches[revision.removeprefix("refs/heads/")] = oid
    else:
        raise Violation(400, f"{revision} is no branch to commit to")


def _check_path(path: str) -> None:
    parts = path.split("/")
    if any(part in ("", ".", "..", ".git") for part in parts) or "\\" in path or "\0" in path:
        raise Violation(400, f"{path!r} is no path in a repository")


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise Violation(400, f"not base64: {error}") from error


# --- refs ---


@WRITING.on("POST", f"{MODEL}/branch/(?P<name>[^/]+)")
def create_branch(state: State, request: Request) -> Answer:
    repo = state.writable(request)
    sent = request.fields({}, {"startingPoint": str, "emptyBranch": bool, "overwrite": bool})
    name = unquote(request.names["name"])
    start = state.commit_of(repo, sent.get("startingPoint", "main"))
    if name in repo.branches and not sent.get("overwrite"):
        raise Refusal(409, f"Reference already exists: refs/heads/{name}")
    repo.branches[name] = start.oid
    return as_json({})


@WRITING.on("DELETE", f"{MODEL}/branch/(?P<name>[^/]+)")
def delete_branch(state: State, request: Request) -> Answer:
    repo = state.writable(request)
    name = unquote(request.names["name"])
    if name == "main":
        raise Refusal(403, "Cannot delete refs/heads/main")
    if repo.branches.pop(name, None) is None:
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return as_json({})


@WRITING.on("POST", f"{MODEL}/tag/{REV}")
def create_tag(state: State, request: Request) -> Answer:
    repo = state.writable(request)
    sent = request.fields({"tag": str}, {"message": str})
    commit = state.commit_of(repo, request.names["rev"])
    if sent["tag"] in repo.tags:
        raise Refusal(409, f"Tag reference exists already: refs/tags/{sent['tag']}")
    repo.tags[sent["tag"]] = commit.oid
    return as_json({})


@WRITING.on("DELETE", f"{MODEL}/tag/(?P<name>[^/]+)")
def delete_tag(state: State, request: Request) -> Answer:
    repo = state.writable(request)
    name = unquote(request.names["name"])
    if repo.tags.pop(name, None) is None:
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return as_json({})
