"""Pruned output amplification (POA) while sampling, with one copy of the weights: D = (1 - w) * dense + w * pruned.

    from crdiff_export import poa

    poa.enable(pipe, "sdxl-512.safetensors")      # pipe holds the dense base
    image = pipe("a red fox", width=512, height=512).images[0]
    poa.disable(pipe)

`source` makes what POA needs, `masks` prune layers in memory, `handle` puts POA on a model of diffusers by the hooks in
`hooks`, and `layers` compares the model with the checkpoint first. Importing this package imports no torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from crdiff_export.errors import PoaError
from crdiff_export.sampling.poa.mix import Schedule, Weight, mix
from crdiff_export.sampling.poa.source import BaseRanking, Source, from_baked, from_recipe

if TYPE_CHECKING:
    from crdiff_export.sampling.poa.handle import Poa

Mode = Literal["sequential", "batched"]

__all__ = [
    "BaseRanking", "Mode", "Schedule", "Source", "Weight", "disable", "enable", "enabled", "from_baked", "from_recipe",
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
    """Let a model predict with POA from now on, in place of a POA that it may have.

    Args:
        pipe: A diffusers pipeline, or its UNet or transformer alone.
        source: A baked file or folder, or the result of `from_baked`, `from_recipe` or `BaseRanking.source`.
        weight: w, or a function of the fraction of sampling that is done; None takes the weight of the file.
        start: The fraction of sampling at which POA begins. Outside, the model is dense and a step takes one pass.
        stop: The fraction at which it ends.
        mode: `sequential`: two passes; `batched`: one pass over a doubled batch.
        check: Compare the weights that are pruned with the checkpoint, and a baked file with its hash.
        keep: Prune each layer once and keep its pruned weights in memory, which is faster. After a change of weights
            through `.data`, enable POA again.

    Returns:
        The handle, whose `schedule` and `mode` may be replaced between two images.

    Raises:
        PoaError: The model is not the one that the source was made from, or it cannot be pruned in memory.
        VerifyError: The baked file was changed after crdiff wrote it.
        CheckpointError: The file was not made by crdiff, or is damaged.

    """
    from crdiff_export.sampling.poa import handle

    if not isinstance(source, Source | str | Path):
        raise PoaError(
            f"{source!r} is no source for POA", "Give a baked file, or what from_baked or from_recipe gives."
        )
    opened = source if isinstance(source, Source) else from_baked(source)
    schedule = Schedule(opened.weight if weight is None else weight, start, stop)
    present = handle.installed(pipe)
    if present and present.filled:  # the weights are compared as they were loaded
        present.remove()
    poa = handle.Poa(pipe, opened, schedule, mode, check=check, keep=keep)
    disable(pipe)
    poa.install()
    return poa


def disable(pipe: Any) -> None:
    """Take POA off a model, if it has any; its weights are as they were, bit by bit."""
    from crdiff_export.sampling.poa import handle

    if poa := handle.installed(pipe):
        poa.remove()


@contextmanager
def enabled(pipe: Any, source: Source | str | Path, weight: Weight | None = None, **options: Any) -> Iterator["Poa"]:
    """Enable POA inside a `with` block; a block inside another one replaces its POA and ends both.

    Args:
        pipe: A diffusers pipeline, or its UNet or transformer alone.
        source: A source as for `enable`.
        weight: A weight as for `enable`.
        **options: Other arguments of `enable`.

    Yields:
        The handle.

    """
    from crdiff_export.sampling.poa import handle

    poa = enable(pipe, source, weight, **options)
    try:
        yield poa
    finally:
        if handle.installed(poa.model) is poa:
            poa.remove()
