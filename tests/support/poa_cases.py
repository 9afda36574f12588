"""Pipelines of random weights with exports of them, for tests of POA; and the public code's way, with two models."""

import copy
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from crdiff_export import ExportRequest, Size, export
from crdiff_export.export import plan_variant
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.prune.plan import Plan
from tests.support import makers, masking
from tests.support.tiny_pipelines import FAMILIES, KINDS

SD15 = KINDS["sd15"]
SIZE = Size(512, 512)
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


class Case:
    """A pipeline, its base, and exports of it by any criterion."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.kind = name, folder, KINDS[name]
        self.pipe = self.kind.make()
        self.base = self.kind.save(self.pipe, folder)
        self._baked: dict[str, Path] = {}

    @property
    def model(self) -> nn.Module:
        """The UNet or transformer."""
        model: nn.Module = getattr(self.pipe, self.kind.part)
        return model

    @cached_property
    def calibration(self) -> Path:
        """A calibration of random numbers for the base."""
        kinds = ("ff", "attn") if self.name in ("sd3", "flux") else ("attn", "ff")
        plan = plan_variant(ExportRequest(str(self.base), SIZE, ratio=0.3, targets=kinds), open_checkpoint(self.base))
        content = makers.read(self.base)
        statistics, digests = {}, {}
        for number, target in enumerate(plan.targets):
            name = target.source.name
            statistics[name] = masking.layer_statistics(number, *target.source.shape)
            digests[name] = hashlib.sha256(content[name][2]).hexdigest()[:16]
        path = self.folder / "calibration.safetensors"
        return masking.write_calibration(path, statistics, digests, FAMILIES[self.name])

    def request(self, criterion: str = "magnitude", **options: Any) -> ExportRequest:
        """An export of the base without an output."""
        calibration = self.calibration if criterion.startswith(("wanda", "obs")) else None
        settings = {"ratio": 0.4, "calibration": calibration, "native": SIZE, **options}
        return ExportRequest(str(self.base), SIZE, criterion=criterion, **settings)

    def baked(self, criterion: str = "magnitude", **options: Any) -> Path:
        """The file of this export, written once."""
        key = f"{criterion} {options}"
        if key not in self._baked:
            name = "-".join(re.findall(r"[\w.=]+", key))  # which does not depend on the order of tests
            output = self.folder / f"{name}.safetensors"
            self._baked[key] = export(replace(self.request(criterion, **options), output=output)).written.path
        return self._baked[key]

    def plan(self, criterion: str = "magnitude", **options: Any) -> Plan:
        """The plan of this export."""
        return plan_variant(self.request(criterion, **options), open_checkpoint(self.base))


def sd15_with(path: Path) -> Any:
    """An SD1 pipeline with the weights of a file."""
    pipe = SD15.make()
    pipe.unet.load_state_dict(safetensors.torch.load_file(path))
    return pipe


def inputs(batch: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Arguments of an SD1 UNet."""
    return torch.randn(batch, 4, 8, 8).to(dtype), 500, torch.randn(batch, 5, 768).to(dtype)


def pruned_copy(model: nn.Module, baked: Path) -> nn.Module:
    """A second model with a file's weights; those of an adapter are the model's own."""
    other = copy.deepcopy(model)
    missing, unexpected = other.load_state_dict(safetensors.torch.load_file(baked), strict=False)
    assert not unexpected
    assert all("_ip" in name or "image_proj" in name for name in missing)
    return other


@contextmanager
def two_models(model: nn.Module, other: nn.Module, weight: float) -> Iterator[None]:
    """Let a model predict as the public code does (POAUnetWrapper): both models predict, the formula mixes."""
    dense: Callable[..., Any] = type(model).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        ours = dense(model, *copy.copy(args), **copy.copy(kwargs))[0]
        theirs = dense(other, *args, **kwargs)[0]
        return ((1 - weight) * ours + weight * theirs if weight != 1 else theirs,)

    model.forward = forward
    yield
    del model.forward


def lora(seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA on pruned layers and on others."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in (
        LAYER,
        LAYER.replace("to_q", "to_out.0"),
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    ):
        rows = 64 if "ff" in layer else 8
        weights[f"unet.{layer}.lora_A.weight"] = torch.randn(2, 8, generator=generator)
        weights[f"unet.{layer}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    return weights
