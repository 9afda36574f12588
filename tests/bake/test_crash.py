"""Whatever ends an export, and whenever: the target is as it was or complete, and the base is never touched."""

import errno
import filecmp
import hashlib
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crdiff_export import CrdiffError, ExportRequest, Size, export
from crdiff_export.bake.staging import clean
from crdiff_export.cli import signals
from crdiff_export.cli.signals import PATIENCE, Stopped, Stopper
from crdiff_export.progress import Progress, Silent
from tests.support import makers
from tests.support.forks import Forks

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")

# How often each of three signals comes at random, for a file and for a folder.
RANDOM_KILLS = [3, pytest.param(30, marks=pytest.mark.slow)]
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
EXIT_CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
WORDS = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}


@pytest.fixture(scope="module")
def other_forks() -> Iterator[Forks]:
    with closing(Forks()) as server:
        yield server


def large(table: str, fraction: int) -> dict[str, tuple[str, makers.Shape, bytes]]:
    """A checkpoint of some 20 MB, quickly."""
    rng = np.random.default_rng(0)

    def content(dtype: str, shape: makers.Shape) -> bytes:
        raw = rng.bytes(math.prod(shape) * makers.SIZES[dtype])
        return (np.frombuffer(raw, "<u2") & 0xBBFF).tobytes() if dtype == "F16" else bytes(len(raw))

    return {
        name: (dtype, shape, content(dtype, shape)) for name, (dtype, shape) in makers.narrow(table, fraction).items()
    }


@dataclass(frozen=True)
class Case:
    """A base, what a whole export makes of it, and something older that the export may replace."""

    base: Path
    whole: Path
    old: Path
    seconds: float

    @property
    def name(self) -> str:
        return self.whole.name


def state(path: Path) -> object:
    """All that must not change about a base."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [(str(f), f.stat().st_mtime_ns, f.stat().st_ino, hashlib.sha256(f.read_bytes()).digest()) for f in files]


def case(folder: Path, base: Path, forks: Forks, name: str) -> Iterator[Case]:
    """Make a case, and check at the end that its base is as it was."""
    before = state(base)
    whole, old = folder / "whole" / name, folder / "old" / name
    for target, ratio in ((old, 0.1), (whole, 0.3)):
        target.parent.mkdir()
        began = time.monotonic()
        assert forks.run(folder, "export", base, "--res", 512, "--ratio", ratio, "-o", target)[0] == 0
    yield Case(base, whole, old, time.monotonic() - began)
    assert state(base) == before
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("file")
    base = makers.write(folder / "base.safetensors", large("sd15.original", 10))
    yield from case(folder, base, forks, "o.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[Case]:
    home = tmp_path_factory.mktemp("folder")
    makers.write_shards(home / "base/unet", large("sd15.diffusers-unet", 18), 3)
    (home / "base/vae").mkdir()
    (home / "base/vae/config.json").write_text("{}")
    (home / "base/model_index.json").write_text("{}")
    yield from case(home, home / "base", forks, "o")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, forks: Forks, shelf: Path) -> Iterator[Case]:
    """A folder, for moments that do not have to be met by chance."""
    yield from case(tmp_path_factory.mktemp("small"), shelf / "pipe", forks, "o")


@pytest.fixture(params=["file", "folder"])
def either(request: pytest.FixtureRequest) -> Case:
    case: Case = request.getfixturevalue(request.param)
    return case


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, removed at once: a hundred of these outputs would fill a small disk."""
    made = tmp_path / "place"
    made.mkdir()
    yield made
    shutil.rmtree(tmp_path)


def same(one: Path, other: Path) -> bool:
    if one.is_file():
        return other.is_file() and filecmp.cmp(one, other, shallow=False)
    files = [sorted(p.relative_to(side) for p in side.rglob("*") if p.is_file()) for side in (one, other)]
    return files[0] == files[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in files[0])


def copy(source: Path, target: Path) -> None:
    """By hard links: nothing writes to the inside of a file that is there."""
    if source.is_file():
        os.link(source, target)
    else:
        shutil.copytree(source, target, copy_function=os.link)


def parts(place: Path) -> list[str]:
    return sorted(p.name for p in place.iterdir() if p.name.startswith("."))


def command(case: Case, *, force: bool) -> list[object]:
    return ["export", case.base, "--res", 512, "--ratio", 0.3, "-o", case.name, *(["--force"] if force else [])]


