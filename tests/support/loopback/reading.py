"""Routes that change nothing: what a repository is, what is in it, and its files' bytes."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode

from tests.support.loopback.cards import card_errors, front_matter
from tests.support.loopback.routes import MODEL, REPO, REV, Routes
from tests.support.loopback.state import State
from tests.support.loopback.store import Content, Entry
from tests.support.loopback.wire import Answer, Refusal, Request, Violation, as_json

READING = Routes()


@READING.on("GET", "/api/whoami-v2")
def whoami(hub: State, request: Request) -> Answer:
    account = hub.account(request)
    role = "fineGrained" if account.role == "repo" else account.role
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
    return as_json({"type": "user", "name": account.user, "auth": token})


@READING.on("GET", "/api/agent-harnesses")
def agent_harnesses(hub: State, request: Request) -> Answer:
    raise Refusal(404, "Sorry, we can't find the page you are looking for.")


@READING.on("POST", "/api/validate-yaml")
def validate_yaml(hub: State, request: Request) -> Answer:
    errors, warnings = card_errors(request.json()["content"])
    lists = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return as_json(lists, 400 if errors else 200)


@READING.on("GET", f"{MODEL}/auth-check")
def auth_check(hub: State, request: Request) -> Answer:
    hub.downloadable(request)
    return as_json({})


@READING.on("GET", f"{MODEL}/auth-check/write")
def auth_check_write(hub: State, request: Request) -> Answer:
    hub.writable(request)
    return as_json({})


@READING.on("GET", f"{MODEL}(?:/revision/{REV})?")
def model_info(hub: State, request: Request) -> Answer:
    repo = hub.readable(request)
    commit = hub.commit_of(repo, request.names.get("rev", "main"))
    info: dict[str, Any] = {"id": repo.id, "sha": commit.oid, "private": repo.private, "gated": repo.gated}
    info["siblings"] = [{"rfilename": path} for path in commit.files]
    readme = commit.files.get("README.md")
    if readme and (card := front_matter(readme.content.read().decode(errors="replace"))):
        info["cardData"] = card
    return as_json(info)


@READING.on("GET", f"{MODEL}/refs")
def refs(hub: State, request: Request) -> Answer:
    repo = hub.readable(request)

    def listed(prefix: str, heads: Mapping[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in heads.items()]

    branches, tags = listed("refs/heads/", repo.branches), listed("refs/tags/", repo.tags)
    return as_json({"branches": branches, "tags": tags, "converts": []})


@READING.on("GET", f"{MODEL}/tree/{REV}", "recursive expand cursor")
def tree(hub: State, request: Request) -> Answer:
    """All files and folders: no client of ours asks for less."""
    repo = hub.readable(request)
    commit = hub.commit_of(repo, request.names["rev"])
    if not request.flag("recursive") or request.flag("expand"):
        raise Violation(400, "only all files are listed, and only briefly")
    folders = {path[:end] for path in commit.files for end, letter in enumerate(path) if letter == "/"}
    entries = {path: {"type": "directory", "oid": Content(path.encode()).blob, "path": path} for path in folders}
    entries |= {path: _file(hub, path, entry) for path, entry in commit.files.items()}
    shown = [entries[path] for path in sorted(entries)]
    start = int(request.query.get("cursor", "0"))
    end = start + hub.page_size
    answer = as_json(shown[start:end])
    if end < len(shown):
        answer.headers["Link"] = f'<{hub.url}{request.path}?{urlencode({**request.query, "cursor": end})}>; rel="next"'
    return answer


@READING.on("POST", f"{MODEL}/paths-info/{REV}")
def paths_info(hub: State, request: Request) -> Answer:
    repo = hub.readable(request)
    commit = hub.commit_of(repo, request.names["rev"])
    paths = parse_qs(request.body.read().decode())["paths"]
    return as_json([_file(hub, path, commit.files[path]) for path in paths if path in commit.files])


def _file(hub: State, path: str, entry: Entry) -> dict[str, Any]:
    shown: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.lfs:
        sha256 = hub.shown_sha256(path, entry)
        shown["lfs"] = {"oid": sha256, "size": entry.size, "pointerSize": len(entry.pointer)}
    if entry.xet:
        shown["xetHash"] = entry.xet
    return shown


@READING.on("GET", f"{MODEL}/discussions", "p type status author")
def pull_requests(hub: State, request: Request) -> Answer:
    """Newest first; a merged one counts as closed. There are no discussions of another kind."""
    repo, query = hub.readable(request), request.query
    if query.get("type") != "pull_request" or query.get("status") != "open":
        raise Violation(400, "only open pull requests are listed")
    shown = [
        {
            "num": pull.num, "title": pull.title, "author": {"name": pull.author}, "status": pull.status,
            "createdAt": "2026-01-02T03:04:05.000Z", "isPullRequest": True, "repo": {"name": repo.id, "type": "model"},
        }
        for pull in reversed(repo.pull_requests)
        if pull.status == "open" and query.get("author", pull.author) == pull.author
    ]  # fmt: skip
    start = int(query.get("p", "0")) * hub.page_size
    return as_json({"discussions": shown[start : start + hub.page_size], "count": len(shown), "start": start})


@READING.on("GET", f"{MODEL}/xet-(?P<kind>read|write)-token/{REV}", "create_pr")
def xet_token(hub: State, request: Request) -> Answer:
    """A client that wants to open a pull request has no revision yet, and says None."""
    kind, revision = request.names["kind"], unquote(request.names["rev"])
    repo = hub.downloadable(request) if kind == "read" else hub.committable(request, revision)
    if not (request.flag("create_pr") and revision == "None"):
        hub.commit_of(repo, revision)
    if hub.xet is None:
        raise Refusal(404, "Xet is not enabled for this repository")
    token, expires = f"xet-{kind}", 2**40
    headers = {"Cas-Url": hub.xet.url, "Access-Token": token, "Token-Expiration": str(expires)}
    return as_json(
        {"casUrl": hub.xet.url, "accessToken": token, "exp": expires},
        headers={f"X-Xet-{name}": text for name, text in headers.items()},
    )


@READING.on("GET HEAD", f"/{REPO}/resolve/{REV}/(?P<path>.+)", "download")
def resolve(hub: State, request: Request) -> Answer:
    repo = hub.downloadable(request)
    commit = hub.commit_of(repo, request.names["rev"])
    entry = commit.files.get(unquote(request.names["path"]))
    if entry is None:
        refusal = Refusal(404, "Entry not found", "EntryNotFound")
        refusal.answer.headers["X-Repo-Commit"] = commit.oid
        raise refusal
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes", "ETag": f'"{entry.etag}"'}
    if entry.lfs:
        headers |= {"X-Linked-Etag": f'"{entry.etag}"', "X-Linked-Size": str(entry.size)}
    if entry.xet:
        token = f"{hub.url}/api/models/{repo.id}/xet-read-token/{commit.oid}"
        headers |= {"X-Xet-Hash": entry.xet, "Link": f'<{token}>; rel="xet-auth"'}
    return _ranged(request, entry.content, headers)


def _ranged(request: Request, content: Content, headers: dict[str, str]) -> Answer:
    """Give all of a content, or the one range that the request names."""
    text = request.headers.get("range")
    if text is None or request.method == "HEAD":
        return Answer(200, b"", headers, content, 0, content.size)
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", text)
    if match is None:
        raise Violation(400, f"not one range of bytes: {text}")
    start, end = int(match[1]), min(int(match[2]) + 1 if match[2] else content.size, content.size)
    if start >= end:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{content.size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{content.size}"
    return Answer(206, b"", headers, content, start, end - start)
