"""A tokenizer that CLIPTokenizer opens, with one token for each word of the scenes and bytes for all others."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

MARKERS = ("<|startoftext|>", "<|endoftext|>")
END = "</w>"
Merge = tuple[str, str]


def merges(words: Iterable[str]) -> list[Merge]:
    """Byte pairs to join, in order, after which each of the ASCII words is one token.

    A word is joined from the left, with the pairs of earlier words first. A new pair comes last, so that it is never
    tried where an earlier word still has one of its own to join: what is one token stays one token.
    """
    table: list[Merge] = []
    for word in words:
        while len(parts := split(word, table)) > 1:
            table.append((parts[0], parts[1]))
    return table


def split(word: str, table: Sequence[Merge]) -> list[str]:
    """The word's tokens, as byte pair encoding finds them: the first pair of the table that occurs is joined first."""
    parts = [*word[:-1], word[-1] + END]
    ranks = {pair: rank for rank, pair in enumerate(table)}
    while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        joined: list[str] = []
        for part in parts:
            if joined and (joined[-1], part) == best:
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
    return parts


def vocabulary(table: Sequence[Merge]) -> dict[str, int]:
    """CLIP's first 512 tokens, the bytes in CLIP's writing; then what is merged, and the two markers."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    tokens = (*letters, *(letter + END for letter in letters), *map("".join, table), *MARKERS)
    return {token: i for i, token in enumerate(tokens)}
