"""What is asked of a pipeline, refused before torch is imported where nothing can be drawn of it."""

from collections.abc import Sequence

from crdiff_export.errors import OptionError
from crdiff_export.families import Family
from crdiff_export.strict_json import is_text

# Seeds that torch tells apart.
SEEDS = 2**64


def check_texts(prompts: Sequence[str], negative: str | None = None) -> None:
    """OptionError for a prompt without a word, and for any text that UTF-8 cannot hold; that there are none is fine."""
    if not all(map(is_text, (*prompts, negative or ""))):  # other bytes of a command line come as halves of pairs
        raise OptionError("a prompt is not UTF-8 text", "Give it in UTF-8.")
    if not all(prompt.strip() for prompt in prompts):
        raise OptionError("a prompt is empty", "Say what the pictures are to show.")


def check_negative(negative: str | None, family: Family) -> None:
    """OptionError for a negative prompt where the family's pipeline takes none: FLUX's guidance is distilled."""
    if negative and family.id.startswith("flux"):
        raise OptionError(f"{family.title} takes no negative prompt", "Leave --negative out.")
