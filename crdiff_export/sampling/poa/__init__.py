"""Pruned output amplification (POA) while sampling, with one copy of the weights: D = (1 - w) * dense + w * pruned.

    from crdiff_export import poa

    poa.enable(pipe, "sdxl-512.safetensors")      # pipe holds the dense base
    image = pipe("a red fox", width=512, height=512).images[0]
    poa.disable(pipe)

    poa.enable(pipe, "sdxl.crdiff")               # a pack: follows the size of every picture
    poa.prune(pipe, "sdxl.crdiff")                # the pruned model alone, as fast as the dense one

`source` makes what POA needs, `masks` prune layers in memory, `handle` puts POA on a model of diffusers by the hooks in
`hooks`, and `layers` compares the model with the checkpoint first. `follow` takes from a pack what the size of each
picture needs; `in_place` prunes the weights where they are. Importing this package imports no torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from crdiff_export.errors import PoaError
from crdiff_export.packs import Pack, find_pack, open_pack
from crdiff_export.sampling.poa.mix import Schedule, Weight, mix
from crdiff_export.sampling.poa.source import BaseRanking, Source, from_baked, from_recipe
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from crdiff_export.sampling.poa.handle import ModelHandle

AnySource = Source | Pack | str | Path
Mode = Literal["sequential", "batched"]

__all__ = [
    "BaseRanking", "Mode", "Schedule", "Source", "Weight", "disable", "enable", "enabled", "from_baked", "from_recipe",
    "mix", "prune",
]  # fmt: skip


def enable(
    pipe: Any,
    source: AnySource,
    weight: Weight | None = None,
    *,
    size: Size | str | None = None,
    start: float = 0.0,
    stop: float = 1.0,
    mode: Mode = "sequential",
    check: bool = True,
    keep: bool = False,
) -> "ModelHandle":
    """Let a model predict with POA from now on, in place of a POA that it may have.

    Args:
        pipe: A diffusers pipeline, or its UNet or transformer alone.
        source: A baked file or folder, a pack (its path or `hf://ORG/NAME/FILE.crdiff`), or the result of `from_baked`,
            `from_recipe` or `BaseRanking.source`.
        weight: w, or a function of the fraction of sampling that is done; None takes the weight of the file, of a pack
            that of the size.
        size: The pack's size to take, whatever is drawn; None to follow the size of each picture.
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
        PackError: The pack is damaged, or has no such size.

    """
    from crdiff_export.sampling.poa import follow, handle

    opened = _open(source)
    chosen = _size(opened, size)
    _remove_changes(pipe)
    poa: ModelHandle
    if isinstance(opened, Pack):
        poa = follow.PackPoa(pipe, opened, weight, start, stop, mode, size=chosen, check=check, keep=keep)
    else:
        schedule = Schedule(opened.weight if weight is None else weight, start, stop)
        poa = handle.Poa(pipe, opened, schedule, mode, check=check, keep=keep)
    disable(pipe)
    poa.install()
    return poa


def prune(pipe: Any, source: AnySource, size: Size | str | None = None, *, check: bool = True) -> "ModelHandle":
    """Let a model be the pruned one from now on, as fast as the dense one: its weights are pruned where they are.

    Args:
        pipe: A diffusers pipeline, or its UNet or transformer alone.
        source: A source as for `enable`.
        size: The pack's size to take; None to follow the size of each picture. Other sources have one size.
        check: Compare the weights with the source first.

    Returns:
        The handle. `disable` makes the model dense again, bit by bit.

    Raises:
        PoaError: The model is not the base of the source, or cannot be pruned in memory.
        PackError: The pack is damaged, or has no such size.
        CrdiffError: The source cannot be read.

    """
    from crdiff_export.sampling.poa import follow

    opened = _open(source)
    if isinstance(opened, Pack):
        return enable(pipe, opened, 1.0, size=size, check=check)
    _size(opened, size)
    _remove_changes(pipe)
    pruned = follow.PrunedModel(pipe, opened, check=check)
    disable(pipe)
    pruned.install()
    return pruned


def disable(pipe: Any) -> None:
    """Make a model dense again and take POA off it, if it has any; its weights are as they were, bit by bit."""
    from crdiff_export.sampling.poa import handle

    if poa := handle.installed(pipe):
        poa.remove()


def _open(source: AnySource) -> Source | Pack:
    """Open a baked file or a pack, which may be on the Hub."""
    if isinstance(source, Source | Pack):
        return source
    if not isinstance(source, str | Path):
        raise PoaError(
            f"{source!r} is no source for POA", "Give a baked file, a pack, or what from_baked or from_recipe gives."
        )
    path = find_pack(source)
    return from_baked(source) if path is None else open_pack(path)


def _size(source: Source | Pack, size: Size | str | None) -> Size | None:
    """Read a size, and check that the source has it."""
    chosen = Size.parse(size) if isinstance(size, str) else size
    if chosen is None:
        return None
    if not isinstance(chosen, Size):
        raise PoaError(f"{size!r} is no size", 'Write it as a text, such as "512" or "400x560".')
    if not isinstance(source, Pack):
        raise PoaError(f"size {chosen}: {source.path} is for one size alone", "Leave the size out, or give a pack.")
    source.check_size(chosen)
    return chosen


def _remove_changes(pipe: Any) -> None:
    """Make a model dense whose weights were changed: they are compared as they were loaded."""
    from crdiff_export.sampling.poa import handle

    present = handle.installed(pipe)
    if present and present.changes_weights:
        present.remove()


@contextmanager
def enabled(pipe: Any, source: AnySource, weight: Weight | None = None, **options: Any) -> Iterator["ModelHandle"]:
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
