"""What a calibration measures and what decides its numbers: names, counts, memory. No weight is read here."""

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

# By the pass that collects them, in the order of the passes.
SAMPLED: Final = ("norm", "gram")
GRADIENT: Final = ("gradient", "gradient_abs", "gradient_square")
NATIVE: Final = tuple(f"native_{name}" for name in GRADIENT)
# src: arXiv 2510.06751, OBS-Diff; its public code (main.py of Alrightlone/OBS-Diff at 3383a4f), `log_decrease`
FIRST_STEP, LAST_STEP = 1.2, 0.8
# Ours: the share of the memory that is free when a pass begins; the rest is for the pass itself.
SHARE: Final = 0.5
# The golden ratio's fraction: multiples of it fill a circle evenly, however many there are (Weyl; Knuth, TAOCP 6.4).
GOLDEN: Final = (math.sqrt(5) - 1) / 2
SAMPLES: Final = 4


@dataclass(frozen=True, slots=True)
class Setting:
    """All that decides the numbers of a calibration, beside the base and the device.

    `pairs` are prompts and the seeds of their noise; `samples` time steps with noise are taken of each one's picture.
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
        if not self.pairs or self.batch < 1 or self.samples < 1:
            raise OptionError("there is nothing to calibrate with", "Give one prompt and one sample at least.")


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A layer by diffusers' name for its weight; `hash` is of its bytes in the base."""

    name: str
    rows: int
    columns: int
    hash: str

    def shape(self, statistic: str) -> tuple[int, ...]:
        """The shape of one of its statistics."""
        return tuple(self.rows if axis == "out" else self.columns for axis in STATISTICS[statistic][1])

    def size(self, statistic: str) -> int:
        """Bytes of one of its statistics."""
        return math.prod(self.shape(statistic)) * BITS[STATISTICS[statistic][0]] // 8


@dataclass(frozen=True, slots=True)
class Room:
    """How much of the statistics is held at once: bytes, layers; what is free decides where nothing is given."""

    memory: int | None = None
    layers: int | None = None


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibration that was written. `resumed` groups of layers were there from a run that was stopped."""

    path: Path
    statistics: tuple[str, ...]
    layers: int
    size: int
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    resumed: int = 0


@dataclass(frozen=True, slots=True)
class Pass:
    """One way through the model that fills `statistics` of a group of layers."""

    title: str
    statistics: tuple[str, ...]
    size: Size

    @property
    def samples_pictures(self) -> bool:
        """Whether it draws; else it takes gradients on pictures that are there."""
        return self.statistics[0] in SAMPLED


def check_statistics(names: Sequence[str]) -> None:
    """CalibrationError for a statistic that nobody collects, OptionError where there is none."""
    if not names:
        raise OptionError("the criteria need no calibration", "Give --criterion wanda, taylor, obs or adverse.")
    for name in names:
        if name not in STATISTICS:
            raise CalibrationError(f"there is no statistic {name!r}", f"There are: {', '.join(STATISTICS)}.")


def passes(setting: Setting) -> tuple[Pass, ...]:
    """What has to be run, in order."""
    kinds = (
        ("sampling", SAMPLED, setting.size),
        ("gradients", GRADIENT, setting.size),
        ("native gradients", NATIVE, setting.native),
    )
    found = []
    for title, known, size in kinds:
        wanted = tuple(name for name in known if name in setting.statistics)
        if wanted:
            found.append(Pass(title, wanted, size))
    return tuple(found)


def groups(
    layers: Sequence[LayerSpec], statistics: Sequence[str], room: Room, free: int
) -> Iterator[tuple[LayerSpec, ...]]:
    """The layers in their order, in groups whose statistics fit; a layer that fits nowhere is a group alone.

    `free` bytes decide where `room` gives none. A gradient needs its own weight's size beside its statistics, twice:
    autograd's, and that in float32.
    """
    limit = room.memory if room.memory is not None else int(free * SHARE)
    extra = 0 if statistics[0] in SAMPLED else 2
    group: list[LayerSpec] = []
    used = 0
    for layer in layers:
        size = sum(map(layer.size, statistics)) + extra * 4 * layer.rows * layer.columns
        full = used + size > limit or (room.layers is not None and len(group) >= room.layers)
        if group and full:
            yield tuple(group)
            group, used = [], 0
        group.append(layer)
        used += size
    if group:
        yield tuple(group)


def step_weight(step: int, steps: int) -> float:
    """OBS-Diff's weight of a step of sampling, from 1.2 for the first to 0.8 for the last.

    alpha_i = 0.8 + (1.2 - 0.8) * ln(N - i) / ln(N), i = 0 .. N-1: the weights 0.8 + 0.4 * ln(1 + i) / ln(N) in reverse,
    as its public code has them (arXiv 2510.06751: weights that decrease with a logarithm). N = 1: 1.2.
    """
    if steps <= 1:
        return FIRST_STEP
    left = steps - min(step, steps - 1)
    return LAST_STEP + (FIRST_STEP - LAST_STEP) * math.log(left) / math.log(steps)


def times(setting: Setting) -> tuple[tuple[float, ...], ...]:
    """For each picture its places in time, in [0, 1): one in each of `samples` equal parts.

    The place within the parts moves on by the golden ratio from picture to picture, from a start that the first seed
    decides, so that all pictures together fill time evenly (a Kronecker sequence; Niederreiter 1992, chapter 3).
    """
    start = random.Random(setting.pairs[0][1]).random()  # noqa: S311  no secret
    shifts = ((start + number * GOLDEN) % 1 for number in range(len(setting.pairs)))
    return tuple(tuple((part + shift) / setting.samples for part in range(setting.samples)) for shift in shifts)


def noise_seed(seed: int, sample: int) -> int:
    """The seed of the noise of a picture's sample, far from those that pictures are drawn from."""
    return int.from_bytes(hashlib.sha256(f"loss {seed} {sample}".encode()).digest()[:8], "little") >> 1


def prompts_hash(pairs: Sequence[tuple[str, int]]) -> str:
    """SHA-256 of the prompts, one a line, in the order of the pictures."""
    return hashlib.sha256("\n".join(prompt for prompt, _ in pairs).encode()).hexdigest()


def facts(setting: Setting, steps: int, guidance: float, scheduler: str, place: Mapping[str, str]) -> dict[str, str]:
    """How the numbers came to be, as it stands in the file's header and decides whether a run may go on."""
    pairs = setting.pairs
    different = len({prompt for prompt, _ in pairs})
    said = {
        "prompts": f"{different}, sha256 {prompts_hash(pairs)}",
        "pictures": str(len(pairs)),
        "seeds": f"{pairs[0][1]} to {pairs[-1][1]}",
        "scheduler": scheduler,
        "steps": str(steps),
        "guidance": f"{guidance:g}",
        "batch": str(setting.batch),
        **place,
    }
    if setting.negative:
        said["negative"] = setting.negative
    if any(name not in SAMPLED for name in setting.statistics):
        said["loss_samples"] = f"{setting.samples} of each picture"
        said["resized"] = "bicubic"
    return said
