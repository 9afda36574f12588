"""Scorers that are programs: real ones, right and wrong in every way."""

import gc
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crdiff_export.errors import OptionError, ScorerError
from crdiff_export.evaluate import scorers
from crdiff_export.evaluate.scorers import Scorer, command, process
from tests.support.messages import golden, raises

Make = Callable[..., Scorer]
RED = Image.new("RGB", (5, 3), (255, 0, 0))
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


def refused(scorer: Scorer, *keys: str, count: int = 1) -> str:
    """Assert that scoring fails with these words and that the program is then gone; return the error's hint."""
    with pytest.raises(ScorerError) as caught:
        scorer.score([RED] * count, ["ab"] * count)
    error = caught.value
    assert error.message.startswith(f"{scorer.name}: ")
    assert all(key in error.message for key in keys), error.message
    golden(f"{error.message}\n{error.hint}".replace(scorer.name, "command:PROGRAM"))  # which Python's name differs
    with pytest.raises(ScorerError, match="has ended"):
        scorer.score([RED], ["a"])
    return error.hint


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
    with pytest.raises(ScorerError, match="has ended"):
        scorer.score([RED], ["a"])


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


def test_the_fingerprint_follows_every_word(made: Make) -> None:
    def record(*words: str, text: str = LOOP + ANSWER) -> dict[str, str]:
        return made(text, *words).fingerprint()

    first = record("--size", "3")
    assert set(first) == {"name", "words", "word 0", "word 1"}
    assert record("--size", "3") == first
    other_word, other_text = record("--size", "4"), record("--size", "3", text=f"pass\n{LOOP}{ANSWER}")
    assert [key for key in first if first[key] != other_word[key]] == ["words"]
    assert [key for key in first if first[key] != other_text[key]] == ["word 1"]
    assert record("--size 3")["words"] != first["words"]


def test_neither_paths_nor_arguments_get_out(made: Make, tmp_path: Path) -> None:
    """What a scorer says of itself ends in recipes, in headers and on pages."""
    scorer = made(LOOP + ANSWER, "--token", "hf_secret", "--model=/home/somebody/model")
    said = " ".join((scorer.name, *(word for pair in scorer.fingerprint().items() for word in pair)))
    assert scorer.name == f"command:{Path(sys.executable).name}"
    for private in ("secret", "somebody", "/", "a program", str(tmp_path)):
        assert private not in said
    failing = made("sys.exit(3)\n", "--token", "hf_secret")
    with pytest.raises(ScorerError) as error:
        failing.score([RED], ["a"])
    assert "secret" not in str(error.value)


# What is wrong


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("command:", "names no program"),
        ("command:a 'b", "command:a 'b"),
        ("command:no-such-thing x", "'no-such-thing'"),
        ("command:/", "command:/: cannot be started"),
    ],
)
def test_a_program_that_cannot_be_started(temporary: Path, text: str, key: str) -> None:
    is_typed = text in ("command:", "command:a 'b")
    with raises(OptionError if is_typed else ScorerError, key):
        scorers.load(text)
    with pytest.raises(ScorerError, match="cannot be started"):
        scorers.load("command:a\0b")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(command.TIMEOUT, text)
    with raises(ScorerError, command.TIMEOUT, repr(text)):
        scorers.load("command:true")


def test_no_shell_reads_it(temporary: Path) -> None:
    text = f"command:{sys.executable} -c 'import sys; input(); print(*sys.argv[1:])' $HOME ; \"a  b\""
    with pytest.raises(ScorerError, match=r"is no JSON: '\$HOME ; a  b'"):
        scorers.load(text).score([RED], ["a"])


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("hello", "is no JSON: 'hello'"),
        ("", "is no JSON: ''"),
        ("[" * 100_000, f"is no JSON: '{'[' * 118}…'"),
        ("{}", 'has no "score"'),
        ("[1]", 'has no "score"'),
        ("1.5", 'has no "score"'),
        ('{"score": NaN}', "is no finite number"),
        ('{"score": -Infinity}', "is no finite number"),
        ('{"score": 1e999}', "is no finite number"),
        ('{"score": 1' + "0" * 400 + "}", "is no finite number"),
        ('{"score": 1' + "0" * 9999 + "}", "is no JSON"),
        ('{"score": "1"}', "is no finite number"),
        ('{"score": true}', "is no finite number"),
        ('{"score": null}', "is no finite number"),
        ("\x1b[31m", "is no JSON: '\\x1b[31m'"),
        ("z" * (1 << 20), "has no end"),
    ],
    ids=range(16),
)
def test_a_wrong_answer(made: Make, answer: str, problem: str) -> None:
    refused(made(LOOP + f"    print({answer!r}, flush=True)\n"), f"the score of picture 1 {problem}")


def test_a_program_that_ends_before_it_is_asked(made: Make) -> None:
    scorer = made("sys.exit(7)\n")
    scorer._scorer._program.status()  # type: ignore[attr-defined]
    time.sleep(0.1)
    refused(scorer, "status 7", "picture 1")


@pytest.mark.parametrize(
    ("text", "problem", "last"),
    [
        ("sys.exit(3)\n", "ended with status 3 before the score of picture 1", ""),
        ("print('no model', file=sys.stderr)\nraise SystemExit('found\\x1b')\n", "ended with status 1",
         "Its last words: no model / 'found\\x1b'"),
        ("sys.stdin.readline()\nprint('{\"score\": 1}', flush=True)\n", "status 0 before the score of picture 2", ""),
        ("sys.stdin.readline()\nos.kill(os.getpid(), 9)\n", "was ended by signal 9", ""),
        ("os.close(1)\ntime.sleep(600)\n", "closed its stdout before the score of picture 1", ""),
    ],
    ids=["status", "words", "early", "signal", "stdout"],
)  # fmt: skip
def test_a_program_that_stops(made: Make, text: str, problem: str, last: str) -> None:
    assert refused(made(text), problem, count=50).endswith(last)


def test_a_program_that_hangs(made: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(command.TIMEOUT, "1.5")
    text = (
        "open(sys.argv[1], 'w').write(str(os.getpid()))\nprint('loading', file=sys.stderr, flush=True)\ntime.sleep(600)"
    )
    scorer = made(text, str(tmp_path / "pid"))
    assert refused(scorer, "picture 1 in 1.5 s").endswith("Its last words: loading")
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_program_that_talks_first(made: Make) -> None:
    scorer = made("print('{\"score\": 1}', flush=True)\ntime.sleep(600)")
    end = time.monotonic() + 10
    while time.monotonic() < end:
        time.sleep(0.2)
        program = scorer._scorer._program  # type: ignore[attr-defined]
        if program.has_lines:
            break
    refused(scorer, "stdout")


def test_the_last_words_are_few(made: Make) -> None:
    hint = refused(made("for i in range(9):\n    print(i, 'w' * 400, file=sys.stderr)\nsys.exit(1)\n"))
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
    with pytest.raises(ScorerError, match="has ended"):
        scorer.score([RED], ["a"])
