"""Packs of small pipelines, with what each of their sizes should predict."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crdiff_export import ExportRequest, Size, export
from crdiff_export.packs import create, open_pack
from crdiff_export.progress import Silent
from crdiff_export.prune.plan_request import PlanRequest
from tests.support.poa_cases import Case, pruned_copy, two_models

NATIVE = Size(1024, 1024)
# By size of the picture: the ratio, and the weight of POA.
NUMBERS = {Size(64, 64): (0.2, 1.5), Size(96, 64): (0.35, 2.25), Size(128, 128): (0.5, 0.75)}
SIZES = tuple(NUMBERS)


def write_pack(path: Path, base: Path, criterion: str = "magnitude", **options: Any) -> Path:
    """A pack of a base for all SIZES."""
    target = path
    for number, (size, (ratio, weight)) in enumerate(NUMBERS.items()):
        plan = PlanRequest(
            str(base), size, ratio=ratio, poa_weight=weight, criterion=criterion, native=NATIVE, **options
        )
        request = create.PackRequest((plan,), target)
        job = create.prepare_more(request, open_pack(target)) if number else create.prepare_new(request)
        create.make(job, Silent())
    return target


class PackCase:
    """A pipeline, the pack of its base, and for each size the exported file."""

    def __init__(self, name: str, folder: Path, criterion: str = "magnitude") -> None:
        self.case, self.criterion = Case(name, folder), criterion
        self.kind, self.folder = self.case.kind, folder
        self.pack = write_pack(folder / "base.crdiff", self.case.base, criterion)

    @cached_property
    def baked(self) -> dict[Size, Path]:
        """The export of each size."""
        return {size: self._export(size) for size in SIZES}

    def _export(self, size: Size) -> Path:
        ratio, weight = NUMBERS[size]
        request = ExportRequest(
            str(self.case.base), size, self.folder / f"{size}.safetensors", ratio=ratio, poa_weight=weight,
            criterion=self.criterion, native=NATIVE,
        )  # fmt: skip
        return export(request).written.path

    def make(self) -> Any:
        """A new pipeline with the base's weights."""
        return self.kind.make()

    def model(self, pipe: Any) -> nn.Module:
        """Its UNet or transformer."""
        model: nn.Module = getattr(pipe, self.kind.part)
        return model

    def run(self, pipe: Any, size: Size, **options: Any) -> torch.Tensor:
        """Latents of a picture of this size."""
        return self.kind.run(pipe, height=size.height, width=size.width, **options)

    def expected(self, size: Size, weight: float | None = None) -> torch.Tensor:
        """What two models and the formula predict."""
        pipe = self.make()
        other = pruned_copy(self.model(pipe), self.baked[size])
        with two_models(self.model(pipe), other, NUMBERS[size][1] if weight is None else weight):
            return self.run(pipe, size)


def bits(model: nn.Module) -> dict[str, bytes]:
    """All weights of a model, bit by bit."""
    return {name: value.cpu().numpy().tobytes() for name, value in model.state_dict().items()}
