"""crdiff as a process: what it imports, ways to start it, streams that are closed or full, pipes, completion."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import pytest

from tests.support import ROOT, makers
from tests.support.command_lines import Line
from tests.support.forks import Forks

pytestmark = pytest.mark.usefixtures("here")


def process(*args: str, stdout: IO[str] | int) -> "subprocess.CompletedProcess[str]":
    """A crdiff of its own that writes to a file."""
    command = [sys.executable, "-m", "crdiff_export", *args]
    return subprocess.run(command, text=True, check=False, stdout=stdout, stderr=subprocess.PIPE)


HEAVY = {
    *("numpy", "numba", "torch", "diffusers", "transformers", "huggingface_hub", "safetensors", "httpx", "requests"),
    *("optuna", "matplotlib", "scipy", "sqlalchemy", "cmaes", "PIL"),
}
NEEDED_TO_PRUNE = {"numpy", "numba", "safetensors", "scipy"}
HEAVY_AFTER_EACH = f"""
import sys
from crdiff_export.cli import main
for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit as end:
        assert end.code == 0, line
    print(line, sorted({HEAVY} & sys.modules.keys()), file=sys.stderr)
"""


def heavy_modules_after(*lines: str) -> list[str]:
    """What command lines have imported, one after the other in one process: each line, and the heavy modules."""
    ran = subprocess.run([sys.executable, "-c", HEAVY_AFTER_EACH, *lines], capture_output=True, text=True, check=True)
    return [text for text in ran.stderr.splitlines() if text.endswith("]")]


def test_a_light_command_imports_nothing_heavy(line: Line, here: Path, shelf: Path) -> None:
    (here / "own.toml").write_text(line("recipes show sdxl --toml").out)
    (here / "sd15.safetensors").symlink_to(shelf / "sd15.safetensors")
    shown = ("recipes list", "recipes show sdxl --json", "recipes validate own.toml", "inspect sd15.safetensors")
    light = ["--help", "export --help", "search --help", *shown]
    assert heavy_modules_after(*light) == [f"{words} []" for words in light]


def test_export_and_verify_on_the_cpu_need_no_torch() -> None:
    lines = ["export demo --res 64", "verify demo-crdiff-64x64.safetensors --base demo"]
    for text in heavy_modules_after(*lines):
        assert "'numba'" in text
        assert not {name for name in HEAVY - NEEDED_TO_PRUNE if f"'{name}'" in text}


def test_the_launcher_of_a_checkout_that_is_not_installed(here: Path, tmp_path: Path) -> None:
    """Without the package's metadata, which a checkout lacks."""
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(
        "import importlib.metadata as m\nfind = m.distribution\n"
        "def distribution(name):\n    if name == 'crdiff-export':\n        raise m.PackageNotFoundError(name)\n"
        "    return find(name)\nm.distribution = distribution\n"
    )
    ran = subprocess.run(
        [sys.executable, ROOT / "cli.py", "export", "demo", "--res", "64", "-q"],
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
    ran = process(*command.split(), stdout=write)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        ran = process("recipes", "list", stdout=full)
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
def test_a_file_name_of_any_bytes(forks: Forks, here: Path) -> None:
    name = os.fsdecode(b"\xff \x1b[31m.safetensors")
    export = ["export", "demo", "--res", "64", "-q", "-o", name]
    ran = forks.start(here, *export)
    assert (ran.wait(), ran.err) == (0, [])
    assert ran.err_file.with_name("out").read_bytes() == os.fsencode(name) + b"\n"
    assert forks.start(here, "inspect", name, "--json").end().result["file"] == name
    failed = forks.start(here, *export).end()
    assert failed.err.splitlines()[0] == "crdiff: \\udcff \\x1b[31m.safetensors: already exists"


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
        (["crdiff", "recipes", "show", "sd35"], ["plain,sd35-large", "plain,sd35-medium", "file,sd35"]),
        (["crdiff", "verify", "x", "--base", "de"], ["plain,demo", "plain,demo-xl", "file,de"]),
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