def check(case: Case, place: Path, *, force: bool, code: int) -> None:
    """The target is whole, or as it was; and only a run that says so has made it whole."""
    target = place / case.name
    whole = target.exists() and same(case.whole, target)
    if code == 0:
        assert whole
    if not whole:
        assert same(case.old, target) if force else not os.path.lexists(target)
    others = {p.name for p in place.iterdir()} - {case.name, *parts(place)}
    assert not others


def prepare(case: Case, place: Path, *, force: bool) -> None:
    target = place / case.name
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    if force:
        copy(case.old, target)


# --- signals, at random ---


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("kills", RANDOM_KILLS)
def test_a_signal_at_any_moment(forks: Forks, either: Case, place: Path, name: str, kills: int) -> None:
    signum, rng = SIGNALS[name], random.Random(f"{name} {either.name}")
    ended, window = 0, either.seconds
    while ended < kills:
        force = rng.random() < 0.5
        prepare(either, place, force=force)
        run = forks.start(place, *command(either, force=force))
        time.sleep(rng.uniform(0, window))
        run.kill(signum)
        code = run.wait()
        check(either, place, force=force, code=code)
        if signum != signal.SIGKILL:
            assert parts(place) == []
        assert len(parts(place)) <= 2
        # A fork is killed outright before its handlers are there and after they are gone.
        assert code in (0, EXIT_CODES[signum], -signum), run.err
        if code == EXIT_CODES[signum] > 0:
            stages = ("counting: ", "writing: ", "copying: ", "note: ")
            assert [line for line in run.err if not line.startswith(stages)] == [
                f"crdiff: {WORDS[signum]}; nothing half-done was left behind"
            ]
        ended += code != 0
        window *= 1 if code else 0.9  # it was faster; a machine has better and worse moments
    prepare(either, place, force=False)
    assert forks.run(place, *command(either, force=False))[0] == 0
    assert [p.name for p in place.iterdir()] == [either.name]  # the left-overs are gone
    check(either, place, force=False, code=0)


# --- signals, at the moments that count ---

MOMENTS = {
    "before the part is made": ("crdiff_export.bake.staging.clean", 1, False),
    "as the part is made": ("crdiff_export.bake.staging._create", 1, True),
    "as the part is opened": ("os.open", 3, True),
    "within the first write": ("os.write", 1, False),
    "after the first write": ("os.write", 1, True),
    "within a later write": ("os.write", 3, False),
    "before the sync": ("os.fsync", 1, False),
    "after the sync": ("os.fsync", 1, True),
    "before the check": ("crdiff_export.bake.direct_writer._check", 1, False),
    "after the check": ("crdiff_export.bake.direct_writer._check", 1, True),
    "before the move": ("crdiff_export.bake.staging.publish", 1, False),
    "before the move is durable": ("crdiff_export.bake.staging.sync_folder", 1, False),
    "after the move": ("crdiff_export.bake.staging.publish", 1, True),
    "before the part is removed": ("crdiff_export.bake.staging._remove", 1, False),
    "after the part is removed": ("crdiff_export.bake.staging._remove", 1, True),
}


@pytest.mark.parametrize(("name", "force"), [("SIGKILL", True), ("SIGTERM", False), ("SIGINT", True)])
@pytest.mark.parametrize(("call", "nth", "after"), MOMENTS.values(), ids=MOMENTS)
def test_a_signal_at_a_moment_that_counts(
    forks: Forks, small: Case, place: Path, name: str, *, call: str, nth: int, after: bool, force: bool
) -> None:
    signum = SIGNALS[name]
    prepare(small, place, force=force)
    hook = {"call": call, "nth": nth, "do": int(signum), "after": after}
    code, err = forks.run(place, *command(small, force=force), hook=hook)
    assert code == EXIT_CODES[signum], err
    check(small, place, force=force, code=code)
    if signum == signal.SIGKILL:
        prepare(small, place, force=False)
        assert forks.run(place, *command(small, force=False))[0] == 0
    assert parts(place) == []


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_between_the_steps_of_a_swap(forks: Forks, small: Case, place: Path, name: str, step: int) -> None:
    """Where two folders cannot be exchanged in one step, the old one is away for a moment; it comes back."""
    prepare(small, place, force=True)
    hook = {"call": "os.rename", "nth": step, "do": int(SIGNALS[name]), "after": True}
    code, err = forks.run(place, *command(small, force=True), hook=hook, platform="darwin")
    assert code == EXIT_CODES[SIGNALS[name]], err
    if SIGNALS[name] == signal.SIGKILL:
        clean(place / small.name)
    check(small, place, force=True, code=code)
    assert parts(place) == []


