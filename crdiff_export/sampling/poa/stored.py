"""What a checkpoint holds of the layers that it prunes, as tensors; and what zeros in a model tell of it."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from crdiff_export.formats.safetensors import show
from crdiff_export.prune.plan import Plan, Target
from crdiff_export.sampling.poa.masks import dtypes
from crdiff_export.verify.reopen import BakedCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

# Ours. Of the weights that a file prunes next to none are exactly zero in its base. Where a smaller mask has been at
# work, they are as many as went then.
SPARSE = 0.01


def weights(plan: Plan, most: int | None = None) -> "Iterator[tuple[Target, Tensor]]":
    """The weights of every layer that is pruned, flat, as they are stored; of each at most so many."""
    return _read(plan, ((t, t.source.dtype, *_beginning(t, most)) for t in _pruned(plan)))


def biases(plan: Plan) -> "Iterator[tuple[Target, Tensor]]":
    """The biases of these layers, of those that have one: they are the base's, whatever became of the weights."""
    return _read(plan, _biases(plan))


def sparse(zeros: int, gone: int, baked: BakedCheckpoint) -> str | None:
    """What to say of a model with so many zeros among the weights that a file prunes; None where that is usual.

    It is no refusal, because a base may have zeros of its own, which go with the rest.
    """
    if zeros <= SPARSE * gone:
        return None
    return (
        f"{zeros / gone:.0%} of the weights that {baked.checkpoint.path} prunes are zero in the model already. Unless "
        f"these zeros are its base's own, the model was pruned before; load {show(baked.stamp.source_name)} instead"
    )


def _pruned(plan: Plan) -> Iterator[Target]:
    return (target for target in plan.targets if plan.scopes[target.scope].rank)


def _beginning(target: Target, most: int | None) -> tuple[int, int]:
    start, stop = target.span(target.source)
    return start, stop if most is None else min(stop, start + most * target.source.itemsize)


def _biases(plan: Plan) -> Iterator[tuple[Target, str, int, int]]:
    found = [{spec.name: spec for spec in file.tensors} for file in plan.checkpoint.files]
    for target in _pruned(plan):
        columns = target.source.shape[-1]
        spec = found[target.file].get(f"{target.source.name.removesuffix('weight')}bias")
        if spec and spec.dtype in dtypes() and spec.count * columns == target.source.count:
            first, end = (spec.start + place // columns * spec.itemsize for place in (target.start, target.stop))
            yield target, spec.dtype, first, end


def _read(plan: Plan, spans: Iterable[tuple[Target, str, int, int]]) -> "Iterator[tuple[Target, Tensor]]":
    import torch

    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(contextlib.closing(file.open())) for file in plan.checkpoint.files]
        for target, dtype, start, stop in spans:
            data = bytearray(stop - start)
            readers[target.file].read_into(start, memoryview(data))
            yield target, torch.frombuffer(data, dtype=dtypes()[dtype])
