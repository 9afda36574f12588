"""Float weights that are hard to prune right, and what a plan prunes by default."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tests.support import makers, oracle
from tests.support.family_rows import ROWS
from tests.support.makers import Shape, Tensors

DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
UNET_RATIOS = {"down": 0.13, "mid": 0.42, "up": 0.77}
DIT_RATIOS = {"blocks": 0.37}
DEMO = "demo.diffusers-unet"


def is_dit(table: str) -> bool:
    return "transformer" in table


def default_kinds(table: str) -> tuple[str, ...]:
    return ROWS[table.partition(".")[0]].kinds


def patterns(magnitudes: NDArray[np.int64], dtype: str, rng: np.random.Generator) -> bytes:
    """Magnitude patterns with random signs."""
    size = oracle.FORMATS[dtype].size
    sign = rng.integers(0, 2, len(magnitudes)) << (size * 8 - 1)
    return (magnitudes | sign).astype(f"<u{size}").tobytes()


def ties(rng: np.random.Generator, dtype: str, count: int) -> NDArray[np.int64]:
    """Five magnitudes, neighbours among them."""
    middle = oracle.FORMATS[dtype].finite // 2
    return rng.choice(np.array([1, middle - 1, middle, middle + 1, middle + 3]), count)


def all_equal(rng: np.random.Generator, dtype: str, count: int) -> NDArray[np.int64]:
    return np.full(count, oracle.FORMATS[dtype].finite // 3)


def zeros(rng: np.random.Generator, dtype: str, count: int) -> NDArray[np.int64]:
    return np.zeros(count, np.int64)


def mostly_zero(rng: np.random.Generator, dtype: str, count: int) -> NDArray[np.int64]:
    """As a checkpoint that was pruned before: fewer weights are left than the ratios ask to prune."""
    return rng.integers(0, oracle.FORMATS[dtype].finite, count) * (rng.random(count) < 0.3)


def subnormal(rng: np.random.Generator, dtype: str, count: int) -> NDArray[np.int64]:
    return rng.integers(0, (1 << oracle.FORMATS[dtype].mantissa) + 2, count)


def anything(rng: np.random.Generator, dtype: str, count: int) -> NDArray[np.int64]:
    return rng.integers(0, oracle.FORMATS[dtype].finite, count)


def largest(rng: np.random.Generator, dtype: str, count: int) -> NDArray[np.int64]:
    return oracle.FORMATS[dtype].finite - 1 - rng.integers(0, 3, count)


def carries(rng: np.random.Generator, dtype: str, count: int) -> NDArray[np.int64]:
    """Around multiples of 2**15, where the two levels of a float32 histogram meet."""
    step = min(1 << 15, oracle.FORMATS[dtype].finite // 4)
    return step * rng.integers(1, 4, count) + rng.integers(-2, 3, count)


Fill = Callable[[np.random.Generator, str, int], NDArray[np.int64]]
FILLS: tuple[Fill, ...] = (ties, all_equal, zeros, mostly_zero, subnormal, anything, largest, carries)


def demo(fill: Fill, dtypes: Sequence[str], seed: int = 0) -> dict[str, tuple[str, Shape, bytes]]:
    """The demo UNet with `fill` in every float tensor; tensors get the dtypes by turns."""
    rng = np.random.default_rng(seed)
    made = {}
    for number, (name, (own, shape)) in enumerate(makers.narrow(DEMO, 4).items()):
        dtype = dtypes[number % len(dtypes)] if own in oracle.FORMATS else own
        made[name] = dtype, shape, patterns(fill(rng, dtype, int(np.prod(shape))), dtype, rng)
    return made


# One dtype whose thresholds take two passes, all others by turns, and all together with one threshold.
def spoil(tensors: dict[str, tuple[str, Shape, bytes]], share: float) -> list[str]:
    """Put infinities and NaN of all kinds into the targets; their names."""
    rng = np.random.default_rng(5)
    names = []
    for piece in oracle.expect([tensors], dict.fromkeys(UNET_RATIOS, 0.0), ("attn", "ff")).slices:
        dtype, shape, data = tensors[piece.tensor]
        form = oracle.FORMATS[dtype]
        raw = np.frombuffer(data, f"<u{form.size}").astype(np.int64)
        lost = rng.random(len(raw)) < share
        width = form.size * 8 - 1
        spoiled = rng.integers(form.finite, 1 << width, int(lost.sum())) | (rng.integers(0, 2, lost.sum()) << width)
        spoiled[::3] = form.finite  # infinity, or the only NaN
        raw[lost] = spoiled
        tensors[piece.tensor] = dtype, shape, raw.astype(f"<u{form.size}").tobytes()
        names += [piece.tensor] if lost.any() else []
    return names


def between(tensors: Tensors, odd: int) -> dict[str, tuple[str, Shape, bytes]]:
    """The tensors with others of an odd length, scalars and empty ones between them, so that targets lie anywhere."""
    made: dict[str, tuple[str, Shape, bytes]] = {"first.scalar": ("F32", (), b"\x01\x02\x03\x04")}
    for number, (name, tensor) in enumerate(tensors.items()):
        made[f"odd.{number}"] = "U8", (odd,), bytes(range(1, odd + 1))
        made[f"empty.{number}"] = "F16", (0, 4), b""
        made[name] = tensor
    return made
