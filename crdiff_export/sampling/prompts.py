"""The prompts that an evaluation draws: those that were given, or scenes that the demo model was never shown."""

import hashlib
from collections.abc import Sequence
from typing import Final

from crdiff_export.errors import OptionError

HELD_OUT: Final = 96


def choose(given: Sequence[str], limit: int | None) -> tuple[str, ...]:
    """The first `limit` of the given prompts, each once; scenes for the demo model where none are given."""
    chosen = tuple(dict.fromkeys(given))
    return chosen[:limit] if chosen else held_out(limit or HELD_OUT)


def held_out(count: int) -> tuple[str, ...]:
    """So many different prompts that the demo model's training never saw, nor any search for its ratios."""
    return _unseen(count, searched=False)


def to_search(count: int) -> tuple[str, ...]:
    """So many that its training never saw, for a search of its ratios; none is among `held_out`."""
    return _unseen(count, searched=True)


def _unseen(count: int, *, searched: bool) -> tuple[str, ...]:
    """The first of an endless list that does not change, so that more prompts are the same ones and others."""
    import numpy as np

    from crdiff_export.models.demo import scenes

    unseen = (scene for scene in scenes.split()[1] if scene.learnt)
    kept = [scene for scene in unseen if _is_searched(scene.combination) == searched]
    if count > len(kept):
        raise OptionError(
            f"the demo model has {len(kept)} prompts that it was not trained on, {count} are asked for",
            "Ask for fewer with --limit.",
        )
    rng = np.random.default_rng(0)
    found: dict[str, None] = {}
    while len(found) < count:
        found |= dict.fromkeys(scene.prompt for scene in scenes.sample(rng, kept, 64))
    return tuple(found)[:count]


def _is_searched(combination: str) -> bool:
    """Whether scenes like this are for a search: about a third of them, on all backgrounds."""
    return hashlib.sha256(f"search {combination}".encode()).digest()[0] < 256 // 3
