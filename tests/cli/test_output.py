"""How things look: on terminals of any width, in pipes and logs, with and without colours."""

import contextlib
import io
import json
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crdiff_export.cli import progress_display
from crdiff_export.cli.blocks import Facts, Table
from crdiff_export.cli.output import Output, Result, print_error
from crdiff_export.cli.signals import Stopper
from crdiff_export.sampling.request_checks import NO_PROMPTS, NO_SIZE
from tests.support.forks import Forks
from tests.support.isolation import Crdiff

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def output(*, as_json: bool = False, quiet: bool = False) -> Output:
    return Output(Stopper(), as_json=as_json, quiet=quiet)


# --- in a pipe ---


def test_a_table_in_a_pipe_is_columns_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["a", "1,000", "x" * 500], ["模型", "1", ""]]
    output().print([Table(["name", "count", "why"], rows, numeric=["count"]), Table(["a", "b"], [])])
    assert capsys.readouterr().out.splitlines() == [
        "name  count  why",
        "a     1,000  " + "x" * 500,
        "模型      1",
        "a  b",
    ]


def test_texts_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    output().print([Table(["[red]a", ":smile:"], [["[/]", "[bold]"]])])
    output().notes(["[red]a[/] :smile:"])
    captured = capsys.readouterr()
    assert captured.out == "[red]a  :smile:\n[/]     [bold]\n"
    assert captured.err == "note: [red]a[/] :smile:\n"


def test_facts_begin_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    output().print([Facts({"a": "1", "long name": "2"}), Facts([("a", "1"), ("a", "2")]), Facts({})])
    assert capsys.readouterr().out == "a:         1\nlong name: 2\na: 1\na: 2\n"


@pytest.mark.parametrize(
    ("settings", "out", "err"),
    [
        ({}, "some text\nthe/path\nmore\n", "note: a note\n"),
        ({"quiet": True}, "the/path\nmore\n", ""),
        ({"as_json": True}, '{"schema": 1, "n": 1}\n', ""),
        ({"as_json": True, "quiet": True}, '{"schema": 1, "n": 1}\n', ""),
    ],
    ids=["people", "quiet", "json", "both"],
)
def test_a_result_has_three_forms(
    settings: dict[str, bool], out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = output(**settings)
    shown.show(Result({"n": 1}, ["some text", "the/path"], bare=["the/path"], notes=["a note"]))
    shown.print(["more"])
    assert capsys.readouterr() == (out, err)


def test_json_is_one_line_of_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    output(as_json=True).show(Result({"name": "ü\udcff\n模", "n": 1}, []))
    text = capsys.readouterr().out
    assert text.isascii()
    assert text.count("\n") == 1
    assert json.loads(text) == {"schema": 1, "name": "ü\udcff\n模", "n": 1}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("plain ü 模", "plain ü 模"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("two\nlines\r", "two\\nlines\\r"),
        ("\udcff", "\\udcff"),
        ("\u202egnp", "\\u202egnp"),
        ("x" * 5000, "x" * 5000),
    ],
    ids=["plain", "escape", "lines", "bytes", "direction", "long"],
)
def test_an_error_is_two_lines_whatever_is_in_it(capsys: pytest.CaptureFixture[str], message: str, shown: str) -> None:
    print_error("plan", message, f"Hint: {message}")
    assert capsys.readouterr().err == f"crdiff: {shown}\n  Hint: {shown}\n"
    print_error("plan", message, "Hint.", as_json=True)
    error = json.loads(capsys.readouterr().err)
    assert error == {"schema": 1, "error": {"code": "plan", "message": message, "hint": "Hint."}}


def test_an_error_without_a_hint_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("interrupted", "interrupted", "")
    assert capsys.readouterr().err == "crdiff: interrupted\n"


# --- progress where nobody watches ---


