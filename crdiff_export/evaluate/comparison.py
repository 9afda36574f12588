"""What preview and evaluate share: the same prompts and noise, drawn by the dense model, the pruned one and POA."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from crdiff_export.bake.metadata import tool_version
from crdiff_export.evaluate.beside import Draw
from crdiff_export.export import ExportRequest
from crdiff_export.formats.text import plural, printable
from crdiff_export.models import recipe
from crdiff_export.progress import Progress
from crdiff_export.prune import criterion_choice
from crdiff_export.prune.plan import Plan
from crdiff_export.sampling import pipelines, request_checks
from crdiff_export.sampling.drawing_setup import DrawingSetup
from crdiff_export.sampling.request_checks import DrawingRequest
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from PIL.Image import Image

    from crdiff_export.sampling.session import Session, Style

# POA with weight 0 is the dense model, and with weight 1 the pruned one.
DENSE: Final = 0.0
PRUNED: Final = 1.0

# Names and texts.
Facts = tuple[tuple[str, str], ...]
# A prompt, and the seed of the noise that its picture is drawn from.
Pair = tuple[str, int]


@dataclass(frozen=True, slots=True)
class ComparisonRequest(DrawingRequest):
    """Which pruned model to compare with its base, and where to write what comes of it.

    The ratios come from the recipe or from `ratio` and `ratios`, as in an export; `criterion` and `calibration` are an
    export's, too. `weights` are POA weights; without any, the recipe's own is taken. `beside` names what else to draw.
    Pages show `command`, the command line that made them.
    """

    _: KW_ONLY
    prompts: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    recipe: Path | None = None
    ratio: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    criterion: str = criterion_choice.MAGNITUDE
    calibration: Path | None = None
    beside: tuple[str, ...] = ()
    outputs: tuple[Path, ...] = ()
    force: bool = False
    command: str = ""

    def export_request(self, size: Size) -> ExportRequest:
        """Return the export whose pruned model is drawn; nothing is written, so no file can be in its way."""
        return ExportRequest(
            self.base, size, recipe=self.recipe, ratio=self.ratio, ratios=self.ratios, criterion=self.criterion,
            calibration=self.calibration, variant=self.variant, family=self.family, force=True,
        )  # fmt: skip


def check_request(request: ComparisonRequest) -> None:
    """Raise OptionError or RecipeError for prompts, steps and POA weights that cannot be."""
    request_checks.check(request, request.prompts)
    for weight in request.weights:
        recipe.check_poa_weight("the POA weight", weight)


def model_name(weight: float) -> str:
    """Return what a model is called, by its POA weight."""
    return {DENSE: "dense", PRUNED: "pruned"}.get(weight, f"POA {weight:g}")


def ratios_text(plan: Plan) -> str:
    """Return the ratio of each group in words."""
    return ", ".join(f"{group} {plan.ratio(group):g}" for group in plan.groups)


class Renderer:
    """Draws pictures with one open pipeline, in batches, and tells the progress."""

    def __init__(self, session: "Session", request: DrawingRequest, progress: Progress, batch: int = 1) -> None:
        self.session = session
        self._request, self._progress, self._batch = request, progress, batch

    def style(self, size: Size) -> "Style":
        """Return how pictures of a size are drawn."""
        request = self._request
        return self.session.style(size, request.steps, request.guidance, request.negative)

    def start(self, pairs: int, weights: Iterable[float], size: Size, more: int = 0) -> None:
        """Announce the work: as many pairs, drawn by the models of these POA weights, and `more` passes for each."""
        passes = self.style(size).steps * sum(map(_passes, weights)) + more
        self._progress.stage("drawing", pairs * passes, "passes")

    def draw(
        self, pairs: Sequence[Pair], size: Size, weight: float, draw: Draw | None = None
    ) -> Iterator[tuple[Sequence[Pair], "list[Image]", float]]:
        """Draw pictures with the model as it is now.

        Args:
            pairs: What to draw.
            size: The size of the pictures.
            weight: The POA weight of the model, for the progress.
            draw: Draws a batch in place of the session.

        Yields:
            The pairs of a batch, their pictures, and the seconds that drawing took.
        """
        style = self.style(size)
        for start in range(0, len(pairs), self._batch):
            batch = pairs[start : start + self._batch]
            on_step = partial(self._progress.advance, _passes(weight) * len(batch))
            began = time.monotonic()
            render = draw or self.session.draw
            images = render([prompt for prompt, _ in batch], [seed for _, seed in batch], style, on_step)
            yield batch, images, time.monotonic() - began


def _passes(weight: float) -> int:
    """Return how often the network runs in a step: POA needs the dense and the pruned one."""
    return 1 if weight in (DENSE, PRUNED) else 2


def sampling_facts(style: "Style", session: "Session") -> Iterator[tuple[str, str]]:
    """Yield how pictures are sampled, as name and text."""
    yield "sampling", f"{plural(style.steps, 'step')} of {session.scheduler}, guidance {style.guidance:g}"
    if style.negative:
        yield "negative", style.negative
    if told := pipelines.told_size(session.usage):
        yield "told size", f"{told}, in place of the size drawn"


def closing_facts(notes: Iterable[str], setup: DrawingSetup, more: str = "") -> Iterator[tuple[str, str]]:
    """Yield the notes, where pictures are drawn, and the versions of the programs, as name and text."""
    for note in notes:
        yield "note", note
    yield "drawn on", f"{setup.device}, {setup.dtype}{more}"
    yield "made by", f"crdiff {tool_version()}, diffusers {version('diffusers')}, torch {version('torch')}"


def printable_facts(facts: Iterable[tuple[str, str]]) -> Facts:
    """Return facts whose texts are safe to print and not too long."""
    return tuple((name, printable(text, limit=1000)) for name, text in facts)


def black_note(black: int, total: int) -> tuple[str, ...]:
    """Return a note if some pictures are all black, as an overflow in half precision makes them."""
    if not black:
        return ()
    return (f"{black} of {total} pictures are all black: try another --dtype, such as bf16 or fp32",)
