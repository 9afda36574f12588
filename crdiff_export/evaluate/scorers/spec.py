"""What a user writes for a scorer: a name, `module:function`, `command:PROGRAM ARG …`, or a weighted sum.

A sum is `0.5*clip-score+0.5*image-reward`; a member without a weight has weight 1. A command takes all the text that
follows, so in a sum it comes last. Names are the built-in ones and those of the entry-point group `crdiff.scorers`,
whose values are factories `(device, dtype) -> Scorer`; another package cannot take a built-in name.
"""

import re
from collections.abc import Iterable
from contextlib import ExitStack, closing
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from crdiff_export.errors import OptionError
from crdiff_export.evaluate.scorers.score import Checked, Scorer
from crdiff_export.formats.text import did_you_mean
from crdiff_export.hub import bases
from crdiff_export.models.demo.scenes import Scene

GROUP: Final = "crdiff.scorers"
DEMO: Final = "demo"
BUILT_IN: Final = {
    "clip-score": "crdiff_export.evaluate.scorers.clip:clip_score",
    "pick-score": "crdiff_export.evaluate.scorers.clip:pick_score",
    "image-reward": "crdiff_export.evaluate.scorers.image_reward:image_reward",
    "aesthetic": "crdiff_export.evaluate.scorers.aesthetic:aesthetic",
    DEMO: "crdiff_export.evaluate.scorers.demo_scorer:demo",
}
COMMAND: Final = "command:"
# The first member of a sum, its weight, and whether another one follows.
_MEMBER = re.compile(r"(?:(?P<weight>[+-]?[^*:+]*)\*)?(?P<scorer>\s*command:.*|[^+]*)(?P<more>\+)?", re.DOTALL)
_SUM_HINT = "Write 0.5*clip-score+0.5*image-reward."


def names() -> tuple[str, ...]:
    """Return all names of scorers, the built-in ones first."""
    return tuple(_entries())


def load(spec: str, device: str = "cpu", dtype: str = "fp32") -> Scorer:
    """Open a scorer.

    Args:
        spec: What the user wrote.
        device: The device of its network, as torch names it.
        dtype: What its network computes in: fp32, fp16 or bf16.

    Returns:
        The scorer, ready; the caller closes it.

    Raises:
        CrdiffError: It cannot be opened.
    """
    members = parse(spec)
    if len(members) == 1 and members[0][0] == 1.0:
        return Checked(_open(members[0][1], device, dtype))
    from crdiff_export.evaluate.scorers.weighted import Weighted

    with ExitStack() as stack:
        opened = [
            (weight, stack.enter_context(closing(Checked(_open(text, device, dtype))))) for weight, text in members
        ]
        stack.pop_all()  # nothing is closed where all could be opened
    return Checked(Weighted(public(spec), opened))


def choose(spec: str | None, base: str) -> str:
    """Choose the scorer of a base's pictures, and check what can be checked before a model or a program is opened.

    Args:
        spec: What the user wrote, if anything.
        base: The base.

    Returns:
        What the user wrote, or the scorer that the demo models bring.

    Raises:
        OptionError: Another base has no scorer, or there is no such scorer.
    """
    if not spec and base not in bases.BUILT_IN:
        hint = f"Give --scorer: {', '.join(names())}, module:function or command:PROGRAM."
        raise OptionError("there is no scorer", hint)
    for _, text in parse(spec or DEMO):
        if ":" not in text:
            _check_name(text)
        elif text.startswith(COMMAND):
            from crdiff_export.evaluate.scorers.command import words_of

            words_of(text)
    return spec or DEMO


def check_prompts(spec: str, prompts: Iterable[str]) -> None:
    """Check that a scorer can judge prompts; the demo's knows its own language only.

    Args:
        spec: What the user wrote.
        prompts: The prompts.

    Raises:
        CrdiffError: It cannot judge one of them.
    """
    if DEMO in (name for _, name in parse(spec)):
        for prompt in prompts:
            Scene.parse(prompt)


def public(spec: str) -> str:
    """Return what may be published of a scorer's text: all of it, but of a command the name of its program alone."""
    *_, (_, last) = parse(spec)
    if not last.startswith(COMMAND):
        return spec
    from crdiff_export.evaluate.scorers.command import name_of, words_of

    return spec.strip().removesuffix(last) + name_of(words_of(last))


def parse(spec: str) -> list[tuple[float, str]]:
    """Split a sum.

    Args:
        spec: What the user wrote.

    Returns:
        The weight and the text of each scorer, at least one.

    Raises:
        OptionError: The text is no sum.
    """
    members: list[tuple[float, str]] = []
    rest, more = spec, True
    while more:
        match = _MEMBER.match(rest)
        assert match
        scorer = match["scorer"].strip()
        if not scorer:
            raise OptionError(f"{spec!r}: a scorer is missing", _SUM_HINT)
        if scorer in [other for _, other in members]:
            raise OptionError(f"{spec!r}: {scorer} is in the sum twice", "Add the two weights.")
        members.append((_weight(spec, match["weight"]), scorer))
        rest, more = rest[match.end() :], bool(match["more"])
    return members


def _weight(spec: str, text: str | None) -> float:
    try:
        weight = 1.0 if text is None else float(text)
    except ValueError:
        weight = 0.0
    if not 0 < abs(weight) < float("inf"):
        raise OptionError(f"{spec!r}: {text!r} is no weight", f"A weight is a number other than 0. {_SUM_HINT}")
    return weight


def _open(text: str, device: str, dtype: str) -> Scorer:
    if text.startswith(COMMAND):
        from crdiff_export.evaluate.scorers.command import CommandScorer

        return CommandScorer(text)
    from crdiff_export.evaluate.scorers import function

    if ":" in text:
        return function.open_function(text, device, dtype)
    _check_name(text)
    return function.as_scorer(text, function.load_entry_point(_entries()[text]), device, dtype)


def _check_name(name: str) -> None:
    if name not in names():
        others = "module:function and command:PROGRAM work as well."
        raise OptionError(f"no scorer is called {name!r}", f"{did_you_mean(name, names(), 'scorers')[:-1]}; {others}")


def _entries() -> dict[str, EntryPoint]:
    """Return what every name stands for, the built-in ones first."""
    built_in = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    installed = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    return built_in | {entry.name: entry for entry in installed if entry.name not in BUILT_IN}
