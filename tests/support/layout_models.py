"""Diffusers pipelines of every kind whose layout can be changed, with next to no width, saved as folders."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from crdiff_export.models import demo
from tests.support import tiny_pipelines
from tests.support.tiny_pipelines import Kind


def text_encoder(cls: Any, layers: int, width: int = 16) -> Any:
    """A text encoder with the demo's vocabulary."""
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2, vocab_size=599,
        max_position_embeddings=32, projection_dim=width, bos_token_id=597, eos_token_id=598, pad_token_id=598,
    )  # fmt: skip
    return cls(config)


Clip, Projected = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection


@dataclass(frozen=True)
class Folder:
    """A kind of pipeline, and the text encoders that its folder has."""

    kind: Kind
    encoders: Callable[[], dict[str, Any]] = dict

    def save(self, folder: Path, *, variant: str | None = None, shards: str = "10GB", seed: int = 0) -> Path:
        """Write the folder with random weights in fp16, and what a pipeline needs beside them."""
        pipe = self.kind.make()
        torch.manual_seed(1)
        components = {**pipe.components, **self.encoders()}
        for name, component in components.items():
            if isinstance(component, torch.nn.Module):
                if seed:
                    next(component.parameters()).data += seed
                halved: Any = component.half()
                halved.save_pretrained(folder / name, variant=variant, max_shard_size=shards)
        pipe.scheduler.save_pretrained(folder / "scheduler")
        for name in self.encoders():
            tokenizer = name.replace("text_encoder", "tokenizer")
            shutil.copytree(demo.config() / "tokenizer", folder / tokenizer)
        index = dict(pipe.config)
        for name in (*self.encoders(), *(each.replace("text_encoder", "tokenizer") for each in self.encoders())):
            index[name] = (
                "transformers",
                "CLIPTokenizer" if name.startswith("tokenizer") else type(components[name]).__name__,
            )
        pipe._internal_dict = diffusers.configuration_utils.FrozenDict(index)
        pipe.save_config(folder)
        return folder


KINDS = tiny_pipelines.KINDS
UNETS: dict[str, Folder] = {
    "sd15": Folder(KINDS["sd15"], lambda: {"text_encoder": text_encoder(Clip, 2)}),
    "sd15-inpainting": Folder(KINDS["inpaint"], lambda: {"text_encoder": text_encoder(Clip, 2)}),
    "sd15-edit": Folder(
        Kind(partial(tiny_pipelines.unet, 768, in_channels=8), KINDS["sd15"].pipe, tiny_pipelines.sd),
        lambda: {"text_encoder": text_encoder(Clip, 2)},
    ),
    "sd21": Folder(KINDS["sd21"], lambda: {"text_encoder": text_encoder(Clip, 23)}),
    "sdxl": Folder(
        KINDS["sdxl"],
        lambda: {"text_encoder": text_encoder(Clip, 2), "text_encoder_2": text_encoder(Projected, 11, 32)},
    ),
    "sdxl-refiner": Folder(KINDS["refiner"], lambda: {"text_encoder_2": text_encoder(Projected, 11, 32)}),
}
TRANSFORMERS: dict[str, Folder] = {"sd3-medium": Folder(KINDS["sd3"]), "flux-dev": Folder(KINDS["flux"])}
