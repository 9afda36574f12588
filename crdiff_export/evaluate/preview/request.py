"""What to preview, everything that is decided before a weight is read, and the pictures that come of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crdiff_export.evaluate.beside import Rival, RivalSizes
from crdiff_export.evaluate.comparison import ComparisonRequest, Facts, Pair, model_name
from crdiff_export.evaluate.request import Subject
from crdiff_export.models.evidence_text import evidence_text
from crdiff_export.prune.criteria.spec import Spec
from crdiff_export.sampling.drawing_setup import DrawingSetup
from crdiff_export.sizes import Size
from crdiff_export.verify import BakedCheckpoint
from crdiff_export.verify.inspect import provenance

if TYPE_CHECKING:
    from PIL.Image import Image

    from crdiff_export.sampling.session import Style


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
    """A request that has been checked and planned. The subject's plan is that of the base, or of the baked file.

    Its weights are the columns: 0 for the dense model, 1 for the pruned one, others for POA.
    """

    request: PreviewRequest
    drawing: DrawingSetup
    subject: Subject
    baked: BakedCheckpoint | None
    outputs: tuple[Path, ...]
    notes: tuple[str, ...]
    rivals: tuple[Rival, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """What the models are called, and what is drawn beside them."""
        return (*map(model_name, self.subject.weights), *(rival.name for rival in self.rivals))

    @property
    def setting(self) -> RivalSizes:
        """What rivals have to know."""
        return RivalSizes(self.drawing.native, self.subject.size, self.subject.plan.match.family.grid)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The prompt and the seed of each row of pictures."""
        return tuple((prompt, seed) for prompt in self.request.prompts for seed in self.request.seeds)

    @property
    def provenance(self) -> str:
        """How the ratios came about, as a recipe spells it."""
        return self.baked.stamp.provenance if self.baked else self.subject.plan.variant.provenance

    @property
    def borrowed_from(self) -> Size | None:
        """The size that the ratios were found for, where they are taken for another one."""
        return self.baked.stamp.borrowed_from if self.baked else self.subject.plan.variant.borrowed_from

    @property
    def ratios_from(self) -> str:
        """Where the ratios come from, in words."""
        source = self.baked.stamp.provenance_source if self.baked else self.subject.plan.variant.source
        return provenance(self.provenance, source, self.borrowed_from)

    @property
    def evidence(self) -> str:
        """What was measured of the ratios, in a sentence; empty if nothing was."""
        if self.baked:
            return evidence_text(self.baked.stamp.evidence) if self.baked.stamp.evidence else ""
        evidence = self.subject.plan.variant.evidence
        return evidence_text(evidence.values()) if evidence else ""

    @property
    def criterion(self) -> str:
        """How weights were ranked, as a header spells it."""
        return self.baked.stamp.criterion if self.baked else str(Spec.parse(self.request.criterion))


@dataclass(frozen=True, slots=True)
class PreviewPicture:
    """A picture, its column, the POA weight of its model, and the seconds that drawing took."""

    column: str
    weight: float
    prompt: str
    seed: int
    image: "Image"
    seconds: float


@dataclass(frozen=True, slots=True)
class Preview:
    """All pictures, row by row, how they were sampled, and the facts that a sheet shows above them."""

    job: PreviewJob
    pictures: tuple[PreviewPicture, ...]
    style: "Style"
    scheduler: str
    facts: Facts
    notes: tuple[str, ...]
