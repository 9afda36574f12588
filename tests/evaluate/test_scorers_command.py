"""Scorers that are programs: real ones, right and wrong in every way."""

import gc
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crdiff_export.errors import ScorerError
from crdiff_export.evaluate import scorers
from crdiff_export.evaluate.scorers import Scorer, command, process

Make = Callable[..., Scorer]
RED = Image.new("RGB", (5, 3), (255, 0, 0))
FORM = 'One line {"score": NUMBER} on stdout is a score; all other words belong on stderr.'
LOOP = "for line in sys.stdin:\n    asked = json.loads(line)\n"
START = "import json, os, sys, time\n"
ANSWER = '    print(json.dumps({"score": len(asked["prompt"])}), flush=True)\n'


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where private folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def made(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Writes a program and loads it as a scorer; after the test neither it nor a picture is left."""
    opened = []

    def make(text: str, *words: str) -> Scorer:
        path = tmp_path / "a program.py"
        path.write_text(START + text)
        scorer = scorers.load(f"command:{shlex.join([sys.executable, str(path), *words])}")
        opened.append(scorer)
        return scorer

    monkeypatch.setattr(process, "GRACE", 0.5)
    monkeypatch.setenv(command.TIMEOUT, "60")
    yield make
    for scorer in opened:
        scorer.close()
    assert list(temporary.iterdir()) == []


def wrong(act: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(ScorerError) as caught:
        act()
    return caught.value.message, caught.value.hint


def refused(scorer: Scorer, count: int = 1) -> tuple[str, str]:
    """What an error says after the scorer's name, and its hint; the program is then gone."""
    message, hint = wrong(lambda: scorer.score([RED] * count, ["ab"] * count))
    assert message.startswith(f"{scorer.name}: ")
    assert wrong(lambda: scorer.score([RED], ["a"])) == (f"{scorer.name}: has ended", "Load it again.")
    return message.removeprefix(f"{scorer.name}: "), hint


def is_there(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    end = time.monotonic() + 5
    while is_there(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_there(pid)


# What is right


def test_one_program_scores_all(made: Make) -> None:
    text = LOOP + '    print(json.dumps({"score": len(asked["prompt"]) + os.getpid()}), flush=True)\n'
    scorer = made(text)
    first = [score.value for score in scorer.score([RED] * 3, ["a", "", 'abc\n"é🙂'])]
    (second,) = scorer.score([RED], ["ab"])
    assert [value - first[1] for value in first] == [1, 0, 7]
    assert second.value - first[1] == 2, "the same process"
    assert scorer.score([], []) == []


def test_pictures_are_pngs_in_a_private_folder(made: Make, temporary: Path) -> None:
    look = (
        "    from PIL import Image\n"
        "    picture = Image.open(asked['image'])\n"
        "    folder = os.path.dirname(asked['image'])\n"
        "    assert picture.format == 'PNG' and picture.mode == 'RGB' and os.stat(folder).st_mode & 0o77 == 0\n"
        "    print(json.dumps({'score': picture.width * 1000 + sum(picture.getpixel((0, 0)))}), flush=True)\n"
    )
    scorer = made(LOOP + look)
    values = np.random.default_rng(0).integers(0, 255, (4, 6, 4), np.uint8)
    odd = [RED, Image.fromarray(values), RED.convert("CMYK"), RED.convert("L"), RED.convert("P")]
    found = [score.value for score in scorer.score(odd, ["a"] * 5)]
    assert found[:2] == [5255, 6000 + int(values[0, 0, :3].astype(int).sum())]
    assert found[2:] == pytest.approx([5255, 5000 + 3 * 76, 5255], abs=6)
    assert [path.name for folder in temporary.iterdir() for path in folder.iterdir()] == []


def test_a_program_may_read_ahead(made: Make) -> None:
    text = (
        "while True:\n    lines = [sys.stdin.readline() for _ in range(3)]\n    if not lines[0]:\n        break\n"
        "    for line in lines:\n        print(json.dumps({'score': len(json.loads(line)['prompt'])}))\n"
        "    sys.stdout.flush()\n"
    )
    assert [score.value for score in made(text).score([RED] * 3, ["a", "bb", "ccc"])] == [1, 2, 3]


def test_neither_pipe_blocks(made: Make) -> None:
    noise = "    sys.stderr.write('x' * 99 + '\\n' * 3000)\n    sys.stderr.flush()\n"
    scorer = made(LOOP + noise + ANSWER)
    long = "y" * 300_000
    assert [score.value for score in scorer.score([RED] * 3, [long] * 3)] == [300_000] * 3


def test_many_answers_wait(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "AHEAD", 2)
    assert len(made(LOOP + ANSWER).score([RED] * 40, ["a"] * 40)) == 40


def test_it_ends_by_itself(made: Make, tmp_path: Path) -> None:
    text = LOOP + ANSWER + "open(sys.argv[1], 'w').write('the end')\n"
    scorer = made(text, str(tmp_path / "last"))
    scorer.score([RED], ["a"])
    scorer.close()
    scorer.close()
    assert (tmp_path / "last").read_text() == "the end"
    assert wrong(lambda: scorer.score([RED], ["a"]))[0] == f"{scorer.name}: has ended"


def test_one_that_does_not_end_is_ended_with_its_children(made: Make) -> None:
    text = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        + LOOP
        + '    print(json.dumps({"score": child.pid if asked["prompt"] else os.getpid()}), flush=True)\n'
        "time.sleep(600)\n"
    )
    scorer = made(text)
    pids = [int(score.value) for score in scorer.score([RED] * 2, ["", "child"])]
    assert all(is_there(pid) for pid in pids)
    scorer.close()
    assert all(gone(pid) for pid in pids)


def test_one_that_nobody_closes_is_ended(tmp_path: Path, temporary: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(START + LOOP + '    print(json.dumps({"score": os.getpid()}), flush=True)\n')
    scorer = scorers.load(f"command:{sys.executable} {shlex.quote(str(path))}")
    pid = int(scorer.score([RED], ["a"])[0].value)
    assert is_there(pid)
    del scorer
    gc.collect()
    assert gone(pid)
    assert list(temporary.iterdir()) == []


def test_the_fingerprint(made: Make, tmp_path: Path) -> None:
    record = made(LOOP + ANSWER, "--size", "3").fingerprint()
    again = made(LOOP + ANSWER, "--size", "3").fingerprint()
    other = made(LOOP + "    pass\n" + ANSWER, "--size", "3").fingerprint()
    assert record == again
    assert set(record) == {"name", "words", "word 0", "word 1"}
    assert [key for key in record if record[key] != other[key]] == ["word 1"]


def test_the_fingerprint_follows_every_word(made: Make) -> None:
    one, two = (made(LOOP + ANSWER, "--size", size).fingerprint() for size in ("3", "4"))
    assert [key for key in one if one[key] != two[key]] == ["words"]
    assert made(LOOP + ANSWER, "--size 3").fingerprint()["words"] != one["words"]


def test_neither_paths_nor_arguments_get_out(made: Make, tmp_path: Path) -> None:
    """What a scorer says of itself ends in recipes, in headers and on pages."""
    scorer = made(LOOP + ANSWER, "--token", "hf_secret", "--model=/home/somebody/model")
    said = " ".join((scorer.name, *(word for pair in scorer.fingerprint().items() for word in pair)))
    assert scorer.name == f"command:{Path(sys.executable).name}"
    for private in ("secret", "somebody", "/", "a program", str(tmp_path)):
        assert private not in said
    assert "secret" not in refused(made("sys.exit(3)\n", "--token", "hf_secret"))[0]


def test_it_may_be_part_of_a_sum(made: Make, tmp_path: Path) -> None:
    made(LOOP + ANSWER)
    words = f"command:{shlex.join([sys.executable, str(tmp_path / 'a program.py')])}"
    scorer = scorers.load(f"-1*{words}")
    (found,) = scorer.score([RED], ["abc"])
    program = f"command:{Path(sys.executable).name}"
    assert (found.value, dict(found.parts)) == (-3.0, {program: 3.0})
    assert scorer.name == scorers.public(f"-1*{words}") == f"-1*{program}"
    assert str(tmp_path) not in repr(scorer.fingerprint())
    scorer.close()


# What is wrong


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("command:", "command:: names no program", "Write command:PROGRAM ARG …, with quotes as in a shell."),
        ("command:a 'b", "command:a 'b: cannot be split into words: No closing quotation", "Write command:PROGRAM"),
        ("command:no-such-thing x", "command:no-such-thing x: there is no program 'no-such-thing'", "Give its path,"),
        ("command:/", "command:/: cannot be started: Permission denied", "Check that it is a program that may be run."),
        ("command:a\0b", "command:a\0b: cannot be started: embedded null byte", "Check that it is a program"),
    ],
)
def test_what_cannot_be_started(temporary: Path, text: str, message: str, hint: str) -> None:
    found = wrong(lambda: scorers.load(text))
    assert found[0] == message
    assert found[1].startswith(hint)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(command.TIMEOUT, text)
    found = wrong(lambda: scorers.load("command:true"))
    assert found == (f"CRDIFF_SCORER_TIMEOUT is {text!r}", "Set it to a number of seconds, as in 600.")


def test_no_shell_reads_it(temporary: Path) -> None:
    text = f"command:{sys.executable} -c 'import sys; input(); print(*sys.argv[1:])' $HOME ; \"a  b\""
    message, _ = wrong(lambda: scorers.load(text).score([RED], ["a"]))
    assert message.endswith("is no JSON: '$HOME ; a  b'")


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ("hello", "is no JSON: 'hello'"),
        ("", "is no JSON: ''"),
        ("[" * 100_000, f"is no JSON: '{'[' * 118}…'"),
        ("{}", "has no \"score\": '{}'"),
        ("[1]", "has no \"score\": '[1]'"),
        ("1.5", "has no \"score\": '1.5'"),
        ('{"score": NaN}', "is no finite number: '{\"score\": NaN}'"),
        ('{"score": -Infinity}', "is no finite number: '{\"score\": -Infinity}'"),
        ('{"score": 1e999}', "is no finite number: '{\"score\": 1e999}'"),
        ('{"score": 1' + "0" * 400 + "}", "is no finite number: "),
        ('{"score": 1' + "0" * 9999 + "}", "is no JSON: "),
        ('{"score": "1"}', 'is no finite number: \'{"score": "1"}\''),
        ('{"score": true}', "is no finite number: '{\"score\": true}'"),
        ('{"score": null}', "is no finite number: '{\"score\": null}'"),
        ("\x1b[31m", "is no JSON: '\\x1b[31m'"),
        ("z" * (1 << 20), "has no end"),
    ],
)
def test_an_answer_that_is_none(made: Make, answer: str, what: str) -> None:
    message, hint = refused(made(LOOP + f"    print({answer!r}, flush=True)\n"))
    assert message.startswith(f"the score of picture 1 {what}")
    assert hint == FORM


