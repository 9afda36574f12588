"""Text for people stays on one line, in the unit that suits it, with the right plural."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdiff_export.formats.text import amount, nearest, plural, printable


@pytest.mark.parametrize(
    ("text", "line"),
    [("a b", "a b"), ("", ""), ("é…", "é…"), ("a\n\x1b[31m\u2028é", r"a\n\x1b[31m\u2028é"), ("\ud800", r"\ud800")],
)
def test_unprintable_characters_are_escaped(text: str, line: str) -> None:
    assert printable(text) == line


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_becomes_one_printable_line(text: str) -> None:
    assert printable(text).isprintable()


def test_a_long_text_is_cut_and_its_length_told() -> None:
    assert printable("x" * 300, 10) == "x" * 10 + "… (300 characters)"
    assert printable("x" * 300, limit=None) == "x" * 300


@pytest.mark.parametrize(
    ("word", "guess"),
    [
        ("clip", "clip-score"),
        ("CLIP", "clip-score"),
        ("sdlx", "sdxl"),
        ("sdxl-refiners", "sdxl-refiner"),
        ("zzz", None),
    ],
)
def test_the_nearest_word(word: str, guess: str | None) -> None:
    assert nearest(word, ("sdxl", "clip-score", "sdxl-refiner")) == guess


@pytest.mark.parametrize(("number", "text"), [(0, "0 prompts"), (1, "1 prompt"), (2, "2 prompts")])
def test_plural(number: int, text: str) -> None:
    assert plural(number, "prompt") == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 KB"), (6.94e9, "6.94 GB"), (5e12, "5000.00 GB")]
)
def test_amounts_count_in_thousands(size: float, text: str) -> None:
    assert amount(size) == text
