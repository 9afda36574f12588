"""The protocol of a scorer, the scorer by a function, and a check of answers: a finite score for each picture."""

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from crdiff_export.errors import ScorerError, foreign_errors

if TYPE_CHECKING:
    from PIL.Image import Image

    # Gives a number for each picture and its prompt.
    Compute = Callable[[Sequence[Image], Sequence[str]], Any]

# The hint for a scorer whose code raises.
SCORER_HINT: Final = "Correct the scorer, or ask its author."
# A larger score is a fault; sums and squares of it would overflow.
LARGEST: Final = 1e100


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one picture: `value` is finite, and higher is better; `parts` are what it was made of, if known."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


class Scorer(Protocol):
    """Gives each picture a score for its prompt, the same whatever other pictures are scored with it."""

    name: str

    def score(self, images: "Sequence[Image]", prompts: Sequence[str]) -> list[Score]:
        """Score pictures.

        Args:
            images: PIL pictures, of any size and mode.
            prompts: The prompt of each picture.

        Returns:
            A score for each picture, in their order.
        """
        ...

    def fingerprint(self) -> dict[str, str]:
        """Return all that the numbers depend on: two scorers with the same fingerprint may be compared."""
        ...

    def close(self) -> None:
        """Free what the scorer holds; it may be called twice, and nothing may be scored after it."""
        ...


class FunctionScorer:
    """A scorer by a function, which gets at most `batch` pictures at once; `record` is its fingerprint."""

    def __init__(self, record: dict[str, str], compute: "Compute", batch: int | None = None) -> None:
        self.name = record["name"]
        self._record, self._batch = record, batch
        self._compute: Compute | None = compute

    def score(self, images: "Sequence[Image]", prompts: Sequence[str]) -> list[Score]:
        assert self._compute
        values: list[float] = []
        batch = self._batch or len(images)
        for start in range(0, len(images), batch):
            with foreign_errors(ScorerError, self.name, SCORER_HINT):
                answer = self._compute(images[start : start + batch], prompts[start : start + batch])
                listed = None if isinstance(answer, Mapping | str | bytes) else _listed(answer)
            if listed is None:
                message = f"{self.name}: gives {type(answer).__name__}, no list of numbers"
                raise ScorerError(message, "Return one finite number for each picture.")
            values += listed
        return [Score(value) for value in values]

    def fingerprint(self) -> dict[str, str]:
        return dict(self._record)

    def close(self) -> None:
        self._compute = None  # which may hold a network


def _listed(answer: Any) -> list[Any] | None:
    """Make a list of an answer, such as an array; None if it is not iterable."""
    try:
        return list(answer)
    except TypeError:
        return None


class Checked:
    """A scorer whose answers can be trusted: one for each picture, every number finite; ScorerError otherwise."""

    def __init__(self, scorer: Scorer) -> None:
        with foreign_errors(ScorerError, type(scorer).__name__, SCORER_HINT):
            self.name = scorer.name
        self._scorer = scorer

    def score(self, images: "Sequence[Image]", prompts: Sequence[str]) -> list[Score]:
        with foreign_errors(ScorerError, self.name, SCORER_HINT):
            scores = self._scorer.score(images, prompts)
        if not isinstance(scores, list) or not all(isinstance(score, Score) for score in scores):
            raise ScorerError(f"{self.name}: its answer is no list of scores", "Return one `Score` for each picture.")
        if len(scores) != len(images):
            message = f"{self.name}: {len(scores)} scores for {len(images)} pictures"
            raise ScorerError(message, "Return one score for each picture.")
        for number, score in enumerate(scores, 1):
            for name, value in {"the score": score.value, **score.parts}.items():
                if not is_finite(value):
                    raise ScorerError(
                        f"{self.name}: {name} of picture {number} is {value!r}",
                        "A score must be a finite number; with fp16 a model can overflow, with fp32 it does not.",
                    )
        return [Score(float(score.value), score.parts) for score in scores]

    def fingerprint(self) -> dict[str, str]:
        with foreign_errors(ScorerError, self.name, SCORER_HINT):
            return dict(self._scorer.fingerprint())

    def close(self) -> None:
        with foreign_errors(ScorerError, self.name, SCORER_HINT):
            self._scorer.close()


def is_finite(value: object) -> bool:
    """Whether a value is a number that can be a score; a truth value, a text and a list of one number are none."""
    is_complex = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    if isinstance(value, bool | str | bytes) or is_complex or bool(getattr(value, "ndim", 0)):
        return False
    try:
        return abs(float(value)) <= LARGEST  # type: ignore[arg-type]  # anything but a number raises
    except (TypeError, ValueError, OverflowError):
        return False
