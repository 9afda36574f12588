"""Text for people: numbers of bytes, and guesses for a mistyped word."""

import difflib
from collections.abc import Iterable

_STEPS = (("GB", 10**9), ("MB", 10**6), ("KB", 10**3))


def amount(size: float) -> str:
    """A number of bytes in the unit that suits it, in thousands as disks and the Hub count them."""
    for unit, step in _STEPS:
        if size >= step:
            return f"{size / step:.2f} {unit}"
    return f"{size:.0f} bytes"


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `words` that `word` probably means."""
    return next(iter(difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, words: tuple[str, ...], plural: str) -> str:
    """The hint for a word that is none of `words`."""
    guess = nearest(word, words)
    return (f"Did you mean {guess}? " if guess else "") + f"The {plural} are: {', '.join(words)}."