def test_one_that_is_gone_before_it_is_asked(made: Make) -> None:
    scorer = made("sys.exit(7)\n")
    scorer._scorer._program.status()  # type: ignore[attr-defined]
    time.sleep(0.1)
    assert refused(scorer) == ("ended with status 7 before the score of picture 1", "Run it by itself to see why.")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("sys.exit(3)\n", "ended with status 3 before the score of picture 1", "Run it by itself to see why."),
        (
            "print('no model', file=sys.stderr)\nraise SystemExit('found\\x1b')\n",
            "ended with status 1 before the score of picture 1",
            "Run it by itself to see why. Its last words: no model / 'found\\x1b'",
        ),
        (
            "sys.stdin.readline()\nprint('{\"score\": 1}', flush=True)\n",
            "ended with status 0 before the score of picture 2",
            "Run it by itself to see why.",
        ),
        (
            "sys.stdin.readline()\nos.kill(os.getpid(), 9)\n",
            "was ended by signal 9 before the score of picture 1",
            "Run it by itself to see why.",
        ),
        (
            "os.close(1)\ntime.sleep(600)\n",
            "closed its stdout before the score of picture 1",
            "It has to read and answer line by line, until its stdin ends.",
        ),
        (
            "sys.stdin.readline()\nos.close(0)\nprint('{\"score\": 1}', flush=True)\ntime.sleep(600)\n",
            "closed its stdin before the score of picture 2",
            "It has to read and answer line by line, until its stdin ends.",
        ),
    ],
)
def test_a_program_that_stops(made: Make, text: str, message: str, hint: str) -> None:
    assert refused(made(text), 50) == (message, hint)


