"""What the real client does with the loopback Hub, in a process of its own; prints the results as JSON.

`python client.py JOBS`: the environment says where the Hub is; a job is the name of a function and its arguments.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard

CARD = "---\nlicense: mit\nlibrary_name: diffusers\nbase_model: org/base\n---\n# A card\n"


def caught(act: Callable[[], Any]) -> list[Any]:
    """The class of the exception and the status of the answer that it comes from; ["None", None] without one."""
    try:
        act()
    except Exception as error:  # noqa: BLE001  the test compares it
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]
    return ["None", None]


def sha256_of(entry: Any) -> str | None:
    """The sha256 that a listing gives a large file."""
    return entry.lfs.sha256 if getattr(entry, "lfs", None) else None


def metadata(card: Any) -> Any:
    return card.to_dict() if card else None


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def upload(repo: str, small: str, large: str) -> Any:
    """A repository, a small and a large file, a commit of several files with a parent, and what goes wrong."""
    api = HfApi()
    created = [str(api.create_repo(repo, private=True)), str(api.create_repo(repo, exist_ok=True))]

    def put(path: str | bytes, name: str, **more: Any) -> str:
        return str(api.upload_file(path_or_fileobj=path, path_in_repo=name, repo_id=repo, **more).oid)

    first = put(small, "small.safetensors")
    again = put(small, "small.safetensors", commit_message="No news")
    second = put(large, "sub/large.safetensors", commit_message="Two", commit_description="In parts.")

    def several(parent: str) -> CommitInfo:
        contents = {"README.md": CARD.encode(), "config.json": b"{}", "empty.txt": b""}
        operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
        return api.create_commit(repo, operations, commit_message="Three", parent_commit=parent)

    stale = caught(lambda: several(first))
    third = several(second)
    return {
        "created": created,
        "exists": caught(lambda: api.create_repo(repo)),
        "commits": [first, again, second, third.oid],
        "url": third.commit_url,
        "stale": stale,
        "bad card": caught(lambda: put(b"---\nlicense: [mit\n---\n", "README.md")),
        "no branch": caught(lambda: put(small, "x.bin", revision="nowhere")),
    }


def folder(repo: str, path: str, **more: Any) -> Any:
    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    operations = [CommitOperationAdd(file.name, file) for file in sorted(Path(path).iterdir())]
    commit = api.create_commit(repo, operations, commit_message="A folder", **more)
    return [commit.oid, commit.pr_revision]


def propose(repo: str) -> Any:
    """Two pull requests, another commit on the first, a branch and a tag."""
    api = HfApi()

    def commit(content: bytes, title: str, **more: Any) -> Any:
        return api.create_commit(repo, [CommitOperationAdd("1.txt", content)], commit_message=title, **more)

    pulls = [commit(b"1", f"Pull {number}", create_pr=True) for number in (1, 2)]
    commit(b"2", "More", revision="refs/pr/1")
    queries: dict[str, dict[str, Any]] = {"all": {}, "own": {"author": "tester"}, "others": {"author": "stranger"}}
    listed = {
        kind: [
            [pull.num, pull.title, pull.status, pull.author]
            for pull in api.get_repo_discussions(
                repo, discussion_type="pull_request", discussion_status="open", **query
            )
        ]
        for kind, query in queries.items()
    }
    api.create_branch(repo, branch="side/way")
    again = caught(lambda: api.create_branch(repo, branch="side/way"))
    api.create_branch(repo, branch="side/way", exist_ok=True)
    commit(b"3", "Side", revision="side/way")
    api.create_tag(repo, tag="v1", revision="side/way")
    refs = api.list_repo_refs(repo)
    return {
        "pulls": [[pull.pr_num, pull.pr_revision, pull.pr_url] for pull in pulls],
        "listed": listed,
        "again": [again, caught(lambda: api.create_tag(repo, tag="v1"))],
        "refs": [sorted(ref.ref for ref in kind) for kind in (refs.branches, refs.tags)],
    }


def read(repo: str, revisions: list[str], path: str) -> Any:
    """Every way to look at a repository and to get at its files."""
    api = HfApi()
    info = api.model_info(repo)
    snapshot = Path(api.snapshot_download(repo, revision=revisions[0]))
    return {
        "downloads": [digest(api.hf_hub_download(repo, path, revision=revision)) for revision in revisions],
        "snapshot": {
            file.relative_to(snapshot).as_posix(): digest(str(file)) for file in snapshot.rglob("*") if file.is_file()
        },
        "info": [info.id, info.sha, info.private, info.gated],
        "cards": [metadata(info.card_data), metadata(ModelCard.load(repo).data)],
        "paths": [[entry.path, sha256_of(entry)] for entry in api.get_paths_info(repo, [path, "README.md", "nothing"])],
        "tree": [entry.path for entry in api.list_repo_tree(repo, recursive=True)],
        "tensors": len(api.parse_safetensors_file_metadata(repo, path).tensors),
        "exists": [api.repo_exists(repo), api.file_exists(repo, path), api.file_exists(repo, "nothing")],
    }


def rights(base: str, gated: str, private: str, tokens: dict[str, str]) -> Any:
    """What goes wrong with names that do not exist and with tokens that lack a right."""
    api = HfApi()
    as_ = {**{name: HfApi(token=token) for name, token in tokens.items()}, "anonymous": HfApi(token=False)}

    def commit(who: str, repo: str, **more: Any) -> Any:
        add = CommitOperationAdd("file.bin", f"{who} {more}".encode())
        return caught(lambda: as_[who].create_commit(repo, [add], commit_message=who, **more))

    def check(who: str, repo: str, *, write: bool) -> Any:
        return caught(lambda: as_[who].auth_check(repo, write=write))

    def create(who: str, repo: str) -> Any:
        return caught(lambda: as_[who].create_repo(repo))

    return {
        "repo": caught(lambda: api.model_info("org/nothing")),
        "revision": caught(lambda: api.model_info(base, revision="nothing")),
        "entry": caught(lambda: api.hf_hub_download(base, "nothing")),
        "gated": {
            who: caught(lambda who=who: as_[who].hf_hub_download(gated, "model.safetensors"))  # type: ignore[misc]
            for who in ("stranger", "anonymous", "write")
        },
        "whoami": [as_[who].whoami()["auth"]["accessToken"]["role"] for who in ("write", "read", "scoped")],
        "expired": caught(lambda: as_["expired"].model_info(base)),
        "read": {who: check(who, private, write=False) for who in as_},
        "write": {who: check(who, private, write=True) for who in as_},
        "commit": {who: commit(who, base) for who in as_},
        "pull": {who: commit(who, base, create_pr=True) for who in as_},
        "own pull": commit("read", base, revision="refs/pr/1"),
        "create": {who: create(who, f"tester/by-{who}") for who in as_},
        "create elsewhere": create("write", "org/new"),
    }


def once(repo: str, name: str, path: str) -> Any:
    """One upload, as it goes on a day on which things go wrong."""
    api = HfApi()
    result = caught(lambda: api.upload_file(path_or_fileobj=path, path_in_repo=name, repo_id=repo))
    return [*result, [sha256_of(entry) for entry in api.get_paths_info(repo, name)]]


def download(repo: str, path: str, revision: str) -> Any:
    return digest(HfApi().hf_hub_download(repo, path, revision=revision, force_download=True))


def hurry(seconds: Any) -> None:
    """Wait between two tries for a hundredth of the time."""
    sleep(seconds / 100)


if __name__ == "__main__":
    sleep, time.sleep = time.sleep, hurry
    acts = {act.__name__: act for act in (upload, folder, propose, read, rights, once, download)}
    answers = [acts[name](**arguments) for name, arguments in json.loads(sys.argv[1])]
    sys.stdout.write(json.dumps({"version": huggingface_hub.__version__, "answers": answers}))
