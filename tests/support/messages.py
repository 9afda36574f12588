"""Errors in tests: a test names the class, the key and the exit code; the full texts stand in one golden file.

`tests/golden/messages.txt` holds every text that these helpers have seen, sorted. After a change of wording run
`python -m pytest --golden=add` (adds the new texts) or, for the whole suite, `--golden=rewrite` (drops the old ones,
too), and read the difference.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from crdiff_export.errors import CrdiffError
from tests.support.isolation import Ran

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "messages.txt"
# A test's own folder below pytest's: its name changes with the run and the test.
OWN_FOLDER = re.compile(rf"{re.escape(tempfile.gettempdir())}/pytest-of-[^/]+/pytest-\d+(?:/popen-gw\d+)?/[^/:\s'\"]+")

LOOPBACK = re.compile(r"http://127\.0\.0\.1:\d+")
HASH = re.compile(r"\b(?:0x)?(?=[a-f]*\d)[0-9a-f]{10,64}\b")

# The texts of this process's tests.
seen: set[str] = set()
updating = False


class Caught:
    """The error that a block raised, once it is over."""

    value: CrdiffError


@contextmanager
def raises(kind: type[CrdiffError], *keys: object) -> Iterator[Caught]:
    """Expect an error of this very class whose message holds these keys (file names, tensors, options)."""
    caught = Caught()
    with pytest.raises(kind) as info:
        yield caught
    caught.value = info.value
    check(info.value, kind, *keys)


def check(error: CrdiffError, kind: type[CrdiffError], *keys: object) -> None:
    """Assert the class of an error, the keys in its message, and that its full text is a golden one."""
    assert type(error) is kind
    for key in keys:
        assert str(key) in error.message, f"{key} is not in: {error.message}"
    golden(f"{error.message}\n{error.hint}")


def refused(ran: Ran, exit_code: int, *keys: object) -> None:
    """Assert that a command line failed with this code, naming these keys, and that its text is a golden one."""
    assert ran.code == exit_code, ran.err
    for key in keys:
        assert str(key) in ran.err, f"{key} is not in: {ran.err}"
    assert "Traceback" not in ran.err
    golden(ran.err)


def golden(text: str) -> None:
    """Assert that a text stands in the golden file, or note it where the file is being updated."""
    plain = normalised(text)
    seen.add(plain)
    assert updating or plain in texts(), f"not in {GOLDEN.name} (see {__name__}):\n{plain}"


def normalised(text: str) -> str:
    """A text without what differs from run to run: folders of tests, ports, hashes, and space at the end."""
    text = HASH.sub("HASH", LOOPBACK.sub("http://HUB", OWN_FOLDER.sub("TMP", text)))
    return text.replace(tempfile.gettempdir(), "TMP").strip()


@cache
def texts() -> frozenset[str]:
    """The golden texts."""
    return frozenset(_blocks(GOLDEN.read_text("utf-8"))) if GOLDEN.exists() else frozenset()


def update(found: set[str], *, keep: bool) -> None:
    """Write the golden file anew, with the texts found, and with those that it has if they are to be kept."""
    whole = found | (texts() if keep else frozenset())
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("\n\n".join(block.replace("\n\n", "\n\\\n") for block in sorted(whole)) + "\n", "utf-8")


def _blocks(content: str) -> Iterator[str]:
    for block in content.strip("\n").split("\n\n"):
        yield block.replace("\n\\\n", "\n\n")
