"""What is asked of a pipeline, refused before torch is imported where nothing can be drawn of it."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from crdiff_export.errors import OptionError
from crdiff_export.formats.strict_json import is_text
from crdiff_export.models.families import Family

# Seeds that torch tells apart.
SEEDS = 2**64


@dataclass(frozen=True, slots=True)
class DrawingRequest:
    """What every request says that draws pictures: with which base and how. None leaves it to family and device.

    `config` is what a single file lacks, as a folder or a repository on the Hub; `variant` names the weights to take
    from a folder that has several.
    """

    base: str
    _: KW_ONLY
    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    device: str = "auto"
    dtype: str | None = None
    config: str | None = None
    variant: str | None = None


def check(request: DrawingRequest, prompts: Sequence[str]) -> None:
    """OptionError for texts that are none, and for too few steps."""
    check_texts(prompts, request.negative)
    if request.steps is not None and request.steps < 1:
        raise OptionError(f"{request.steps} steps make no picture", "Give --steps 1 or more.")


def check_texts(prompts: Sequence[str], negative: str | None = None) -> None:
    """OptionError for a prompt without a word, and for any text that UTF-8 cannot hold; that there are none is fine."""
    if not all(map(is_text, (*prompts, negative or ""))):  # other bytes of a command line come as halves of pairs
        raise OptionError("a prompt is not UTF-8 text", "Give it in UTF-8.")
    if not all(prompt.strip() for prompt in prompts):
        raise OptionError("a prompt is empty", "Say what the pictures are to show.")


def check_seeds(last: int, option: str = "--seed") -> None:
    """OptionError where a seed, the last one of many, is beyond those that torch tells apart."""
    if last >= SEEDS:
        hint = f"They end before {SEEDS}; begin with a smaller {option}."
        raise OptionError("there are not so many seeds", hint)


def check_negative(negative: str | None, family: Family) -> None:
    """OptionError for a negative prompt where the family's pipeline takes none: FLUX's guidance is distilled."""
    if negative and family.id.startswith("flux"):
        raise OptionError(f"{family.title} takes no negative prompt", "Leave --negative out.")
