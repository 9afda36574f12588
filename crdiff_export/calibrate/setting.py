"""The settings that decide the numbers of a calibration, and the passes and groups of layers that follow from them."""

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crdiff_export.errors import CalibrationError, OptionError
from crdiff_export.formats.safetensors import BITS
from crdiff_export.prune.criteria.calibration import STATISTICS
from crdiff_export.sizes import Size

# The statistics of each pass, in the order of the passes.
SAMPLED: Final = ("norm", "gram")
GRADIENT: Final = ("gradient", "gradient_abs", "gradient_square")
NATIVE: Final = tuple(f"native_{name}" for name in GRADIENT)
# src: arXiv 2510.06751, OBS-Diff; its public code (main.py of Alrightlone/OBS-Diff at 3383a4f), `log_decrease`
FIRST_STEP, LAST_STEP = 1.2, 0.8
# The fraction of the golden ratio: any number of multiples of it fill a circle evenly (Weyl; Knuth, TAOCP 6.4).
GOLDEN: Final = (math.sqrt(5) - 1) / 2
SAMPLES: Final = 4


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything that decides the numbers of a calibration, besides the base and the device.

    Attributes:
        size: The target size in pixels.
        native: The native size in pixels.
        statistics: The statistics to collect.
        pairs: Prompts with the seeds of their noise.
        steps: Sampling steps; by default the pipeline's.
        guidance: The guidance scale; by default the pipeline's.
        negative: The negative prompt.
        batch: Pictures that are drawn at once.
        samples: Samples of the loss (time steps with noise) for each picture.
    """

    size: Size
    native: Size
    statistics: tuple[str, ...]
    pairs: tuple[tuple[str, int], ...]
    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    batch: int = 1
    samples: int = SAMPLES

    def __post_init__(self) -> None:
        check_statistics(self.statistics)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A layer: the diffusers name of its weight, its shape, and the start of the SHA-256 of its bytes in the base."""

    name: str
    rows: int
    columns: int
    hash: str

    def shape(self, statistic: str) -> tuple[int, ...]:
        """Return the shape of a statistic."""
        return tuple(self.rows if axis == "out" else self.columns for axis in STATISTICS[statistic][1])

    def size(self, statistic: str) -> int:
        """Return the bytes of a statistic."""
        return math.prod(self.shape(statistic)) * BITS[STATISTICS[statistic][0]] // 8


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """A written calibration. `resumed` is the number of groups of layers that an interrupted run had finished."""

    path: Path
    statistics: tuple[str, ...]
    layers: int
    size: int
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    resumed: int = 0


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass over the model that collects statistics of a group of layers, at a size."""

    title: str
    statistics: tuple[str, ...]
    size: Size

    @property
    def samples_pictures(self) -> bool:
        """Whether it draws pictures; other passes compute gradients on pictures that exist."""
        return self.statistics[0] in SAMPLED


def check_statistics(names: Sequence[str]) -> None:
    """Check the names of statistics.

    Raises:
        OptionError: The list is empty.
        CalibrationError: A name is unknown.
    """
    if not names:
        raise OptionError("the criteria need no calibration", "Give --criterion wanda, taylor, obs or adverse.")
    for name in names:
        if name not in STATISTICS:
            raise CalibrationError(f"unknown statistic {name!r}", f"There are: {', '.join(STATISTICS)}.")


def passes(setting: Setting) -> tuple[Pass, ...]:
    """Return the passes of a calibration, in order."""
    kinds = (
        ("sampling", SAMPLED, setting.size),
        ("gradients", GRADIENT, setting.size),
        ("native gradients", NATIVE, setting.native),
    )
    selected = [(title, tuple(n for n in names if n in setting.statistics), size) for title, names, size in kinds]
    return tuple(Pass(title, names, size) for title, names, size in selected if names)


def groups(
    layers: Sequence[LayerSpec], statistics: Sequence[str], limit: int, most: int | None = None
) -> Iterator[tuple[LayerSpec, ...]]:
    """Split layers into groups whose statistics fit into memory; a layer that is too large is a group of its own.

    A gradient pass also needs each weight's size twice: for autograd's gradient and for that in float32.

    Args:
        layers: The layers, whose order is kept.
        statistics: The statistics of the pass.
        limit: Bytes of statistics that may be in memory at once.
        most: How many layers a group may have.

    Yields:
        One group after another.
    """
    extra = 0 if statistics[0] in SAMPLED else 2
    group: list[LayerSpec] = []
    used = 0
    for layer in layers:
        size = sum(map(layer.size, statistics)) + extra * 4 * layer.rows * layer.columns
        if group and (used + size > limit or len(group) == most):
            yield tuple(group)
            group, used = [], 0
        group.append(layer)
        used += size
    if group:
        yield tuple(group)


def step_weight(step: int, steps: int) -> float:
    """Compute OBS-Diff's weight of a sampling step, from 1.2 for the first to 0.8 for the last.

    alpha_i = 0.8 + (1.2 - 0.8) * ln(N - i) / ln(N), i = 0 .. N-1: the weights 0.8 + 0.4 * ln(1 + i) / ln(N) in reverse,
    as in its public code (arXiv 2510.06751: weights that decrease logarithmically). 1.2 for N = 1.

    Args:
        step: i, from 0.
        steps: N.

    Returns:
        alpha_i.
    """
    if steps <= 1:
        return FIRST_STEP
    left = steps - min(step, steps - 1)
    return LAST_STEP + (FIRST_STEP - LAST_STEP) * math.log(left) / math.log(steps)


def times(setting: Setting) -> tuple[tuple[float, ...], ...]:
    """Choose the times of the loss samples of each picture, in [0, 1): one in each of `samples` equal intervals.

    The position inside the intervals shifts by the golden ratio from picture to picture, from a start that the first
    seed decides, so that all pictures together fill time evenly (a Kronecker sequence; Niederreiter 1992, chapter 3).
    """
    start = random.Random(setting.pairs[0][1]).random()  # noqa: S311  not a secret
    shifts = ((start + number * GOLDEN) % 1 for number in range(len(setting.pairs)))
    return tuple(tuple((part + shift) / setting.samples for part in range(setting.samples)) for shift in shifts)


def noise_seed(seed: int, sample: int) -> int:
    """Return the seed of the noise of a loss sample, which differs from the seeds of pictures."""
    return int.from_bytes(hashlib.sha256(f"loss {seed} {sample}".encode()).digest()[:8], "little") >> 1


def facts(setting: Setting, steps: int, guidance: float, scheduler: str, origin: Mapping[str, str]) -> dict[str, str]:
    """Describe how the numbers are made, for the file's header and to recognise an interrupted run."""
    pairs = setting.pairs
    prompts = [prompt for prompt, _ in pairs]
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    texts = {
        "prompts": f"{len(set(prompts))}, sha256 {digest}",
        "pictures": str(len(pairs)),
        "seeds": f"{pairs[0][1]} to {pairs[-1][1]}",
        "scheduler": scheduler,
        "steps": str(steps),
        "guidance": f"{guidance:g}",
        "batch": str(setting.batch),
        **origin,
    }
    if setting.negative:
        texts["negative"] = setting.negative
    if any(name not in SAMPLED for name in setting.statistics):
        texts["loss_samples"] = f"{setting.samples} of each picture"
        texts["resized"] = "bicubic"
    return texts