def test_a_second_signal_does_not_disturb_the_first(forks: Forks, file: Case, place: Path) -> None:
    for number, delay in enumerate((0.0, 0.001, 0.01)):
        go = place.parent / f"go-{number}"
        hook = {"call": "os.fsync", "nth": 1, "do": str(go), "after": False}
        run = forks.start(place, *command(file, force=False), hook=hook)
        while not go.with_name(f"{go.name}.reached").exists():
            time.sleep(0.005)
        run.kill(signal.SIGINT)
        time.sleep(delay)
        run.kill(signal.SIGTERM)
        run.kill(signal.SIGINT)
        go.touch()
        code = run.wait()
        assert code in (130, -signal.SIGTERM, -signal.SIGINT)  # the latter once all is cleaned up
        assert parts(place) == []
        check(file, place, force=False, code=code)


def test_a_terminal_that_is_closed_and_an_interrupt_for_machines(forks: Forks, small: Case, place: Path) -> None:
    hook = {"call": "os.fsync", "nth": 1, "do": int(signal.SIGHUP), "after": False}
    code, err = forks.run(place, *command(small, force=False), hook=hook)
    assert (code, err[-1]) == (129, "crdiff: terminated; nothing half-done was left behind")
    code, (line,) = forks.run(place, *command(small, force=False), "--json", hook=hook | {"do": int(signal.SIGINT)})
    assert (code, json.loads(line)["error"]["code"]) == (130, "interrupted")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_a_signal_to_a_process_of_its_own(file: Case, place: Path, name: str) -> None:
    """From the very start, imports included."""
    signum, rng = SIGNALS[name], random.Random(name)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "crdiff_export", *map(str, command(file, force=False))],
            cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(rng.uniform(0.1, 0.8))
        process.send_signal(signum)
        code = process.wait()
        check(file, place, force=False, code=code)
        assert name == "SIGKILL" or parts(place) == []
        prepare(file, place, force=False)


