"""What a model's layers see, and how its loss changes with their weights, at a size: measured once, kept in a file.

The whole story, as in `export.py`: plan, open the pipeline, collect in groups of layers (`runner.py`), write. Criteria
read the file (`criteria/calibration.py`); docs/calibration.md says what is in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crdiff_export.calibrate import folder
from crdiff_export.calibrate.setting import SAMPLES, Calibrated, Room, Setting, check_statistics
from crdiff_export.errors import OptionError
from crdiff_export.export import ExportRequest
from crdiff_export.hub import bases
from crdiff_export.models.demo.scenes import Scene
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune import criteria
from crdiff_export.prune.criteria.calibration import STATISTICS
from crdiff_export.prune.plan import Plan
from crdiff_export.sampling import drawing_setup, pipelines, prompts, request_checks
from crdiff_export.sampling.drawing_setup import DrawingSetup
from crdiff_export.sampling.request_checks import DrawingRequest
from crdiff_export.sizes import Size

# Ours: Wanda's norms and a gradient's mean are steady with that many of the demo model's (docs/calibration.md).
PROMPTS: Final = 16


@dataclass(frozen=True, slots=True)
class CalibrateRequest(DrawingRequest):
    """What someone wants: the statistics of which criteria, of which base, at which size, on which prompts.

    Each prompt is drawn `pictures` times; the seeds count up from `seed`. `samples` is how often the loss is taken of
    each picture. `memory` bytes and `layers` bound what is held at once, and change no number.
    """

    size: Size
    criteria: tuple[str, ...] = ()
    output: Path | None = None
    prompts: tuple[str, ...] = ()
    limit: int | None = None
    pictures: int = 1
    seed: int = 0
    samples: int = SAMPLES
    targets: tuple[str, ...] | None = None
    batch: int | None = None
    memory: int | None = None
    layers: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A request that nothing stands against."""

    request: CalibrateRequest
    drawing: DrawingSetup
    plan: Plan
    setting: Setting
    target: Path
    notes: tuple[str, ...]

    @property
    def room(self) -> Room:
        """What may be held at once."""
        return Room(self.request.memory, self.request.layers)


def calibrate(request: CalibrateRequest, progress: Progress | None = None) -> Calibrated:
    """Collect and write; raises a CrdiffError if it cannot, and then keeps the groups of layers that are finished."""
    return run(prepare(request), progress or Silent())


def prepare(request: CalibrateRequest) -> Job:
    """Find the base, read its headers and plan; any refusal comes from here, before a weight is read."""
    _check(request)
    wanted = statistics(request.criteria)
    pipelines.check_packages(offload=False)
    demo = request.base == bases.BUILT_IN
    if not (request.prompts or demo):
        raise OptionError("there are no prompts", "Give --prompts FILE, one a line.")
    found = drawing_setup.find(request)
    exported = ExportRequest(request.base, request.size, targets=request.targets, variant=request.variant, force=True)
    planned = drawing_setup.planned(found, exported)
    stem = found.base.stem or found.checkpoint.stem
    target = request.output or Path(f"{stem}-{request.size}-calibration.safetensors")
    folder.check_target(target, planned, force=request.force)
    pairs = _pairs(request)
    if demo:
        for prompt, _ in pairs:
            Scene.parse(prompt)
    request_checks.check_seeds(pairs[-1][1])
    set_up = drawing_setup.set_up(request, found, planned)
    from crdiff_export.sampling import session

    batch = request.batch or session.usual_batch(found.match.family.id, set_up.device)
    setting = Setting(
        request.size, set_up.native, wanted, pairs, request.steps, request.guidance, request.negative, batch,
        request.samples,
    )  # fmt: skip
    return Job(request, set_up, planned, setting, target, planned.notes)


def run(job: Job, progress: Progress) -> Calibrated:
    """Open the base once, collect, and write."""
    from crdiff_export.calibrate import runner
    from crdiff_export.sampling.session import Place, session

    family, drawing = job.plan.match.family.id, job.drawing
    place = Place(drawing.device, drawing.dtype, advice="a smaller --batch or --memory")
    with session(drawing.opening, family, place, drawing.base.name) as opened:
        return runner.collect(
            opened, job.plan, job.setting, job.target, progress,
            base=drawing.base.name, room=job.room, replace=job.request.force,
        )  # fmt: skip


def statistics(specs: Sequence[str]) -> tuple[str, ...]:
    """What some criteria need, in our order; a CrdiffError for a criterion that is none or needs nothing we have."""
    if not specs:
        raise OptionError("there is no criterion", "Give --criterion: wanda, taylor, obs or adverse.")
    needed = {name for text in specs for name in criteria.load(text).statistics}
    check_statistics(sorted(needed))
    return tuple(name for name in STATISTICS if name in needed)


def _pairs(request: CalibrateRequest) -> tuple[tuple[str, int], ...]:
    """Prompts and the seeds of their noise; scenes for the demo model, which a check of what is found never sees."""
    given = tuple(dict.fromkeys(request.prompts))[: request.limit]
    chosen = given or prompts.to_search(request.limit or PROMPTS)
    return tuple(
        (prompt, request.seed + number * request.pictures + picture)
        for number, prompt in enumerate(chosen)
        for picture in range(request.pictures)
    )


def _check(request: CalibrateRequest) -> None:
    """Refuse what the request alone shows to be impossible."""
    request_checks.check(request, request.prompts)
    counts = (request.limit, request.pictures, request.samples, request.batch, request.layers)
    if any(count is not None and count < 1 for count in counts) or request.seed < 0:
        raise OptionError("a number is too small", "Count prompts, pictures and samples from 1, seeds from 0.")
    if request.memory is not None and request.memory < 1:
        raise OptionError("no memory is no room for a statistic", "Give --memory 4GB, or leave it out.")


__all__ = [
    "CalibrateRequest", "Calibrated", "Job", "Room", "Setting", "calibrate", "prepare", "run", "statistics",
]  # fmt: skip