class Clock:
    """A time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress_display, "time", made)
    return made


def test_a_stage_is_a_line_when_it_is_over(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with output().progress() as progress:
        progress.stage("counting", 4_000_000)
        clock.now += 2
        progress.advance(4_000_000)
        assert capsys.readouterr().err == ""
        progress.stage("writing", 1000)
        assert capsys.readouterr().err == "counting: 4.00 MB in 2.0 s, 2.00 MB/s\n"
        progress.advance(1000)
    assert capsys.readouterr() == ("", "writing: 1.00 KB in 0.0 s\n")


@pytest.mark.parametrize(
    ("title", "size", "unit", "lines"),
    [
        ("writing", 7 * 10**9, "bytes", ["3.00 GB of 7.00 GB", "6.00 GB of 7.00 GB", "7.00 GB in 70.0 s, 100.00 MB/s"]),
        ("drawing", 70, "steps", ["30 steps of 70 steps", "60 steps of 70 steps", "70 steps in 70.0 s, 1.0/s"]),
    ],
)  # fmt: skip
def test_a_long_stage_says_now_and_then_how_far_it_is(
    title: str, size: int, unit: str, lines: list[str], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with output().progress() as progress:
        progress.stage(title, size, unit)
        for _ in range(7):
            clock.now += 10
            progress.advance(size // 7)
    assert capsys.readouterr().err.splitlines() == [f"{title}: {line}" for line in lines]


@pytest.mark.parametrize(("quiet", "size"), [(False, 0), (True, 10)], ids=["nothing to do", "quiet"])
def test_no_line_for_a_stage(quiet: bool, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    with output(quiet=quiet).progress() as progress:
        progress.stage("counting", size)
        progress.advance(size)
        progress.stage("writing", size)
    assert capsys.readouterr() == ("", "")


def test_a_stage_that_fails_is_not_called_done(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with output().progress() as progress:
            progress.stage("writing", 10)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert capsys.readouterr() == ("", "")


def test_progress_comes_from_many_threads(capsys: pytest.CaptureFixture[str]) -> None:
    with output().progress() as progress, ThreadPoolExecutor(8) as pool:
        progress.stage("counting", 8000)
        list(pool.map(progress.advance, [1] * 8000))
    assert capsys.readouterr().err.startswith("counting: 8.00 KB in")


# --- on a terminal ---

terminal = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")


OnTerminal = Callable[..., tuple[int, str]]


@pytest.fixture
def on_terminal(forks: Forks, here: Path) -> OnTerminal:
    """What a crdiff writes to a terminal that is its stdout and stderr, unless one of them is another file."""
    import fcntl
    import pty
    import termios

    def run(
        *args: str, columns: int = 100, env: Mapping[str, str] | None = None, out: str = "", err: str = ""
    ) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        name = os.ttyname(theirs)
        started = forks.start(here, *args, env={"COLUMNS": "", **(env or {})}, stdout=out or name, stderr=err or name)
        with ThreadPoolExecutor(1) as pool:
            text = pool.submit(_until_closed, ours)
            code = started.wait()
            os.close(theirs)
        os.close(ours)
        return code, text.result().decode().replace("\r\n", "\n")

    return run


def _until_closed(terminal: int) -> bytes:
    text = b""
    with contextlib.suppress(OSError):  # Linux: the other side is closed
        while more := os.read(terminal, 1 << 16):
            text += more
    return text


def plain(text: str) -> str:
    return ESCAPE.sub("", text)


@terminal
def test_bars_have_rate_and_time_left(on_terminal: OnTerminal) -> None:
    code, text = on_terminal("export", "demo", "--res", "72")
    assert code == 0
    shown = plain(text)
    for stage in ("counting", "writing"):
        assert re.search(rf"{stage} +━+ [\d.]+/[\d.]+ [kM]B +\S+( [kMG]B/s)? +(-:--:--|\d:\d\d:\d\d)", shown), stage
    assert re.search(r"2\.5/2\.5 MB +([\d.]+ [kMG]B/s +)?0:00:00", shown)
    assert COLOUR.search(text)
    assert text.index("\x1b[?25l") < text.index("\x1b[?25h")  # the cursor is back
    assert text.endswith("demo-crdiff-72x72.safetensors\n")


class Terminal(io.StringIO):
    """A stderr that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


def test_bars_count_other_things_than_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "100")
    with output().progress() as progress:
        progress.stage("drawing", 8, "passes")
        for _ in range(4):
            progress.advance(2)
            time.sleep(0.05)  # a rate needs two moments, and a tenth of a second
    assert isinstance(sys.stderr, Terminal)
    assert re.search(r"drawing +━+ 8/8 passes +[\d.]+/s +\d:\d\d:\d\d", plain(sys.stderr.getvalue()))


