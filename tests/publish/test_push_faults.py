"""Pushes on a bad day: a Hub that is busy, slow, raced for or wrong, connections that break, and processes that end."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors

from crdiff_export.errors import HubError
from crdiff_export.hub.daemon_threads import map_in_threads, run_in_daemon_thread
from crdiff_export.hub.retry import retry
from tests.support import hub_runs
from tests.support.forks import Forks
from tests.support.hub_runs import CLIENTS, Client, answer
from tests.support.loopback_hub import READ_TOKEN, WRITE_TOKEN, LoopbackHub
from tests.support.publishing import NAME, PULL, REPO, TITLE, Desk, Made, changed, digest, refused

# --- a Hub that is out of order for a while ---

# The requests that fail once each. What the client does not try again costs one of our own tries.
OUTAGES: dict[str, tuple[str, ...]] = {
    "on the way there": (
        "GET .*/auth-check/write", "POST /api/repos/create", "GET .*/revision/main", "GET .*/tree/", "/preupload/",
        "/objects/batch", "PUT /lfs/", "/info/lfs/verify", "/commit/main", "GET .*/refs",
    ),
    "card and tag": (
        "GET .*/resolve/.*/README.md", "/validate-yaml", "/paths-info/", "/tag/",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("where", "client"), [*zip(OUTAGES, CLIENTS, strict=True)])
def test_an_outage_passes(where: str, client: Client, desk: Desk, made: Made) -> None:
    if where == "card and tag":
        desk.hub.add_repo(REPO, {"README.md": b"# Mine\n"})
    for number, match in enumerate(OUTAGES[where]):
        desk.hub.fail(match, status=(503, 502, 500, 504)[number % 4])
    ran = desk.push(made.one, REPO, "--tag", "v1", client=client, hurry=True)
    assert ran.code == 0, ran.err
    assert all(fault.times == 0 for fault in desk.hub.faults)
    assert "no commit was made" not in ran.out
    assert desk.titles()[0] == TITLE
    assert len(desk.titles()) == (2 if where == "card and tag" else 1)
    assert desk.hub.repo(REPO).tags == {"v1": desk.head()}
    assert desk.is_whole(made.one)
    assert [one.received for one in desk.hub.uploads] == [made.one.stat().st_size]


def test_a_busy_hub_says_when(desk: Desk, made: Made) -> None:
    desk.hub.add_repo(REPO)
    desk.hub.fail("/commit/", status=429, headers={"Retry-After": "7"})
    assert desk.push(made.one, hurry=True).code == 0
    assert [seconds for seconds in hub_runs.slept(desk.home) if seconds >= 0.5] == [7.0]
    assert (desk.titles(), len(desk.hub.uploads)) == ([TITLE], 1)


GROWING = [1.0, 2.0, 4.0, 8.0]
WAITS: dict[str, tuple[Callable[[], BaseException], list[float]]] = {
    "503": (lambda: answer("HfHubHTTPError", 503), GROWING),
    "429": (lambda: answer("HfHubHTTPError", 429), GROWING),
    "in a while": (lambda: answer("HfHubHTTPError", 503, {"Retry-After": "7"}), [7.0] * 4),
    "at once": (lambda: answer("HfHubHTTPError", 503, {"Retry-After": "0"}), [0.0] * 4),
    "on a date": (lambda: answer("HfHubHTTPError", 429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), GROWING),
    "none are left": (
        lambda: answer("HfHubHTTPError", 429, {"RateLimit": '"api";r=0;t=9', "Retry-After": "1"}), [9.0] * 4
    ),
    "some are left": (lambda: answer("HfHubHTTPError", 429, {"RateLimit": '"api";r=3;t=9'}), GROWING),
    "in an hour": (lambda: answer("HfHubHTTPError", 429, {"Retry-After": "3600"}), []),
    "never": (lambda: answer("HfHubHTTPError", 429, {"Retry-After": "9" * 400}), GROWING),
    "raced": (lambda: answer("HfHubHTTPError", 412), [0.0] * 4),
    "a commit is being made": (lambda: answer("HfHubHTTPError", 409), [0.0] * 4),
    "400": (lambda: answer("HfHubHTTPError", 400), []),
    "broken": (lambda: ConnectionResetError("reset"), GROWING),
    "late": (lambda: TimeoutError("late"), GROWING),
    "hf_xet": (lambda: ConnectionError("Network error"), []),
    "offline": (lambda: errors.OfflineModeIsEnabled("offline"), []),
    "ours": (lambda: HubError("a", "b"), []),
}  # fmt: skip


@pytest.mark.parametrize("kind", WAITS)
@pytest.mark.parametrize("as_hub_error", [False, True])
def test_what_may_pass_is_waited_for(kind: str, *, as_hub_error: bool) -> None:
    make, waits = WAITS[kind]
    slept: list[float] = []

    def act() -> None:
        if as_hub_error:
            raise HubError("a", "b") from make()
        raise make()

    with pytest.raises((HubError, OSError)):
        retry(act, slept.append)
    assert slept == waits


def test_work_aside() -> None:
    assert run_in_daemon_thread(lambda: 5) == 5
    assert map_in_threads(lambda n: n * n, range(50), 4) == [n * n for n in range(50)]
    assert map_in_threads(str, [], 4) == []
    with pytest.raises(ZeroDivisionError):
        run_in_daemon_thread(lambda: 1 // 0)
    done: list[int] = []

    def act(n: int) -> int:
        done.append(n)
        return 1 // (n - 3)

    with pytest.raises(ZeroDivisionError):
        map_in_threads(act, range(1000), 2)
    assert len(done) < 1000
    # Nothing waits for it: a program that uses the package can be interrupted, too.
    assert run_in_daemon_thread(lambda: threading.current_thread().daemon)


LOGIN_PAGE = {"status": 200, "body": b"<html>Log in</html>"}
BAD_CARD = {"status": 400, "body": {"errors": [{"message": "no\nlicense"}], "warnings": []}}
TOO_LARGE = {"oid": "a" * 64, "size": 5, "error": {"code": 422, "message": "too large"}}
# What always fails, the answer, what is said of it, and how often it is asked for.
NEVER: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "busy": ("/commit/", {"status": 429, "headers": {"Retry-After": "1"}}, "429", 5),
    "busy for an hour": ("/commit/", {"status": 429, "headers": {"Retry-After": "3600"}}, "429", 1),
    "closed": ("auth-check", {"status": 503}, "503", 5),
    "storage": ("PUT /lfs/", {"status": 503}, "upload", 6),
    "full": ("/commit/", {"status": 402, "headers": {"X-Error-Message": "Private  storage limit reached"}},
             "402: Private storage limit reached", 1),
    "refused": ("/commit/", {"status": 403}, "403", 1),
    "logged out": ("/commit/", {"status": 401}, "401", 1),
    "a page": ("/commit/", LOGIN_PAGE, "somebody else", 1),
    "a page at once": ("/revision/", LOGIN_PAGE, "somebody else", 1),
    "a card": ("/validate-yaml", BAD_CARD, "card: no license", 1),
    "a file": ("/objects/batch", {"status": 200, "body": {"objects": [TOO_LARGE]}}, "too large", 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", NEVER)
def test_what_does_not_pass_is_said(kind: str, desk: Desk, made: Made) -> None:
    match, answer, key, times = NEVER[kind]
    desk.hub.add_repo(REPO)
    desk.hub.fail(match, times=99, **answer)
    client: Client = "oldest" if kind in ("a card", "a file", "busy") else "installed"
    ran = desk.push(made.one, hurry=times > 1, client=client)
    refused(ran, 4, REPO, key)
    assert sum(99 - fault.times for fault in desk.hub.faults) == times
    assert (desk.titles(), len(desk.hub.uploads)) == ([], int(match == "/commit/"))


def test_an_error_is_one_object(desk: Desk, made: Made) -> None:
    desk.hub.add_repo(REPO)
    desk.hub.fail("/commit/", times=99, status=500)
    ran = desk.push(made.one, REPO, "--json", hurry=True)
    assert (ran.code, ran.out) == (4, "")
    assert (ran.error["code"], ran.error["message"]) == ("hub", f"{REPO}: the Hub answered 500")
    ran = desk.push(made.one, REPO, "--json", env={"HF_HUB_OFFLINE": "1"})
    assert (ran.code, ran.out, ran.error["hint"]) == (4, "", "Unset HF_HUB_OFFLINE.")


def test_a_bare_result_has_nothing_of_the_clients_troubles(desk: Desk, made: Made) -> None:
    """It logs every request that it sends again, to signed addresses as well, unless it is told before it is loaded."""
    desk.hub.add_repo(REPO)
    for match in ("/preupload/", "PUT /lfs/"):
        desk.hub.fail(match)
    ran = replace(desk, clients=None).push(made.one, REPO, "--json", hurry=True)
    assert (ran.code, ran.err, ran.result["changed"]) == (0, "", True)


def test_what_the_hub_says_of_a_card_is_a_note(desk: Desk, made: Made) -> None:
    desk.hub.add_repo(REPO)
    warnings = [{"message": "no licence,\nplease"}, {"message": "no tags"}]
    desk.hub.fail("/validate-yaml", status=200, body={"errors": [], "warnings": warnings})
    ran = desk.push(made.one)
    assert ran.code == 0
    assert ran.err.splitlines()[-1] == "note: README.md: no licence, please; no tags"
    assert "Warning" not in ran.err


# --- connections that break ---


@pytest.mark.parametrize(("parts", "client"), [(False, "installed"), (True, "oldest")], ids=["whole", "in parts"])
def test_a_connection_breaks_in_the_middle(client: Client, parts: bool, desk: Desk, made: Made) -> None:
    size = made.one.stat().st_size
    if parts:
        desk.hub.part_size = size // 2 + 1
    desk.hub.add_repo(REPO)
    desk.hub.drop("PUT /lfs/.*2$" if parts else "PUT /lfs/", after_bytes=1000)
    ran = desk.push(made.one, hurry=True, client=client)
    assert ran.code == 0, ran.err
    assert desk.is_whole(made.one)
    assert sum(one.received for one in desk.hub.uploads) in range(size, size + 300_000)
    assert len(desk.hub.uploads) == (3 if parts else 2)


@pytest.mark.parametrize(
    ("given", "client"), [(["--create-pr"], "installed"), ([], "oldest")], ids=["pull request", "main"]
)
def test_an_answer_is_lost(client: Client, given: list[str], desk: Desk, made: Made) -> None:
    """The commit is there: nothing is done again, and it is ours."""
    desk.hub.add_repo(REPO)
    desk.hub.drop("auth-check")
    desk.hub.drop_answer("/commit/")
    ran = desk.push(made.one, REPO, *given, "--json", hurry=True, client=client)
    assert ran.code == 0
    assert ran.result["changed"] is True
    revision = "refs/pr/1" if given else "main"
    assert ran.result["revision"] == revision
    assert desk.titles(REPO, revision) == [PULL if given else TITLE]
    assert len(desk.hub.repo(REPO).pull_requests) == len(given)
    assert bool(ran.result["pull_request"]) == bool(given)
    assert (desk.count("/commit/"), len(desk.hub.uploads)) == (1, 1)


def test_nobody_answers(desk: Desk, made: Made) -> None:
    ran = desk.push(made.one, hurry=True, env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    refused(ran, 4, REPO, "connection")


@pytest.mark.parametrize("client", CLIENTS)
def test_a_hub_without_xet_is_explained(client: Client, desk: Desk, made: Made) -> None:
    desk.hub.add_repo(REPO)
    ran = desk.push(made.one, xet=True, client=client)
    refused(ran, 4, REPO, "HF_HUB_DISABLE_XET=1")
    assert desk.titles() == []
    assert desk.count("xet-write-token") == 1


# --- others who commit at the same time ---


def test_somebody_commits_in_between(desk: Desk, made: Made) -> None:
    desk.hub.add_repo(REPO, {"README.md": b"# Mine\n", "x.txt": b"x"})
    theirs = {"README.md": b"---\nlicense: mit\n---\n# Mine, and more\n", "x.txt": None, "y.txt": b"y"}
    desk.hub.before("/commit/", lambda: desk.hub.commit(REPO, theirs))
    ran = desk.push(made.one, REPO, "--json", client="oldest")
    assert (ran.code, ran.result["changed"]) == (0, True)
    assert desk.titles() == [TITLE, "A commit by somebody else", "Add files"]
    assert desk.names() == {"README.md", "y.txt", NAME}
    card = desk.hub.read(REPO, "README.md")
    assert card.startswith(b"---\nlicense: mit\n")
    assert b"# Mine, and more\n" in card
    assert b"| [one" in card
    assert (len(desk.hub.uploads), desk.count("/objects/batch")) == (1, 1)
    newest, second, *_ = desk.hub.repo(REPO).log()
    assert changed(newest, second) == {NAME, "README.md"}


def test_somebody_takes_it_away_again(desk: Desk, made: Made) -> None:
    """After the commit, and before it was looked at."""
    desk.hub.add_repo(REPO)
    desk.hub.before("/paths-info/", lambda: desk.hub.commit(REPO, {NAME: None}))
    desk.hub.fail("/paths-info/")
    ran = desk.push(made.one, REPO, "--json", hurry=True)
    assert (ran.code, ran.result["changed"]) == (0, True)
    assert desk.titles() == [TITLE, "A commit by somebody else", TITLE]
    assert desk.is_whole(made.one)


def test_somebody_pushes_the_same_first(desk: Desk, made: Made) -> None:
    desk.hub.add_repo(REPO)
    desk.hub.before("/commit/", lambda: desk.hub.commit(REPO, {NAME: made.one}))
    ran = desk.push(made.one, REPO, "--json")
    assert (ran.code, ran.result["changed"], ran.result["commit"]) == (0, False, desk.head())
    assert desk.titles() == ["A commit by somebody else"]


def test_the_hub_holds_something_else(desk: Desk, made: Made) -> None:
    """Whether it says so after the commit or in the beginning."""
    desk.hub.lie_about_sha(NAME)
    for _ in range(2):
        ran = desk.push(made.one)
        refused(ran, 3, f"{REPO}/{NAME}", digest(made.one), "0" * 64, desk.head()[:10])
    assert desk.titles() == [TITLE]


def test_three_at_a_time(desk: Desk, made: Made) -> None:
    """Into a repository that none of them finds: all are there, and all are in the card."""
    names = [f"{number}.safetensors" for number in range(3)]
    started = [desk.start_push(made.one, REPO, "--path-in-repo", name, "--json") for name in names]
    rans = [hub_runs.finish(process) for process in started]
    assert [(ran.code, ran.err) for ran in rans] == [(0, "")] * 3
    assert [ran.result["changed"] for ran in rans] == [True] * 3
    assert desk.names() == {*names, "README.md"}
    assert sorted(desk.titles()) == [f"Upload {name} with crdiff" for name in names]
    assert desk.hub.read(REPO, "README.md").count(b"| [") == 3


def test_a_file_changes_on_the_way(desk: Desk, made: Made, tmp_path: Path) -> None:
    desk.hub.add_repo(REPO)
    path = tmp_path / NAME
    shutil.copy(made.one, path)
    desk.hub.before("/preupload/", lambda: shutil.copy(made.other, path))
    ran = desk.push(path)
    assert (ran.code, ran.out) == (3, "")
    assert f"{REPO}/{NAME}: sent {digest(made.one)}, the Hub holds {digest(made.other)} at" in ran.err


# --- processes that end ---

Held = Callable[[LoopbackHub], Any]
HOLDS: dict[str, Held] = {
    "in the middle": lambda hub: hub.hold("PUT /lfs/", after_bytes=50_000),
    "in a later part": lambda hub: hub.hold("PUT /lfs/.*2$", after_bytes=50_000),
    "before the commit": lambda hub: hub.hold("/commit/"),
    "after the commit": lambda hub: hub.hold("/commit/", answer=True),
    "over Xet": lambda hub: hub.hold("xet-write-token"),
}


def held(desk: Desk, path: Path, hold: Any, *args: object, **how: Any) -> subprocess.Popen[str]:
    """A push that waits for the Hub at a certain place."""
    process = desk.start_push(path, REPO, *args, **how)
    if not hold.reached.wait(30):
        process.kill()
        raise AssertionError(process.communicate())
    return process


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
@pytest.mark.parametrize(
    ("where", "given", "client"),
    [
        ("in the middle", [], "installed"),
        ("in a later part", [], "oldest"),
        ("before the commit", ["--create-pr"], "oldest"),
        ("after the commit", [], "installed"),
        ("after the commit", ["--create-pr"], "installed"),
        ("over Xet", [], "installed"),
    ],
)
def test_a_second_run_does_what_a_kill_left(
    where: str, given: list[str], client: Client, made: Made, tmp_path: Path, clients: Forks | None
) -> None:
    with LoopbackHub(tmp_path / "xet" if where == "over Xet" else None) as hub:
        desk = Desk(hub, tmp_path, clients)
        hub.add_repo(REPO, {"README.md": b"# Mine\n"})
        if where == "in a later part":
            hub.part_size = made.one.stat().st_size // 2 + 1
        token = READ_TOKEN if given else WRITE_TOKEN
        how: Mapping[str, Any] = {"client": client, "token": token, "xet": where == "over Xet"}
        hold = HOLDS[where](hub)
        process = held(desk, made.one, hold, *given, **how)
        process.kill()
        process.communicate()
        (hold.release if where == "after the commit" else hold.drop)()
        ran = desk.push(made.one, REPO, *given, "--json", **how)
        assert ran.code == 0
        revision = "refs/pr/1" if given else "main"
        assert (ran.result["revision"], ran.result["changed"]) == (revision, where != "after the commit")
        assert desk.titles(REPO, revision) == [PULL if given else TITLE, "Add files"]
        assert desk.is_whole(made.one, REPO, revision)
        assert b"| [one" in hub.read(REPO, "README.md", revision)
        assert len(hub.repo(REPO).pull_requests) == len(given)
        if where != "in the middle":
            assert len(hub.uploads) <= 4
        assert not hub.violations


SIGNALS: dict[str, tuple[str, Client, int]] = {
    "SIGTERM in the middle": ("in the middle", "installed", signal.SIGTERM),
    "SIGINT in a folder": ("folder", "installed", signal.SIGINT),
    "SIGTERM over Xet": ("over Xet", "oldest", signal.SIGTERM),
    "SIGINT at the commit": ("after the commit", "oldest", signal.SIGINT),
}


@pytest.mark.skipif(os.name == "nt", reason="no signals")
@pytest.mark.parametrize("case", SIGNALS)
def test_a_signal_ends_it_at_once(case: str, made: Made, tmp_path: Path) -> None:
    """Even while the Hub does not answer, and while the client's own threads are at work."""
    where, client, signum = SIGNALS[case]
    with LoopbackHub(tmp_path / "xet" if where == "over Xet" else None) as hub:
        desk = Desk(hub, tmp_path)
        hub.add_repo(REPO)
        hold = HOLDS.get(where, HOLDS["in the middle"])(hub)
        process = held(desk, made.pipe if where == "folder" else made.one, hold, client=client, xet=where == "over Xet")
        process.send_signal(signum)
        ran = hub_runs.finish(process, patience=10)
        word = "interrupted" if signum == signal.SIGINT else "terminated"
        assert (ran.code, ran.out) == (128 + signum, "")
        assert ran.err.splitlines()[1:] == [f"crdiff: {word}; nothing half-done was left behind"]
        assert not hub.violations


def test_a_signal_as_json(desk: Desk, made: Made) -> None:
    desk.hub.add_repo(REPO)
    process = held(desk, made.one, desk.hub.hold("/commit/"), "--json")
    process.send_signal(signal.SIGTERM)
    ran = hub_runs.finish(process, patience=10)
    assert (ran.code, ran.error["code"]) == (143, "terminated")