def test_a_program_that_hangs(made: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(command.TIMEOUT, "1.5")
    text = (
        "open(sys.argv[1], 'w').write(str(os.getpid()))\nprint('loading', file=sys.stderr, flush=True)\ntime.sleep(600)"
    )
    scorer = made(text, str(tmp_path / "pid"))
    message, hint = refused(scorer)
    assert message == "gave no score of picture 1 in 1.5 s"
    flush = "It has to flush each line that it writes; CRDIFF_SCORER_TIMEOUT gives it more seconds."
    assert hint == f"{flush} Its last words: loading"
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_program_that_talks_first(made: Make) -> None:
    scorer = made("print('{\"score\": 1}', flush=True)\ntime.sleep(600)")
    end = time.monotonic() + 10
    while time.monotonic() < end:
        time.sleep(0.2)
        program = scorer._scorer._program  # type: ignore[attr-defined]
        if program.ahead:
            break
    assert refused(scorer) == ("wrote to stdout before it was asked", FORM)


def test_the_last_words_are_few(made: Make) -> None:
    _, hint = refused(made("for i in range(9):\n    print(i, 'w' * 400, file=sys.stderr)\nsys.exit(1)\n"))
    assert hint.endswith("w" * 400)
    assert len(hint) < 700


def test_whatever_stops_the_scoring_ends_the_program(made: Make, temporary: Path) -> None:
    class Unsaved(Image.Image):
        def convert(self, *_args: object, **_options: object) -> Image.Image:
            raise KeyboardInterrupt

    scorer = made(LOOP + ANSWER)
    with pytest.raises(KeyboardInterrupt):
        scorer.score([RED, Unsaved()], ["a", "b"])
    assert list(temporary.iterdir()) == []
    assert wrong(lambda: scorer.score([RED], ["a"]))[0].endswith("has ended")


@pytest.mark.skipif(os.name != "posix", reason="sessions are POSIX's")
def test_it_has_a_session_of_its_own(made: Make) -> None:
    (found,) = made(LOOP + '    print(json.dumps({"score": os.getsid(0)}), flush=True)\n').score([RED], ["a"])
    assert found.value != os.getsid(0)
