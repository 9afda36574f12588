"""A Hugging Face Hub on loopback, strict about what clients send; fixtures `loopback_hub` and `xet_hub`.

    loopback_hub.add_repo("org/base", {"model.safetensors": path, "README.md": b"---\\nlicense: mit\\n---\\n"})
    subprocess.run([...], env={**os.environ, **loopback_hub.environment(tmp_path / "home")})
    assert [commit.title for commit in loopback_hub.repo("tester/new").log()] == ["Upload", "initial commit"]

It has the routes that crdiff uses by way of the Hub's client. What no client of the real Hub may do is refused and
noted in `violations`, and the fixture fails the test for it; a test that provokes such a thing clears the list.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support.loopback.reading import READING
from tests.support.loopback.routes import Routes
from tests.support.loopback.state import State
from tests.support.loopback.store import Account, Content, Entry, Gated, PullRequest, Repo, is_lfs
from tests.support.loopback.trusting import TRUSTING
from tests.support.loopback.wire import (
    Answer,
    Answered,
    Dropped,
    Fault,
    Hold,
    Interruption,
    Listener,
    Request,
    as_json,
)
from tests.support.loopback.writing import WRITING, move

USER = "tester"
ORG = "studio"  # an organization of theirs
WRITE_TOKEN = "hf_write" + "W" * 26
READ_TOKEN = "hf_read" + "R" * 27
REPO_TOKEN = "hf_repo" + "S" * 27  # writes to SCOPED_REPO alone
EXPIRED_TOKEN = "hf_expired" + "E" * 24
STRANGER_TOKEN = "hf_stranger" + "O" * 23  # another user's
SCOPED_REPO = f"{USER}/scoped"

ACCOUNTS = {
    WRITE_TOKEN: Account(USER, "write", frozenset({ORG})),
    READ_TOKEN: Account(USER, "read", frozenset({ORG})),
    REPO_TOKEN: Account(USER, "repo", frozenset({ORG}), frozenset({SCOPED_REPO})),
    EXPIRED_TOKEN: Account(USER, "expired"),
    STRANGER_TOKEN: Account("stranger", "write"),
}
ROUTES = Routes([*READING, *WRITING, *TRUSTING])


class LoopbackHub(State):
    """The Hub, from a test's side. Its server runs inside a `with` block."""

    def __init__(self, xet: Path | None = None) -> None:
        """With a folder for Xet's storage, clients upload there; without, the Hub is one that has no Xet."""
        super().__init__(ACCOUNTS, xet)
        self.faults: list[Fault] = []
        self.holds: list[Hold] = []
        self.requests: list[Answered] = []
        self.violations: list[str] = []
        self.host = ""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        listener = Listener(self)
        self.host = f"127.0.0.1:{listener.server_address[1]}"
        self.url = f"http://{self.host}"
        self._stack.enter_context(self.spool)
        self._stack.enter_context(listener.open())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    # --- what is there ---

    def environment(self, home: Path, *, token: str | None = WRITE_TOKEN, xet: bool = False) -> dict[str, str]:
        """What leads a client here and keeps what it writes below `home`; to be put over the environment's own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_XET_CACHE": str(home / "xet"),
            "XDG_CACHE_HOME": str(home / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            # Certificates take long to read, and nothing needs them here; hf_xet will not begin without.
            **({} if xet else {"SSL_CERT_FILE": "", "SSL_CERT_DIR": str(home)}),
        }

    def lead_here(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        """Lead the client in this process here."""
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        constants = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache)}
        for name, value in {**constants, "HF_HUB_DISABLE_XET": True}.items():
            patch.setattr(f"huggingface_hub.constants.{name}", value)

    def repo(self, repo_id: str) -> Repo:
        """A repository as it is now; later changes do not show. KeyError where there is none."""
        with self.lock:
            return copy.deepcopy(self.repositories[repo_id])

    def repos(self) -> list[str]:
        with self.lock:
            return sorted(self.repositories)

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """A file's bytes; KeyError where there is no such file."""
        return self.repo(repo_id).files(revision)[path].content.read()

    # --- what others do ---

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path] | None = None,
        *,
        private: bool = False,
        gated: Gated = False,
        access: tuple[str, ...] = (),
        sha256: Mapping[str, str] | None = None,
        xet: bool = False,
    ) -> str:
        """Make a repository with one commit of these files, and return the commit's id.

        A file that is given as a path is not read before somebody asks for it, nor for its sha256 if that is given.
        `access` are users whom a gated repository lets in. With `xet`, large files are on Xet.
        """
        with self.lock:
            repo = self.repositories[repo_id] = Repo(repo_id, private=private, gated=gated)
            repo.access.update(access)
            return self.commit(repo_id, files, "Add files", sha256=sha256, xet=xet) if files else repo.branches["main"]

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path | None],
        message: str = "A commit by somebody else",
        *,
        revision: str = "main",
        author: str = "somebody",
        sha256: Mapping[str, str] | None = None,
        xet: bool = False,
    ) -> str:
        """Commit these files on top of a branch or a pull request, or take those away that are None."""
        with self.lock:
            repo = self.repositories[repo_id]
            head = self.commit_of(repo, revision)
            changed = dict(head.files)
            for path, source in files.items():
                changed.pop(path, None)
                if source is not None:
                    changed[path] = self._entry(path, Content(source, (sha256 or {}).get(path)), xet=xet)
            oid = repo.add(head.oid, message, changed, author=author)
            move(repo, revision, oid)
            return oid

    def _entry(self, path: str, content: Content, *, xet: bool) -> Entry:
        with content.open() as file:
            lfs = is_lfs(path, content.size, file.read(512))
        return Entry(content, lfs, self.xet.put(content) if lfs and xet and self.xet else None)

    def open_pull_request(self, repo_id: str, title: str, author: str = USER) -> PullRequest:
        """Open a pull request without changes."""
        with self.lock:
            repo = self.repositories[repo_id]
            return repo.open_pull_request(title, "", author, repo.branches["main"])

    def merge(self, repo_id: str, number: int) -> None:
        """Merge a pull request into a branch that has not changed since."""
        with self.lock:
            repo = self.repositories[repo_id]
            repo.branches["main"] = repo.pulls[number]
            repo.pull_requests[number - 1].status = "merged"

    # --- what goes wrong; `match` is a pattern found in "METHOD /path?query" ---

    def fail(
        self,
        match: str,
        *,
        status: int = 503,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
    ) -> None:
        """Answer the next requests that match with an error, and do nothing of what they ask for."""
        content = {"error": "the Hub is out of order"} if body is None else body
        answer = Answer(status, content) if isinstance(content, bytes) else as_json(content, status)
        answer.headers.update(headers or {})

        def act(request: Request) -> None:
            request.body.drain()
            raise Interruption(answer)

        self._add_fault(match, times, act)

    def drop(self, match: str, *, after_bytes: int = 0) -> None:
        """Close the connection when so much of the request's body has come."""
        self._add_fault(match, 1, lambda request: request.body.stop_at(after_bytes, _drop))

    def drop_answer(self, match: str) -> None:
        """Do what the request asks for, then close the connection in place of an answer."""
        self._add_fault(match, 1, lambda request: _drop(), "end")

    def hold(self, match: str, *, after_bytes: int = 0, answer: bool = False) -> Hold:
        """Let the next request that matches wait, when so much of its body has come or when only the answer is left."""
        hold = Hold()
        self.holds.append(hold)
        if answer:
            self._add_fault(match, 1, lambda request: hold.wait(), "end")
        else:
            self._add_fault(match, 1, lambda request: request.body.stop_at(after_bytes, hold.wait))
        return hold

    def before(self, match: str, act: Callable[[], object], *, times: int = 1) -> None:
        """Call something before the next request that matches is looked at."""
        self._add_fault(match, times, lambda request: act(), "before")

    def lie_about_sha(self, path: str, sha256: str = "0" * 64) -> None:
        """Let listings give a large file another sha256 than it has."""
        self.lies[path] = sha256

    def _add_fault(self, match: str, times: int, act: Callable[[Request], object], when: str = "start") -> None:
        with self.lock:
            self.faults.append(Fault(re.compile(match), times, act, when))

    # --- the server's side ---

    def meet_faults(self, request: Request) -> None:
        """Let the faults happen that a request meets: all of "before", and the first of the others."""
        line = f"{request.method} {request.target}"
        with self.lock:
            matching = [fault for fault in self.faults if fault.times > 0 and fault.pattern.search(line)]
            due = [fault for fault in matching if fault.when == "before"]
            due += [fault for fault in matching if fault.when != "before"][:1]
            for fault in due:
                fault.times -= 1
        for fault in due:
            if fault.when == "end":
                request.at_end = fault.act
            else:
                fault.act(request)

    def handle(self, request: Request) -> Answer:
        route = ROUTES.find(request)
        if not request.path.startswith(("/lfs/", "/api/complete_multipart", "/oauth/", "/runner/")):
            request.account = self.authenticate(request)
        if not route.locked:
            return route.act(self, request)
        request.body.read()
        with self.lock:
            return route.act(self, request)


def _drop() -> None:
    raise Dropped


def served(xet: Path | None = None) -> Iterator[LoopbackHub]:
    """A Hub for one test, which fails if a client has done what none may do."""
    with LoopbackHub(xet) as hub:
        yield hub
    assert not hub.violations


@pytest.fixture
def loopback_hub() -> Iterator[LoopbackHub]:
    """A Hub without Xet."""
    yield from served()


@pytest.fixture
def xet_hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub whose large files go to Xet's storage in a folder."""
    yield from served(tmp_path / "xet-storage")
