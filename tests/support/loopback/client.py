"""What the real client does with the loopback Hub, in a process of its own; says what came of it as JSON.

`python client.py JOBS`: the environment says where the Hub is; a job is the name of a function and its arguments.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, ModelCard

CARD = "---\nlicense: mit\nlibrary_name: diffusers\nbase_model: org/base\n---\n# A card\n"


def caught(act: Callable[[], Any]) -> list[Any]:
    """The class of the exception and the status of the answer that it comes from; ["None", None] where all is well."""
    try:
        act()
    except Exception as error:  # noqa: BLE001  which one is what is asked
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]
    return ["None", None]


def stored(entry: Any) -> str | None:
    """The sha256 that a listing gives a large file."""
    return entry.lfs.sha256 if getattr(entry, "lfs", None) else None


def metadata(card: Any) -> Any:
    return card.to_dict() if card else None


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def upload(repo: str, small: str, large: str) -> Any:
    """A repository, a small and a large file, a commit of several operations with a parent, and the same again."""
    api = HfApi()
    made = [str(api.create_repo(repo)), str(api.create_repo(repo, exist_ok=True))]
    exists = caught(lambda: api.create_repo(repo))

    def put(path: str | bytes, name: str, **more: Any) -> str:
        return str(api.upload_file(path_or_fileobj=path, path_in_repo=name, repo_id=repo, **more).oid)

    first = put(small, "small.safetensors")
    again = put(small, "small.safetensors", commit_message="No news")
    second = put(large, "sub/large.safetensors", commit_message="Two", commit_description="In parts.")

    def several(parent: str) -> CommitInfo:
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            CommitOperationAdd("README.md", CARD.encode()),
            CommitOperationAdd("config.json", b"{}"),
            CommitOperationAdd("empty.txt", b""),
            CommitOperationCopy("small.safetensors", "copy.safetensors"),
            CommitOperationDelete("sub/"),
        ]
        return api.create_commit(repo, operations, commit_message="Three", parent_commit=parent)

    stale = caught(lambda: several(first))
    third = several(second)
    bad = b"---\nlicense: [mit\n---\n"
    return {
        "made": made,
        "exists": exists,
        "commits": [first, again, second, third.oid],
        "url": third.commit_url,
        "stale": stale,
        "bad card": caught(lambda: put(bad, "README.md")),
        "missing": caught(lambda: api.delete_file("nothing.txt", repo)),
        "branch": caught(lambda: put(small, "x.bin", revision="nowhere")),
    }


def settings(repo: str) -> Any:
    """A private repository, then a gated one, then none."""
    api = HfApi()
    api.create_repo(repo, private=True)
    seen = [api.model_info(repo).private]
    api.update_repo_settings(repo, gated="manual", private=False)
    info = api.model_info(repo)
    api.delete_repo(repo)
    return [*seen, info.private, info.gated, api.repo_exists(repo)]


def folder(repo: str, path: str, **more: Any) -> Any:
    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    made = api.upload_folder(repo_id=repo, folder_path=path, **more)
    return [made.oid, made.pr_revision]


def pull_requests(repo: str) -> Any:
    """Two of them, more commits on the first, what the Hub says of them, and branches and tags."""
    api = HfApi()
    text = CommitOperationAdd
    made = [
        api.create_commit(repo, [text(f"{n}.txt", b"1")], commit_message=f"Pull {n}", create_pr=True) for n in (1, 2)
    ]
    api.create_commit(repo, [text("1.txt", b"2")], commit_message="More", revision="refs/pr/1")
    api.create_discussion(repo, "A question", description="What?")
    draft = api.create_pull_request(repo, "A draft")
    comment = api.comment_discussion(repo, 2, "Looks good").content
    queries: dict[str, Any] = {
        "all": {},
        "pulls": {"discussion_type": "pull_request", "discussion_status": "open", "author": "tester"},
        "others": {"discussion_type": "discussion"},
        "strangers": {"author": "nobody"},
    }
    listed = {
        kind: [[one.num, one.title, one.status, one.author] for one in api.get_repo_discussions(repo, **query)]
        for kind, query in queries.items()
    }
    closed = api.change_discussion_status(repo, draft.num, "closed", comment="Not this").new_status
    api.rename_discussion(repo, 2, "Pull 2, renamed")
    api.merge_pull_request(repo, 1)
    details = [api.get_discussion_details(repo, number) for number in (1, 2)]
    api.create_branch(repo, branch="side/way")
    again = caught(lambda: api.create_branch(repo, branch="side/way"))
    api.create_branch(repo, branch="side/way", exist_ok=True)
    api.create_commit(repo, [text("side.txt", b"3")], commit_message="Side", revision="side/way")
    api.create_tag(repo, tag="v1", revision="side/way", tag_message="One")
    api.create_tag(repo, tag="v1", exist_ok=True)
    api.create_tag(repo, tag="v2")
    api.delete_tag(repo, tag="v2")
    api.create_branch(repo, branch="gone", revision=made[0].oid)
    api.delete_branch(repo, branch="gone")
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    return {
        "pulls": [[one.pr_num, one.pr_revision, one.pr_url] for one in made],
        "draft": [draft.num, draft.status, draft.git_reference],
        "comment": comment,
        "listed": listed,
        "closed": closed,
        "details": [[one.title, one.status, [event.type for event in one.events]] for one in details],
        "branch again": again,
        "tag again": caught(lambda: api.create_tag(repo, tag="v1")),
        "no branch": caught(lambda: api.delete_branch(repo, branch="gone")),
        "refs": [sorted(ref.ref for ref in found) for found in (refs.branches, refs.tags, refs.pull_requests or [])],
    }


def read(repo: str, revisions: list[str], path: str) -> Any:
    """Every way to look at a repository and to get at its files."""
    api = HfApi()
    info = api.model_info(repo, files_metadata=True)
    paths = api.get_paths_info(repo, [path, "README.md", "sub", "nothing"], expand=True)
    snapshot = Path(api.snapshot_download(repo, revision=revisions[0]))
    assert info.siblings
    return {
        "downloads": [digest(api.hf_hub_download(repo, path, revision=revision)) for revision in revisions],
        "snapshot": {
            file.relative_to(snapshot).as_posix(): digest(str(file)) for file in snapshot.rglob("*") if file.is_file()
        },
        "info": [info.id, info.sha, info.private, info.gated, info.library_name, info.tags],
        "card": metadata(info.card_data),
        "siblings": {one.rfilename: [one.size, stored(one)] for one in info.siblings},
        "paths": [[one.path, stored(one)] for one in paths],
        "tree": [one.path for one in api.list_repo_tree(repo, recursive=True)],
        "top": [one.path for one in api.list_repo_tree(repo)],
        "sub": [one.path for one in api.list_repo_tree(repo, "sub")],
        "commits": [[one.title, one.message, one.authors] for one in api.list_repo_commits(repo)],
        "tensors": len(api.parse_safetensors_file_metadata(repo, path).tensors),
        "model card": metadata(ModelCard.load(repo).data),
        "exists": [api.repo_exists(repo), api.file_exists(repo, path), api.file_exists(repo, "nothing")],
    }


def errors(base: str, gated: str, private: str, tokens: dict[str, str]) -> Any:
    """What goes wrong with names that do not exist and with tokens that may not."""
    api = HfApi()
    as_ = {**{name: HfApi(token=token) for name, token in tokens.items()}, "nobody": HfApi(token=False)}

    def commit(who: str, repo: str, **more: Any) -> Any:
        add = CommitOperationAdd("file.bin", f"{who} {more}".encode())
        return caught(lambda: as_[who].create_commit(repo, [add], commit_message=who, **more))

    def check(who: str, repo: str, *, write: bool) -> Any:
        return caught(lambda: as_[who].auth_check(repo, write=write))

    people = ("write", "read", "scoped", "expired", "stranger", "nobody")
    return {
        "repo": caught(lambda: api.model_info("org/nothing")),
        "revision": caught(lambda: api.model_info(base, revision="nothing")),
        "entry": caught(lambda: api.hf_hub_download(base, "nothing")),
        "gated": caught(lambda: as_["stranger"].hf_hub_download(gated, "model.safetensors")),
        "gated, nobody": caught(lambda: as_["nobody"].hf_hub_download(gated, "model.safetensors")),
        "gated, let in": caught(lambda: api.hf_hub_download(gated, "model.safetensors")),
        "private": caught(lambda: as_["stranger"].model_info(private)),
        "private, nobody": caught(lambda: as_["nobody"].model_info(private)),
        "whoami": [as_[who].whoami()["auth"]["accessToken"]["role"] for who in ("write", "read", "scoped")],
        "whoami, expired": caught(as_["expired"].whoami),
        "expired": caught(lambda: as_["expired"].model_info(base)),
        "read": {who: check(who, private, write=False) for who in people},
        "write": {who: check(who, private, write=True) for who in people},
        "commit": {who: commit(who, base) for who in people},
        "pull": {who: commit(who, base, create_pr=True) for who in people},
        "own pull": commit("read", base, revision="refs/pr/1"),
        "create": {who: caught(lambda who=who: as_[who].create_repo(f"tester/by-{who}")) for who in people},  # type: ignore[misc]
        "create elsewhere": caught(lambda: api.create_repo("org/new")),
        "exists": caught(lambda: as_["scoped"].create_repo(private, exist_ok=True)),
    }


def once(repo: str, name: str, path: str) -> Any:
    """One upload, as it goes on a day on which things go wrong."""
    api = HfApi()
    result = caught(lambda: api.upload_file(path_or_fileobj=path, path_in_repo=name, repo_id=repo))
    return [*result, [stored(one) for one in api.get_paths_info(repo, name)]]


def copy(source: str, target: str, path: str) -> Any:
    """From one repository to another, without the bytes passing through here."""
    api = HfApi()
    api.create_repo(target)
    operation = CommitOperationCopy(path, path, src_repo_id=source, src_repo_type="model")
    return api.create_commit(target, [operation], commit_message="Copy").oid


def download(repo: str, path: str, revision: str) -> Any:
    return digest(HfApi().hf_hub_download(repo, path, revision=revision, force_download=True))


if __name__ == "__main__":
    known = {act.__name__: act for act in (upload, settings, folder, pull_requests, read, errors, once, copy, download)}
    answers = [known[name](**given) for name, given in json.loads(sys.argv[1])]
    sys.stdout.write(json.dumps({"version": huggingface_hub.__version__, "answers": answers}))
