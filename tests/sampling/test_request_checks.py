"""What is asked of a pipeline in words: texts that it cannot draw, and a negative prompt that it does not take."""

import os

import pytest

from crdiff_export.errors import OptionError
from crdiff_export.models.families import Family, all_families
from crdiff_export.sampling import request_checks

NOT_UTF8 = ("a prompt is not UTF-8 text", "Give it in UTF-8.")
EMPTY = ("a prompt is empty", "Say what the pictures are to show.")


@pytest.mark.parametrize(
    ("prompts", "negative", "texts"),
    [
        (["a fox", os.fsdecode(b"caf\xe9")], None, NOT_UTF8),
        (["a fox"], os.fsdecode(b"caf\xe9"), NOT_UTF8),
        (["half a pair: \ud83e"], None, NOT_UTF8),
        (["a fox", ""], None, EMPTY),
        ([" \n\t"], "blur", EMPTY),
    ],
    ids=["latin-1", "negative", "half", "nothing", "blank"],
)
def test_texts_that_cannot_be_drawn(prompts: list[str], negative: str | None, texts: tuple[str, str]) -> None:
    with pytest.raises(OptionError) as error:
        request_checks.check_texts(prompts, negative)
    assert (error.value.message, error.value.hint) == texts


@pytest.mark.parametrize(
    ("prompts", "negative"),
    [(["ein Füchslein 🦊", "a\nb"], ""), ([], None), (["a"], " ")],
    ids=["unicode", "none", "blank-negative"],
)
def test_texts_that_can(prompts: list[str], negative: str | None) -> None:
    request_checks.check_texts(prompts, negative)


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.id)
def test_who_takes_a_negative_prompt(family: Family) -> None:
    request_checks.check_negative(None, family)
    request_checks.check_negative("", family)
    if not family.id.startswith("flux"):
        request_checks.check_negative("blur", family)
        return
    with pytest.raises(OptionError, match=f"{family.title} takes no negative prompt") as error:
        request_checks.check_negative("blur", family)
    assert error.value.hint == "Leave --negative out."
