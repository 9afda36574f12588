"""A sum of scorers, each with a weight."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from crdiff_export.evaluate.scorers.score import Score, Scorer

if TYPE_CHECKING:
    from PIL.Image import Image


class Weighted:
    """The sum of weight times value; `parts` has each member's value by its name, and its own parts as `name.part`."""

    def __init__(self, name: str, members: Sequence[tuple[float, Scorer]]) -> None:
        self.name = name
        self._members = tuple(members)

    def score(self, images: "Sequence[Image]", prompts: Sequence[str]) -> list[Score]:
        columns = [(weight, scorer.name, scorer.score(images, prompts)) for weight, scorer in self._members]
        scores = []
        for place in range(len(images)):
            parts: dict[str, float] = {}
            for _, name, column in columns:
                parts[name] = column[place].value
                parts |= {f"{name}.{part}": value for part, value in column[place].parts.items()}
            scores.append(Score(sum(weight * parts[name] for weight, name, _ in columns), parts))
        return scores

    def fingerprint(self) -> dict[str, str]:
        found = {"name": self.name}
        for number, (weight, scorer) in enumerate(self._members, 1):
            found[f"{number}.weight"] = repr(weight)
            found |= {f"{number}.{key}": value for key, value in scorer.fingerprint().items()}
        return found

    def close(self) -> None:
        for _, scorer in self._members:
            scorer.close()
