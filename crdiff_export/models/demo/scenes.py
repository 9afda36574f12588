"""The scenes that the demo models can draw: one to three plain shapes, each scene with one prompt that describes it.

Each prompt has exactly one scene, so that a prompt can be parsed and a picture can be scored.
Three kinds: "a large red circle on white", "two red circles on white", "a red circle left of a blue square on white".
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Literal

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

    @staticmethod
    def parse(prompt: str) -> "Scene":
        """Parse a prompt.

        Raises:
            CrdiffError: The text is not a prompt of the demo model.
        """
        scene = _by_prompt().get(prompt)
        if scene and scene.first != scene.second:
            return scene
        unknown = [word for word in prompt.split() if word not in vocabulary()]
        if unknown:
            reason = f"it does not know {', '.join(unknown)}"
        elif scene:
            reason = "its two things are the same"
        else:
            reason = "it does not know this order of words"
        raise CrdiffError(
            f'"{prompt}" is not a prompt of the demo model: {reason}',
            f'Write it like "{EXAMPLE}", of these words: {", ".join(vocabulary())}.',
        )


@cache
def vocabulary() -> tuple[str, ...]:
    """Return every word of the prompts, sorted."""
    return tuple(sorted({word for prompt in _by_prompt() for word in prompt.split()}))


def all_scenes() -> Iterator[Scene]:
    """Yield every scene, always in the same order."""
    return (scene for scene in _by_prompt().values() if scene.first != scene.second)


@cache
def _by_prompt() -> dict[str, Scene]:
    """Map every prompt to its scene, those of two things that are the same included."""
    scenes: list[Scene] = []
    pairs = list(product(SHAPES, COLOURS))
    for background in BACKGROUNDS:
        for shape, colour in pairs:
            scenes += (Scene(background, Thing(shape, colour, size)) for size in SIZES)
            scenes += (Scene(background, Thing(shape, colour, count=count)) for count in COUNTS.values())
        for first, relation, second in product(pairs, RELATIONS, pairs):
            scenes.append(Scene(background, Thing(*first), relation, Thing(*second)))
    return {scene.prompt: scene for scene in scenes}


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


def with_relations(scenes: Iterable[Scene], relations: Collection[str]) -> tuple[Scene, ...]:
    """Choose scenes by their relations.

    Args:
        scenes: The scenes to choose from.
        relations: The relations that may be in them.

    Returns:
        The scenes that have one of these relations, or none.
    """
    return tuple(scene for scene in scenes if not scene.relation or scene.relation in relations)


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
