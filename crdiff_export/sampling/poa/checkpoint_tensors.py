"""The pruned layers of a checkpoint as tensors, and the comparisons of a model's weights with them."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from crdiff_export.errors import PoaError
from crdiff_export.formats.dtypes import torch_dtypes
from crdiff_export.formats.safetensors import show
from crdiff_export.prune.plan import Plan, Target
from crdiff_export.verify import BakedCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

# Our choice. Hardly any of the weights that a file prunes are exactly zero in its base. In a model that was pruned
# with a smaller mask, all weights of that mask are.
SPARSE = 0.01


def read_weights(plan: Plan, most: int | None = None) -> "Iterator[tuple[Target, Tensor]]":
    """Read the weights of every pruned layer.

    Args:
        plan: A plan of the checkpoint.
        most: How many elements to read of each layer at most.

    Yields:
        Each target and its weights, flat, in the dtype of the file.

    """
    return _read(plan, ((t, t.source.dtype, *_beginning(t, most)) for t in _pruned(plan)))


def read_biases(plan: Plan) -> "Iterator[tuple[Target, Tensor]]":
    """Read the biases of the pruned layers that have one; a baked file has those of its base."""
    return _read(plan, _biases(plan))


def equal(a: "Tensor", b: "Tensor") -> "Tensor":
    """Compare elementwise; NaN equals NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def matches(loaded: "Tensor", stored: "Tensor", scale: float | None) -> "Tensor":
    """Compare a model's weights elementwise with those of a checkpoint.

    A loader of codes with a scale rounds twice, the scale and the product, and may do so in bfloat16 whatever dtype the
    model has then. So the weights may differ by that.

    Args:
        loaded: The weights in memory, flat.
        stored: The weights of the checkpoint, or their codes, on any device.
        scale: The scale of the codes; None for plain weights.

    Returns:
        bool, True for weights that agree.

    """
    import torch

    if scale is None:
        return equal(loaded, stored.to(loaded.device, loaded.dtype))
    numbers, codes, limits = loaded.cpu().double(), stored.cpu().double(), torch.finfo(loaded.dtype)
    relative, smallest = 1.5 * torch.finfo(torch.bfloat16).eps, limits.smallest_normal * limits.eps
    bound = relative * (codes * scale).abs() + (codes.abs() + 1) * smallest
    same: Tensor = ((numbers - codes * scale).abs() <= bound) | (numbers.isnan() & codes.isnan())
    return same.to(loaded.device)


def sparse_warning(zeros: int, pruned: int, baked: BakedCheckpoint) -> str | None:
    """Warn of a dense model with unusually many zeros.

    A base may have zeros of its own, so this is no error.

    Args:
        zeros: How many weights are zero in the model and in the file.
        pruned: How many are zero in the file.
        baked: The file.

    Returns:
        The warning, or None if there are few zeros.

    """
    if zeros <= SPARSE * pruned:
        return None
    share, path = f"{zeros / pruned:.0%}", baked.checkpoint.path
    return (
        f"{share} of the weights that {path} prunes are zero in the model already. Unless these zeros are its "
        f"base's own, the model was pruned before; load {show(baked.stamp.source_name)} instead"
    )


def prunes_nothing(path: Path) -> PoaError:
    """Make the error for a source whose ratios are all 0."""
    return PoaError(
        f"{path}: prunes nothing, as all of its ratios are 0",
        "Its pruned model is the dense one; take a file or a recipe that prunes something.",
    )


def other_base(name: str, path: Path, base: str | None) -> PoaError:
    """Make the error for a model that is not the base of a file.

    Args:
        name: The name of the weight that differs.
        path: The file.
        base: The name of the base that it was made from; None if it is the base itself.

    Returns:
        The error.

    """
    source = f"{path}" if base is None else f"{show(base)}, which {path} was made from"
    return PoaError(
        f"the weights of {name.removesuffix('.weight').removesuffix('.bias')} are not those of {source}",
        "Load that base as it was published, without a fused LoRA.",
    )


def _pruned(plan: Plan) -> Iterator[Target]:
    return (target for target in plan.targets if plan.scopes[target.scope].rank)


def _beginning(target: Target, most: int | None) -> tuple[int, int]:
    start, stop = target.span(target.source)
    return start, stop if most is None else min(stop, start + most * target.source.itemsize)


def _biases(plan: Plan) -> Iterator[tuple[Target, str, int, int]]:
    tensors = [{spec.name: spec for spec in file.tensors} for file in plan.checkpoint.files]
    for target in _pruned(plan):
        columns = target.source.shape[-1]
        spec = tensors[target.file].get(f"{target.source.name.removesuffix('weight')}bias")
        if spec and spec.dtype in torch_dtypes() and spec.count * columns == target.source.count:
            start, stop = (spec.start + index // columns * spec.itemsize for index in (target.start, target.stop))
            yield target, spec.dtype, start, stop


def _read(plan: Plan, spans: Iterable[tuple[Target, str, int, int]]) -> "Iterator[tuple[Target, Tensor]]":
    import torch

    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(contextlib.closing(file.open())) for file in plan.checkpoint.files]
        for target, dtype, start, stop in spans:
            data = bytearray(stop - start)
            readers[target.file].read_into(start, memoryview(data))
            yield target, torch.frombuffer(data, dtype=torch_dtypes()[dtype])
