"""Import torchvision, also where its build does not match torch's."""

from typing import Any

import torch

# A library's operators are gone when it is collected.
_LIBRARIES: list[Any] = []


def import_torchvision() -> None:
    """Import torchvision, and declare its operators if its build is for another torch. No check computes with them."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # an operator is missing
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
