"""The prompts of an evaluation: those that the user gives, or scenes that a demo model has not seen in training."""

import hashlib
from collections.abc import Sequence
from typing import Final

from crdiff_export.errors import OptionError
from crdiff_export.models import demo

HELD_OUT: Final = 96


def choose(given: Sequence[str], limit: int | None, base: str = demo.DEMO) -> tuple[str, ...]:
    """Choose the prompts to draw, each once.

    Args:
        given: The user's prompts; without any, scenes for a demo model are taken.
        limit: How many to take from the beginning; by default all.
        base: The demo model.

    Returns:
        Different prompts.

    """
    different = tuple(dict.fromkeys(given))
    return different[:limit] if different else held_out(limit or HELD_OUT, base)


def held_out(count: int, base: str = demo.DEMO) -> tuple[str, ...]:
    """Choose prompts that neither the training of a demo model nor any search for its ratios has seen.

    Args:
        count: How many.
        base: The demo model.

    Returns:
        Different prompts, the same ones each time.
    """
    return _unseen(count, base, searched=False)


def to_search(count: int, base: str = demo.DEMO) -> tuple[str, ...]:
    """Choose prompts for a search of a demo model's ratios, which its training has not seen.

    Args:
        count: How many.
        base: The demo model.

    Returns:
        Different prompts, the same ones each time.
    """
    return _unseen(count, base, searched=True)


def _unseen(count: int, base: str, *, searched: bool) -> tuple[str, ...]:
    """Take prompts from the beginning of a fixed list, so that a larger number only adds some."""
    import numpy as np

    from crdiff_export.models.demo import scenes

    unseen = scenes.with_relations(scenes.split()[1], demo.RELATIONS[base])
    chosen = [scene for scene in unseen if _is_searched(scene.combination) == searched]
    if count > len(chosen):
        raise OptionError(
            f"{base} has {len(chosen)} prompts that it was not trained on, {count} are asked for",
            "Ask for fewer with --limit.",
        )
    rng = np.random.default_rng(0)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts |= dict.fromkeys(scene.prompt for scene in scenes.sample(rng, chosen, 64))
    return tuple(prompts)[:count]


def _is_searched(combination: str) -> bool:
    """Whether a combination is for searches; about a third of them are, on all backgrounds."""
    return hashlib.sha256(f"search {combination}".encode()).digest()[0] < 256 // 3
