"""What every test gets: no network, caches of its own, and none of the user's settings."""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support import messages
from tests.support.guard.sitecustomize import other_machine
from tests.support.isolation import NOWHERE, Crdiff, NetworkUsed, Ran

if TYPE_CHECKING:
    from tests.support.browser import Browser
    from tests.support.forks import Forks

pytest_plugins = ["tests.support.loopback_hub"]

# Several test processes with several threads each wait for each other, and torch then takes minutes for seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine must not fail a test.
settings.register_profile("crdiff", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("crdiff")

FOREIGN = ("CRDIFF_", "_CRDIFF_", "HF_", "HUGGING_FACE_", "TRANSFORMERS_", "DIFFUSERS_")
APPEARANCE = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "CLICOLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE")
# Rooms of the tests, those first that take longest.
LONG = (
    "test_docs.py", "search", "calibrate", "sampling", "publish", "bake", "export", "evaluate", "formats", "prune",
    "verify",
)  # fmt: skip
# They share a fork server, which takes ten seconds to start.
DRAWING = LONG[:3]
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each room to one process, so that what its tests share is made once."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class ByRoom(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            part = room(nodeid.partition("::")[0])
            return "drawing" if part in DRAWING else part

    config.option.loadscopereorder = False  # they are in order by now
    return ByRoom(config, log)


def room(file: str) -> str:
    """The folder or file below `tests` that a path leads to."""
    return file.removeprefix("tests/").partition("/")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the rooms that take longest, so that all processes end at about the same time."""
    items.sort(
        key=lambda item: LONG.index(part) if (part := room(item.nodeid.partition("::")[0])) in LONG else len(LONG)
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--golden`, which updates tests/golden/messages.txt; see tests/support/messages.py."""
    parser.addoption("--golden", choices=["add", "rewrite"], help="update the golden texts of errors")


def pytest_configure(config: pytest.Config) -> None:
    """Let texts pass that are not golden yet, while the golden file is being updated."""
    messages.updating = bool(config.getoption("golden"))
    if config.getoption("golden") == "rewrite" and "CRDIFF_TEST_OLDEST_HUB" not in os.environ:
        raise pytest.UsageError(
            "--golden=rewrite drops the texts of the oldest client: set CRDIFF_TEST_OLDEST_HUB (.ci/run)"
        )


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect the texts that a worker's tests have seen."""
    messages.seen.update(getattr(node, "workeroutput", {}).get("messages", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the texts to the process that started the workers, which writes the golden file."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["messages"] = sorted(messages.seen)
    elif messages.updating:
        messages.update(messages.seen, keep=session.config.getoption("golden") == "add")


def pytest_collection_finish() -> None:
    """Spare the garbage collector what has been imported by now, as it stays."""
    gc.freeze()


def stay_on_this_machine(event: str, args: tuple[Any, ...]) -> None:
    """Raise NetworkUsed for connections, datagrams and look-ups that leave this machine."""
    if host := other_machine(event, args):
        raise NetworkUsed(f"a test reached for {host}")


sys.addaudithook(stay_on_this_machine)


@pytest.fixture(scope="session", autouse=True)
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches below pytest's own folder, shared by all tests, and a Hub that does not answer."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(FOREIGN) or name in APPEARANCE:
                patch.delenv(name)
        for name in ("HF_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(home / name.lower()))
        patch.setenv("HF_ENDPOINT", NOWHERE)
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        patch.setenv("HF_HUB_DISABLE_UPDATE_CHECK", "1")
        patch.setenv("TERM", "xterm")
        yield


@pytest.fixture(scope="session", autouse=True)
def signals_arrive() -> None:
    """Signals end processes even where a shell runs the tests in its background, and so ignores Ctrl-C."""
    for signum in SIGNALS:
        usual = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, usual)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Browser]":
    """A headless browser; skips where Chromium is not installed."""
    from tests.support import browser

    if not browser.CHROMIUM:
        pytest.skip("Chromium is not installed")
    with browser.opened(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def crdiff(capfd: pytest.CaptureFixture[str]) -> Iterator[Crdiff]:
    """Runs a command line in this process."""
    from crdiff_export.cli import main

    def run(*args: object) -> Ran:
        capfd.readouterr()
        code: object = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code
        finally:
            with contextlib.suppress(AttributeError):  # click may have replaced it
                sys.stdout.flush()
        assert isinstance(code, int)
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield run
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch: sums in another order differ in their last bits."""
    import torch

    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture(scope="session")
def forks() -> Iterator["Forks"]:
    """Runs command lines in forks of a process that has loaded what an export needs."""
    yield from _forks()


@pytest.fixture(scope="session")
def drawing() -> Iterator["Forks"]:
    """Runs command lines that draw in forks of a process that has loaded torch and diffusers once."""
    from tests.support.forks import DRAWING

    yield from _forks(*DRAWING)


@pytest.fixture(scope="session")
def clients() -> Iterator["Forks | None"]:
    """Runs command lines in forks of one client of the Hub, where there are forks."""
    from tests.support.forks import HUB_CLIENT

    yield from _forks(*HUB_CLIENT, hub_client=True) if hasattr(os, "fork") else [None]


def _forks(*modules: str, hub_client: bool = False) -> Iterator["Forks"]:
    from tests.support.forks import Forks

    server = Forks(*modules, hub_client=hub_client)
    yield server
    server.close()


@pytest.fixture(scope="session")
def narrow_exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Base and export (96x64, ratio 0.3) of each table's narrow checkpoint, made once. No test may change them."""
    from crdiff_export import ExportRequest, Size, export
    from tests.support import makers

    @cache
    def pair(table: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("narrow")
        base = makers.write(folder / "base.safetensors", makers.tiny(table))
        request = ExportRequest(str(base), Size(96, 64), folder / "out.safetensors", ratio=0.3)
        return base, export(request).written.path

    return pair


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one base of every kind, and files that are no base. No test may change it."""
    from tests.support import makers

    folder = tmp_path_factory.mktemp("shelf")
    makers.write(folder / "sd15.safetensors", makers.tiny("sd15.original"), {"modelspec.title": "Tiny SD"})
    makers.write(folder / "dit.safetensors", makers.tiny("sd3-medium.original-transformer"))
    makers.write_shards(folder / "shards", makers.tiny("sd15.diffusers-unet"), 3)
    pipe = folder / "pipe"
    (pipe / "unet").mkdir(parents=True)
    (pipe / "vae").mkdir()
    unet = makers.tiny("demo.diffusers-unet")
    makers.write(pipe / "unet/diffusion_pytorch_model.safetensors", unet)
    makers.write(pipe / "unet/diffusion_pytorch_model.fp16.safetensors", makers.tiny("demo.diffusers-unet", "F16"))
    makers.write(pipe / "vae/diffusion_pytorch_model.safetensors", {"encoder.down.0.weight": ("F16", (2,), b"\1" * 4)})
    (pipe / "unet/config.json").write_text("{}")
    (pipe / "model_index.json").write_text("{}")
    lora = {f"lora_unet_{i}.lora_down.weight": ("F16", (2, 2), bytes(8)) for i in range(3)}
    makers.write(folder / "lora.safetensors", lora)
    vae = {f"decoder.up.{i}.weight": ("F16", (2, 2), bytes(8)) for i in range(3)}
    makers.write(folder / "vae.safetensors", vae)
    makers.write(folder / "odd.safetensors", {"odd.weight": ("F16", (2, 2), bytes(8))})
    makers.write_sparse(folder / "sparse.safetensors", "sdxl.original")
    return folder
