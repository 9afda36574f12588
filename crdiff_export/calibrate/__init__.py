"""Calibrations: statistics of a model's layers at a size, collected by running the model, and stored in a file.

This module has the whole story: plan, open the pipeline, collect in groups of layers (`runner.py`), write. Criteria
read the file (`prune/criteria/calibration.py`); docs/calibration.md specifies it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crdiff_export.calibrate import folder
from crdiff_export.calibrate.setting import SAMPLES, CalibrationResult, Setting, check_statistics
from crdiff_export.errors import OptionError
from crdiff_export.export import ExportRequest
from crdiff_export.hub import bases
from crdiff_export.models.demo.scenes import Scene
from crdiff_export.progress import Progress, Silent
from crdiff_export.prune.criteria.calibration import STATISTICS
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.plan import Plan
from crdiff_export.sampling import drawing_setup, pipelines, prompts, request_checks
from crdiff_export.sampling.drawing_setup import DrawingSetup
from crdiff_export.sampling.request_checks import DrawingRequest
from crdiff_export.sizes import Size

# Ours: with this many prompts of the demo model Wanda's norms and mean gradients are stable (docs/calibration.md).
PROMPTS: Final = 16


@dataclass(frozen=True, slots=True)
class CalibrateRequest(DrawingRequest):
    """A request for a calibration.

    Attributes:
        size: The target size in pixels.
        criteria: The criteria whose statistics are needed.
        output: The file to write; by default STEM-WxH-calibration.safetensors in the current folder.
        prompts: What to draw; for the demo models scenes by default.
        limit: The number of prompts to use.
        pictures: Pictures of each prompt; their seeds count up from `seed`.
        seed: The first seed.
        samples: Samples of the loss for each picture.
        targets: The kinds of layers; by default the family's.
        batch: Pictures that are drawn at once.
        memory: Bytes of statistics that may be in memory at once; changes no number.
        layers: Layers that may be measured at once; changes no number.
        force: Whether to replace an existing output.
        rehash: Hash the base anew, whatever the user's cache of hashes says.
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
    rehash: bool = False


@dataclass(frozen=True, slots=True)
class CalibrationJob:
    """A checked request: the base is found, its headers are read, and the plan is made."""

    request: CalibrateRequest
    drawing: DrawingSetup
    plan: Plan
    setting: Setting
    target: Path
    notes: tuple[str, ...]


def calibrate(request: CalibrateRequest, progress: Progress | None = None) -> CalibrationResult:
    """Collect the statistics and write them.

    Args:
        request: What to collect.
        progress: Told of every stage.

    Returns:
        The written calibration.

    Raises:
        CrdiffError: Something is wrong; finished groups of layers are kept, and the same request goes on with them.
    """
    return run(prepare(request), progress or Silent())


def prepare(request: CalibrateRequest) -> CalibrationJob:
    """Find the base, read its headers and plan; whatever can be refused is refused before a weight is read.

    Raises:
        OptionError: The request is impossible.
    """
    _check(request)
    wanted = statistics(request.criteria)
    pipelines.check_packages(offload=False)
    demo = request.base in bases.BUILT_IN
    if not (request.prompts or demo):
        raise OptionError(*request_checks.NO_PROMPTS)
    headers = drawing_setup.read_base(request)
    exported = ExportRequest(
        request.base, request.size, targets=request.targets, variant=request.variant, family=request.family, force=True
    )
    planned = drawing_setup.plan_export(headers, exported)
    stem = headers.base.stem or headers.checkpoint.stem
    target = request.output or Path(f"{stem}-{request.size}-calibration.safetensors")
    folder.check_target(target, planned, force=request.force)
    pairs = _pairs(request)
    if demo:
        for prompt, _ in pairs:
            Scene.parse(prompt)
    request_checks.check_seeds(pairs[-1][1])
    set_up = drawing_setup.set_up(request, headers, planned)
    from crdiff_export.sampling import session

    batch = request.batch or session.usual_batch(set_up.opening.pipeline, set_up.device)
    setting = Setting(
        request.size, set_up.native, wanted, pairs, request.steps, request.guidance, request.negative, batch,
        request.samples,
    )  # fmt: skip
    return CalibrationJob(request, set_up, planned, setting, target, planned.notes)


def run(job: CalibrationJob, progress: Progress) -> CalibrationResult:
    """Open the base once, collect, and write.

    Args:
        job: The result of `prepare`.
        progress: Told of every stage.

    Returns:
        The written calibration.
    """
    from crdiff_export.calibrate import runner
    from crdiff_export.sampling.session import Placement, open_session

    request, drawing = job.request, job.drawing
    placement = Placement(drawing.device, drawing.dtype, advice="a smaller --batch or --memory")
    with open_session(drawing.opening, placement, drawing.base.name) as opened:
        return runner.collect(
            opened, job.plan, job.setting, job.target, progress,
            base=drawing.base.name, memory=request.memory, layers=request.layers, replace=request.force,
            identity=runner.identify(job.plan, progress, rehash=request.rehash) if request.rehash else None,
        )  # fmt: skip


def statistics(specs: Sequence[str]) -> tuple[str, ...]:
    """Return the statistics that criteria need, in the order of STATISTICS.

    Raises:
        OptionError: No criterion is given, one is unknown, or none of them needs a calibration.
    """
    if not specs:
        raise OptionError("no criterion is given", "Give --criterion: wanda, taylor, obs or adverse.")
    needed = {name for text in specs for name in CriterionChoice.load(text).statistics}
    check_statistics(sorted(needed))
    return tuple(name for name in STATISTICS if name in needed)


def _pairs(request: CalibrateRequest) -> tuple[tuple[str, int], ...]:
    """Return prompts with the seeds of their noise; for a demo model scenes that no evaluation uses."""
    given = tuple(dict.fromkeys(request.prompts))[: request.limit]
    chosen = given or prompts.to_search(request.limit or PROMPTS, request.base)
    return tuple(
        (prompt, request.seed + number * request.pictures + picture)
        for number, prompt in enumerate(chosen)
        for picture in range(request.pictures)
    )


def _check(request: CalibrateRequest) -> None:
    """Refuse a request that is impossible for any base."""
    request_checks.check(request, request.prompts)
    counts = (request.limit, request.pictures, request.samples, request.batch, request.layers, request.memory)
    if any(count is not None and count < 1 for count in counts) or request.seed < 0:
        raise OptionError("a number is too small", "Count prompts, pictures, samples and bytes from 1, seeds from 0.")


__all__ = [
    "CalibrateRequest",
    "CalibrationJob",
    "CalibrationResult",
    "Setting",
    "calibrate",
    "prepare",
    "run",
    "statistics",
]  # fmt: skip
