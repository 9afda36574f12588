"""Any program as a scorer, `command:PROGRAM ARG …`: an old package, say, can run in an environment of its own.

The program is started once, without a shell. For each picture it reads one line from stdin,
`{"image": PATH, "prompt": TEXT}`, where PATH is a PNG in a private folder, and writes one line to stdout,
`{"score": NUMBER}`, in the same order. It may read ahead. It must flush each answer, and keep its stdin open until that
ends. The last lines of its stderr go into the message of an error. CRDIFF_SCORER_TIMEOUT is how many seconds an answer
may take.

A command may hold paths and secrets, so its name, which goes into recipes, headers, cards and pages, is that of the
program alone; the fingerprint has hashes of the rest.
"""

import hashlib
import json
import math
import os
import shlex
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from crdiff_export.errors import OptionError, ScorerError
from crdiff_export.evaluate.scorers.process import LONGEST_LINE, Program
from crdiff_export.evaluate.scorers.score import Score, is_finite
from crdiff_export.formats.strict_json import show

if TYPE_CHECKING:
    from PIL.Image import Image

TIMEOUT: Final = "CRDIFF_SCORER_TIMEOUT"
SECONDS = 1200.0  # src: the time-out of an evaluation in CR-Diff's public code
_FORM = 'One line {"score": NUMBER} on stdout is a score; all other words belong on stderr.'
_QUOTES = "Write command:PROGRAM ARG …, with quotes as in a shell."


class CommandScorer:
    """A running program; after an error or `close` it is gone, with its children and the pictures."""

    def __init__(self, spec: str) -> None:
        self._words = words_of(spec)
        self.name = name_of(self._words)
        self._seconds = _seconds()
        self._program = _start(spec, self._words)

    def score(self, images: "Sequence[Image]", prompts: Sequence[str]) -> list[Score]:
        if not self._program.running:
            raise ScorerError(f"{self.name}: has ended", "Load it again.")
        try:
            if self._program.has_lines:
                self._refuse("wrote to stdout before it was asked", _FORM)
            questions = zip(range(1, len(images) + 1), images, prompts, strict=True)
            self._program.send([self._question(*question) for question in questions])
            return [Score(self._answer(number)) for number in range(1, len(images) + 1)]
        except BaseException:
            self._program.kill()
            raise

    def _question(self, number: int, image: "Image", prompt: str) -> bytes:
        path = self._program.folder / f"{number}.png"
        image.convert("RGB").save(path, "PNG")
        return json.dumps({"image": str(path), "prompt": prompt}).encode() + b"\n"

    def _answer(self, number: int) -> float:
        try:
            line = self._program.receive(self._seconds)
        except TimeoutError:
            hint = f"It has to flush each line that it writes; {TIMEOUT} gives it more seconds."
            self._refuse(f"gave no score of picture {number} in {self._seconds:g} s", hint)
        if line is None:
            self._explain_end(f"before the score of picture {number}")
        (self._program.folder / f"{number}.png").unlink(missing_ok=True)
        where, text = f"the score of picture {number}", show(line.decode(errors="replace").rstrip("\r\n"), 120)
        if len(line) >= LONGEST_LINE:
            self._refuse(f"{where} has no end", _FORM)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            self._refuse(f"{where} is no JSON: {text}", _FORM)
        if not isinstance(answer, dict) or "score" not in answer:
            self._refuse(f'{where} has no "score": {text}', _FORM)
        value = answer["score"]
        if not isinstance(value, int | float) or not is_finite(value):
            self._refuse(f"{where} is no finite number: {text}", _FORM)
        return float(value)

    def _explain_end(self, before: str) -> NoReturn:
        """Say how its stdout ended."""
        status = self._program.status()
        if status is None:
            self._refuse(f"closed its stdout {before}", "It has to read and answer line by line, until its stdin ends.")
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        self._refuse(f"{how} {before}", "Run it by itself to see why.")

    def _refuse(self, what: str, hint: str) -> NoReturn:
        last = self._program.last_words()
        raise ScorerError(f"{self.name}: {what}", f"{hint} Its last words: {last}" if last else hint)

    def fingerprint(self) -> dict[str, str]:
        """Return the hash of its words, and of each word that is a file; what else the program uses cannot be seen."""
        words = hashlib.sha256(json.dumps(self._words).encode()).hexdigest()
        record = {"name": self.name, "words": f"sha256:{words}"}
        for number, word in enumerate(self._words):
            path = Path(word if number else shutil.which(word) or word)
            # A word may be too long for a file's name, or a file that only the program may read.
            with suppress(OSError):
                if path.is_file():
                    with path.open("rb") as file:
                        record[f"word {number}"] = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        return record

    def close(self) -> None:
        self._program.end()


def words_of(spec: str) -> list[str]:
    """Split a command into the program and its arguments; OptionError where there are none."""
    try:
        words = shlex.split(spec.partition(":")[2])
    except ValueError as error:
        raise OptionError(f"{spec}: cannot be split into words: {error}", _QUOTES) from error
    if not words:
        raise OptionError(f"{spec}: names no program", _QUOTES)
    return words


def name_of(words: Sequence[str]) -> str:
    """Return what may be published of a command: its program, without its folder and without its arguments."""
    return f"command:{Path(words[0]).name}"


def _seconds() -> float:
    text = os.environ.get(TIMEOUT, "").strip() or str(SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise ScorerError(f"{TIMEOUT} is {text!r}", "Set it to a number of seconds, as in 600.")
    return seconds


def _start(spec: str, words: Sequence[str]) -> Program:
    try:
        return Program(words)
    except FileNotFoundError as error:
        hint = "Give its path, or put it on PATH; a python and its script are two words."
        raise ScorerError(f"{spec}: there is no program {words[0]!r}", hint) from error
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or error
        hint = "Check that it is a program that may be run."
        raise ScorerError(f"{spec}: cannot be started: {what}", hint) from error
