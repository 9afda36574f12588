"""Target weights as tensors: read from the checkpoint, cast to the dtype that will be written, and back to raw bits."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crdiff_export.errors import CalibrationError
from crdiff_export.formats.weight_file import Bytes, SourceFile
from crdiff_export.prune.criteria import selection
from crdiff_export.prune.criteria.decision import Mask
from crdiff_export.prune.criteria.spec import SCORED, Spec
from crdiff_export.prune.plan import Target

_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_LESS = "Ask for more damping (obs:damping=0.1), for none of it (obs:compensate=off)"


@dataclass(frozen=True, slots=True)
class Weights:
    """One target's weights.

    `bits` are flat, raw, in the output dtype. `values` is float32 [out, in] on the device, 0 for what is not finite.
    `broken` marks that and `zero` what is +0.0 or -0.0, both None where there is none.
    """

    bits: NDArray[Any]
    values: Tensor
    broken: Tensor | None
    zero: Tensor | None


class Reader:
    """Reads targets of a checkpoint's files, each file opened once."""

    def __init__(self, files: Sequence[SourceFile], device: torch.device) -> None:
        self._files, self._device = files, device
        self._open: dict[int, Bytes] = {}

    def raw(self, target: Target) -> memoryview:
        """The bytes of a target as the base holds them."""
        if target.file not in self._open:
            self._open[target.file] = self._files[target.file].open()
        start, stop = target.span(target.source)
        data = memoryview(bytearray(stop - start))
        self._open[target.file].read_into(start, data)
        return data

    def weights(self, target: Target, data: memoryview) -> Weights:
        """The weights that a target's bytes are, in the dtype that will be written."""
        source, output = target.source.dtype, target.output.dtype
        if source != output:
            from crdiff_export.prune.kernels.cast import cast

            data = memoryview(cast(data, source, output))
        bits = np.frombuffer(data, f"u{target.output.itemsize}")
        written = torch.frombuffer(data, dtype=_DTYPES[output]).to(self._device)
        values = written.to(torch.float32).reshape(-1, target.source.shape[-1])
        zero, broken = values == 0, None
        if not selection.finite(values):
            broken = ~torch.isfinite(values)
            values = values.masked_fill(broken, 0.0)
        return Weights(bits, values, broken, zero if bool(zero.any()) else None)

    def close(self) -> None:
        """Close the files; they are opened again when they are needed."""
        for file in self._open.values():
            file.close()
        self._open = {}


@contextmanager
def reading(files: Sequence[SourceFile], device: torch.device) -> Iterator[Reader]:
    """A reader that is closed at the end."""
    reader = Reader(files, device)
    try:
        yield reader
    finally:
        reader.close()


def digest(data: memoryview) -> str:
    """The SHA-256 of a weight's bytes as hex."""
    return hashlib.sha256(data).hexdigest()


def rounded(
    target: Target, layer: str, weights: Weights, mask: Tensor, moved: Tensor, spec: Spec
) -> tuple[Mask, NDArray[Any]]:
    """Weights after compensation as raw bits in the output dtype, to nearest even, and the mask of their zeros.

    What goes is +0.0, and so is what rounds to zero, which joins the mask: the file's zeros are the mask. What is not
    finite keeps its bits. CalibrationError where the criterion has moved a weight to what is no number or beyond what
    the dtype holds, and where what it gives is no weight for each.
    """
    dtype, ours = target.output.dtype, spec.name in SCORED
    if moved.shape != weights.values.shape:
        raise CalibrationError(
            f"{layer}: compensation by {spec} gives {list(moved.shape)} for weights of {list(weights.values.shape)}",
            "Each weight needs one; ask whoever made the criterion.",
        )
    exact = moved.to("cpu", torch.float32)
    written = exact.to(_DTYPES[dtype])
    again = written.float()
    broken = torch.zeros_like(again, dtype=torch.bool) if weights.broken is None else weights.broken.cpu()
    gone = (mask.cpu() | (again == 0)) & ~broken
    stays = ~broken & ~gone
    if not selection.finite(again):
        odd, over = (int((~torch.isfinite(values) & stays).sum()) for values in (exact, again))
        if odd:
            raise CalibrationError(
                f"{layer}: compensation by {spec} makes {odd} weights that are not finite",
                _LESS + "." if ours else "Ask whoever made the criterion.",
            )
        if over:
            raise CalibrationError(
                f"{layer}: compensation by {spec} makes {over} weights larger than {dtype} holds",
                f"{_LESS}, or for --dtype fp32." if ours else "Ask for --dtype fp32, or whoever made the criterion.",
            )
    bits = written.flatten().view(torch.uint8).numpy().view(weights.bits.dtype).copy()
    bits[gone.flatten().numpy()] = 0
    kept = broken.flatten().numpy()
    bits[kept] = weights.bits[kept]
    return Mask.pack(gone.numpy()), bits
