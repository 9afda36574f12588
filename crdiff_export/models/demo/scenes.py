"""The scenes that the demo model can draw: one to three plain shapes, each scene with one prompt that describes it.

Each prompt has exactly one scene, so that a prompt can be parsed and a picture can be scored.
Three kinds: "a large red circle on white", "two red circles on white", "a red circle left of a blue square on white".
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal, Self

from crdiff_export.errors import CrdiffError

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["single", "counted", "related"]
Colour = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle")
# Any two are at least 97 apart in RGB, so that noise and blur do not change one into another.
COLOURS: dict[str, Colour] = {
    "red": (215, 30, 40),
    "green": (40, 165, 60),
    "blue": (40, 75, 215),
    "yellow": (250, 225, 40),
    "purple": (150, 45, 185),
    "orange": (240, 130, 20),
}
BACKGROUNDS: dict[str, Colour] = {"white": (245, 245, 245), "black": (15, 15, 15), "grey": (128, 128, 128)}
SIZES = ("small", "large")
COUNTS = {"two": 2, "three": 3}
# Each relation with its inverse, which describes the same picture with the two things swapped.
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# The relations that the model has learnt. Trained with the inverses as well, it learnt the axis soon, but not in two
# hours which thing is where, because each thing is on either side in half of the pictures.
LEARNT = ("left of", "above")
SHARES: dict[Kind, float] = {"single": 0.2, "counted": 0.2, "related": 0.6}

EXAMPLE = "a red circle left of a blue square on white"


@dataclass(frozen=True, slots=True, order=True)
class Thing:
    """One shape of one colour, once or several times; only a single thing has a size."""

    shape: str
    colour: str
    size: str = ""
    count: int = 1

    @property
    def phrase(self) -> str:
        """Its words, such as "a large red circle" or "two red circles"."""
        what = f"{self.size} {self.colour} {self.shape}".lstrip()
        number = next((word for word, count in COUNTS.items() if count == self.count), "an" if what[0] == "o" else "a")
        return f"{number} {what}s" if self.count > 1 else f"{number} {what}"


@dataclass(frozen=True, slots=True, order=True)
class Scene:
    """Things on a background; where it has two kinds of things, `first` is in `relation` to `second`."""

    background: str
    first: Thing
    relation: str = ""
    second: Thing | None = None

    @property
    def kind(self) -> Kind:
        """The form of its prompt."""
        if self.second:
            return "related"
        return "counted" if self.first.count > 1 else "single"

    @property
    def learnt(self) -> bool:
        """Whether the model was trained with all of its words."""
        return not self.relation or self.relation in LEARNT

    @property
    def things(self) -> tuple[Thing, ...]:
        """Every single shape of the picture, those of the first thing before the second."""
        alone = (Thing(self.first.shape, self.first.colour, self.first.size),) * self.first.count
        return (*alone, self.second) if self.second else alone

    @property
    def prompt(self) -> str:
        """The prompt of this scene."""
        between = f" {self.relation} {self.second.phrase}" if self.second else ""
        return f"{self.first.phrase}{between} on {self.background}"

    @property
    def combination(self) -> str:
        """A text shared with the scenes that differ only in the background, or in the thing that is named first."""
        other = self.second
        if other and self.relation in ("right of", "below"):
            return f"{other.phrase} {RELATIONS[self.relation]} {self.first.phrase}"
        return self.prompt.removesuffix(f" on {self.background}")

    @classmethod
    def parse(cls, prompt: str) -> Self:
        """Parse a prompt.

        Raises:
            CrdiffError: The text is not a prompt of the demo model.
        """
        found = _PROMPT.fullmatch(prompt)
        scene = cls(found["background"], *cls._things(found)) if found else None
        if scene and scene.prompt == prompt and scene.first != scene.second:
            return scene
        unknown = [word for word in prompt.split() if word not in vocabulary()]
        if unknown:
            reason = f"it does not know {', '.join(unknown)}"
        elif scene and scene.first == scene.second:
            reason = "its two things are the same"
        else:
            reason = "it does not know this order of words"
        raise CrdiffError(
            f'"{prompt}" is not a prompt of the demo model: {reason}',
            f'Write it like "{EXAMPLE}", of these words: {", ".join(vocabulary())}.',
        )

    @staticmethod
    def _things(found: re.Match[str]) -> tuple[Thing] | tuple[Thing, str, Thing]:
        """Return the first thing and, if present, the relation and the second thing."""
        first = Thing(found["shape"], found["colour"], found["size"] or "", COUNTS.get(found["many"], 1))
        return (first, found["relation"], Thing(found["shape2"], found["colour2"])) if found["relation"] else (first,)


def _prompts() -> str:
    """Return a regular expression of all prompts."""

    def any_of(words: Sequence[str] | dict[str, Colour] | dict[str, int] | dict[str, str]) -> str:
        return "|".join(words)

    shape, colour = any_of(SHAPES), any_of(COLOURS)
    many = f"(?P<many>{any_of(COUNTS)}) "
    second = f" (?P<relation>{any_of(RELATIONS)}) an? (?P<colour2>{colour}) (?P<shape2>{shape})"
    start = f"(?:an? (?:(?P<size>{any_of(SIZES)}) )?|{many})(?P<colour>{colour}) (?P<shape>{shape})"
    # A plural follows only a number; a second thing is there if, and only if, the first has neither number nor size.
    end = f"(?(many)s|(?(size)|{second}))"
    return f"{start}{end} on (?P<background>{any_of(BACKGROUNDS)})"


_PROMPT = re.compile(_prompts())


def vocabulary() -> tuple[str, ...]:
    """Return every word of the prompts, sorted."""
    relations = {word for relation in RELATIONS for word in relation.split()}
    plurals = {f"{shape}s" for shape in SHAPES}
    return tuple(sorted({"a", "an", "on", *SHAPES, *plurals, *COLOURS, *BACKGROUNDS, *SIZES, *COUNTS, *relations}))


def all_scenes() -> Iterator[Scene]:
    """Yield every scene, always in the same order."""
    pairs = list(product(SHAPES, COLOURS))
    for background in BACKGROUNDS:
        for shape, colour in pairs:
            yield from (Scene(background, Thing(shape, colour, size)) for size in SIZES)
            yield from (Scene(background, Thing(shape, colour, count=count)) for count in COUNTS.values())
        for first, relation, second in product(pairs, RELATIONS, pairs):
            if first != second:
                yield Scene(background, Thing(*first), relation, Thing(*second))


def split(held_out: float = 0.1) -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
    """Split all scenes into training scenes and held-out scenes, which training never sees on any background.

    No held-out scene is a training scene with its two things named in the other order.

    Args:
        held_out: The share of held-out scenes.

    Returns:
        The training scenes and the held-out scenes.
    """
    train: list[Scene] = []
    test: list[Scene] = []
    for scene in all_scenes():
        number = int.from_bytes(hashlib.sha256(scene.combination.encode()).digest()[:6])
        (test if number < held_out * 2**48 else train).append(scene)
    return tuple(train), tuple(test)


def sample(rng: "np.random.Generator", scenes: Sequence[Scene], count: int = 1) -> list[Scene]:
    """Choose scenes at random: each kind with its share of `SHARES`, each scene of a kind with the same probability.

    Args:
        rng: Decides the choice.
        scenes: The scenes to choose from.
        count: How many to choose; a scene can be chosen again.

    Returns:
        The chosen scenes.
    """
    kinds: dict[Kind, list[Scene]] = {}
    for scene in scenes:
        kinds.setdefault(scene.kind, []).append(scene)
    names = list(kinds)
    total = sum(SHARES[name] for name in names)
    chosen = rng.choice(len(names), count, p=[SHARES[name] / total for name in names])
    return [kinds[names[i]][int(rng.integers(len(kinds[names[i]])))] for i in chosen]
