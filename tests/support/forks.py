"""Command lines in forks of a process that has loaded what they need (`fork_server.py`)."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.isolation import Ran

# What commands that draw load, which takes seconds. None of it starts a thread, which a fork would not have.
DRAWING = (
    "crdiff_export.calibrate",
    "crdiff_export.evaluate",
    "crdiff_export.evaluate.preview",
    "crdiff_export.search",
    "diffusers.loaders.single_file",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "optuna",
)


# What runs of a client of the Hub load besides the client itself; criteria need torch.
HUB_CLIENT = (
    *(
        "huggingface_hub.hf_api",
        "asyncio",
        "encodings.idna",
        "jinja2",
        "markdown_it",
        "tqdm.auto",
        "_strptime",
        "torch",
    ),
    *(f"crdiff_export.{name}" for name in ("cli.publish", "cli.push", "publish.run", "publish.report")),
)


@dataclass
class Run:
    """A command that is going on in a fork."""

    server: "subprocess.Popen[str]"
    pid: int
    err_file: Path

    def kill(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by now
            os.kill(self.pid, signum)

    @property
    def running(self) -> bool:
        """Whether its process is there; the server waits for it as soon as it has ended."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait(self) -> int:
        assert self.server.stdout
        return int(self.server.stdout.readline())

    def end(self) -> Ran:
        """Wait for its end, and give what it did; the code is -N if signal N ended it."""
        code = self.wait()
        return Ran(code, self.err_file.with_name("out").read_text("utf-8"), self.err_file.read_text("utf-8"))

    @property
    def err(self) -> list[str]:
        return self.err_file.read_text().splitlines()


class Forks:
    """A fork server that has loaded what an export needs, and some modules. One run at a time."""

    def __init__(self, *modules: str, hub_client: bool = False) -> None:
        """With `hub_client` every run has the environment `env` and nothing else, and a client that knows its Hub."""
        self._folder = tempfile.TemporaryDirectory() if hub_client else None
        if not hasattr(os, "fork"):
            pytest.skip("there are no forks here")
        kind = "hub-client" if hub_client else "plain"
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("fork_server.py"), kind, *modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def start(self, cwd: Path, *args: object, **options: Any) -> Run:
        """Begin a command; `hook`, `limit` (bytes of any file), `platform` and `env` are as the server says."""
        if self._folder:
            options["env"] = self._at_one_place(options["env"])
        logs = cwd.parent / f"logs-{self.process.pid}"
        logs.mkdir(exist_ok=True)
        job = {
            "args": [str(arg) for arg in args], "cwd": str(cwd),
            "stdout": str(logs / "out"), "stderr": str(logs / "err"),
            "hook": None, "limit": None, "platform": None, "env": {}, **options,
        }  # fmt: skip
        assert self.process.stdin
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return Run(self.process, int(self._line()), logs / "err")

    def _at_one_place(self, environment: dict[str, str]) -> dict[str, str]:
        """The same with a home of the Hub's client that has one name for all runs, so that it is loaded once."""
        assert self._folder
        link = Path(self._folder.name) / "home"
        link.unlink(missing_ok=True)
        Path(environment["HF_HOME"]).mkdir(parents=True, exist_ok=True)
        link.symlink_to(environment["HF_HOME"])
        return {**environment, "HF_HOME": str(link), "HF_XET_CACHE": str(link / "xet")}

    def run(self, cwd: Path, *args: object, **options: Any) -> tuple[int, list[str]]:
        started = self.start(cwd, *args, **options)
        return started.wait(), started.err

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        if self._folder:
            self._folder.cleanup()
