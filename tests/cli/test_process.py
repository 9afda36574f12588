"""crdiff as a process: what it imports, ways to start it, streams that are closed or full, pipes, completion."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, makers
from tests.support.command_lines import Line
from tests.support.forks import Forks

pytestmark = pytest.mark.usefixtures("here")


def process(*args: object, env: Mapping[str, str] | None = None, **options: Any) -> "subprocess.CompletedProcess[str]":
    """A crdiff of its own."""
    command = [sys.executable, "-m", "crdiff_export", *map(str, args)]
    return subprocess.run(
        command, env={**os.environ, **(env or {})}, text=True, check=False, **{"capture_output": True, **options}
    )


def modules_after(*args: str) -> set[str]:
    """What a command imports."""
    code = (
        "import sys, json\nfrom crdiff_export.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)\nsys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(ran.stderr.splitlines()[-1])
    return {name.partition(".")[0] for name in found}


HEAVY = {"numpy", "numba", "torch", "diffusers", "transformers", "huggingface_hub", "safetensors", "httpx", "requests"}


@pytest.mark.parametrize(
    "command", ["--help", "export --help", "recipes list", "recipes show sdxl --json", "recipes validate own.toml"]
)
def test_a_light_command_imports_nothing_heavy(line: Line, here: Path, command: str) -> None:
    (here / "own.toml").write_text(line("recipes show sdxl --toml").out)
    assert not modules_after(*command.split()) & HEAVY


def test_inspect_reads_headers_without_heavy_modules(shelf: Path) -> None:
    assert not modules_after("inspect", str(shelf / "sd15.safetensors")) & HEAVY


def test_export_and_verify_on_the_cpu_need_no_torch() -> None:
    assert not modules_after("export", "demo", "--res", "64") & (HEAVY - {"numpy", "numba", "safetensors"})
    file = "demo-crdiff-64x64.safetensors"
    assert not modules_after("verify", file, "--base", "demo") & (HEAVY - {"numpy", "numba", "safetensors"})


def test_the_launcher_of_a_checkout_that_is_not_installed(here: Path, tmp_path: Path) -> None:
    """Without the package's metadata, which a checkout lacks."""
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(
        "import importlib.metadata as m\nfind = m.distribution\n"
        "def distribution(name):\n    if name == 'crdiff-export':\n        raise m.PackageNotFoundError(name)\n"
        "    return find(name)\nm.distribution = distribution\n"
    )
    for args in (["--version"], ["export", "demo", "--res", "64", "-q"]):
        ran = subprocess.run(
            [sys.executable, ROOT / "cli.py", *args],
            capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(hide)},
        )  # fmt: skip
        assert (ran.returncode, ran.stderr) == (0, "")
    assert "checkout" in makers.metadata_of(here / "demo-crdiff-64x64.safetensors")["crdiff.version"]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's way to break a pipe")
@pytest.mark.parametrize("command", ["recipes list", "inspect o.safetensors --metadata", "-h"])
def test_a_reader_that_leaves_is_no_accident(baked: Path, here: Path, command: str) -> None:
    shutil.copy(baked, here)
    read, write = os.pipe()
    os.close(read)
    ran = process(*command.split(), capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        ran = process("recipes", "list", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert ran.returncode == 1
    assert ran.stderr == (
        "crdiff: standard output: No space left on device\n  Free some space, or send the output elsewhere.\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's way to close a stream")
def test_closed_streams_are_no_accident(here: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m crdiff_export export demo --res 64 >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
    assert len(makers.read(here / "demo-crdiff-64x64.safetensors")) == 481


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are text there")
def test_a_file_name_of_any_bytes(here: Path) -> None:
    name = os.fsdecode(b"\xff \x1b[31m.safetensors")
    ran = subprocess.run(
        [sys.executable, "-m", "crdiff_export", "export", "demo", "--res", "64", "-q", "-o", name],
        capture_output=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, os.fsencode(name) + b"\n", b"")
    found = process("inspect", name, "--json", env={"PYTHONIOENCODING": "utf-8"})
    assert json.loads(found.stdout)["file"] == name
    failed = process("export", "demo", "--res", 64, "-o", name)
    assert failed.stderr.splitlines()[0] == "crdiff: \\udcff \\x1b[31m.safetensors: already exists"


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["plain", "NO_COLOR", "dumb"])
@pytest.mark.parametrize(
    "command", ["recipes list", "export demo --res 72", "export demo --res 97", "export demo --res x", "-h"]
)
def test_no_escapes_in_a_pipe(forks: Forks, here: Path, command: str, env: Mapping[str, str]) -> None:
    ran = forks.start(here, *command.split(), env=env).end()
    assert not {"\x1b", "\r"} & set(ran.out + ran.err)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["crdiff", "ex"], ["plain,export"]),
        (["crdiff", "recipes", "v"], ["plain,validate"]),
        (["crdiff", "export", "--no"], ["plain,--no-hash"]),
        (["crdiff", "export", "sdxl"], ["plain,sdxl", "plain,sdxl-refiner", "file,sdxl"]),
        (["crdiff", "export", "./my"], ["file,./my"]),
        (["crdiff", "recipes", "show", "flux"], ["plain,flux-dev", "plain,flux-schnell", "file,flux"]),
        (["crdiff", "verify", "x", "--base", "de"], ["plain,demo", "file,de"]),
        (["crdiff", "export", "demo", "--dtype", "b"], ["plain,bf16"]),
        (["crdiff", "export", "demo", "--device", "c"], ["plain,cpu", "plain,cuda"]),
        (["crdiff", "inspect", "a"], ["file,a"]),
    ],
    ids=" ".join,
)
def test_completion(forks: Forks, here: Path, words: list[str], offered: list[str]) -> None:
    """What bash would offer for the last word: `type,value`."""
    env = {"_CRDIFF_COMPLETE": "bash_complete", "COMP_WORDS": shlex.join(words), "COMP_CWORD": str(len(words) - 1)}
    ran = forks.start(here, env=env).end()
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_has_a_script(forks: Forks, here: Path, shell: str) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("click asks bash for its version")
    ran = forks.start(here, env={"_CRDIFF_COMPLETE": f"{shell}_source"}).end()
    assert ran.code == 0
    assert "_CRDIFF_COMPLETE" in ran.out
