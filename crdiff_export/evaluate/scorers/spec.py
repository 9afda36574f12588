"""Scorers by what a user writes for them: a name, `module:function`, `command:PROGRAM ARG …`, or a weighted sum.

A sum is `0.5*clip-score+0.5*image-reward`; a member without a number counts once. A command takes all that is left of
the text, so in a sum it comes last. Names are the built-in ones and those of the entry-point group `crdiff.scorers`,
whose values are factories `(device, dtype) -> Scorer`; a built-in name cannot be taken by another package.
"""

import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from crdiff_export.errors import ScorerError
from crdiff_export.evaluate.scorers.score import Checked, Scorer
from crdiff_export.formats.text import did_you_mean

GROUP: Final = "crdiff.scorers"
BUILT_IN: Final = {
    "clip-score": "crdiff_export.evaluate.scorers.clip:clip_score",
    "pick-score": "crdiff_export.evaluate.scorers.clip:pick_score",
    "image-reward": "crdiff_export.evaluate.scorers.image_reward:image_reward",
    "aesthetic": "crdiff_export.evaluate.scorers.aesthetic:aesthetic",
    "demo": "crdiff_export.evaluate.scorers.judged:demo",
}
COMMAND: Final = "command:"
# The first of a sum's members, its weight, and what follows.
_MEMBER = re.compile(r"(?:(?P<weight>[+-]?[^*:+]*)\*)?(?P<scorer>\s*command:.*|[^+]*)(?P<more>\+)?", re.DOTALL)
_SUM_HINT = "Write 0.5*clip-score+0.5*image-reward."

Factory = Callable[[str, str], Scorer]


def names() -> tuple[str, ...]:
    """All names that are known here, the built-in ones first."""
    return (*BUILT_IN, *sorted(_installed()))


def load(spec: str, device: str = "cpu", dtype: str = "fp32") -> Scorer:
    """The scorer, opened and ready; CrdiffError says why it cannot be. Whoever loads it closes it."""
    members = parse(spec)
    if len(members) == 1 and members[0][0] == 1.0:
        return _open(members[0][1], device, dtype)
    from crdiff_export.evaluate.scorers.weighted import Weighted

    opened: list[tuple[float, Scorer]] = []
    try:
        for weight, text in members:
            opened.append((weight, _open(text, device, dtype)))
    except BaseException:
        for _, scorer in opened:
            scorer.close()
        raise
    return Checked(Weighted(public(spec), opened))


def check(spec: str) -> None:
    """ScorerError for what can be known to be wrong without opening a model or starting a program."""
    for _, text in parse(spec):
        if ":" not in text:
            _refuse_unknown(text)
        elif text.startswith(COMMAND):
            from crdiff_export.evaluate.scorers.command import words_of

            words_of(text)


def public(spec: str) -> str:
    """What others may read of a text: all of it, but of a command the base name of its program alone."""
    *_, (_, last) = parse(spec)
    if not last.startswith(COMMAND):
        return spec
    from crdiff_export.evaluate.scorers.command import name_of, words_of

    return spec.strip().removesuffix(last) + name_of(words_of(last))


def parse(spec: str) -> list[tuple[float, str]]:
    """The weights and scorers of a sum, of which there is one at least; ScorerError for a text that is no sum."""
    members: list[tuple[float, str]] = []
    rest, more = spec, True
    while more:
        match = _MEMBER.match(rest)
        assert match
        scorer = match["scorer"].strip()
        if not scorer:
            raise ScorerError(f"{spec!r}: a scorer is missing", _SUM_HINT)
        if scorer in [other for _, other in members]:
            raise ScorerError(f"{spec!r}: {scorer} is in the sum twice", "Add the two weights.")
        members.append((_weight(spec, match["weight"]), scorer))
        rest, more = rest[match.end() :], bool(match["more"])
    return members


def _weight(spec: str, text: str | None) -> float:
    try:
        weight = 1.0 if text is None else float(text)
    except ValueError:
        weight = 0.0
    if not 0 < abs(weight) < float("inf"):
        raise ScorerError(f"{spec!r}: {text!r} is no weight", f"A weight is a number other than 0. {_SUM_HINT}")
    return weight


def _open(text: str, device: str, dtype: str) -> Scorer:
    if text.startswith(COMMAND):
        from crdiff_export.evaluate.scorers.command import Command

        return Checked(Command(text))
    if text in BUILT_IN:
        factory: Factory = EntryPoint(text, BUILT_IN[text], GROUP).load()
        return Checked(factory(device, dtype))
    from crdiff_export.evaluate.scorers import function

    if ":" in text:
        return Checked(function.open_function(text, device, dtype))
    _refuse_unknown(text)
    return Checked(function.made(text, function.loaded(_installed()[text]), device, dtype))


def _refuse_unknown(text: str) -> None:
    if text not in names():
        others = "module:function and command:PROGRAM work as well."
        raise ScorerError(f"no scorer is called {text!r}", f"{did_you_mean(text, names(), 'scorers')[:-1]}; {others}")


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in BUILT_IN}
