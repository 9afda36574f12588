"""Narrow models whose tensors have several dtypes and lie at odd places."""

import numpy as np

from tests.support import makers
from tests.support.makers import Shape


def unet() -> dict[str, tuple[str, Shape, bytes]]:
    """The demo UNet in five dtypes at odd places, with runs before, between and after the targets that are longer than
    a small chunk."""
    rng = np.random.default_rng(11)
    dtypes = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
    made: dict[str, tuple[str, Shape, bytes]] = {"before": ("U8", (30_001,), rng.bytes(30_001))}
    for number, (name, (_, shape)) in enumerate(makers.narrow("demo.diffusers-unet", 4).items()):
        dtype = dtypes[number % len(dtypes)]
        made[f"odd.{number}"] = "U8", (number % 5,), rng.bytes(number % 5)
        if number % 100 == 50:
            made[f"between.{number}"] = "I64", (5_000,), rng.bytes(40_000)
        made[name] = dtype, shape, makers.weights(name, dtype, shape)
    return made | {"after": ("U8", (50_003,), rng.bytes(50_003))}


def sd3() -> dict[str, tuple[str, Shape, bytes]]:
    """A narrow SD3 in BF16 with its fused layers, behind an odd byte."""
    return {"odd": ("U8", (1,), b"x"), **makers.tiny("sd3-medium.original-transformer", "BF16")}
