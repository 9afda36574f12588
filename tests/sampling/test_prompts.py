"""Prompts that an evaluation draws: given ones, or scenes that a demo model was never shown."""

import pytest

from crdiff_export.errors import OptionError
from crdiff_export.models import demo
from crdiff_export.models.demo import scenes
from crdiff_export.sampling import prompts
from tests.support.messages import raises


def combinations(texts: tuple[str, ...]) -> set[str]:
    return {scenes.Scene.parse(text).combination for text in texts}


@pytest.mark.parametrize("base", demo.NAMES)
def test_held_out_prompts_were_held_out(base: str) -> None:
    chosen, searched = prompts.held_out(150, base), prompts.to_search(80, base)
    assert len(set(chosen)) == 150
    assert len(set(searched)) == 80
    train = {scene.combination for scene in scenes.split()[0]}
    assert not train & combinations(chosen)
    assert not (train | combinations(chosen)) & combinations(searched)
    assert prompts.held_out(150, base) == chosen
    assert prompts.held_out(50, base) == chosen[:50]
    relations = {scenes.Scene.parse(prompt).relation for prompt in (*chosen, *searched)}
    assert relations == {"", *demo.RELATIONS[base]}
    assert {scenes.Scene.parse(prompt).kind for prompt in chosen} == {"single", "counted", "related"}


def test_prompts_are_drawn_once_each() -> None:
    assert prompts.choose(["a", "b", "a", "c"], 2) == ("a", "b")
    assert len(prompts.choose((), None)) == prompts.HELD_OUT
    with raises(OptionError, "162", "163"):
        prompts.held_out(163)
