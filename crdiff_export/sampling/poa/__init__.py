"""Pruned output amplification while sampling, with one copy of the weights: D = (1 - w) * dense + w * pruned.

    from crdiff_export import poa

    poa.enable(pipe, "sdxl-512.safetensors")      # pipe holds the dense base
    image = pipe("a red fox", width=512, height=512).images[0]
    poa.disable(pipe)

Importing this package imports no torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from crdiff_export.errors import PoaError
from crdiff_export.sampling.poa.mix import Schedule, Weight, mix
from crdiff_export.sampling.poa.source import Counted, Source, from_baked, from_recipe

if TYPE_CHECKING:
    from crdiff_export.sampling.poa.sampling import Poa

Mode = Literal["sequential", "batched"]

__all__ = [
    "Counted", "Mode", "Schedule", "Source", "Weight", "disable", "enable", "enabled", "from_baked", "from_recipe",
    "mix",
]  # fmt: skip


def enable(
    pipe: Any,
    source: Source | str | Path,
    weight: Weight | None = None,
    *,
    start: float = 0.0,
    stop: float = 1.0,
    mode: Mode = "sequential",
    check: bool = True,
    keep: bool = False,
) -> "Poa":
    """Have a diffusers pipeline, or its UNet or transformer alone, predict with POA from now on.

    `source` is a baked file or what `from_baked` and `from_recipe` give. `weight` is a number, or a function of the
    fraction of sampling that is done; None takes the file's own. Outside `start` to `stop` the model stays dense and
    costs one pass. The weights that are pruned are compared with the checkpoint first, and a baked file with its hash;
    `check=False` trusts both. `keep=True` prunes each layer once and holds its pruned weights, which is
    faster where there is room for them; who changes weights through `.data` then has to enable POA again.
    PoaError if they are of another model, VerifyError or CheckpointError for a file that is not as crdiff wrote it.
    """
    from crdiff_export.sampling.poa import sampling

    if not isinstance(source, Source | str | Path):
        raise PoaError(
            f"{source!r} is no source for POA", "Give a baked file, or what from_baked or from_recipe gives."
        )
    found = source if isinstance(source, Source) else from_baked(source)
    schedule = Schedule(found.weight if weight is None else weight, start, stop)
    return sampling.enable(pipe, found, schedule, mode=mode, check=check, keep=keep)


def disable(pipe: Any) -> None:
    """Take POA off again: the weights are those that they were, bit by bit. Without POA nothing happens."""
    from crdiff_export.sampling.poa import sampling

    sampling.disable(pipe)


@contextmanager
def enabled(pipe: Any, source: Source | str | Path, weight: Weight | None = None, **options: Any) -> Iterator["Poa"]:
    """`enable` for the length of a `with` block; within another one's it takes its place, and then both are over."""
    from crdiff_export.sampling.poa import sampling

    poa = enable(pipe, source, weight, **options)
    try:
        yield poa
    finally:
        sampling.take_off(poa)
