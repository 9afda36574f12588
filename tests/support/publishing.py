"""A desk for tests of `crdiff publish`: a loopback Hub, an empty folder with plans, and what came of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import hub_runs, makers
from tests.support.forks import Forks, Run
from tests.support.isolation import Ran
from tests.support.loopback_hub import ACCOUNTS, LoopbackHub

BASE = "hf://org/base/model.safetensors"
CARD = b"---\nlicense: mit\n---\n# A base\n"


def checked(ran: Ran) -> Ran:
    """What any run must be: without a traceback, and silent about tokens."""
    told = ran.out + ran.err
    assert "Traceback" not in told, told
    assert not [token for token in ACCOUNTS if token in told], "a token was shown"
    return ran


# What they load besides the Hub's client itself.
LOADED = (
    *("asyncio", "encodings.idna", "tqdm.auto", "_strptime"),
    *(f"crdiff_export.{name}" for name in ("cli.publish", "cli.push", "publish.run", "publish.report")),
)


class Clients(Forks):
    """A fork server whose runs are clients of a Hub; one at a time."""

    def __init__(self) -> None:
        super().__init__(*LOADED, script="client_server.py")


@dataclass
class Desk:
    """`folder` is the current one of what runs: in forks, or without `clients` in processes with a `client`."""

    hub: LoopbackHub
    tmp: Path
    clients: Clients | None = None
    client: hub_runs.Client = "installed"

    @property
    def folder(self) -> Path:
        (self.tmp / "desk").mkdir(exist_ok=True)
        return self.tmp / "desk"

    def base(self, repo: str = "org/base", seed: int = 0, card: bytes = CARD, **settings: Any) -> bytes:
        """Put a base into a repository, and say its bytes."""
        data = checkpoint(seed)
        self.hub.add_repo(repo, {"model.safetensors": data, "README.md": card}, **settings)
        return data

    def plan(self, text: str, name: str = "plan.toml") -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    def start(self, *args: object, hook: Mapping[str, Any] | None = None, **how: Any) -> Run:
        """Begin `crdiff publish plan.toml ARGS` in a fork."""
        if not self.clients:
            pytest.skip("there are no forks here")
        environment = hub_runs.environment(self.hub, self.tmp / "home", **how)
        return self.clients.start(self.folder, *publish(args), hook=hook, env=environment)

    def end(self, run: Run) -> Ran:
        """What a fork has done by its end."""
        return checked(run.end())

    def run(self, *args: object, **how: Any) -> Ran:
        """What `crdiff publish plan.toml ARGS` does, or with another plan that is the first of them."""
        self.hub.requests.clear()
        if self.clients:
            return self.end(self.start(*args, **how))
        return hub_runs.run(self.hub, self.tmp / "home", self.folder, *publish(args), client=self.client, **how)

    def made(self, *args: object, code: int = 0, **how: Any) -> dict[str, str]:
        """The status of every variant, by its path, of a run that ends with `code`."""
        ran = self.run(*args, "--json", **how)
        assert ran.code == code, ran.err + ran.out
        assert ran.err == ""
        return statuses(ran.result)

    def files(self) -> set[str]:
        """All that is in the folder but plans."""
        return {p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.suffix != ".toml"}

    def titles(self, repo: str, revision: str = "main") -> list[str]:
        """Of the commits that a run made, the oldest first."""
        return [commit.title for commit in self.hub.repo(repo).log(revision)][-2::-1]

    def asked(self, *methods: str) -> list[str]:
        """The paths of the requests by a method."""
        return [asked.path for asked in self.hub.requests if asked.method in methods]

    def downloads(self, name: str = "model.safetensors") -> list[str]:
        """Requests for the whole of a file."""
        whole = (asked for asked in self.hub.requests if asked.method == "GET" and "range" not in asked.headers)
        return [asked.path for asked in whole if "/resolve/" in asked.path and asked.path.endswith(name)]

    def changes(self) -> list[str]:
        """What a run asked the Hub to change."""
        reads = ("/paths-info/", "/validate-yaml")
        return [path for path in self.asked("POST", "PUT", "DELETE", "PATCH") if not any(r in path for r in reads)]


def checkpoint(seed: int = 0, dtype: str = "F16") -> bytes:
    """A narrow model's file."""
    tensors = makers.tiny("demo.original-unet", dtype, seed=seed)
    return makers.header(tensors) + b"".join(data for _, _, data in tensors.values())


def publish(args: Sequence[object]) -> list[object]:
    own = bool(args) and str(args[0]).endswith(".toml")
    return ["publish", *([] if own else ["plan.toml"]), *args]


def statuses(result: Mapping[str, Any]) -> dict[str, str]:
    return {one["path"]: one["status"] for one in result["variants"]}


def plan(*sizes: str, base: str = BASE, repo: str = "tester/out", more: str = "", each: str = "") -> str:
    """A plan with one base; `more` stands before it, `each` in it."""
    listed = ", ".join(f'"{size}"' for size in sizes)
    before = f'repo = "{repo}"\nname = "{{size}}.safetensors"\nsizes = [{listed}]\n{more}\n'
    return before + f'[[base]]\nbase = "{base}"\n{each}\n'
