"""Prompts that an evaluation draws: given ones, or scenes that the demo model was never shown."""

from crdiff_export.errors import OptionError
from crdiff_export.models.demo import scenes
from crdiff_export.sampling import prompts
from tests.support.messages import raises


def combinations(texts: tuple[str, ...]) -> set[str]:
    return {scenes.Scene.parse(text).combination for text in texts}


def test_held_out_prompts_were_held_out() -> None:
    chosen, searched = prompts.held_out(150), prompts.to_search(50)
    assert len(set(chosen)) == 150
    assert len(set(searched)) == 50
    train = {scene.combination for scene in scenes.split()[0]}
    assert not train & combinations(chosen)
    assert not (train | combinations(chosen)) & combinations(searched)
    assert prompts.held_out(150) == chosen
    assert prompts.held_out(50) == chosen[:50]
    assert all(scenes.Scene.parse(prompt).learnt for prompt in (*chosen, *searched))
    assert {scenes.Scene.parse(prompt).kind for prompt in chosen} == {"single", "counted", "related"}


def test_prompts_are_drawn_once_each() -> None:
    assert prompts.choose(["a", "b", "a", "c"], 2) == ("a", "b")
    assert len(prompts.choose((), None)) == prompts.HELD_OUT
    with raises(OptionError, "162", "163"):
        prompts.held_out(163)
