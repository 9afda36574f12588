"""A weighted sum of scorers."""

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
        answers = [scorer.score(images, prompts) for _, scorer in self._members]
        return [self._sum(scores) for scores in zip(*answers, strict=True)]

    def _sum(self, scores: Sequence[Score]) -> Score:
        """Add the members' scores of one picture."""
        total, parts = 0.0, {}
        for (weight, scorer), score in zip(self._members, scores, strict=True):
            total += weight * score.value
            parts[scorer.name] = score.value
            parts |= {f"{scorer.name}.{part}": value for part, value in score.parts.items()}
        return Score(total, parts)

    def fingerprint(self) -> dict[str, str]:
        record = {"name": self.name}
        for number, (weight, scorer) in enumerate(self._members, 1):
            record[f"{number}.weight"] = repr(weight)
            record |= {f"{number}.{key}": value for key, value in scorer.fingerprint().items()}
        return record

    def close(self) -> None:
        for _, scorer in self._members:
            scorer.close()
