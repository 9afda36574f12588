"""Target weights as tensors in the dtype that will be written, and changed weights as raw bits again."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crdiff_export.errors import CalibrationError
from crdiff_export.formats.dtypes import torch_dtypes
from crdiff_export.prune.criteria import selection
from crdiff_export.prune.criteria.decision import Mask
from crdiff_export.prune.criteria.spec import SCORED, Spec
from crdiff_export.prune.plan import Target

_LESS = "Ask for more damping (obs:damping=0.1), for none of it (obs:compensate=off)"


@dataclass(frozen=True, slots=True)
class Weights:
    """One target's weights.

    Attributes:
        bits: Raw bits in the output dtype, flat.
        values: float32 [out, in] on the device, 0 in place of values that are not finite.
        broken: bool [out, in], True for values that are not finite; None if all are finite.
        zero: bool [out, in], True for +0.0 and -0.0; None if no value is zero.
    """

    bits: NDArray[Any]
    values: Tensor
    broken: Tensor | None
    zero: Tensor | None


def to_weights(target: Target, data: memoryview, device: torch.device) -> Weights:
    """Convert the bytes of a target in the base to weights in the dtype that will be written."""
    source, output = target.source.dtype, target.output.dtype
    if source != output:
        from crdiff_export.prune.kernels.cast import cast

        data = memoryview(cast(data, source, output))
    bits = np.frombuffer(data, f"u{target.output.itemsize}")
    written = torch.frombuffer(data, dtype=torch_dtypes()[output]).to(device)
    values = written.to(torch.float32).reshape(target.shape)
    if target.scale is not None:
        values = values * target.scale
    zero, broken = values == 0, None
    if not selection.finite(values):
        broken = ~torch.isfinite(values)
        values = values.masked_fill(broken, 0.0)
    return Weights(bits, values, broken, zero if bool(zero.any()) else None)


def rounded(target: Target, weights: Weights, mask: Tensor, moved: Tensor, spec: Spec) -> tuple[Mask, NDArray[Any]]:
    """Round compensated weights to raw bits in the output dtype, to nearest even, and return the mask of their zeros.

    Pruned weights are +0.0. Weights that round to zero join the mask, because the file's zeros are the mask. Weights
    that are not finite keep their bits. A CalibrationError is raised if the criterion returned another shape, or a
    weight that is not finite or too large for the dtype.
    """
    layer, dtype, ours = target.layer.diffusers, target.output.dtype, spec.name in SCORED
    if moved.shape != weights.values.shape:
        raise CalibrationError(
            f"{layer}: compensation by {spec} gives {list(moved.shape)} for weights of {list(weights.values.shape)}",
            "Each weight needs one; ask whoever made the criterion.",
        )
    exact = moved.to("cpu", torch.float32)
    written = exact.to(torch_dtypes()[dtype])
    again = written.float()
    broken = torch.zeros_like(again, dtype=torch.bool) if weights.broken is None else weights.broken.cpu()
    zeros = (mask.cpu() | (again == 0)) & ~broken
    stays = ~broken & ~zeros
    if not selection.finite(again):
        nonfinite, over = (int((~torch.isfinite(values) & stays).sum()) for values in (exact, again))
        if nonfinite:
            raise CalibrationError(
                f"{layer}: compensation by {spec} makes {nonfinite} weights that are not finite",
                _LESS + "." if ours else "Report it to the criterion's author.",
            )
        if over:
            raise CalibrationError(
                f"{layer}: compensation by {spec} makes {over} weights larger than {dtype} holds",
                f"{_LESS}, or for --dtype fp32." if ours else "Ask for --dtype fp32, or whoever made the criterion.",
            )
    bits = written.flatten().view(torch.uint8).numpy().view(weights.bits.dtype).copy()
    bits[zeros.flatten().numpy()] = 0
    unchanged = broken.flatten().numpy()
    bits[unchanged] = weights.bits[unchanged]
    return Mask.pack(zeros.numpy()), bits
