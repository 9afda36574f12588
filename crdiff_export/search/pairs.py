"""Which prompts and noise a search judges by, and which others its result is checked on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from crdiff_export.errors import OptionError
from crdiff_export.evaluate.statistics import FEWEST
from crdiff_export.formats.text import plural
from crdiff_export.hub.bases import BUILT_IN
from crdiff_export.sampling import prompts

if TYPE_CHECKING:
    from crdiff_export.search.tuning import SearchRequest

# Ours. More prompts make a trial dearer and its score surer; so do more pictures of a single prompt.
DEMO: Final = 32
OF_ONE: Final = 16

Some = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Prompts with the seeds of their noise; no seed is there twice. `pictures` are those of a prompt in the check."""

    search: Some
    check: Some
    pictures: int
    notes: tuple[str, ...]


def choose(request: "SearchRequest") -> Pairs:
    """The pairs of a request; OptionError where there are no prompts, or none that the search would not see."""
    if request.prompt is not None:
        return _of_one(request, request.prompt)
    searched, kept = _split(request)
    pictures = request.pictures or 1
    first = _drawn(searched, pictures, request.noise)
    then = _drawn(kept, pictures, request.noise + len(first))
    return Pairs(first, then, pictures, _few(len(kept), "held-out prompt"))


def _of_one(request: "SearchRequest", prompt: str) -> Pairs:
    """Pictures of one prompt; the check has as many from other noise."""
    if request.prompts or request.held_out:
        raise OptionError("--prompt is for one prompt alone", "Leave out --prompts and --held-out, or --prompt.")
    if request.limit or request.held_out_limit:
        raise OptionError("a single prompt has no limit", "Give --pictures, the number of its pictures.")
    pictures = request.pictures or OF_ONE
    first = _drawn([prompt], pictures, request.noise)
    then = _drawn([prompt], pictures, request.noise + pictures)
    return Pairs(first, then, pictures, _few(pictures, "held-out picture"))


def _split(request: "SearchRequest") -> tuple[Sequence[str], Sequence[str]]:
    given, held_out = tuple(dict.fromkeys(request.prompts)), tuple(dict.fromkeys(request.held_out))
    if not given and request.base == BUILT_IN:
        kept = held_out or prompts.held_out(request.held_out_limit or prompts.HELD_OUT)
        return prompts.to_search(request.limit or DEMO), kept[: request.held_out_limit]
    if not given:
        hint = "Give --prompts FILE, one a line, or one --prompt TEXT to search for that alone."
        raise OptionError("there are no prompts", hint)
    if not held_out:
        if len(given) < 2:
            hint = "Give more prompts, or --held-out FILE; --prompt TEXT is a search for one prompt."
            raise OptionError("a search by one prompt leaves none for the check", hint)
        cut = len(given) - max(1, len(given) // 3)
        given, held_out = given[:cut], given[cut:]
    searched, kept = given[: request.limit], held_out[: request.held_out_limit]
    if both := set(searched) & set(kept):
        hint = "Take them out of --held-out or of --prompts: a check needs prompts that the search never saw."
        raise OptionError(f"{len(both)} held-out prompts are among those of the search", hint)
    return searched, kept


def _drawn(texts: Sequence[str], pictures: int, seed: int) -> Some:
    """Each prompt so many times, every time from noise of its own."""
    return tuple(
        (text, seed + number * pictures + picture) for number, text in enumerate(texts) for picture in range(pictures)
    )


def _few(count: int, thing: str) -> tuple[str, ...]:
    if count >= FEWEST:
        return ()
    few = f"{plural(count, thing)}"
    return (f"{few}: an interval takes {FEWEST}, so the check cannot show whether the ratios found do any good",)
