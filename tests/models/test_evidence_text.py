"""Evidence as a sentence: never better or worse than its interval says, whatever stands in a header."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdiff_export.models import recipe_files
from crdiff_export.models.evidence_text import evidence_text, poa_note

SCORES = {"scorer": "demo", "dense": 0.952, "pruned": 0.95, "prompts": 162}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {**SCORES, "interval": [-0.0131, 0.0072]},
            "no difference shown: pruned against dense -0.002 (95 %: -0.013 to +0.007), 162 prompts, scorer demo",
        ),
        (
            {**SCORES, "pruned": 0.99, "interval": (0.01, 0.07), "prompts": 1},
            "better: pruned against dense +0.038 (95 %: +0.010 to +0.070), 1 prompt, scorer demo",
        ),
        (
            {key: str(value) for key, value in SCORES.items()} | {"interval": "[-0.5, -0.25]"},
            "worse: pruned against dense -0.002 (95 %: -0.500 to -0.250), 162 prompts, scorer demo",
        ),
        (SCORES, "no interval: pruned against dense -0.002, 162 prompts, scorer demo"),
        (
            {**SCORES, "interval": [-0.1, 0.1], "poa": 1.0, "poa_low": 0.01, "poa_high": 0.2},
            (
                "no difference shown: pruned against dense -0.002 (95 %: -0.100 to +0.100); "
                "better: POA against dense +0.048 (95 %: +0.010 to +0.200), 162 prompts, scorer demo"
            ),
        ),
        (
            {**SCORES, "pruned": 0.95201, "interval": [0.000001, 0.000019]},
            "better: pruned against dense +0.000010 (95 %: +0.000001 to +0.000019), 162 prompts, scorer demo",
        ),
        ({"pruned": "1", "scorer": "IR"}, "pruned 1, scorer IR"),
        ({"pruned": "nan", "dense": "1", "scorer": "a\nb"}, r"dense 1, pruned nan, scorer a\nb"),
    ],
)
def test_the_sentence(values: dict[str, object], expected: str) -> None:
    assert evidence_text(values) == expected


def test_every_recipe_has_one() -> None:
    for variant in (variant for recipe in recipe_files.builtin() for variant in recipe.variants if variant.evidence):
        assert variant.evidence
        sentence = evidence_text(variant.evidence.values())
        assert sentence.endswith(f"{variant.evidence.prompts} prompts, scorer {variant.evidence.scorer}")


@given(
    st.dictionaries(
        st.sampled_from(["scorer", "pruned", "dense", "prompts", "interval", "poa", "poa_low", "poa_high", "x"]),
        st.text(max_size=20) | st.floats().map(repr) | st.lists(st.floats(), max_size=3).map(repr),
    )
)
def test_headers_may_hold_anything(values: dict[str, object]) -> None:
    sentence = evidence_text(values)
    assert sentence.isprintable()
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"poa": 0.6, "dense": 0.5, "poa_low": 0.01, "poa_high": 0.2}, ""),
        ({"poa": 0.6, "dense": 0.5, "poa_low": -0.01, "poa_high": 0.2}, "not shown"),
        ({"poa": "0.4", "dense": "0.5", "poa_low": "-0.2", "poa_high": "-0.01"}, "worse"),
        ({"poa": 0.6, "dense": 0.5}, ""),
        ({}, ""),
    ],
)
def test_a_weight_that_is_not_shown_to_help_is_said_to_be(values: dict[str, object], note: str) -> None:
    text = poa_note(values)
    assert note in text
    assert bool(text) == bool(note)
