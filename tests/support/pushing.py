"""A desk for tests of `crdiff push`: a loopback Hub, an empty folder, what is pushed, and what came of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from subprocess import Popen
from typing import Any

from crdiff_export.export import ExportRequest, export
from crdiff_export.sizes import Size
from tests.support import hub_runs, makers
from tests.support.isolation import Ran
from tests.support.loopback_hub import LoopbackHub
from tests.support.publishing import Clients, checked

NAME = "one.safetensors"
REPO = "tester/out"
TITLE = f"Upload {NAME} with crdiff"
PULL = "Upload one with crdiff"  # what a pull request is called


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
    return export(ExportRequest(str(base), Size.parse(size), output=output)).written.path


@dataclass
class Desk:
    """Runs commands against a Hub in an empty folder: with `clients` in their forks, but for what they cannot do."""

    hub: LoopbackHub
    tmp: Path
    clients: Clients | None = None

    @property
    def folder(self) -> Path:
        (self.tmp / "here").mkdir(exist_ok=True)
        return self.tmp / "here"

    @property
    def home(self) -> Path:
        return self.tmp / "home"

    def run(self, *args: object, client: hub_runs.Client = "installed", hurry: bool = False, **how: Any) -> Ran:
        if self.clients is None or hurry or client != "installed":
            return hub_runs.run(self.hub, self.home, self.folder, *args, client=client, hurry=hurry, **how)
        environment = hub_runs.environment(self.hub, self.home, **how)
        return checked(self.clients.start(self.folder, *args, env=environment).end())

    def push(self, path: Path | str, repo: str = REPO, *args: object, **how: Any) -> Ran:
        return self.run("push", path, repo, *args, **how)

    def start(self, path: Path | str, repo: str = REPO, *args: object, **how: Any) -> Popen[str]:
        """Begin a push."""
        return hub_runs.start(self.hub, self.home, self.folder, "push", path, repo, *args, **how)

    def export(self, base: Path | str, *args: object, **how: Any) -> Ran:
        return self.run("export", base, "--res", "96x64", *args, **how)

    def titles(self, repo: str = REPO, revision: str = "main") -> list[str]:
        """Of all commits but the Hub's own first one, the newest first."""
        return [commit.title for commit in self.hub.repo(repo).log(revision)[:-1]]

    def names(self, repo: str = REPO, revision: str = "main") -> set[str]:
        return set(self.hub.repo(repo).files(revision)) - {".gitattributes"}

    def head(self, repo: str = REPO) -> str:
        return self.hub.repo(repo).branches["main"]

    def asked(self, method: str = "") -> list[str]:
        return [f"{one.method} {one.path}" for one in self.hub.requests if one.method.startswith(method)]

    def count(self, what: str) -> int:
        """The requests that have this in them."""
        return sum(what in line for line in self.asked())

    def is_whole(self, path: Path, repo: str = REPO, revision: str = "main") -> bool:
        """Whether the Hub holds the very bytes."""
        return digest(self.hub.read(repo, path.name, revision)) == digest(path)


def refused(ran: Ran, code: int, message: str, hint: str) -> None:
    """A failure says what is wrong and what to do at its end, and has nothing on stdout."""
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert ran.err.splitlines()[-2:] == [f"crdiff: {message}", f"  {hint}"]


def changed(newer: Any, older: Any) -> set[str]:
    """The paths at which two commits differ."""
    paths: Iterable[str] = newer.files.keys() | older.files.keys()
    return {path for path in paths if newer.files.get(path) != older.files.get(path)}
