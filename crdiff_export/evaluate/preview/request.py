"""What to preview, everything that is decided before a weight is read, and the pictures that come of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crdiff_export.evaluate.comparison import ComparisonRequest, Facts, model_name
from crdiff_export.prune.criteria.spec import Spec
from crdiff_export.prune.plan import Plan
from crdiff_export.sampling.drawing_setup import DrawingSetup
from crdiff_export.sizes import Size
from crdiff_export.verify.inspect import provenance
from crdiff_export.verify.reopen import BakedCheckpoint

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class PreviewRequest(ComparisonRequest):
    """Which base to preview, for which size, with which prompts.

    With a `baked` file everything is pruned as in that file, whose size is then the default. Each prompt is drawn from
    the noise of each seed. POA works from the fraction `start` to the fraction `stop` of the steps.
    """

    prompts: tuple[str, ...]
    size: Size | None = None
    seeds: tuple[int, ...] = (0,)
    baked: Path | None = None
    start: float = 0.0
    stop: float = 1.0
    offload: bool = False


@dataclass(frozen=True, slots=True)
class PreviewJob:
    """A request that has been checked and planned. `plan` is that of the base, or of the baked file.

    `weights` are the POA weights of the columns: 0 for the dense model, 1 for the pruned one.
    """

    request: PreviewRequest
    drawing: DrawingSetup
    plan: Plan
    baked: BakedCheckpoint | None
    size: Size
    weights: tuple[float, ...]
    outputs: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """What the models are called."""
        return tuple(map(model_name, self.weights))

    @property
    def rows(self) -> int:
        """How many rows of pictures there are: one for each prompt and seed."""
        return len(self.request.prompts) * len(self.request.seeds)

    @property
    def ratios(self) -> dict[str, float]:
        """The share of each group that the pruned model lacks."""
        return {group: self.plan.ratio(group) for group in self.plan.groups}

    @property
    def provenance(self) -> str:
        """How the ratios came about, as a recipe spells it."""
        return self.baked.stamp.provenance if self.baked else self.plan.variant.provenance

    @property
    def ratios_from(self) -> str:
        """Where the ratios come from, in words."""
        source = self.baked.stamp.provenance_source if self.baked else self.plan.variant.source
        return provenance(self.provenance, source)

    @property
    def criterion(self) -> str:
        """How weights were ranked, as a header spells it."""
        return self.baked.stamp.criterion if self.baked else str(Spec.parse(self.request.criterion))


@dataclass(frozen=True, slots=True)
class PreviewPicture:
    """A picture, the POA weight of its model, and the seconds that drawing took."""

    weight: float
    prompt: str
    seed: int
    image: "Image"
    seconds: float


@dataclass(frozen=True, slots=True)
class Preview:
    """All pictures, row by row, with the facts that a sheet shows above them, and the files they were written to."""

    job: PreviewJob
    pictures: tuple[PreviewPicture, ...]
    steps: int
    guidance: float
    scheduler: str
    facts: Facts
    notes: tuple[str, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that show the pictures."""
        return self.job.outputs
