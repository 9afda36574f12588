"""JSON out of files that nobody vouches for: no key twice, no number that is none, bounded in memory and time."""

import json
from typing import Any, NoReturn

# Brackets, colons and commas bound what the parser can build, so they are counted before it runs. A tensor takes some
# 14 in a header and 2 in an index, and the largest published checkpoints have some 10 000 tensors.
MAX_MARKS = 2_000_000
# Text beyond ASCII takes up to four times its bytes, and is held twice.
MAX_WIDE = 32 << 20


class MalformedError(ValueError):
    """What is wrong with a document, to be read after its name: `the header` + `is not JSON`."""


def parse_object(raw: bytes, *, fractions: bool = False) -> dict[str, Any]:
    """The object that `raw` spells, or MalformedError; numbers are whole and short unless `fractions` may be there.

    Everything that it accepts the JSON of the safetensors library (serde_json) accepts as well.
    """
    if sum(map(raw.count, (b"{", b"[", b":", b","))) > MAX_MARKS:
        raise MalformedError("describes more tensors than any checkpoint has")
    if len(raw) > MAX_WIDE and (b"\\" in raw or not raw.isascii()):
        raise MalformedError("holds more text than any checkpoint has")
    try:
        value = json.loads(
            raw.decode(),
            object_pairs_hook=_object if b"\\u" in raw else _plain,
            parse_float=float if fractions else _no_number,
            parse_constant=_no_number,
            parse_int=_integer,
        )
    except UnicodeDecodeError as error:
        raise MalformedError(f"is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise MalformedError(f"is not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise MalformedError("nests too deeply") from error
    if not isinstance(value, dict):
        raise MalformedError("is not a JSON object")
    return value


def show(value: object, limit: int = 80) -> str:
    """A value from a file, fit for one line of a terminal: printable, short; text is quoted, deep things are named."""
    if isinstance(value, list):
        items = [_show_one(item, 24) for item in value[:9]] + ["…"] * (len(value) > 9)
        return f"[{', '.join(items)}]"
    return _show_one(value, limit)


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: JSON and pickles can spell half of a surrogate pair, which is no character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _show_one(value: object, limit: int) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if not isinstance(value, str):
        return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    quoted = ascii(value[:limit])
    return quoted if len(value) <= limit and len(quoted) <= 2 * limit else f"{quoted[: limit - 1]}…{quoted[0]}"


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The same where no text can be spelt that is none: most headers have a thousand objects, and all are like that."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else _object(pairs)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise MalformedError(f"has the key {show(key)} twice")
        for text in (key, value):
            if isinstance(text, str) and not is_text(text):
                raise MalformedError(f"has text that is not Unicode: {show(text)}")
        found[key] = value
    return found


def _integer(digits: str) -> int:
    # 2**64 has 20 digits; to serde_json -0 is a fraction.
    if len(digits) > 20 or digits == "-0":
        _no_number(digits)
    return int(digits)


def _no_number(text: str) -> NoReturn:
    raise MalformedError(f"holds the number {show(text, 30)}, where only whole numbers may stand")
