"""The pairs of prompt and noise that a search judges by, and the others that its result is checked on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from crdiff_export.errors import OptionError
from crdiff_export.evaluate.statistics import FEWEST
from crdiff_export.formats.text import plural
from crdiff_export.hub.bases import BUILT_IN
from crdiff_export.sampling import prompts, request_checks
from crdiff_export.search.request import SearchRequest

# Ours. More prompts make a trial dearer and its score surer; so do more pictures of a single prompt.
DEMO: Final = 32
OF_ONE: Final = 16

# Prompts with the seeds of their noise.
Pairs = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class PromptPairs:
    """The pairs of the search and of its check; no seed is there twice.

    `pictures` is how many pictures of a prompt the check has.
    """

    search: Pairs
    check: Pairs
    pictures: int
    notes: tuple[str, ...]


def choose_pairs(request: SearchRequest) -> PromptPairs:
    """Choose the pairs of a request; OptionError where no prompts are left for the search or for the check."""
    is_single = request.prompt is not None
    texts, held_out = _single(request, request.prompt) if request.prompt is not None else _split(request)
    pictures = request.pictures or (OF_ONE if is_single else 1)
    search = _with_seeds(texts, pictures, request.noise)
    check = _with_seeds(held_out, pictures, request.noise + len(search))
    count, thing = (pictures, "held-out picture") if is_single else (len(held_out), "held-out prompt")
    few = f"an interval takes {FEWEST}, so the check cannot show whether the ratios found do any good"
    return PromptPairs(search, check, pictures, (f"{plural(count, thing)}: {few}",) if count < FEWEST else ())


def _single(request: SearchRequest, prompt: str) -> tuple[Sequence[str], Sequence[str]]:
    """Return the one prompt twice: the check takes it again, with other noise."""
    if request.prompts or request.held_out:
        raise OptionError("--prompt is for one prompt alone", "Leave out --prompts and --held-out, or --prompt.")
    if request.limit or request.held_out_limit:
        raise OptionError("a single prompt has no limit", "Give --pictures, the number of its pictures.")
    return [prompt], [prompt]


def _split(request: SearchRequest) -> tuple[Sequence[str], Sequence[str]]:
    """Return the prompts of the search and those of the check, each prompt once."""
    given, held_out = tuple(dict.fromkeys(request.prompts)), tuple(dict.fromkeys(request.held_out))
    if not given and request.base in BUILT_IN:
        held_out = held_out or tuple(prompts.held_out(request.held_out_limit or prompts.HELD_OUT, request.base))
        return prompts.to_search(request.limit or DEMO, request.base), held_out[: request.held_out_limit]
    if not given:
        raise OptionError(*request_checks.NO_PROMPTS)
    if not held_out:
        if len(given) < 2:
            hint = "Give more prompts, or --held-out FILE; --prompt TEXT is a search for one prompt."
            raise OptionError("a search by one prompt leaves none for the check", hint)
        cut = len(given) - max(1, len(given) // 3)
        given, held_out = given[:cut], given[cut:]
    given, held_out = given[: request.limit], held_out[: request.held_out_limit]
    if both := set(given) & set(held_out):
        hint = "Take them out of --held-out or of --prompts: a check needs prompts that the search never saw."
        raise OptionError(f"{len(both)} held-out prompts are among those of the search", hint)
    return given, held_out


def _with_seeds(texts: Sequence[str], pictures: int, seed: int) -> Pairs:
    """Take each prompt so many times, every time from noise of its own."""
    return tuple(
        (text, seed + number * pictures + picture) for number, text in enumerate(texts) for picture in range(pictures)
    )
