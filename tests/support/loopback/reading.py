"""Routes that change nothing: what a repository is, what is in it, and its files' bytes."""

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

from tests.support.loopback.cards import card_errors, card_tags, front_matter
from tests.support.loopback.routes import MODEL, REPO, REV, Routes
from tests.support.loopback.state import State
from tests.support.loopback.store import Commit, Content, Entry, Repo, stamp
from tests.support.loopback.wire import Answer, Refusal, Request, Violation, as_json

READING = Routes()
_POINTER_FREE = "text/plain; charset=utf-8"


@READING.on("GET", "/api/whoami-v2")
def whoami(state: State, request: Request) -> Answer:
    account = state.known(request)
    role = "fineGrained" if account.role == "repo" else account.role
    return as_json(
        {
            "type": "user",
            "id": account.user,
            "name": account.user,
            "fullname": account.user,
            "orgs": [{"type": "org", "id": name, "name": name} for name in sorted(account.namespaces)],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }
    )


@READING.on("GET", "/api/agent-harnesses")
def agent_harnesses(state: State, request: Request) -> Answer:
    raise Refusal(404, "Sorry, we can't find the page you are looking for.")


@READING.on("POST", "/api/validate-yaml")
def validate_yaml(state: State, request: Request) -> Answer:
    sent = request.fields({"content": str, "repoType": str})
    errors, warnings = card_errors(sent["content"])
    found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return as_json(found, 400 if errors else 200)


@READING.on("GET", f"{MODEL}/auth-check")
def auth_check(state: State, request: Request) -> Answer:
    state.downloadable(request)
    return as_json({})


@READING.on("GET", f"{MODEL}/auth-check/write")
def auth_check_write(state: State, request: Request) -> Answer:
    state.writable(request)
    return as_json({})


@READING.on("GET", f"{MODEL}(?:/revision/{REV})?", "blobs securityStatus expand expand[]")
def model_info(state: State, request: Request) -> Answer:
    repo = state.readable(request)
    commit = state.commit_of(repo, request.names.get("rev", "main"))
    info = _info(state, repo, commit, blobs=request.flag("blobs"))
    wanted = [
        name for key in ("expand", "expand[]") for value in request.query.get(key, []) for name in value.split(",")
    ]
    if wanted:
        info = {name: info[name] for name in ("_id", "id", *wanted) if name in info}
    return as_json(info)


