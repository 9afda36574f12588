"""Parse untrusted JSON: no duplicate keys, no NaN, bounded memory and time."""

import json
from typing import Any, NoReturn

# The number of brackets, colons and commas bounds the number of objects that the parser makes, so they are counted
# first. A tensor takes about 14 of them in a header and 2 in an index; published checkpoints have up to 10,000 tensors.
MAX_MARKS = 2_000_000
# Text beyond ASCII takes up to four times its bytes in memory, twice.
MAX_WIDE = 32 << 20


class MalformedError(ValueError):
    """A malformed document. The message follows the document's name, as in `the header` + `is not JSON`."""


def parse_object(raw: bytes, *, fractions: bool = False) -> dict[str, Any]:
    """Parse a JSON object. Whatever is accepted, the parser of the safetensors library (serde_json) accepts as well.

    Args:
        raw: UTF-8 text.
        fractions: Whether numbers may have a fraction or an exponent; otherwise they are integers of up to 20 digits.

    Returns:
        The object, with text as keys.

    Raises:
        MalformedError: The text is not such an object, or describes more than any checkpoint holds.
    """
    if sum(map(raw.count, (b"{", b"[", b":", b","))) > MAX_MARKS:
        raise MalformedError("describes more tensors than any checkpoint has")
    if len(raw) > MAX_WIDE and (b"\\" in raw or not raw.isascii()):
        raise MalformedError("holds more text than any checkpoint has")
    try:
        value = json.loads(
            raw.decode(),
            object_pairs_hook=_object,
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
    """Show a value from a file in a message, as short printable text.

    Args:
        value: A value that JSON can hold.
        limit: The number of characters to show of a text.

    Returns:
        Quoted text, a number, or the items of a list; a nested value is only named.
    """
    if isinstance(value, list):
        items = [_show_one(item, 24) for item in value[:9]] + ["…"] * (len(value) > 9)
        return f"[{', '.join(items)}]"
    return _show_one(value, limit)


def is_text(value: str) -> bool:
    """Whether UTF-8 can encode the text: JSON and pickles can contain half of a surrogate pair."""
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise MalformedError(f"has the key {show(key)} twice")
        for text in (key, value):
            if isinstance(text, str) and not is_text(text):
                raise MalformedError(f"has text that is not Unicode: {show(text)}")
        entries[key] = value
    return entries


def _integer(digits: str) -> int:
    # 2**64 has 20 digits; to serde_json -0 is a fraction.
    if len(digits) > 20 or digits == "-0":
        _no_number(digits)
    return int(digits)


def _no_number(text: str) -> NoReturn:
    raise MalformedError(f"holds the number {show(text, 30)}, where only whole numbers may stand")