def test_a_shell_that_shields_its_jobs_from_interrupts(file: Case, place: Path) -> None:
    """As `nohup` does for SIGHUP, and a script for what it puts in the background."""
    words = shlex.join([sys.executable, "-m", "crdiff_export", *map(str, command(file, force=False))])
    process = subprocess.Popen(
        ["sh", "-c", f"trap '' INT; exec {words}"], cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(0.2)  # for the trap
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    assert process.returncode == 0
    check(file, place, force=False, code=0)


# --- what a signal does to the command line ---


class Steps(Silent):
    """Progress that counts."""

    def __init__(self) -> None:
        self.advanced = 0

    def advance(self, size: int) -> None:
        self.advanced += size


@pytest.fixture
def stopper() -> Iterator[Stopper]:
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    made = Stopper()
    made.install()
    yield made
    made.remove()
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_a_signal_unwinds_at_once_where_nothing_else_runs(stopper: Stopper) -> None:
    with pytest.raises(Stopped) as stop:
        signal.raise_signal(signal.SIGTERM)
    assert (stop.value.exit_code, stop.value.word) == (143, "terminated")


def watched(stopper: Stopper, work: Callable[[Progress], None], steps: Steps | None = None) -> None:
    with stopper.watch(steps or Steps()) as progress:
        work(progress)


def test_a_signal_waits_for_the_next_step_where_threads_are_at_work(stopper: Stopper) -> None:
    """Raised anywhere, it may leave a lock taken for ever, and with it the threads that want it."""
    steps = Steps()

    def work(progress: Progress) -> None:
        progress.advance(1)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        steps.advanced += 10
        progress.advance(100)

    with pytest.raises(Stopped) as stop:
        watched(stopper, work, steps)
    assert steps.advanced == 11
    assert (stop.value.exit_code, stop.value.word) == (130, "interrupted")


@pytest.mark.parametrize(
    "call", [lambda p: p.stage("a", 1), lambda p: p.advance(1), lambda _: None], ids=["stage", "advance", "end"]
)
def test_a_signal_is_never_forgotten(stopper: Stopper, call: Callable[[Progress], None]) -> None:
    def work(progress: Progress) -> None:
        signal.raise_signal(signal.SIGHUP)
        call(progress)

    with pytest.raises(Stopped):
        watched(stopper, work)


def test_a_failure_is_told_rather_than_the_signal_before_it(stopper: Stopper) -> None:
    def work(_: Progress) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        watched(stopper, work)


def test_who_asks_again_after_a_while_is_obeyed_at_once(stopper: Stopper) -> None:
    def work(_: Progress) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        stopper._since -= PATIENCE
        signal.raise_signal(signal.SIGINT)
        pytest.fail("not reached")

    with pytest.raises(Stopped):
        watched(stopper, work)


def test_a_signal_that_python_drops_comes_again(stopper: Stopper, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a destructor, or in a callback of the import system, an exception is reported and ends nothing."""
    printed: list[object] = []
    monkeypatch.setattr(stopper, "_unraisable", printed.append)

    class Last:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    last = [Last()]

    def work() -> None:
        last.clear()
        for _ in range(500):
            time.sleep(PATIENCE / 500)

    with pytest.raises(Stopped) as stop:
        work()
    assert stop.value.exit_code == 143
    assert printed == []


def test_a_dropped_signal_waits_for_the_next_step_too(stopper: Stopper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_AFTER", 0.2)

    class Last:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    steps, last = Steps(), [Last()]

    def work(progress: Progress) -> None:
        time.sleep(0.5)
        steps.advanced += 1
        progress.advance(1)
        pytest.fail("not reached")

    last.clear()
    with pytest.raises(Stopped):
        watched(stopper, work, steps)
    assert steps.advanced == 1


def test_what_else_python_drops_is_reported_as_ever(stopper: Stopper, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[Any] = []
    monkeypatch.setattr(stopper, "_unraisable", printed.append)

    class Last:
        def __del__(self) -> None:
            raise ZeroDivisionError

    last = Last()
    del last
    assert [dropped.exc_type for dropped in printed] == [ZeroDivisionError]


def test_a_thread_takes_no_signals() -> None:
    failures: list[BaseException] = []

    def command() -> None:
        try:
            Stopper().install()
        except BaseException as error:  # noqa: BLE001  a thread's exception is lost
            failures.append(error)

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert failures == []


# --- disks ---


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999], ids=str)
@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_a_file_that_may_not_grow_further(forks: Forks, either: Case, place: Path, share: float, force: bool) -> None:
    sizes = [p.stat().st_size for p in ([either.whole] if either.whole.is_file() else either.whole.rglob("*"))]
    prepare(either, place, force=force)
    code, err = forks.run(place, *command(either, force=force), limit=max(4096, int(share * max(sizes))))
    assert code == 1
    assert err[-2:] == [
        f"crdiff: {either.name}: File too large; nothing was left behind",
        "  Free some space, or give another place with -o.",
    ]
    assert parts(place) == []
    check(either, place, force=force, code=code)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(made, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_a_disk_that_fills_up(small_disk: Path, file: Case, force: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(small_disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 40))  # another program was faster
    target = small_disk / file.name
    shutil.copyfile(file.old, target if force else small_disk / "filler")
    before = state(small_disk)
    with pytest.raises(CrdiffError) as error:
        export(ExportRequest(str(file.base), Size(512, 512), target, force=force))
    assert error.value.message == f"{target}: No space left on device; nothing was left behind"
    assert state(small_disk) == before
    assert parts(small_disk) == []


# With the errors that they can give, and whether hashes are written.
CALLS = [
    *[("os.open", errno.EACCES, True), ("os.open", errno.EMFILE, False), ("os.write", errno.ENOSPC, True)],
    *[("os.write", errno.EIO, False), ("os.fsync", errno.EIO, True), ("os.lseek", errno.EIO, True)],
    *[("os.link", errno.EACCES, True), ("os.replace", errno.EBUSY, True), ("os.rename", errno.ENOSPC, True)],
    *[("os.mkdir", errno.ENOSPC, True), ("os.fstat", errno.EIO, True), ("shutil.copyfile", errno.ENOSPC, True)],
]


class Failing:
    """A function of the system that fails at its nth call."""

    def __init__(self, call: str, number: int, nth: int, patch: pytest.MonkeyPatch) -> None:
        module, _, name = call.partition(".")
        self._original: Callable[..., Any] = getattr(sys.modules[module], name)
        self._number, self._nth = number, nth
        self.calls = 0
        patch.setattr(sys.modules[module], name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self._nth:
            raise OSError(self._number, os.strerror(self._number))
        return self._original(*args, **kwargs)


@pytest.fixture(scope="module")
def small_case(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """A case of each kind, made once."""

    @cache
    def made(kind: str, *, hashing: bool) -> Case:
        folder = tmp_path_factory.mktemp("small")
        base, name = shelf / "pipe", "o"
        if kind == "file":
            base, name = makers.write(folder / "base.safetensors", makers.tiny("demo.original-unet")), "o.safetensors"
        for target, ratio in ((folder / "whole" / name, None), (folder / "old" / name, 0.1)):
            target.parent.mkdir()
            export(ExportRequest(str(base), Size(512, 512), target, ratio=ratio, hashing=hashing))
        return Case(base, folder / "whole" / name, folder / "old" / name, 0)

    return made


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize(("call", "number", "hashing"), CALLS, ids=str)
def test_every_call_of_the_system_may_fail(
    small_case: Callable[..., Case], tmp_path: Path, *, call: str, number: int, kind: str, hashing: bool, force: bool
) -> None:
    if not hasattr(sys.modules[call.partition(".")[0]], call.partition(".")[2]):
        pytest.skip("no such call here")
    made, place = small_case(kind, hashing=hashing), tmp_path / "place"
    base, name = made.base, made.name
    before, threads = state(base), threading.active_count()
    place.mkdir()
    request = ExportRequest(str(base), Size(512, 512), place / name, hashing=hashing, force=force)
    for nth in (1, 2, 3, 5, 8, 13, 21, 34, 1000):
        prepare(made, place, force=force)
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(call, number, nth, patch)
            code = 0
            try:
                export(request)
            except CrdiffError:
                code = 1
        check(made, place, force=force, code=code)
        # Within the removal of what was replaced, which is no failure; Python's own has fstat there from 3.13 on.
        if code == 0 and call in ("os.open", "os.fstat"):
            clean(place / name)
        assert parts(place) == []
        assert threading.active_count() == threads, threading.enumerate()
        if failing.calls < nth:
            assert code == 0
            break
    assert state(base) == before


# --- two at once ---


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_two_runs_for_one_target(
    forks: Forks, other_forks: Forks, either: Case, place: Path, tmp_path: Path, force: bool
) -> None:
    """One waits before its move until the other is done."""
    prepare(either, place, force=force)
    go = tmp_path / "go"
    hook = {"call": "crdiff_export.bake.staging.publish", "nth": 1, "do": str(go), "after": False}
    first = forks.start(place, *command(either, force=force), hook=hook)
    while not go.with_suffix(".reached").exists():
        time.sleep(0.005)
    (part,) = parts(place)
    second = other_forks.start(place, *command(either, force=force))
    assert second.wait() == 0
    assert parts(place) == [part]  # a living run's part is left alone
    check(either, place, force=force, code=0)
    go.touch()
    code = first.wait()
    if force:
        assert code == 0
    else:
        assert code == 1
        assert first.err[-2:] == [
            f"crdiff: {either.name}: came there during the export", "  Give another -o, or --force to replace it.",
        ]  # fmt: skip
    assert parts(place) == []
    check(either, place, force=force, code=0)


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_many_runs_for_one_target(place: Path, shelf: Path, force: bool) -> None:
    """All from the start; each for itself is right, and one of them is what stays. A lock is a thread's own, too."""
    target, wholes = place / "out" / "o", {ratio: place / "whole" / str(ratio) for ratio in range(1, 5)}
    base = str(shelf / "pipe")
    (place / "whole").mkdir()
    (place / "out").mkdir()
    for ratio, whole in wholes.items():
        export(ExportRequest(base, Size(512, 512), whole, ratio=ratio / 10))
    if force:
        shutil.copytree(wholes[1], target)
    start = threading.Barrier(len(wholes))

    def run(ratio: int) -> bool:
        start.wait()
        try:
            export(ExportRequest(base, Size(512, 512), target, ratio=ratio / 10, force=force))
        except CrdiffError:
            return False
        return True

    for _ in range(3):
        if not force:
            shutil.rmtree(target, ignore_errors=True)
        with ThreadPoolExecutor(len(wholes)) as pool:
            written = dict(zip(wholes, pool.map(run, wholes), strict=True))
        (left,) = [ratio for ratio, whole in wholes.items() if same(whole, target)]
        assert written[left]
        assert all(written.values()) if force else sum(written.values()) == 1
        assert [path.name for path in target.parent.iterdir()] == ["o"]
