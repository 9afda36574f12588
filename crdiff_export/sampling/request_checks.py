"""The options that all commands with pictures share, checked before torch is imported."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from crdiff_export.errors import OptionError
from crdiff_export.formats.strict_json import is_text
from crdiff_export.models.families import Family
from crdiff_export.sizes import Size

# What is said of a missing size and of missing prompts, by every command alike.
NO_SIZE = ("there is no size: --res is missing", "Give one, such as --res 512 or --res 768x512.")
NO_PROMPTS = ("there are no prompts", "Give --prompt TEXT, or --prompts FILE with one a line.")
# torch takes seeds below this one.
SEEDS = 2**64


@dataclass(frozen=True, slots=True)
class DrawingRequest:
    """A base and how to draw with it; None leaves a choice to the family and the device.

    Attributes:
        base: A path, a repository on the Hub or `demo`.
        steps: Steps of sampling.
        guidance: The guidance scale.
        negative: The negative prompt.
        device: torch's name of a device, or `auto`.
        dtype: The dtype to compute in, as in `--dtype`.
        config: A folder or a repository on the Hub with the parts that a single file lacks.
        variant: Which weights to take from a folder that has several.
        family: The table of the base's family, if it is not built in.
        told_size: The size that a model is told which is conditioned on sizes (SDXL), in place of the size drawn.
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
    family: Path | None = None
    told_size: Size | Literal["native"] | None = None


def check(request: DrawingRequest, prompts: Sequence[str]) -> None:
    """Check the texts and the number of steps.

    Args:
        request: The request.
        prompts: The prompts that were given; there may be none.

    Raises:
        OptionError: A text cannot be used, or there are fewer steps than one.

    """
    check_texts(prompts, request.negative)
    if request.steps is not None and request.steps < 1:
        raise OptionError(f"{request.steps} steps make no picture", "Give --steps 1 or more.")


def check_texts(prompts: Sequence[str], negative: str | None = None) -> None:
    """Check that prompts have words and that UTF-8 can hold them.

    Args:
        prompts: The prompts; there may be none.
        negative: The negative prompt, which may be empty.

    Raises:
        OptionError: A prompt is empty, or a text is not UTF-8.

    """
    if not all(map(is_text, (*prompts, negative or ""))):  # Python reads other bytes of a command line as surrogates
        raise OptionError("a prompt is not UTF-8 text", "Give it in UTF-8.")
    if not all(prompt.strip() for prompt in prompts):
        raise OptionError("a prompt is empty", "Say what the pictures are to show.")


def check_seeds(last: int, option: str = "--seed") -> None:
    """Check that torch takes the last of several seeds.

    Args:
        last: The largest seed.
        option: The option that sets the first one.

    Raises:
        OptionError: The seed is too large.

    """
    if last >= SEEDS:
        hint = f"They end before {SEEDS}; begin with a smaller {option}."
        raise OptionError("there are not so many seeds", hint)


def check_negative(negative: str | None, family: Family) -> None:
    """Refuse a negative prompt for a family that takes none, such as FLUX with its distilled guidance.

    Args:
        negative: The negative prompt, if any.
        family: The base's family.

    Raises:
        OptionError: The family's pipeline takes no negative prompt.

    """
    if negative and not family.negative:
        raise OptionError(f"{family.title} takes no negative prompt", "Leave --negative out.")
