"""Text for people: amounts of bytes, plurals, printable lines, and guesses for a mistyped word."""

import difflib
from collections.abc import Iterable
from typing import Final

# How a note begins that is a warning.
WARNING = "warning: "
_STEPS = (("GB", 10**9), ("MB", 10**6), ("KB", 10**3))


def amount(size: float) -> str:
    """Return a number of bytes in the unit that suits it, in powers of 1000 as disks and the Hub count."""
    for unit, step in _STEPS:
        if size >= step:
            return f"{size / step:.2f} {unit}"
    return f"{size:.0f} bytes"


def plural(number: int, noun: str) -> str:
    """Write a number with its noun.

    Args:
        number: How many.
        noun: The singular of a noun whose plural ends in s.

    Returns:
        Text such as `1 prompt` or `2 prompts`.
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


# The project's web page, which model cards link to; empty until it has one.
PROJECT_ADDRESS: Final = ""


def printable(text: str, limit: int | None = 200) -> str:
    """Text from a file as one line that is safe on a terminal: control characters and line breaks are escaped.

    Args:
        text: Any text, half surrogate pairs included.
        limit: The number of characters to keep, or None for all; the length of a cut text follows in brackets.

    Returns:
        One line of printable characters.

    """
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}… ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shortened(text: str, limit: int) -> str:
    """Shorten a text in its middle, and make it safe to show.

    Args:
        text: Any text.
        limit: The most characters.

    Returns:
        The text, no longer than that.
    """
    shown = printable(text, None)
    keep = limit - 1
    return shown if len(shown) <= limit else f"{shown[: keep - keep // 2]}…{shown[-(keep // 2) :]}"


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the word that was probably meant.

    Args:
        word: A mistyped word.
        words: The valid words.
        cutoff: How alike they must be, from 0 to 1 (`difflib.get_close_matches`).

    Returns:
        The nearest valid word, or None if none is near.
    """
    word, words = word.lower(), list(words)
    prefixed = [valid for valid in words if len(word) > 2 and (valid.startswith(word) or word.startswith(valid))]
    if len(prefixed) == 1 and cutoff <= 0.6:
        return prefixed[0]
    return next(iter(difflib.get_close_matches(word, words, n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, words: tuple[str, ...], plural: str) -> str:
    """Return the hint for an unknown word: the nearest valid one, and all of them.

    Args:
        word: The unknown word.
        words: The valid words.
        plural: What the words are, such as `groups`.

    Returns:
        One or two sentences.
    """
    guess = nearest(word, words)
    return (f"Did you mean {guess}? " if guess else "") + f"The {plural} are: {', '.join(words)}."
