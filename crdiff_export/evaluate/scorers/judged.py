"""The demo's judge as a scorer: exact, without weights, for the prompts of the demo language alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from crdiff_export.errors import CrdiffError, ScorerError
from crdiff_export.evaluate.scorers.score import Score, Scorer

if TYPE_CHECKING:
    from PIL.Image import Image

    from crdiff_export.models.demo.scenes import Scene


class Judged:
    """The value is the judge's score; the parts are its parts that the scene has, and `right`: 1 or 0."""

    name = "demo"

    def score(self, images: "Sequence[Image]", prompts: Sequence[str]) -> list[Score]:
        import numpy as np

        from crdiff_export.evaluate.scorers import demo_scorer as judging

        scenes = [_scene(prompt) for prompt in prompts]  # all of them before the first is judged
        scores = []
        for image, scene in zip(images, scenes, strict=True):
            found = asdict(judging.judge(np.asarray(image.convert("RGB")), scene))
            value = found.pop("score")
            scores.append(Score(value, {part: float(grade) for part, grade in found.items() if grade is not None}))
        return scores

    def fingerprint(self) -> dict[str, str]:
        """The judge's and the scenes' program text, for it is all that decides."""
        import numpy as np

        from crdiff_export.bake.metadata import tool_version
        from crdiff_export.evaluate.scorers import demo_scorer as judging
        from crdiff_export.models.demo import drawing, scenes

        text = b"".join(Path(str(module.__file__)).read_bytes() for module in (judging, scenes, drawing))
        digest = hashlib.sha256(text.replace(b"\r\n", b"\n")).hexdigest()
        return {"name": self.name, "judge": f"sha256:{digest}", "crdiff": tool_version(), "numpy": np.__version__}

    def close(self) -> None:
        """It holds nothing."""


def demo(device: str, dtype: str) -> Scorer:  # noqa: ARG001  every factory gets both
    """The judge; it runs on the CPU and in its own precision, whatever is asked for."""
    return Judged()


def _scene(prompt: str) -> "Scene":
    from crdiff_export.models.demo.scenes import Scene

    try:
        return Scene.parse(prompt)
    except CrdiffError as error:
        raise ScorerError(f"demo: {error.message}", error.hint) from error