@terminal
def test_the_cursor_is_back_after_an_error(on_terminal: OnTerminal, baked: Path) -> None:
    raw = baked.read_bytes()
    Path("o.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    code, text = on_terminal("verify", "o.safetensors")
    assert code == 3
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0
    assert "crdiff: o.safetensors: its bytes hash to 0x" in plain(text)


@terminal
@pytest.mark.parametrize(
    ("env", "colours", "escapes"),
    [({}, True, True), ({"NO_COLOR": "1"}, False, True), ({"TERM": "dumb"}, False, False)],
    ids=["plain", "NO_COLOR", "dumb"],
)
def test_colours_and_bars_are_for_those_who_want_them(
    env: Mapping[str, str], colours: bool, escapes: bool, on_terminal: OnTerminal
) -> None:
    _, text = on_terminal("export", "demo", "--res", "72", env=env)
    _, error = on_terminal("export", "demo", "--res", "7", env=env)
    assert bool(COLOUR.search(text)) == bool(COLOUR.search(error)) == colours
    assert bool(ESCAPE.search(text)) == escapes
    if not escapes:
        assert "counting: 2.49 MB in" in text


@terminal
@pytest.mark.parametrize(("columns", "env"), [(30, {}), (100, {"COLUMNS": "30"})], ids=["narrow", "COLUMNS"])
def test_a_narrow_terminal_loses_nothing(columns: int, env: Mapping[str, str], on_terminal: OnTerminal) -> None:
    code, text = on_terminal("export", "demo", "--res", "64x96", "-o", "o.safetensors", columns=columns, env=env)
    assert code == 0
    shown = plain(text)
    for fact in ("group:     up", "zeroed:    196,673", "of:        655,360", "threshold: 0.0250092"):
        assert f"\n{fact}\n" in shown
    _, error = on_terminal("export", "demo", "--res", "64x96", "-o", "o.safetensors", columns=columns, env=env)
    assert "crdiff: o.safetensors: already exists\n" in plain(error)


@terminal
def test_only_words_are_wrapped(on_terminal: OnTerminal) -> None:
    _, text = on_terminal("recipes", "list", columns=80)
    shown = plain(text).splitlines()
    assert shown[0].split() == ["alias", "model", "ratios", "sizes"]
    assert shown[-1] == "(no room for: native)"
    assert any(row.split()[:4] == ["sdxl-refiner", "SDXL", "refiner", "starting-point"] for row in shown)
    assert max(len(row) for row in shown) <= 80
    assert "…" not in text
    _, text = on_terminal("families", "list", columns=80)
    assert "…" not in text
    assert max(len(row) for row in plain(text).splitlines()) <= 80


@terminal
def test_bars_go_to_the_terminal_and_the_result_to_the_pipe(on_terminal: OnTerminal) -> None:
    _, text = on_terminal("export", "demo", "--res", "72", out="result")
    assert "counting" in plain(text)
    assert "demo-crdiff-72x72.safetensors" not in text
    piped = Path("result").read_text()
    assert "\x1b" not in piped
    assert piped.splitlines()[-1] == "demo-crdiff-72x72.safetensors"


@terminal
def test_no_bars_in_a_log_beside_a_terminal(on_terminal: OnTerminal) -> None:
    _, text = on_terminal("export", "demo", "--res", "72", err="log")
    assert "counting" not in text
    assert "─────" in text
    logged = Path("log").read_text()
    assert "\x1b" not in logged
    assert [line.partition(":")[0] for line in logged.splitlines()] == ["note", "counting", "writing"]


@terminal
@pytest.mark.parametrize("option", ["-q", "--json"])
def test_no_bars_for_machines(option: str, on_terminal: OnTerminal) -> None:
    code, text = on_terminal("export", "demo", "--res", "72", option)
    assert code == 0
    assert "\x1b" not in text
    assert text.count("\n") == 1


def test_a_wait_is_seen_on_a_terminal_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    for quiet, seen in ((False, "loading\r\x1b[2K\r"), (True, "")):
        terminal.seek(0)
        terminal.truncate()
        with Output(Stopper(), as_json=False, quiet=quiet).waiting("loading"):
            pass
        assert terminal.getvalue() == seen
    plain = io.StringIO()
    monkeypatch.setattr("sys.stderr", plain)
    with Output(Stopper(), as_json=False, quiet=False).waiting("loading"):
        pass
    assert plain.getvalue() == ""


@pytest.mark.parametrize("command", ["export demo", "calibrate demo --criterion wanda", "search demo", "evaluate demo",
                                     "preview demo --prompt x"])  # fmt: skip
def test_a_missing_size_has_the_same_words_everywhere(command: str, crdiff: Crdiff, here: Path) -> None:
    ran = crdiff(*command.split())
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines() == [f"crdiff: {NO_SIZE[0]}", f"  {NO_SIZE[1]}"]


@pytest.mark.parametrize("command", ["calibrate {sd15} --criterion wanda", "search {sd15} --scorer aesthetic",
                                     "evaluate {sd15} --scorer aesthetic", "preview {sd15}"])  # fmt: skip
def test_missing_prompts_have_the_same_words_everywhere(command: str, crdiff: Crdiff, shelf: Path, here: Path) -> None:
    ran = crdiff(*command.format(sd15=shelf / "sd15.safetensors").split(), "--res", "512")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[-2:] == [f"crdiff: {NO_PROMPTS[0]}", f"  {NO_PROMPTS[1]}"]
