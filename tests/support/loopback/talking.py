"""Routes of discussions and pull requests."""

from typing import Any

from tests.support.loopback.routes import MODEL, Routes
from tests.support.loopback.state import State
from tests.support.loopback.store import Discussion, Repo, stamp
from tests.support.loopback.wire import Answer, Refusal, Request, Violation, as_json
from tests.support.loopback.writing import open_discussion

TALKING = Routes()
_ONE = rf"{MODEL}/discussions/(?P<num>\d+)"


@TALKING.on("GET", f"{MODEL}/discussions", "p type status author")
def discussions(state: State, request: Request) -> Answer:
    """Newest first; a draft counts as open, what is merged as closed."""
    repo = state.readable(request)
    kind, status, author, page = (request.asks(name) for name in ("type", "status", "author", "p"))
    if kind not in (None, "all", "pull_request", "discussion") or status not in (None, "all", "open", "closed"):
        raise Violation(400, f"type={kind} status={status}")
    found = [
        _summary(repo, one)
        for one in reversed(repo.discussions)
        if (kind in (None, "all") or one.is_pull_request == (kind == "pull_request"))
        and (status in (None, "all") or (one.status in ("open", "draft")) == (status == "open"))
        and author in (None, one.author)
    ]
    start = int(page or 0) * state.page_size
    shown = found[start : start + state.page_size]
    return as_json({"discussions": shown, "count": len(found), "start": start})


@TALKING.on("POST", f"{MODEL}/discussions")
def create(state: State, request: Request) -> Answer:
    """What is opened before there are changes is a draft."""
    account = state.known(request)
    repo = state.readable(request)
    sent = request.fields({"title": str, "description": str, "pullRequest": bool})
    if not 3 <= len(sent["title"]) <= 200:
        raise Violation(400, "a title has 3 to 200 characters")
    pull = sent["pullRequest"]
    made = open_discussion(repo, sent["title"], sent["description"], account.user, repo.branches["main"], pull=pull)
    if pull:
        made.status = "draft"
        repo.pulls[made.num] = repo.branches["main"]
    return as_json({"num": made.num, "pullRequest": pull, "url": f"{state.url}/{repo.id}/discussions/{made.num}"})


@TALKING.on("GET", _ONE, "diff")
def details(state: State, request: Request) -> Answer:
    repo, one = _found(state, request)
    shown: dict[str, Any] = {**_summary(repo, one), "events": one.events, "filesWithConflicts": []}
    if one.is_pull_request:
        shown["changes"] = {"base": "refs/heads/main", "mergeCommitId": one.merged_as}
        shown["diff"] = ""
    return as_json(shown)


@TALKING.on("POST", f"{_ONE}/comment")
def comment(state: State, request: Request) -> Answer:
    account = state.known(request)
    _, one = _found(state, request)
    sent = request.fields({"comment": str})
    return as_json({"newMessage": one.say(account.user, sent["comment"])})


@TALKING.on("POST", f"{_ONE}/title")
def rename(state: State, request: Request) -> Answer:
    account, one = _owned(state, request)
    sent = request.fields({"title": str})
    event = one.note("title-change", account, {"from": one.title, "to": sent["title"]})
    one.title = sent["title"]
    return as_json({"newTitle": event})


@TALKING.on("POST", f"{_ONE}/status")
def change_status(state: State, request: Request) -> Answer:
    account, one = _owned(state, request)
    sent = request.fields({"status": str}, {"comment": str})
    if sent["status"] not in ("open", "closed"):
        raise Violation(400, f"status={sent['status']}")
    if one.status == "merged":
        raise Refusal(409, "This pull request is merged already")
    if "comment" in sent:
        one.say(account, sent["comment"])
    one.status = "open" if sent["status"] == "open" else "closed"
    return as_json({"newStatus": one.note("status-change", account, {"status": one.status})})


@TALKING.on("POST", f"{_ONE}/merge")
def merge(state: State, request: Request) -> Answer:
    """What differs between the pull request and where it began comes on top of main, as one commit."""
    repo = state.writable(request)
    _, one = _found(state, request)
    if not one.is_pull_request or one.status not in ("open", "draft"):
        raise Refusal(409, "This is no open pull request")
    base, head, main = (repo.commits[oid] for oid in (one.base, repo.pulls[one.num], repo.branches["main"]))
    kept = {path: entry for path, entry in main.files.items() if path in head.files or path not in base.files}
    changed = {path: entry for path, entry in head.files.items() if base.files.get(path) != entry}
    author = state.known(request).user
    one.merged_as = repo.add(main.oid, f"{one.title} (#{one.num})", {**kept, **changed}, one.description, author)
    repo.branches["main"] = one.merged_as
    one.status = "merged"
    one.note("status-change", author, {"status": "merged"})
    return as_json({})


def _found(state: State, request: Request) -> tuple[Repo, Discussion]:
    repo = state.readable(request)
    number = int(request.names["num"])
    if not 0 < number <= len(repo.discussions):
        raise Refusal(404, "Discussion not found")
    return repo, repo.discussions[number - 1]


def _owned(state: State, request: Request) -> tuple[str, Discussion]:
    """A discussion that whoever asks has opened, or that is in a repository of theirs."""
    account = state.known(request)
    repo, one = _found(state, request)
    if one.author != account.user and not account.may_write(repo.id):
        raise Refusal(403, "Forbidden: this discussion is not yours.")
    return account.user, one


def _summary(repo: Repo, one: Discussion) -> dict[str, Any]:
    return {
        "num": one.num,
        "title": one.title,
        "author": {"name": one.author},
        "createdAt": stamp(one.created),
        "status": one.status,
        "repo": {"name": repo.id, "type": "model"},
        "isPullRequest": one.is_pull_request,
        "pinned": False,
    }
