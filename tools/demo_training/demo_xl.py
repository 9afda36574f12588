"""`demo-xl`, SDXL in miniature, trained at 128x128 and in other shapes of as many pixels."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from crdiff_export import convert
from crdiff_export.convert import ConvertRequest
from crdiff_export.models.demo import DEMO, DEMO_XL, RELATIONS, scenes
from crdiff_export.progress import Silent
from crdiff_export.sizes import Size
from demo_training import data, model, model_xl, sized, training, vae
from demo_training.convert import State
from demo_training.diffusion_xl import DenoiserXL, Period
from demo_training.model import Config
from demo_training.model_xl import SCALE, GeometryXL, PartsXL
from demo_training.training import Schedule

VAE = Schedule(steps=2800, batch=8, rate=1.5e-3, warm_up=50, decay=0.4, average=0.99, report=200)
DIFFUSION = Schedule(steps=10500, batch=32, rate=1e-3, warm_up=100, decay=0.3, average=0.998, report=500)
# What the first training lacks is shapes, which the later half of the schedule decides: the second has even times.
SECOND = Schedule(
    steps=8000, batch=32, rate=1e-3, warm_up=100, decay=1.0, average=0.998, report=500, attempt=(5000, 5000)
)
# SDXL was trained at 256, then at 512, and at last in many shapes around 1024x1024, when it was first told the size
# that a picture is shown at.
BUCKETS = tuple(map(Size.parse, (*["128x128"] * 4, "112x144", "144x112", "96x160", "160x96")))
FIRST, ALL = RELATIONS[DEMO], RELATIONS[DEMO_XL]
PERIODS = (
    Period(0, (Size(64, 64),), shift=3.0, relations=FIRST, tells_target=False),
    Period(1500, (Size(64, 64),), shift=3.0, relations=ALL, tells_target=False),
    Period(3000, (Size(128, 128),), shift=6.0, relations=ALL),
    Period(4250, (Size(128, 128),), shift=2.5, relations=ALL),
    Period(5950, (Size(128, 128),), shift=1.0, relations=ALL),
    Period(8000, BUCKETS, shift=1.5, relations=ALL),
)
PERIODS_AGAIN = (
    Period(0, BUCKETS, shift=1.0, relations=ALL),
    Period(5000, (*[Size(128, 128)] * 8, *BUCKETS), shift=1.0, relations=ALL),
)


@dataclass(frozen=True, slots=True)
class DemoXLTraining:
    """All that the weights of `demo-xl` depend on, but for the machine and its number of threads."""

    seed: int = 0
    threads: int = 2
    vae: Schedule = VAE
    diffusion: Schedule = DIFFUSION
    second: Schedule = SECOND
    periods: tuple[Period, ...] = PERIODS
    periods_again: tuple[Period, ...] = PERIODS_AGAIN
    geometry: GeometryXL = field(default_factory=lambda: GeometryXL(scenes.vocabulary()))

    name: ClassVar[str] = "demo-xl"
    metadata: ClassVar[Mapping[str, str]] = {
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.title": "crdiff demo-xl",
    }

    def configs(self) -> dict[str, Config]:
        """Every table of the pipeline's folder, by its file's name."""
        return model_xl.configs(self.geometry)

    def build(self) -> PartsXL:
        """The models with random weights."""
        parts = model_xl.build(self.geometry, self.seed)
        parts.vae.to(memory_format=torch.channels_last)  # two fifths faster on a CPU
        return parts

    def draw(self, rng: np.random.Generator, step: int) -> tuple[data.Scenes, torch.Tensor]:
        """The scenes and pictures of a step of the autoencoder's training: the native size, and half of it, in turn."""
        halved = step % 2
        some = scenes.sample(rng, scenes.split()[0], self.vae.batch * 4**halved)
        side = self.geometry.native // 2**halved
        return some, sized.draw(some, Size(side, side), self.geometry.native, rng).pictures

    def settle(self, autoencoder: AutoencoderKL) -> None:
        """Scale the latents of the trained autoencoder."""
        rng, native = training.numbers(self.seed, "settle", 0), self.geometry.native
        some = scenes.sample(rng, scenes.split()[0], 512)
        vae.settle(autoencoder, sized.draw(some, Size(native, native), native, rng).pictures, SCALE)

    def denoiser(self, parts: PartsXL, tokenizer: CLIPTokenizer) -> DenoiserXL:
        """The first training of text encoders and UNet."""
        return DenoiserXL("diffusion", parts, tokenizer, self.diffusion, self.periods, self.geometry, self.seed)

    def denoiser_again(self, file: Path, config: Path, tokenizer: CLIPTokenizer) -> DenoiserXL:
        """The second training, which begins with the weights of the first one's file."""
        parts = model_xl.opened(file, config)
        return DenoiserXL("second", parts, tokenizer, self.second, self.periods_again, self.geometry, self.seed)

    def original(self, parts: PartsXL, folder: Path) -> State:
        """Every tensor of the original file, which `crdiff convert` makes of a folder of the models in float16."""
        model.write_folder(self.configs(), self.geometry, folder)
        for name, network in parts.by_folder.items():
            copy.deepcopy(network).half().save_pretrained(folder / name)
        file = folder.with_suffix(".original.safetensors")
        convert.run(convert.prepare(ConvertRequest(str(folder), "original", file, force=True)), Silent())
        return load_file(file)
