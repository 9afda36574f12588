"""Command lines against a loopback Hub, each in a process of its own with one version of the Hub's client.

    ran = run(loopback_hub, tmp_path, here, "push", "file.safetensors", "tester/new", "--json", client="oldest")
    assert (ran.code, ran.result["changed"]) == (0, True)

`start` gives the process itself, to kill it; `finish` waits for it and says what it did. `finish`, and so `run`, make
sure that no token was shown and that no traceback was. With `hurry` the waits between tries are a hundredth of what
they are; `slept` says of how many seconds each was to be.
"""

import http
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from huggingface_hub import errors

from tests.support.isolation import NOWHERE, Ran
from tests.support.loopback_hub import ACCOUNTS, WRITE_TOKEN, LoopbackHub

# Read now: the tests' own environment has nothing of whoever runs them.
OLDEST = os.environ.get("CRDIFF_TEST_OLDEST_HUB")
TOKEN = "hf_" + "secret" * 6
Client = Literal["installed", "oldest"]
CLIENTS: tuple[Client, ...] = ("installed", "oldest")
# Lets no process reach another machine.
GUARD = Path(__file__).resolve().parent / "guard"
# Seconds that no run may take, however busy the machine.
PATIENCE = 120.0


def need(client: Client) -> None:
    """Skip the test where that version of the client is not there."""
    if client == "oldest" and OLDEST is None:
        pytest.skip("CRDIFF_TEST_OLDEST_HUB names no folder with the oldest huggingface_hub")


def environment(
    hub: LoopbackHub,
    home: Path,
    *,
    client: Client = "installed",
    token: str | None = WRITE_TOKEN,
    env: Mapping[str, str] | None = None,
    xet: bool = False,
    hurry: bool = False,
) -> dict[str, str]:
    """What leads a process to the Hub, keeps what it writes below `home`, and chooses its client."""
    need(client)
    (home / "user").mkdir(parents=True, exist_ok=True)
    first = [str(GUARD), *([OLDEST] if client == "oldest" and OLDEST else [])]
    return {
        **os.environ,
        "HOME": str(home / "user"),
        **hub.environment(home / "hub", token=token, xet=xet),
        "PYTHONWARNINGS": "default",
        "CRDIFF_TEST_SLEPT": str(home / "slept"),
        **({"CRDIFF_TEST_HURRY": "1"} if hurry else {}),
        "PYTHONPATH": os.pathsep.join(first),
        **(env or {}),
    }


def start(hub: LoopbackHub, home: Path, cwd: Path, *args: object, **how: Any) -> subprocess.Popen[str]:
    """Begin `crdiff ARGS` in the folder `cwd`; its caches are below `home`, and are shared by what has the same one."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "crdiff_export", *map(str, args)],
        cwd=cwd, env=environment(hub, home, **how),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], patience: float = PATIENCE) -> Ran:
    """Wait for a process that was begun; its code is -N if the signal N ended it."""
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return checked(Ran(process.returncode, out, err))


def checked(ran: Ran) -> Ran:
    """Assert what holds for any run: no traceback, and no token in what it prints."""
    text = ran.out + ran.err
    assert "Traceback" not in text, text
    assert not [token for token in ACCOUNTS if token in text], "a token was shown"
    return ran


def run(hub: LoopbackHub, home: Path, cwd: Path, *args: object, **how: Any) -> Ran:
    """What `crdiff ARGS` does in the folder `cwd`."""
    return finish(start(hub, home, cwd, *args, **how))


def slept(home: Path) -> list[float]:
    """The waits of all runs in a hurry that had this home, in seconds."""
    noted = home / "slept"
    return [float(line) for line in noted.read_text().splitlines()] if noted.exists() else []


def answer(kind: str, status: int, headers: dict[str, str] | None = None) -> Exception:
    """The client's exception for an answer, whichever HTTP library it is built on."""
    headers = headers or {}
    request = SimpleNamespace(headers=headers, method="GET", url=f"{NOWHERE}/x?token={TOKEN}")
    response = SimpleNamespace(status_code=status, headers=headers, request=request, text="", url=request.url)
    error_type: Any = getattr(errors, kind, errors.EntryNotFoundError)  # what the remote one was before 1.0
    text = f"{status} {http.HTTPStatus(status).phrase} for {request.url}"
    made: Exception = error_type(text, response=response)
    return made
