"""A desk for tests of `crdiff push` and `crdiff publish`: a loopback Hub, an empty folder, and what came of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from crdiff_export.export import ExportRequest, export
from crdiff_export.sizes import Size
from tests.support import hub_runs, makers, messages
from tests.support.forks import Forks, Run
from tests.support.hub_runs import checked
from tests.support.isolation import Ran
from tests.support.loopback_hub import LoopbackHub

BASE = "hf://org/base/model.safetensors"
CARD = b"---\nlicense: mit\n---\n# A base\n"
REPO = "tester/out"
# What a push of `Made.one` is called, and its pull request.
NAME, TITLE, PULL = "one.safetensors", "Upload one.safetensors with crdiff", "Upload one with crdiff"


def digest(data: bytes | Path) -> str:
    return sha256(data if isinstance(data, bytes) else data.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Made:
    """What has been baked: two files of one name, a diffusers folder, and shards. Not to be changed by a test."""

    home: Path
    one: Path
    other: Path
    pipe: Path
    shards: Path

    @classmethod
    def below(cls, home: Path) -> "Made":
        small = makers.write(home / "small.safetensors", makers.tiny("demo.original-unet"))
        pipe = home / "base"
        for name in ("unet", "vae", "tokenizer"):
            (pipe / name).mkdir(parents=True)
        makers.write(pipe / "unet/diffusion_pytorch_model.safetensors", makers.tiny("demo.diffusers-unet"))
        makers.write(pipe / "vae/diffusion_pytorch_model.safetensors", {"a.weight": ("F16", (2,), b"\1" * 4)})
        for name, text in {
            "unet/config.json": "{}", "model_index.json": "{}", "tokenizer/merges ü.txt": "a b\r\n", "empty.json": "",
            "tokenizer/spiece.model": "\0binary", "README.md": "# The base's own", ".gitattributes": "* -text\n",
        }.items():  # fmt: skip
            (pipe / name).write_text(text, encoding="utf-8", newline="")
        makers.write_shards(home / "pieces", makers.tiny("demo.diffusers-unet"), 3)
        return cls(
            home,
            _bake(small, "96x64", home / "a" / NAME),
            _bake(small, "64x96", home / "b" / NAME),
            _bake(pipe, "96x64", home / "pipe"),
            _bake(home / "pieces", "96x64", home / "shards"),
        )


def _bake(base: Path, size: str, output: Path) -> Path:
    output.parent.mkdir(exist_ok=True)
    return export(ExportRequest(str(base), Size.parse(size), output=output, all_files=True)).written.path


def refused(ran: Ran, exit_code: int, *keys: object) -> None:
    """A failure names these keys in its last two lines, and has nothing on stdout."""
    assert ran.out == ""
    messages.refused(Ran(ran.code, "", "\n".join(ran.err.splitlines()[-2:])), exit_code, *keys)


@dataclass
class Desk:
    """`folder` is the current one of what runs: in forks, or without `clients` in processes with a `client`."""

    hub: LoopbackHub
    tmp: Path
    clients: Forks | None = None
    client: hub_runs.Client = "installed"

    @property
    def folder(self) -> Path:
        (self.tmp / "desk").mkdir(exist_ok=True)
        return self.tmp / "desk"

    @property
    def home(self) -> Path:
        return self.tmp / "home"

    def run(self, *args: object, **how: Any) -> Ran:
        """What `crdiff ARGS` does."""
        if self.clients is None:
            return hub_runs.run(self.hub, self.home, self.folder, *args, **{"client": self.client, **how})
        return checked(self.fork(*args, **how).end())

    def fork(self, *args: object, hook: Mapping[str, Any] | None = None, **how: Any) -> Run:
        """Begin `crdiff ARGS` in a fork."""
        if not self.clients:
            pytest.skip("there are no forks here")
        environment = hub_runs.environment(self.hub, self.home, **{"client": self.client, **how})
        return self.clients.start(self.folder, *args, hook=hook, env=environment)

    def push(self, path: Path | str, repo: str = REPO, *args: object, **how: Any) -> Ran:
        return self.run("push", path, repo, *args, **how)

    def start_push(self, path: Path | str, repo: str = REPO, *args: object, **how: Any) -> Popen[str]:
        return hub_runs.start(self.hub, self.home, self.folder, "push", path, repo, *args, **how)

    def export(self, base: Path | str, *args: object, **how: Any) -> Ran:
        return self.run("export", base, "--res", "96x64", *args, **how)

    def publish(self, *args: object, **how: Any) -> Ran:
        """What `crdiff publish plan.toml ARGS` does, or with another plan that is the first of them."""
        self.hub.requests.clear()
        return self.run(*publish(args), **how)

    def made(self, *args: object, code: int = 0, **how: Any) -> dict[str, str]:
        """The status of every variant, by its path, of a `publish` that ends with `code`."""
        ran = self.publish(*args, "--json", **how)
        assert ran.code == code, ran.err + ran.out
        assert ran.err == ""
        return statuses(ran.result)

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

    def files(self) -> set[str]:
        """All that is in the folder but plans."""
        return {p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.suffix != ".toml"}

    def titles(self, repo: str = REPO, revision: str = "main") -> list[str]:
        """Of all commits but the Hub's own first one, the newest first."""
        return [commit.title for commit in self.hub.repo(repo).log(revision)[:-1]]

    def names(self, repo: str = REPO, revision: str = "main") -> set[str]:
        return set(self.hub.repo(repo).files(revision)) - {".gitattributes"}

    def head(self, repo: str = REPO) -> str:
        return self.hub.repo(repo).branches["main"]

    def asked(self, *methods: str) -> list[str]:
        """The requests, or those by some methods."""
        return [f"{one.method} {one.path}" for one in self.hub.requests if not methods or one.method in methods]

    def count(self, what: str) -> int:
        """The requests that have this in them."""
        return sum(what in line for line in self.asked())

    def downloads(self, name: str = "model.safetensors") -> list[str]:
        """Requests for the whole of a file."""
        whole = (asked for asked in self.hub.requests if asked.method == "GET" and "range" not in asked.headers)
        return [asked.path for asked in whole if "/resolve/" in asked.path and asked.path.endswith(name)]

    def changes(self) -> list[str]:
        """What a run asked the Hub to change."""
        reads = ("/paths-info/", "/validate-yaml")
        return [line for line in self.asked("POST", "PUT", "DELETE", "PATCH") if not any(r in line for r in reads)]

    def is_whole(self, path: Path, repo: str = REPO, revision: str = "main") -> bool:
        """Whether the Hub holds the very bytes."""
        return digest(self.hub.read(repo, path.name, revision)) == digest(path)


def checkpoint(seed: int = 0, dtype: str = "F16") -> bytes:
    """A narrow model's file."""
    tensors = makers.tiny("demo.original-unet", dtype, seed=seed)
    return makers.header(tensors) + b"".join(data for _, _, data in tensors.values())


def publish(args: Sequence[object]) -> list[object]:
    own = bool(args) and str(args[0]).endswith(".toml")
    return ["publish", *([] if own else ["plan.toml"]), *args]


def statuses(result: Mapping[str, Any]) -> dict[str, str]:
    return {one["path"]: one["status"] for one in result["variants"]}


def plan(*sizes: str, base: str = BASE, repo: str = REPO, more: str = "", each: str = "") -> str:
    """A plan with one base; `more` stands before it, `each` in it."""
    listed = ", ".join(f'"{size}"' for size in sizes)
    before = f'repo = "{repo}"\nname = "{{size}}.safetensors"\nsizes = [{listed}]\n{more}\n'
    return before + f'[[base]]\nbase = "{base}"\n{each}\n'


def changed(newer: Any, older: Any) -> set[str]:
    """The paths at which two commits differ."""
    paths = newer.files.keys() | older.files.keys()
    return {path for path in paths if newer.files.get(path) != older.files.get(path)}