def _info(state: State, repo: Repo, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    readme = commit.files.get("README.md")
    card = front_matter(readme.content.read().decode(errors="replace")) if readme else {}
    tags = card_tags(card)
    info: dict[str, Any] = {
        "_id": Content(repo.id.encode()).blob[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.partition("/")[0],
        "sha": commit.oid,
        "lastModified": stamp(commit.date),
        "createdAt": stamp(repo.created),
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        "usedStorage": sum(entry.size for entry in commit.files.values()),
        "siblings": [_sibling(state, path, entry, blobs=blobs) for path, entry in commit.files.items()],
        "spaces": [],
    }
    info.update({name: card[name] for name in ("library_name", "pipeline_tag") if name in card})
    return {**info, "cardData": card} if card else info


def _sibling(state: State, path: str, entry: Entry, *, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    known = {"rfilename": path, "size": entry.size, "blobId": entry.oid}
    if not entry.lfs:
        return known
    sha256 = state.listed(path, entry)
    return {**known, "lfs": {"sha256": sha256, "size": entry.size, "pointerSize": len(entry.pointer)}}


@READING.on("GET", f"{MODEL}/refs", "include_prs")
def refs(state: State, request: Request) -> Answer:
    repo = state.readable(request)

    def shown(prefix: str, named: Mapping[Any, str]) -> list[dict[str, str]]:
        return [{"name": str(n), "ref": f"{prefix}{n}", "targetCommit": oid} for n, oid in named.items()]

    found = {"branches": shown("refs/heads/", repo.branches), "converts": [], "tags": shown("refs/tags/", repo.tags)}
    if request.flag("include_prs"):
        found["pullRequests"] = shown("refs/pr/", repo.pulls)
    return as_json(found)


@READING.on("GET", f"{MODEL}/commits/{REV}", "limit cursor p expand[]")
def commits(state: State, request: Request) -> Answer:
    repo = state.readable(request)
    history = repo.log(state.commit_of(repo, request.names["rev"]).oid)
    shown = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.description,
            "date": stamp(commit.date),
            "authors": [{"user": commit.author}],
        }
        for commit in history
    ]
    return _paged(state, request, shown, {"X-Total-Count": str(len(shown))})


@READING.on("GET", f"{MODEL}/tree/{REV}(?:/(?P<path>.+))?", "recursive expand limit cursor")
def tree(state: State, request: Request) -> Answer:
    repo = state.readable(request)
    commit = state.commit_of(repo, request.names["rev"])
    folder = unquote(request.names.get("path", "")).strip("/")
    inside = {path: entry for path, entry in commit.files.items() if not folder or path.startswith(f"{folder}/")}
    if not inside and folder:
        raise _no_entry(repo, commit, folder)
    depth = len(PurePosixPath(folder).parts) + 1
    expand, recursive = request.flag("expand"), request.flag("recursive")
    shown: dict[str, dict[str, Any]] = {}
    for path, entry in inside.items():
        parts = PurePosixPath(path).parts
        for end in range(depth, len(parts) if recursive else min(depth + 1, len(parts))):
            shown.setdefault("/".join(parts[:end]), _folder_of(repo, commit, "/".join(parts[:end]), expand=expand))
        if recursive or len(parts) == depth:
            shown[path] = _file_of(state, repo, commit, path, entry, expand=expand)
    return _paged(state, request, list(shown.values()))


@READING.on("POST", f"{MODEL}/paths-info/{REV}")
def paths_info(state: State, request: Request) -> Answer:
    repo = state.readable(request)
    commit = state.commit_of(repo, request.names["rev"])
    paths, expand = _paths_asked(request)
    shown = []
    for path in dict.fromkeys(path.strip("/") for path in paths):
        if path in commit.files:
            shown.append(_file_of(state, repo, commit, path, commit.files[path], expand=expand))
        elif any(name.startswith(f"{path}/") for name in commit.files):
            shown.append(_folder_of(repo, commit, path, expand=expand))
    return as_json(shown)


def _paths_asked(request: Request) -> tuple[list[str], bool]:
    """The Python client sends a form, the one for JavaScript sends JSON."""
    if request.headers.get("content-type", "").startswith("application/json"):
        sent = request.fields({"paths": list}, {"expand": bool})
        return sent["paths"], sent.get("expand", False)
    request.expect("application/x-www-form-urlencoded")
    form = parse_qs(request.body.read().decode(), keep_blank_values=True)
    if not {"paths"} <= form.keys() <= {"paths", "expand"} or len(form["paths"]) > 1000:
        raise Violation(400, f"not a list of at most 1000 paths: {sorted(form)}")
    return form["paths"], form.get("expand", ["false"])[-1].lower() == "true"


def _file_of(state: State, repo: Repo, commit: Commit, path: str, entry: Entry, *, expand: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.lfs:
        sha256 = state.listed(path, entry)
        found["lfs"] = {"oid": sha256, "size": entry.size, "pointerSize": len(entry.pointer)}
    if entry.xet:
        found["xetHash"] = entry.xet
    if expand:
        found["lastCommit"] = _last_commit(repo, commit, lambda files: files.get(path))
        found["securityFileStatus"] = {"status": "safe", "avScan": {"virusFound": False}, "pickleImportScan": None}
    return found


def _folder_of(repo: Repo, commit: Commit, path: str, *, expand: bool) -> dict[str, Any]:
    def inside(files: Mapping[str, Entry]) -> list[tuple[str, str]]:
        return [(name, entry.oid) for name, entry in files.items() if name.startswith(f"{path}/")]

    oid = Content(repr(inside(commit.files)).encode()).blob
    found: dict[str, Any] = {"type": "directory", "oid": oid, "size": 0, "path": path}
    if expand:
        found["lastCommit"] = _last_commit(repo, commit, inside)
    return found


def _last_commit(repo: Repo, commit: Commit, look: Any) -> dict[str, str]:
    """The commit since which what `look` sees is as it is."""
    history = repo.log(commit.oid)
    for newer, older in pairwise(history):
        if look(newer.files) != look(older.files):
            break
    else:
        newer = history[-1]
    return {"id": newer.oid, "title": newer.title, "date": stamp(newer.date)}


def _paged(state: State, request: Request, items: list[Any], headers: Mapping[str, str] | None = None) -> Answer:
    start, length = state.page(request)
    answer = as_json(items[start : start + length])
    answer.headers.update(headers or {})
    if start + length < len(items):
        query = {**request.query, "cursor": [str(start + length)]}
        answer.headers["Link"] = f'<{state.url}{request.path}?{urlencode(query, doseq=True)}>; rel="next"'
    return answer


@READING.on("GET", f"{MODEL}/xet-(?P<kind>read|write)-token/{REV}", "create_pr")
def xet_token(state: State, request: Request) -> Answer:
    """A client that wants to open a pull request has no revision yet, and says None."""
    revision = unquote(request.names["rev"])
    if request.names["kind"] == "read":
        repo = state.downloadable(request)
    else:
        repo = state.writable(request, "commit", revision)
    if not (request.flag("create_pr") and revision == "None"):
        state.commit_of(repo, revision)
    if state.xet is None:
        raise Refusal(404, "Xet is not enabled for this repository")
    token, expires = f"xet-{request.names['kind']}", 2**40
    answer = as_json({"casUrl": state.xet.url, "accessToken": token, "exp": expires})
    known = {"X-Xet-Cas-Url": state.xet.url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    answer.headers.update(known)
    return answer


@READING.on("GET HEAD", f"/{REPO}/(?P<kind>resolve|raw)/{REV}/(?P<path>.+)", "download")
def resolve(state: State, request: Request) -> Answer:
    repo = state.downloadable(request)
    commit = state.commit_of(repo, request.names["rev"])
    path = unquote(request.names["path"])
    entry = commit.files.get(path)
    if entry is None:
        raise _no_entry(repo, commit, path)
    name = PurePosixPath(path).name
    headers = {
        "X-Repo-Commit": commit.oid,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}; filename=\"{quote(name)}\";",
    }
    if request.names["kind"] == "raw" and entry.lfs:
        pointer = Content(entry.pointer)
        return _ranged(request, pointer, {**headers, "ETag": f'"{pointer.blob}"', "Content-Type": _POINTER_FREE})
    headers["ETag"] = f'"{entry.etag}"'
    headers["Content-Type"] = "application/octet-stream" if entry.lfs else _POINTER_FREE
    if entry.lfs:
        headers.update({"X-Linked-Etag": f'"{entry.etag}"', "X-Linked-Size": str(entry.size)})
    if entry.xet:
        token = f"{state.url}/api/models/{repo.id}/xet-read-token/{commit.oid}"
        headers.update({"X-Xet-Hash": entry.xet, "Link": f'<{token}>; rel="xet-auth"'})
    return _ranged(request, entry.content, headers)


def _no_entry(repo: Repo, commit: Commit, path: str) -> Refusal:
    refusal = Refusal(404, "Entry not found", "EntryNotFound")
    refusal.headers["X-Repo-Commit"] = commit.oid
    return refusal


def _ranged(request: Request, content: Content, headers: dict[str, str]) -> Answer:
    """All of a content, or the one range that is asked for."""
    asked = request.headers.get("range")
    if asked is None or request.method == "HEAD":
        return Answer(200, b"", headers, content, 0, content.size)
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked.replace(" ", ""))
    if match is None or match[0] == "bytes=-":
        raise Violation(400, f"not one range of bytes: {asked}")
    first, last = match.groups()
    start = int(first) if first else max(content.size - int(last), 0)
    end = min(int(last) + 1 if first and last else content.size, content.size)
    if start >= end:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{content.size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{content.size}"
    return Answer(206, b"", headers, content, start, end - start)
